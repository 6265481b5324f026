"""Find and describe the faults of entries in COCO's annotations."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

MOST_BITS = 30  # of a run length in COCO's compressed text; pycocotools has 32 for it
FARTHEST = 10  # image sides: pycocotools counts a polygon's pixels one by one, and ends the process at 10^8


def repeated(numbers: Iterable[Any]) -> Any | None:
    """Return the most frequent id if it occurs more than once, else None."""
    [(number, times)] = Counter(numbers).most_common(1) or [(None, 0)]
    return number if times > 1 else None


def fault_of(annotation: Mapping[str, Any], height: int, width: int, categories: Mapping[int, str]) -> str:
    """Return an annotation's fault, or an empty text if it can be used."""
    category, box, area = annotation.get("category_id"), annotation.get("bbox"), annotation.get("area", 0)
    if not isinstance(category, (int, float, str)) or category not in categories:
        return f"category {category!r} is not listed"
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
        return f"its box {str(box):.80} is not four numbers"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"its iscrowd is {annotation['iscrowd']!r}, neither 0 nor 1"
    if not is_finite(area) or area < 0:
        return f"its area {area!r:.50} is no number from 0 on"
    return fault_of_outline(annotation.get("segmentation"), height, width)


def fault_of_outline(outline: Any, height: int, width: int) -> str:
    """Return the fault of a segmentation, which is a list of polygons, or run lengths (RLE) of the whole image."""
    if isinstance(outline, dict):
        return fault_of_runs(outline, height, width)
    if not isinstance(outline, list) or not outline:
        return "it has no polygon"
    side = max(height, width)
    for polygon in outline:
        if not isinstance(polygon, list):
            return f"a polygon is {polygon!r:.50} and no list: write [[x, y, x, y, x, y]]"
        if strange := [value for value in polygon if not is_finite(value)]:
            return f"a polygon has {strange[0]!r:.50} in place of a number"
        if len(polygon) < 6 or len(polygon) % 2:
            return f"a polygon of {len(polygon)} numbers, not of 3 points or more"
        least, most = min(polygon), max(polygon)
        if least < -FARTHEST * side or most > (FARTHEST + 1) * side:
            return f"a polygon reaches from {least} to {most}, more than {FARTHEST} sides outside of the image"
    return ""


def fault_of_runs(runs: Mapping[str, Any], height: int, width: int) -> str:
    size, counts = runs.get("size"), runs.get("counts")
    if size != [height, width]:
        return f"its run lengths are of {size}, the image of {[height, width]} pixels"
    if isinstance(counts, str):
        counts = run_lengths(counts)
        if counts is None:
            return "its run lengths are no text of COCO's"
    if not isinstance(counts, list):
        return "its run lengths have no counts"
    if not all(type(count) is int and count >= 0 for count in counts):
        return "its run lengths are no whole numbers from 0 on"
    if sum(counts) != height * width:
        return f"its run lengths make {sum(counts)} pixels, the image has {height * width}"
    return ""


def run_lengths(text: str) -> list[int] | None:
    """Return the run lengths in COCO's compressed text; None if the text is not of this form.

    A letter's code minus 48 has 5 bits of a number, the lowest first, and a sixth bit that says whether the number
    continues. The number's highest bit is its sign. From the fourth on, each number is relative to the run two before.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift == MOST_BITS:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits >> 4 & 1) << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
