"""A report says which run is which: in headings, rows and pictures, in whatever the runs differ."""

import itertools
import re

import pytest
from grid_logs import DIGITS, write_log, write_rows
from pictures import require_whole
from test_paper_tables import edited
from test_report import write

from lbsgd.commands.main import main
from lbsgd.experiments.catalogue import STUDIES
from lbsgd.report.curves import curves, figure
from lbsgd.report.figures import band_figure, batch_figure
from lbsgd.report.groups import find_runs, group_runs
from lbsgd.report.names import row_names
from lbsgd.report.paper_tables import paper_tables
from lbsgd.report.run_log import read_run
from lbsgd.report.run_page import run_page
from lbsgd.report.write import families_at, rows_by_name, write_report

SMALL, LARGE = STUDIES["table1"].rows(DIGITS)[::3]
PLACE = "resnet18 on 1,536 images of digits_1536, 3 epochs"


def run(folder, change=lambda header: None, row=SMALL):
    write_log(folder.parent / "grid", row, 0, [50.0, 40.0, 30.0]).rename(folder)
    (folder.parent / "grid" / row.name).rmdir()
    edited(folder, change)


@pytest.fixture
def three(tmp_path):
    """A run, one with another weight decay, and one with other images, which cannot be compared with the others."""
    run(tmp_path / "plain")
    run(tmp_path / "wd", lambda header: header["config"]["optimizer"]["params"].update(weight_decay=0.001))
    run(tmp_path / "flip", lambda header: header["recipe"]["augmentation"].update(flip=True))
    return tmp_path


def test_headings_name_what_sets_families_apart_and_rows_their_folders(three):
    page = write_report(families_at([three]), three / "report", "three")[-1].read_text()
    headings = re.findall(r"<h2>(resnet.*)</h2>", page)
    assert headings == [f"{PLACE}, augmentation.flip false", f"{PLACE}, augmentation.flip true"]
    assert re.findall(r"<tr><td[^>]*>([^<]*)</td>", page) == [
        "plain, baseline",
        "wd, weight decay 0.001",
        "flip, baseline",
    ]
    assert '"name":"wd, weight decay 0.001, kn 32"' in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header["recipe"]["decay"].update(epochs=[2.0]), ("epochs [10.0, 20.0, 27.0]", "epochs [2.0]")),
        (lambda header: header["recipe"]["batch_norm"].update(per_worker_batch=16), ("n 32", "n 16")),
        (lambda header: header.update(data="abcdef0123456789"), ("fingerprint unknown", "fingerprint abcdef01")),
    ],
)
def test_whatever_makes_a_family_is_in_its_heading(tmp_path, change, words):
    run(tmp_path / "plain")
    run(tmp_path / "other", change)
    places = [family.place for family in families_at([tmp_path])]
    assert sorted(places) != sorted([PLACE] * 2) and all(place.startswith(PLACE) for place in places)
    assert all(any(word in place for place in places) for word in words)


def test_headings_that_differ_anyway_stay_short(tmp_path):
    run(tmp_path / "plain")
    run(
        tmp_path / "other",
        lambda header: header.update(model="resnet50") or header["recipe"]["decay"].update(factor=0.5),
    )
    assert {family.place for family in families_at([tmp_path])} == {PLACE, PLACE.replace("18", "50")}


def test_rows_of_equal_folders_are_told_apart(tmp_path):
    for place, row in (("a", SMALL), ("b", LARGE)):
        (tmp_path / place).mkdir()
        run(tmp_path / place / "runs", row=row)
    [family] = families_at([tmp_path])
    assert row_names(family.rows) == ["a/runs", "b/runs"] == list(family.names)


def test_rows_that_share_a_folder_are_told_apart_by_their_runs(tmp_path):
    for seed, lr in enumerate((0.1, 0.2)):
        change = {"seed": seed, "linear_scaling": {"rule": "linear", "base_lr": lr, "base_batch": 256}}
        run(tmp_path / f"x1/seed{seed}", lambda header: header["recipe"].update(change))  # noqa: B023
    rows = group_runs(find_runs([tmp_path]))
    assert sorted(row_names(rows)) == ["seed0", "seed1"]


def test_a_row_of_several_folders_is_not_named_as_if_it_were_one(tmp_path):
    for seed in range(3):
        run(tmp_path / f"run{seed}", lambda header: header["recipe"].update(seed=seed))  # noqa: B023
    for seed, name in enumerate(("c", "d")):
        run(tmp_path / name, lambda header: header["recipe"].update(seed=seed), row=LARGE)  # noqa: B023
        (tmp_path / name / "log.jsonl").rename(tmp_path / f"{name}.jsonl")
    [family] = families_at([tmp_path, tmp_path / "c.jsonl", tmp_path / "d.jsonl"])
    assert list(family.names) == ["run0 and 2 more", "c and 1 more"]


def test_a_folder_that_begins_with_an_underscore_has_its_name_in_the_legend(tmp_path):
    run(tmp_path / "_a")
    [family] = families_at([tmp_path])
    for picture, label in (
        (band_figure(family.place, family.curve_names(), family.rows), "_a, baseline, kn 32: 40.00 %"),
        (figure(family.rows[0].runs[0]), "_a  40.00"),
    ):
        assert [text.get_text() for text in picture.legends[0].get_texts()] == [label]


@pytest.mark.filterwarnings("error")
def test_a_folder_may_have_any_name(tmp_path):
    """Line ends, a terminal's escapes, bytes that are not UTF-8, and letters that the pictures' font lacks."""
    names = ["new\nline", "\x1b[31mred", "half\udcff", "\u65e5\u3000\u672c"]  # the last with a wide space
    for number, name in enumerate(names):
        decay = 0.001 * (number + 1)
        run(tmp_path / name, lambda header: header["config"]["optimizer"]["params"].update(weight_decay=decay))  # noqa: B023
    out = tmp_path / "report"
    assert main(["report", *(str(tmp_path / name) for name in names), "--output_dir", str(out)]) == 0
    rows = [line.split(" | ")[0] for line in (out / "tables.md").read_text().splitlines()[2:]]
    assert rows == ["| new?line", "| ?[31mred", "| half?", "| \u65e5\u3000\u672c"]
    one = read_run(tmp_path / names[2])
    one.header["environment"]["data"] = "data/half\udcff"
    assert "data/half?" in run_page(one).write(out).read_text()
    curves(one, out / "curves.png")


def test_pictures_have_the_heading_as_their_title(three):
    family, _ = families_at([three])
    picture = band_figure(family.place, family.curve_names(), family.rows)
    [legend] = picture.legends
    assert legend.get_title().get_text().startswith(f"{PLACE}, augmentation.flip false\nmean, band")
    assert legend.get_texts()[1].get_text() == "wd, weight decay 0.001, kn 32: 40.00 %"
    svg = write_report([family], three / "report", "three")[-2].read_text()
    assert "augmentation.flip false" in svg


def test_a_title_is_whole_and_hides_nothing(tmp_path):
    for row in (SMALL, LARGE):
        write_log(tmp_path, row, 0, [50.0, 40.0])
    [family] = families_at([tmp_path])
    [found] = paper_tables(family)
    long = f"{found.title}\n{'a setting with its value, ' * 8}and a folder $\\foo$"  # which is no formula
    names = [[f"{folder}, {name}" for name in found.curve_names] for folder in ("folder" * 20, "MOMENTUM_WARMUP_WD")]
    bands = [band_figure(long, each, found.groups) for each in names]
    for picture in (*bands, batch_figure(long, family, found.groups)):
        require_whole(picture)


def test_many_rows_leave_room_for_their_curves(tmp_path):
    for number in range(20):
        run(
            tmp_path / f"my_experiment_number_{number}_with_a_name_of_many_letters_that_takes_two_lines",
            lambda header: header["config"]["optimizer"]["params"].update(weight_decay=0.001 * (number + 1)),  # noqa: B023
        )
    [family] = families_at([tmp_path])
    picture = band_figure(family.place, family.curve_names(), family.rows)
    require_whole(picture)
    heights = [axes.get_window_extent().height / picture.dpi for axes in picture.axes]
    assert min(heights[:2]) > 2 and heights[2] > 0.7
    labels = [axes.yaxis.label.get_window_extent() for axes in picture.axes]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))


# --- candidates for the learning rate ---------------------------------------------------------------------------------


def test_candidates_for_the_lr_are_named_by_it_and_none_is_the_baseline(tmp_path):
    rows = STUDIES["baseline_lr"].rows(DIGITS)
    write_rows(tmp_path / "runs", rows, {row.name: [1.0, 2.0] for row in rows})
    [family] = families_at([tmp_path / "runs"])
    assert list(map(family.label, family.rows)) == ["lr 0.025", "lr 0.05", "lr 0.1", "lr 0.2"]
    assert family.baseline is None and paper_tables(family) == []
    page = write_report([family], tmp_path / "report", "lr")[-1].read_text()
    assert "x1_lr_0.1, lr 0.1" in page and not re.search(
        "baseline|the lr|difference|curves match", page.split("<main>")[1]
    )


def test_learning_rates_beside_a_large_batch_or_a_more_frequent_one_have_a_reference(tmp_path):
    rows = STUDIES["table2a"].rows(DIGITS)
    names = [
        row for row in rows if row.name in ("x1_half_lr", "x1", "x1_double_lr", "x8_half_lr", "x8", "x8_double_lr")
    ]
    write_rows(tmp_path / "six", names, {row.name: [1.0] for row in names}, epochs=1)
    [family] = families_at([tmp_path / "six"])
    labels = ["half the lr", "baseline", "twice the lr", "half the lr", "gradual warmup", "twice the lr"]
    assert sorted(map(family.label, family.rows)) == sorted(labels)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([1.3, 0.8, 0.8, 0.8], "is 0.2: the largest whose error is within the margin of ±1 of the best."),
        ([0.8, 1.3, 1.7, 1.9], "is 0.1: the largest whose error is within the margin of ±1 of the best. The other"),
    ],
)
def test_the_page_of_the_choice_says_what_these_runs_choose(tmp_path, errors, said):
    study = STUDIES["baseline_lr"]
    rows = study.rows(DIGITS)
    write_rows(tmp_path, rows, {row.name: [error] * 2 for row, error in zip(rows, errors, strict=True)})
    [section] = study.sections(DIGITS, rows_by_name(families_at([tmp_path])))
    assert said in section.note and ("The other experiments have 0.2." in section.note) == ("is 0.1" in section.note)


def test_a_choice_without_a_result_is_none():
    assert STUDIES["baseline_lr"].sections(DIGITS, {}) == []


# --- the table that was asked for -------------------------------------------------------------------------------------


def test_a_table_that_the_runs_do_not_make_is_told_after_the_files_are_written(tmp_path, capsys):
    write(tmp_path / "a", val=[9.0, 8.0])
    words = ["report", str(tmp_path / "a"), "--table", "table1", "--table", "table3a"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert "top-1 errors" in out and (tmp_path / "out" / "index.html").exists()
    assert err.splitlines() == [
        "error: no table1 can be made of these runs: it takes the baseline and a row with no warmup or constant warmup",
        "error: no table3a can be made of these runs: it takes detectors with two backbones",
    ]
