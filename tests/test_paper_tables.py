"""Rows are recognised by the plans in their logs, with the paper's numbers next to ours; files are the same bytes."""

import csv
import io
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from grid_logs import DIGITS, write_log, write_rows
from matplotlib.figure import Figure

from lbsgd.commands.report import TABLES
from lbsgd.errors import ConfigError, DataError
from lbsgd.experiments.answers import answers
from lbsgd.experiments.catalogue import STUDIES
from lbsgd.experiments.grid import Claim, Row
from lbsgd.report.families import common_lr, families_of
from lbsgd.report.group_page import curve_charts
from lbsgd.report.groups import find_runs, group_runs
from lbsgd.report.match import band, distances, matched_from, mean_curve
from lbsgd.report.paper_table import error_cell
from lbsgd.report.paper_tables import NEEDS, paper_tables, why_not
from lbsgd.report.regions import update
from lbsgd.report.write import families_at, rows_by_name, write_report

TABLE_1 = STUDIES["table1"].rows(DIGITS)
ERRORS = {
    "x1": [1.0, 1.2, 1.4],
    "x8_no_warmup": [3.0, 3.5, 2.5],
    "x8_constant_warmup": [2.0, 2.5, 3.0],
    "x8": [1.1, 1.3, 1.5],
}


@pytest.fixture(scope="module")
def table_1_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table1")
    write_rows(folder, TABLE_1, ERRORS)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are files whose bytes do not matter, because drawing takes most of a report's time."""
    monkeypatch.setattr(Figure, "savefig", lambda picture, file, **_: file.write(b"a picture"))


def ended_early(runs, row, seed, error):
    """A run of one of the six planned epochs, as with --epochs 1."""
    folder = write_log(runs, row, seed, [error], planned=6)
    with open(folder / "log.jsonl", "a") as log:
        log.write(f'{{"kind": "result", "val_top1_error_pct": {error}}}\n')
    return folder


def diverged(runs, row, seed):
    folder = write_log(runs, row, seed, [90.0], planned=6)
    (folder / "diverged.txt").write_text("error: the loss of iteration 5 is not a number\n")
    return folder


def table(runs, name):
    [family] = families_at([runs])
    return next(table for table in paper_tables(family) if table.name == name)


def test_table_1_has_the_paper_s_errors_beside_ours(table_1_runs):
    found = table(table_1_runs, "table1")
    assert [row[:7] for row in found.rows] == [
        ("baseline", "256", "0.1", "23.60 ± 0.12", "32", "0.2", "1.20 ± 0.20"),
        ("no warmup", "8,192", "3.2", "24.84 ± 0.37", "256", "1.6", "3.00 ± 0.50"),
        ("constant warmup", "8,192", "3.2", "25.88 ± 0.56", "256", "1.6", "2.50 ± 0.50"),
        ("gradual warmup", "8,192", "3.2", "23.74 ± 0.09", "256", "1.6", "1.30 ± 0.20"),
    ]
    # 0.1 ± t(0.975, 4) · √(0.04/3 + 0.04/3) = 0.1 ± 2.776 · 0.1633
    assert [row[7:9] for row in found.rows][::3] == [("3", ""), ("3", "+0.10 [-0.35, +0.55]")]
    assert "ours: resnet18 on 1,536 images of digits_1536" in found.markdown()


def test_each_large_batch_has_a_table_1_of_its_own(tmp_path):
    for row in (TABLE_1[0], TABLE_1[1], replace(TABLE_1[1], name="x16_no_warmup", factor=16)):
        write_log(tmp_path, row, 0, [1.0])
    [family] = families_at([tmp_path])
    assert [found.name for found in paper_tables(family)] == ["table1_x8", "table1_x16"]


def test_runs_that_are_judged_by_another_number_make_no_table_of_the_paper(tmp_path):
    other = {"key": "train_top1_error_pct", "name": "training error", "short": "train"}
    for row in (TABLE_1[0], TABLE_1[3]):
        edited(write_log(tmp_path, row, 0, [1.0], planned=2), lambda header: header.update(judged_by=[other]))
    [family] = families_at([tmp_path])
    assert len(family.rows) == 2 and paper_tables(family) == []


def test_rows_with_the_small_batch_alone_make_a_table(tmp_path):
    for row in STUDIES["table2b"].rows(DIGITS)[:2]:
        write_log(tmp_path, row, 0, [1.0])
    [family] = families_at([tmp_path])
    assert [found.name for found in paper_tables(family)] == ["table2b"]


def test_only_a_table_that_compares_with_the_baseline_is_said_to_lack_it(table_1_runs):
    families = families_at([table_1_runs / "x8", table_1_runs / "x8_no_warmup"])
    first, other = why_not(families, ["table1", "table3b", "table1"])
    assert "or constant warmup. No row is the baseline: none has 32 images per update" in first
    assert other == "no table3b can be made of these runs: it takes detectors with two global batches"
    [alone] = why_not(families_at([table_1_runs / "x8"]), ["table1"])
    assert alone.endswith("or constant warmup")


def test_every_table_can_be_asked_for_by_its_name():
    assert TABLES == tuple(NEEDS)


def test_ungrouped_seeds_would_be_noticed(table_1_runs):
    [family] = families_at([table_1_runs])
    assert [len(row.runs) for row in family.rows] == [3, 3, 3, 3]


@pytest.mark.parametrize("name", ["table2a", "table2b", "figure1"])
def test_every_row_of_a_study_is_a_row_of_its_table(tmp_path, name):
    rows = STUDIES[name].rows(DIGITS)
    write_rows(tmp_path, rows, {row.name: [1.0 + number, 1.5 + number] for number, row in enumerate(rows)}, epochs=1)
    found = table(tmp_path, name)
    assert len(found.rows) == len(rows)
    assert [row[6][:4] for row in found.rows] == [f"{1.25 + number:.2f}" for number in range(len(rows))]


@pytest.mark.parametrize("model", ["resnet101", "resnet14"])
def test_a_deeper_network_is_compared_with_the_paper_s_deeper_network(tmp_path, model):
    for row, error in zip(STUDIES["table2c"].rows(DIGITS), (1.0, 2.0), strict=True):
        for seed in range(2):
            write_log(tmp_path, row, seed, [error + seed / 10], model=model)
    [family] = families_at([tmp_path])
    [found] = paper_tables(family)
    assert found.name == "table2c" and found.measured == (
        f"Paper: ResNet-101 on ImageNet, ours: {model} on 1,536 images of digits_1536, 1 epochs."
    )
    assert [row[:7] for row in found.rows] == [
        ("baseline", "256", "0.1", "22.08 ± 0.06", "32", "0.2", "1.05 ± 0.07"),
        ("gradual warmup", "8,192", "3.2", "22.36 ± 0.09", "256", "1.6", "2.05 ± 0.07"),
    ]
    write_log(tmp_path, Row("x16", 16), 0, [3.0], model=model)
    [family] = families_at([tmp_path])
    assert [table.name for table in paper_tables(family)] == ["table2c_x8", "table2c_x16"]


@pytest.mark.usefixtures("undrawn")
def test_csv_holds_the_same_cells(table_1_runs, tmp_path):
    write_report(families_at([table_1_runs]), tmp_path, "digits")
    lines = list(csv.reader(io.StringIO((tmp_path / "tables.csv").read_text())))
    assert lines[0][:5] == ["table", "", "paper kn", "paper η", "paper error %"] and lines[0][5] == "ours kn"
    assert lines[1][:8] == ["table1", "baseline", "256", "0.1", "23.60 ± 0.12", "32", "0.2", "1.20 ± 0.20"]
    assert [line[0] for line in lines[1:]] == ["table1"] * 4 + ["figure1"] * 2  # with one line of heads
    assert {len(line) for line in lines} == {11}


def test_runs_of_other_code_are_refused(tmp_path):
    write_log(tmp_path, TABLE_1[0], 0, [1.0])
    write_log(tmp_path, TABLE_1[0], 1, [1.0], code="another code")
    with pytest.raises(DataError, match="were run by different code of lbsgd"):
        group_runs(find_runs([tmp_path]))


def test_a_copy_of_a_run_is_no_second_seed(tmp_path):
    for place in ("a", "b"):
        write_log(tmp_path / place, TABLE_1[0], 0, [1.0])
    assert [len(row.runs) for row in group_runs(find_runs([tmp_path]))] == [1]


def test_a_killed_copy_does_not_hide_the_run_that_was_started_again(tmp_path):
    write_log(tmp_path / "8k", TABLE_1[0], 0, [50.0], planned=2)
    write_log(tmp_path / "8k_again", TABLE_1[0], 0, [3.0, 2.0])
    [row] = group_runs(find_runs([tmp_path]))
    assert row.values == [2.5] and error_cell(row) == "2.50"


def test_what_changes_no_number_parts_no_seeds(tmp_path):
    def measure_noise(header):
        header["recipe"]["diagnostics"]["gradient_noise"] = 100
        header["recipe"]["aggregation"] = {"hierarchy": "flat", "between": "auto"}
        optimizer = header["config"]["optimizer"]
        header["config"]["optimizer"] = dict(reversed(optimizer.items()))

    edited(write_log(tmp_path, TABLE_1[0], 0, [0.0]), measure_noise)  # an error of 0 is a number, too
    write_log(tmp_path, TABLE_1[0], 1, [2.0])
    assert [row.values for row in group_runs(find_runs([tmp_path]))] == [[0.0, 2.0]]


def test_a_diverged_run_and_one_under_way_are_told(tmp_path):
    for seed, error in enumerate([1.0, 2.0]):
        write_log(tmp_path, TABLE_1[0], seed, [90.0, error])
        write_log(tmp_path, TABLE_1[3], seed, [90.0, error])
    folder = write_log(tmp_path, TABLE_1[0], 2, [90.0], planned=2)
    (folder / "diverged.txt").write_text("error: the loss of iteration 5 is not a number\n")
    write_log(tmp_path, TABLE_1[0], 3, [50.0], planned=2)
    baseline, _ = table(tmp_path, "figure1").rows
    # medians of (90, 1) and (90, 2)
    assert baseline[6:8] == ("45.75 ± 0.35, 1 diverged, 1 not finished", "4")
    write_report(families_at([tmp_path]), tmp_path / "report", "digits")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "4 of 6 runs are finished, 1 diverged" in page
    assert 'data-reload-seconds=""' in page  # nothing will write it again


@pytest.mark.parametrize("lost", [0, 3])
def test_a_row_with_a_diverged_seed_has_no_difference(tmp_path, lost):
    """The remaining seeds do not stand for all, neither in the row nor in the baseline. The claims say the same."""
    for number in (0, 3):
        for seed in range(2):
            write_log(tmp_path, TABLE_1[number], seed, [2.0 + seed] * 6)
    assert table(tmp_path, "figure1").rows[1][8].startswith("+0.00 [")
    diverged(tmp_path, TABLE_1[lost], 2)
    _, large = table(tmp_path, "figure1").rows
    assert large[8] == ""


def test_a_run_that_was_started_again_and_has_finished_did_not_diverge(tmp_path):
    (write_log(tmp_path, TABLE_1[0], 0, [2.0] * 6) / "diverged.txt").write_text("error: of the start before\n")
    [row] = group_runs(find_runs([tmp_path]))
    assert error_cell(row) == "2.00" and row.num_diverged == 0


def test_the_learning_rate_is_drawn_of_a_run_that_has_finished(tmp_path):
    diverged(tmp_path, TABLE_1[3], 0)
    write_log(tmp_path, TABLE_1[3], 1, [2.0] * 6)
    rows = group_runs(find_runs([tmp_path]))
    *_, rates = curve_charts(["x8"], rows)
    assert rates.series[0].x[-1] > 5  # of six epochs; the other seed ended in the first


def test_a_run_ended_early_is_a_row_of_its_own(tmp_path):
    ended_early(tmp_path, TABLE_1[0], 0, 1.0)
    write_log(tmp_path, TABLE_1[0], 1, [1.0] * 6)
    assert [len(row.runs) for row in group_runs(find_runs([tmp_path]))] == [1, 1]


@pytest.mark.parametrize("early", ["a", "z"])
def test_a_trial_of_an_epoch_is_no_baseline(tmp_path, early):
    """Wherever its folder is in the sort order."""
    ended_early(tmp_path / early, TABLE_1[0], 0, 90.0)
    write_rows(tmp_path / "full", TABLE_1, ERRORS)
    family, trial = families_of(group_runs(find_runs([tmp_path])))
    assert len(family.rows) == 4 and family.baseline.values == ERRORS["x1"] and len(trial.rows) == 1


def test_a_seed_that_diverges_in_a_trial_stays_in_its_row(tmp_path):
    for seed in range(3):
        ended_early(tmp_path, TABLE_1[0], seed, 50.0 + seed)
        diverged(tmp_path, TABLE_1[3], seed) if seed == 0 else ended_early(tmp_path, TABLE_1[3], seed, 60.0 + seed)
    [family] = families_at([tmp_path])
    large = rows_by_name([family])["x8"]
    assert large.values == [61.0, 62.0] and error_cell(large) == "61.50 ± 0.71, 1 diverged"
    assert family.place == "resnet18 on 1,536 images of digits_1536, 1 of 6 epochs"


def test_a_row_whose_seeds_all_diverge_in_a_trial_stays_in_its_table(tmp_path):
    for seed in range(2):
        ended_early(tmp_path, TABLE_1[0], seed, 50.0 + seed)
        diverged(tmp_path, TABLE_1[3], seed)
    [family] = families_at([tmp_path])
    baseline, large = table(tmp_path, "figure1").rows
    assert baseline[6] == "50.50 ± 0.71" and large[6:9] == ("all diverged", "2", "")
    assert family.place == "resnet18 on 1,536 images of digits_1536, 1 of 6 epochs"
    write_report([family], tmp_path / "report", "digits")
    write_log(tmp_path / "whole", TABLE_1[1], 0, [2.0] * 6)  # if a row was trained to its end, it belongs to that table
    assert [len(found.rows) for found in families_at([tmp_path])] == [2, 1]
    assert {error_cell(row) for row in families_at([tmp_path])[0].rows} == {"all diverged", "2.00"}


def test_a_seed_that_diverges_early_is_of_the_row_that_was_trained_to_its_end(tmp_path):
    ended_early(tmp_path / "trial", TABLE_1[0], 0, 90.0)
    diverged(tmp_path, TABLE_1[0], 0)
    write_log(tmp_path, TABLE_1[0], 1, [2.0] * 6)
    found = sorted(map(error_cell, group_runs(find_runs([tmp_path]))))
    assert found == ["2.00, 1 diverged", "90.00"]


def test_fake_images_are_no_imagenet(tmp_path):
    def fake(header):
        header["environment"]["data"] = "fake"
        header["recipe"]["num_images"] = 1_281_167

    edited(write_log(tmp_path, TABLE_1[0], 0, [1.0]), fake)
    [family] = families_at([tmp_path])
    assert family.place == "resnet18 on fake images, 1 epochs"


def edited(folder, edit):
    """Change the first line of a run's log."""
    first, *rest = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    header = json.loads(first)
    edit(header)
    (folder / "log.jsonl").write_text(json.dumps(header) + "\n" + "".join(rest))


@pytest.mark.parametrize(
    "edit, label",
    [
        (lambda header: header.update(precision="bf16"), "precision bf16"),
        (lambda header: header["recipe"]["warmup"].update(epochs=4.0), "warmup epochs 4.0"),
        (lambda header: header["config"]["optimizer"]["params"].update(weight_decay=0.001), "weight decay 0.001"),
        (lambda header: header["config"]["optimizer"]["params"].update(nesterov=False), "nesterov False"),
        (lambda header: header["recipe"]["warmup"].update(start_fraction=0.5), "warmup start fraction 0.5"),
        (lambda header: header["recipe"]["momentum"].update(form="lr_inside"), "momentum form lr_inside"),
        (lambda header: header["recipe"]["biases"].update(lr_factor=2.0), "biases lr factor 2.0"),
        (
            lambda header: header["recipe"]["batch_norm"].update(implementation="torch"),
            "batch norm implementation torch",
        ),
        (
            lambda header: (
                header["recipe"]["momentum"].update(form="lr_inside", correction=False),
                header["config"]["optimizer"]["params"].update(momentum=0.8),
            ),
            "momentum 0.8, momentum not corrected",
        ),
        (
            lambda header: (
                header["recipe"]["batch_norm"].update(scope="all"),
                header["recipe"]["weight_decay"].update(on_batch_norm=True),
            ),
            "batch norm all, decay on batch norm yes",
        ),
        (
            lambda header: (
                header["recipe"]["batch_norm"].update(statistics="first_worker"),
                header["recipe"]["weight_decay"].update(scaling="inverse_lr", base=1e-4),
                header["config"]["optimizer"]["params"].update(weight_decay=1e-4 / 8),  # which follows from that
            ),
            "statistics first_worker, weight decay inverse_lr",
        ),
    ],
)
def test_what_differs_is_named_and_is_not_the_paper_s_row(tmp_path, edit, label):
    write_rows(tmp_path / "z", TABLE_1, ERRORS)
    edited(write_log(tmp_path / "a", TABLE_1[3], 0, [9.0] * 6), edit)
    [family] = families_at([tmp_path])
    assert sorted(map(family.label, family.rows)) == sorted(
        ["baseline", "no warmup", "constant warmup", "gradual warmup", label]
    )
    assert family.find(8).values == ERRORS["x8"]


@pytest.mark.parametrize(
    "factors, lr", [((1, 8, 8), 0.1), ((1, 1, 8), 0.1), ((1, 1, 1), None), ((1, 1, 1, 1), 0.2)], ids=str
)
def test_the_middle_of_equally_frequent_lrs_is_the_reference_unless_all_are_candidates(factors, lr):
    given = zip((0.2, 0.05, 0.1, 0.2), factors, strict=False)
    assert common_lr([SimpleNamespace(base_lr=base_lr, factor=factor) for base_lr, factor in given]) == lr


def test_a_warmup_up_to_base_batch_is_named(tmp_path):
    write_rows(tmp_path / "z", TABLE_1, ERRORS)
    warmup = {"kind": "gradual", "epochs": 2.0, "start_fraction": 0.1}
    edited(
        write_log(tmp_path / "a", TABLE_1[0], 0, [9.0] * 6), lambda header: header["recipe"]["warmup"].update(warmup)
    )
    [family] = families_at([tmp_path])
    assert "warmup gradual, warmup start fraction 0.1" in map(family.label, family.rows)
    assert family.baseline.values == ERRORS["x1"]


OTHER_FAMILY = [
    lambda header: header.update(data="other images"),
    lambda header: header.update(model="resnet50"),
    lambda header: header["recipe"].update(num_images=1437),
    lambda header: header["recipe"].update(epochs=None, iterations=48),
    lambda header: header["recipe"].update(epochs=None, iterations=96),
    lambda header: header["recipe"]["decay"].update(factor=0.2),
    lambda header: header["recipe"]["augmentation"].update(resolution=64),
    lambda header: header["recipe"]["batch_norm"].update(per_worker_batch=16),
    lambda header: header["recipe"]["linear_scaling"].update(base_batch=64),
]
OTHER_ROW = [
    *OTHER_FAMILY,
    lambda header: header.update(global_batch=64),
    lambda header: header.update(precision="bf16"),
    lambda header: header.update(started_from="a network"),
    lambda header: header["schedule"].update(reference_lr=0.3),
    lambda header: header["recipe"]["biases"].update(lr_factor=2.0),
    lambda header: header["config"]["optimizer"]["params"].update(momentum=0.8),
]


def test_runs_that_differ_in_more_than_their_seed_are_no_seeds_of_one_row(tmp_path):
    for seed, edit in enumerate([lambda header: None, *OTHER_ROW]):
        edited(write_log(tmp_path, TABLE_1[0], seed, [1.0]), edit)
    assert [len(row.runs) for row in group_runs(find_runs([tmp_path]))] == [1] * (1 + len(OTHER_ROW))


def test_rows_that_do_not_share_network_images_and_schedule_are_not_compared(tmp_path):
    write_log(tmp_path / "longer", TABLE_1[0], 0, [1.0, 1.0])
    for seed, edit in enumerate([lambda header: None, *OTHER_FAMILY]):
        edited(write_log(tmp_path, TABLE_1[0], seed, [1.0]), edit)
    assert [len(family.rows) for family in families_at([tmp_path])] == [1] * (2 + len(OTHER_FAMILY))


def test_published_logs_in_a_grid_s_checkout_are_not_its_runs(tmp_path):
    write_log(tmp_path / "code" / "results", TABLE_1[0], 0, [9.0])
    (tmp_path / "code" / ".git").write_text("gitdir: elsewhere\n")
    write_log(tmp_path, TABLE_1[0], 0, [1.0])
    assert [run.value for run in find_runs([tmp_path])] == [1.0]
    assert [run.value for run in find_runs([tmp_path / "code"])] == [9.0]  # if it is asked for


def test_a_copy_of_other_code_is_refused(tmp_path):
    for place in ("a", "b"):
        write_log(tmp_path / place, TABLE_1[0], 0, [1.0], code=place)
    with pytest.raises(DataError, match="different code of lbsgd, and the runs of a row must not differ"):
        group_runs(find_runs([tmp_path]))


def test_an_evaluation_without_a_number_is_a_gap(tmp_path):
    write_log(tmp_path / "runs", TABLE_1[0], 0, [5.0, float("nan"), 3.0])
    write_log(tmp_path / "runs", TABLE_1[0], 1, [7.0, 6.0, 3.0])
    write_log(tmp_path / "runs", TABLE_1[3], 0, [float("nan"), 4.0, 3.0])
    families = families_at([tmp_path / "runs"])
    alone, pair = ([*mean_curve(row.runs, "val_top1_error_pct").values()] for row in reversed(families[0].rows))
    assert math.isnan(alone[0]) and alone[1:] == [4.0, 3.0] and pair == [6.0, 6.0, 3.0]
    write_report(families, tmp_path / "report", "gaps")
    assert "null" in (tmp_path / "report" / "index.html").read_text()


# --- curve match ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "curve, words",
    [
        ([50.0, 30.9, 20.9, 10.9], "from epoch 2"),  # the band is mean ± 2 std = ± 2 at epoch 2, ± 1 after it
        ([50.0, 30.0, 22.0, 10.0], "from epoch 4"),
        ([40.0, 30.0, 18.0, 10.0], "from epoch 4"),
        ([40.0, 30.0, 20.0, 12.0], "never"),
        ([40.0, 30.0, 20.0, 10.0], "from epoch 1"),
    ],
)
def test_the_epoch_from_which_training_follows_the_baseline(tmp_path, curve, words):
    for seed, by in enumerate([-1.0, 0.0, 1.0]):
        train = [40.0 + by, 30.0 + by, 20.0 + by / 2, 10.0 + by / 2]
        write_log(tmp_path, TABLE_1[0], seed, [5.0] * 4, train)
    write_log(tmp_path, TABLE_1[3], 0, [5.0] * 4, curve)
    for row in (TABLE_1[0], TABLE_1[3]):
        write_log(tmp_path, row, 5, [5.0], [90.0], planned=4)  # still running, and not compared yet
    [family] = families_at([tmp_path])
    baseline = family.baseline
    assert band(baseline.finished)[3] == (19.0, 21.0)
    assert matched_from(family.find(8), baseline).words == words


def test_the_band_is_never_narrower_than_half_a_point(tmp_path):
    for seed in range(3):
        write_log(tmp_path, TABLE_1[0], seed, [5.0], [10.0])
    [group] = group_runs(find_runs([tmp_path]))
    assert band(group.runs) == {1: (9.5, 10.5)}


def test_curves_are_compared_where_both_rows_have_finished_runs_with_the_same_epochs(tmp_path):
    for seed, epochs in enumerate((2, 1)):
        for row in (TABLE_1[0], TABLE_1[3]):
            write_log(tmp_path, row, seed, [5.0] * epochs, [10.0 + 4 * seed] * epochs, planned=3)
    [family] = families_at([tmp_path])
    assert band(family.baseline.runs) == {1: pytest.approx((12 - 4 * math.sqrt(2), 12 + 4 * math.sqrt(2)))}
    assert matched_from(family.find(8), family.baseline).words == "-"
    write_log(tmp_path, TABLE_1[0], 2, [5.0] * 3)
    log = write_log(tmp_path, TABLE_1[3], 2, [5.0] * 3) / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"epoch": 1,' not in line))  # lost, and begun again on resuming
    [family] = families_at([tmp_path])
    assert matched_from(family.find(8), family.baseline).words == "-"


def test_epochs_are_compared_with_the_same_epochs_and_a_part_of_one_has_its_own_number(tmp_path):
    for row, left_out in ((TABLE_1[0], (1, 2)), (TABLE_1[3], (3, 4))):
        log = write_log(tmp_path, row, 0, [5.0] * 6, [60.0, 50.0, 40.0, 30.0, 20.0, 10.0]) / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if not any(f'"epoch": {epoch},' in line for epoch in left_out)))
    [family] = families_at([tmp_path])
    assert matched_from(family.find(8), family.baseline).words == "-"  # as many epochs, but others
    for row in (TABLE_1[0], TABLE_1[3]):
        train = [60.0, 50.0, 40.0 if row is TABLE_1[0] else 10.0, 30.0]
        log = write_log(tmp_path / "part", row, 0, [5.0] * 4, train) / "log.jsonl"
        log.write_text(log.read_text().replace('"kind": "epoch", "epoch": 4', '"kind": "epoch", "epoch": 3.5'))
    [family] = families_at([tmp_path / "part"])
    assert matched_from(family.find(8), family.baseline).words == "from epoch 3.5"


# --- claims -----------------------------------------------------------------------------------------------------------


def test_claims_are_answered_also_where_they_fail(table_1_runs):
    rows = rows_by_name(families_at([table_1_runs]))
    found = answers(STUDIES["table1"], DIGITS, rows, num_seeds=3)
    # constant against gradual warmup: 1.2 ± t(0.975, 2.63) · √(0.25/3 + 0.04/3) = 1.2 ± 3.45 · 0.311, above 0.12
    assert [answer.holds for answer in found] == [True, True, True, True, True]
    worse = Claim("gradual warmup is worse than none", "x8", "worse", "x8_no_warmup")
    other = replace(STUDIES["table1"], claims=lambda data: (worse,))
    assert [answer.cells[1] for answer in answers(other, DIGITS, rows, num_seeds=3)] == ["no"]
    assert [answer.holds for answer in answers(STUDIES["table1"], DIGITS, rows, num_seeds=5)] == [None] * 5


def test_a_claim_about_curves_compares_how_far_they_lie_from_the_baselines_mean(tmp_path):
    first = [50.0, 50.0]  # the first third of six epochs is not counted
    curves = {
        "x1": [[9.0] * 6, [11.0] * 6],  # mean 10
        "x8": [[*first, 10, 10, 10, 11], [*first, 10, 10, 10, 8]],  # 0.25 and 0.5 points away
        "x1_half_lr": [[*first, 12, 8, 12, 8], [*first, 13, 7, 13, 7]],  # 2 and 3 points, whatever the sign
    }
    rows = [row for row in STUDIES["longer_figure5"].rows(DIGITS) if row.name in curves]
    for row in rows:
        for seed, train in enumerate(curves[row.name]):
            write_log(tmp_path, row, seed, [5.0 + seed] * 6, train)
    groups = rows_by_name(families_at([tmp_path]))
    *_, half, double = answers(STUDIES["longer_figure5"], DIGITS, groups, num_seeds=2)
    assert half.apart.value == pytest.approx(2.5 - 0.375)
    # Welch: 2.125 ± t(0.975, 1.12) · √(0.5/2 + 0.03125/2) = 2.125 ± 9.8 · 0.515, which two seeds cannot tell from 0
    assert half.holds is False and half.apart.low < -2
    assert half.cells[3] == "x1_half_lr - x8, distances of curves from x1" and double.holds is None
    one_seed = replace(groups["x1"], runs=groups["x1"].runs[:1])
    *_, half, _ = answers(STUDIES["longer_figure5"], DIGITS, {**groups, "x1": one_seed}, num_seeds=2)
    assert half.apart is None and half.holds is None  # the baseline lacks a seed
    [small] = [row for row in rows if row.name == "x1"]
    (write_log(tmp_path, small, 2, [90.0], planned=6) / "diverged.txt").write_text("error: not a number\n")
    *_, half, _ = answers(STUDIES["longer_figure5"], DIGITS, rows_by_name(families_at([tmp_path])), num_seeds=2)
    assert half.apart is None and half.holds is None  # a seed of the baseline has diverged


def test_the_distance_of_curves_counts_an_error_of_0_no_epoch_without_a_number_and_no_run_that_goes_on(tmp_path):
    nothing = float("nan")
    write_log(tmp_path, TABLE_1[0], 0, [5.0] * 3, [10.0, 10.0, nothing])
    for seed, train in enumerate([[10.0, 0.0, 5.0], [10.0, nothing, 5.0]]):
        write_log(tmp_path, TABLE_1[3], seed, [5.0] * 3, train)
    for row in (TABLE_1[0], TABLE_1[3]):
        write_log(tmp_path, row, 2, [50.0] * 2, planned=3)
    [family] = families_at([tmp_path])
    assert distances(family.find(8), family.baseline, left_out=1 / 2) == [10.0]  # of epoch 2 of the first seed


def test_the_page_tells_the_distance_of_curves_also_with_the_epochs_that_no_claim_counts(tmp_path):
    curves = {"x1": [[10.0] * 6, [10.0] * 6], "x8": [[40.0, 40, 10, 10, 11, 11], [46.0, 46, 10, 10, 12, 12]]}
    for row in STUDIES["longer_figure5"].rows(DIGITS):
        for seed, train in enumerate(curves.get(row.name, [])):
            write_log(tmp_path, row, seed, [5.0 + seed] * 6, train)
    [section] = STUDIES["longer_figure5"].sections(DIGITS, rows_by_name(families_at([tmp_path])))
    assert section.heads == ("row", "epochs after the first third", "all epochs", "seeds")
    # 0.5 and 1 points over the last four epochs; (2 · 30 + 2 · 1) / 6 and (2 · 36 + 2 · 2) / 6 over all six
    assert section.rows == [["x8", "0.75 ± 0.35", "11.50 ± 1.65", "2"]]


def test_a_diverged_seed_counts_also_where_enough_others_ended(tmp_path):
    write_rows(tmp_path, TABLE_1, ERRORS)
    (write_log(tmp_path, TABLE_1[3], 3, [90.0], planned=6) / "diverged.txt").write_text("error: not a number\n")
    claim = Claim("no worse", "x8", "no worse", "x1")
    study = replace(STUDIES["table1"], claims=lambda data: (claim,))
    [answer] = answers(study, DIGITS, rows_by_name(families_at([tmp_path])), num_seeds=3)
    assert answer.cells[1:3] == ("could not be answered", "1 of 4 seeds of x8 diverged")


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_the_same_bytes_each_time(table_1_runs, tmp_path):
    for place in ("a", "b"):
        write_report(families_at([table_1_runs]), tmp_path / place, "digits", ["table1"])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["index.html", "table1.png", "table1.svg", "tables.csv", "tables.md"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_a_bar_in_a_folder_s_name_is_no_border_of_a_table(table_1_runs, tmp_path):
    shutil.copytree(table_1_runs / "x8" / "seed0", tmp_path / "a|b" / "seed0")
    write_report(families_at([tmp_path]), tmp_path / "report", "digits")
    assert (tmp_path / "report" / "tables.md").read_text().splitlines()[2].startswith("| a\\|b | 256 |")


@pytest.mark.usefixtures("undrawn")
def test_two_reports_may_write_into_one_folder_at_once(table_1_runs, tmp_path, monkeypatch):
    def write():
        return write_report(families_at([table_1_runs]), tmp_path, "digits", ["table1"])

    replace_really, begun = os.replace, []

    def in_between(temporary, path):
        if not begun.count(path):  # the other report writes the same file, whole
            begun.append(path)
            write()
        replace_really(temporary, path)

    monkeypatch.setattr("os.replace", in_between)
    written = write()
    assert {Path(path) for path in begun} == set(written) == set(tmp_path.iterdir())


def test_a_region_of_a_file_is_written_again(table_1_runs, tmp_path):
    file = tmp_path / "README.md"
    marker = f"<!-- report {table_1_runs} --table table1 -->\n"
    file.write_text(f"before\n{marker}old numbers\n<!-- end of report -->\nafter\n")
    assert update([file]) == [file] and update([file]) == []
    text = file.read_text()
    assert text.startswith(f"before\n{marker}\n**Table 1") and text.endswith("|\n\n<!-- end of report -->\nafter\n")
    assert "old numbers" not in text and "| 24.84 ± 0.37 | 256 | 1.6 | 3.00 ± 0.50 |" in text


def test_a_linked_file_stays_a_link_and_keeps_its_mode(table_1_runs, tmp_path):
    link, file = tmp_path / "README.md", tmp_path / "file.md"
    file.write_text(f"<!-- report {table_1_runs} --table table1 -->\n<!-- end of report -->\n")
    file.chmod(0o640)
    link.symlink_to(file)
    (tmp_path / "README.md.tmp").write_text("the user's own")
    assert update([link]) and link.is_symlink() and "**Table 1" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o640 and (tmp_path / "README.md.tmp").read_text() == "the user's own"


def test_the_line_ends_of_a_file_stay(table_1_runs, tmp_path):
    file = tmp_path / "README.md"
    marker = f"<!-- report {table_1_runs} --table table1 -->"
    file.write_bytes(f"before\r\n{marker}\r\nold\r\n<!-- end of report -->\r\na lone\nline end\r\n".encode())
    assert update([file]) == [file] and update([file]) == []
    text = file.read_bytes()
    assert text.count(b"\n") == text.count(b"\r\n") + 1 and b"|\r\n\r\n<!-- end of report -->\r\na lone\nline" in text


@pytest.mark.parametrize("fence", ["```", "~~~~", "  ```"])
def test_an_example_in_a_fence_is_left_alone(table_1_runs, tmp_path, fence):
    file = tmp_path / "README.md"
    marker = f"<!-- report {table_1_runs} --table table1 -->\n"
    example = f"{fence}markdown\n<!-- report nowhere -->\nyour table\n<!-- end of report -->\n{fence}\n"
    file.write_text(f"{example}{marker}<!-- end of report -->\n{example}")
    assert update([file]) == [file]
    text = file.read_text()
    assert text.startswith(example) and text.endswith(example) and "**Table 1" in text


@pytest.mark.parametrize(
    "text, reason",
    [
        ("nothing", "0 regions begin"),
        ("<!-- report a -->\nno end", "1 regions begin and 0 are complete"),
        ("<!-- report a -->\nprose\n  <!-- report b -->\n<!-- end of report -->", "1 regions begin and 0 are complete"),
        ("<!-- report a -->\nprose\n* <!-- report b -->\n<!-- end of report -->", "1 regions begin and 0 are complete"),
        ("```\n<!-- report a -->\n<!-- end of report -->\n```\n", "0 regions begin"),
        ("<!-- report --table table1 -->\n<!-- end of report -->", "marker is wrong: .*places"),
        (
            "<!-- report a --table table9 -->\n<!-- end of report -->",
            "there is no table table9; there are table1, table2a",
        ),
        (
            "<!-- report ../Bob's runs -->\n<!-- end of report -->",
            "marker is wrong: ../Bob's runs: No closing quotation",
        ),
    ],
)
def test_a_file_without_a_whole_region_is_refused(tmp_path, text, reason):
    (tmp_path / "a.md").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        update([tmp_path / "a.md"])


def test_a_region_lacks_no_table_that_it_asks_for(table_1_runs, tmp_path):
    file = tmp_path / "a.md"
    text = f"<!-- report {table_1_runs} --table table1 --table table2b -->\nold\n<!-- end of report -->\n"
    file.write_text(text)
    with pytest.raises(
        ConfigError, match="a.md: no table2b can be made of these runs: it takes the baseline and a row"
    ):
        update([file])
    assert file.read_text() == text
    file.write_text(f"<!-- report {table_1_runs / 'x1'} -->\n<!-- end of report -->\n")
    with pytest.raises(ConfigError, match="a.md: no table of the paper can be made of .*x1. Give more rows"):
        update([file])
    file.write_text(f"<!-- report {table_1_runs / 'x8'} {table_1_runs / 'x8_no_warmup'} -->\n<!-- end of report -->\n")
    with pytest.raises(ConfigError, match="made of .*x8_no_warmup. No row is the baseline: none has 32 images per up"):
        update([file])


def test_rows_of_other_data_are_no_family(tmp_path):
    folder = write_log(tmp_path, TABLE_1[0], 0, [1.0])
    write_log(tmp_path, TABLE_1[3], 0, [1.0])
    log = folder / "log.jsonl"
    first, *rest = log.read_text().splitlines(keepends=True)
    header = json.loads(first)
    header["recipe"]["num_images"] = 50_000
    log.write_text(json.dumps(header) + "\n" + "".join(rest))
    assert len(families_of(group_runs(find_runs([tmp_path])))) == 2


def test_families_side_by_side_lose_no_row_and_no_picture(tmp_path):
    for name, images in (("r50", 1_536), ("r101", 50_000)):
        for row in (TABLE_1[0], TABLE_1[3]):
            folder = write_log(tmp_path / "runs" / name, row, 0, [1.0])
            edited(folder, lambda header, images=images: header["recipe"].update(num_images=images))
    other = write_log(tmp_path / "runs" / "alone", TABLE_1[3], 0, [2.0])
    edited(other, lambda header: header.update(model="resnet152"))
    written = write_report(families_at([tmp_path / "runs"]), tmp_path / "report", "three")
    names = [path.name for path in written if path.suffix == ".svg"]
    assert names == [
        *("figure1.svg", "error_over_batch.svg", "figure1_2.svg", "error_over_batch_2.svg"),
        "curves_3.svg",
    ]
    assert (
        written[0].read_text().count("| gradual warmup |") == 2
        and "| alone/x8 | 256 | 1.6 | 2.00" in written[0].read_text()
    )
    assert len(written) == len(set(written))
    in_csv = [list(csv.reader(io.StringIO(path.read_text()))) for path in written[1:3]]
    assert [path.name for path in written[1:3]] == ["tables.csv", "tables_2.csv"]
    assert [line[0] for line in in_csv[0]] == ["table", "figure1", "figure1", "figure1_2", "figure1_2"]
    assert [line[0] for line in in_csv[1]] == ["row", "alone/x8"]


def test_rows_of_no_table_have_a_table_of_their_own_and_curves(tmp_path):
    rows = STUDIES["baseline_lr"].rows(DIGITS)
    write_rows(tmp_path / "runs", rows, {row.name: [1.0, 2.0] for row in rows})
    written = write_report(families_at([tmp_path / "runs"]), tmp_path / "report", "lr", ["baseline_lr"])
    assert {path.name for path in written} == {"tables.md", "tables.csv", "curves.png", "curves.svg", "index.html"}
    assert "| x1_lr_0.05 | 32 | 0.05 | 1.50 ± 0.71 | 2 |" in written[0].read_text()
    assert "x1_lr_0.05,32,0.05,1.50 ± 0.71,2" in written[1].read_text()
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<td>1.50 ± 0.71</td>") == 4 and page.count('<figure class="chart"') == 3
