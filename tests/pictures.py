"""What must hold for every picture."""


def require_whole(picture):
    """Assert that no part of a Matplotlib figure is cut off, and that its legend hides no curve."""
    picture.draw_without_rendering()
    around, paper = picture.get_tightbbox(), picture.bbox_inches
    assert 0 <= around.x0 and 0 <= around.y0 and around.x1 <= paper.x1 and around.y1 <= paper.y1
    legend = picture.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in picture.axes)
