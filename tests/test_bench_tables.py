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
    part.notes.append("**its loss is not a number**")
    part.state, late.state, late.why = "done", "out of time", "not begun"
    results.write()
    return tmp_path


def test_a_region_of_a_page_is_a_part_s_table(folder):
    page = folder / "page.md"
    page.write_text("Before.\n\n<!-- report speed.json --table step -->\n<!-- end of report -->\n\nAfter.\n")
    assert update([page]) and not update([page])
    text = page.read_text()
    assert (
        "**Whole steps** (a GPU, 2026-11-27)" in text
        and "| lbsgd / plain | 1.250 [1.200, 1.300] | at least 1.1 | reached | 10 | 2 and 1 ms |" in text
    )
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n")
    assert "\n\n**its loss is not a number**\n" in text


def test_what_went_wrong_with_a_part_stands_in_its_place(folder):
    [late] = bench_tables(folder / "speed.json", ["late"])
    assert late == "**Not begun** (a GPU, 2026-11-27)\n\nout of time: not begun\n"
    assert len(bench_tables(folder / "speed.json", [])) == 2


def test_a_part_that_it_lacks_and_a_file_of_something_else_are_refused_in_one_line(folder):
    with pytest.raises(ConfigError, match="speed.json: has no part norm; it has step, late"):
        bench_tables(folder / "speed.json", ["norm"])
    (folder / "other.json").write_text(json.dumps({"device": "a GPU"}))
    for name in ("other.json", "none.json"):
        with pytest.raises(ConfigError, match=f"{name}: holds no results of tools/bench_gpu.py"):
            bench_tables(folder / name, [])


@pytest.mark.parametrize("value", [..., None, 5, "", [], {"a": 1}])
def test_no_value_of_a_file_is_a_traceback(folder, value):
    whole = (folder / "speed.json").read_text()
    for path in ((), ("parts", 0), ("parts", 0, "figures", 0)):
        block = json.loads(whole)
        for key in path:
            block = block[key]
        for key in block:
            changed = json.loads(whole)
            inner = changed
            for name in path:
                inner = inner[name]
            if value is ...:
                del inner[key]
            else:
                inner[key] = value
            (folder / "changed.json").write_text(json.dumps(changed))
            try:
                bench_tables(folder / "changed.json", [])
            except ConfigError as error:
                assert "changed.json: holds no results of tools/bench_gpu.py" in str(error)
