"""The tables that a page takes from a bench on a GPU."""

import json

import pytest

from lbsgd.bench.figure import Figure, Goal
from lbsgd.bench.results import Results
from lbsgd.errors import ConfigError
from lbsgd.report.bench_tables import bench_tables
from lbsgd.report.regions import update


@pytest.fixture
def folder(tmp_path):
    results = Results(tmp_path, "speed", {"device": "a GPU", "started": "2026-11-27 07:21:00 +0000"})
    part, late = results.announce("step", "Whole steps"), results.announce("late", "Not begun")
    part.figures.append(Figure("lbsgd / plain", 1.25, 1.2, 1.3, 10, goal=Goal("at least", 1.1), beside="2 and 1 ms"))
    part.state, late.state = "done", "out of time"
    results.write()
    return tmp_path


def test_a_region_of_a_page_is_a_part_s_table(folder):
    page = folder / "page.md"
    page.write_text("Before.\n\n<!-- report speed.json --table step -->\n<!-- end of report -->\n\nAfter.\n")
    assert update(page) and not update(page)
    text = page.read_text()
    assert (
        "**Whole steps** (a GPU, 2026-11-27)" in text
        and "| lbsgd / plain | 1.250 [1.200, 1.300] | at least 1.1 | reached | 10 | 2 and 1 ms |" in text
    )
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n")
    assert bench_tables(folder / "speed.json", []) == bench_tables(
        folder / "speed.json", ["step"]
    )  # parts with figures


def test_a_part_without_figures_and_a_file_of_something_else_are_refused_in_one_line(folder):
    with pytest.raises(ConfigError, match="speed.json: has no figures of late; it has step"):
        bench_tables(folder / "speed.json", ["late"])
    (folder / "other.json").write_text(json.dumps({"device": "a GPU"}))
    for name in ("other.json", "none.json"):
        with pytest.raises(ConfigError, match=f"{name}: holds no results of tools/bench_gpu.py"):
            bench_tables(folder / name, [])
