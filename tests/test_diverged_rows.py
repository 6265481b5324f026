"""Rows with diverged seeds in pictures and pages: the remaining seeds never stand for the whole row."""

import math
import shutil

import pytest
from grid_logs import DIGITS, write_log
from test_page import chromium
from test_paper_tables import diverged

from lbsgd.experiments.catalogue import STUDIES
from lbsgd.experiments.checkout import ROOT
from lbsgd.report.figures import band_figure, batch_figure
from lbsgd.report.group_page import batch_chart, curve_charts, group_page
from lbsgd.report.match import matched_from
from lbsgd.report.paper_tables import paper_tables
from lbsgd.report.write import families_at, rows_by_name, write_report

LOST = {"x1": 0, "x2": 0, "x4": 1, "x8": 2, "x16": 3}  # of three seeds


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Figure 1 with rows that have lost seeds, and its family."""
    folder = tmp_path_factory.mktemp("figure1")
    for row in STUDIES["figure1"].rows(DIGITS):
        for seed in range(3 if row.name in LOST else 0):
            if seed < LOST[row.name]:
                diverged(folder, row, seed)
            else:
                write_log(folder, row, seed, [10.0 + seed] * 6)
    [family] = families_at([folder])
    [found] = [table for table in paper_tables(family) if table.name == "figure1"]
    return found, family


def test_the_legend_of_the_curves_has_the_words_of_the_table(table):
    found, _ = table
    picture = band_figure("Figure 1", found.curve_names, found.groups)
    legend = [text.get_text() for text in picture.legends[0].get_texts()]
    assert legend == [
        "baseline, kn 32: 11.00 ± 1.00 %",
        "gradual warmup, kn 64: 11.00 ± 1.00 %",
        "gradual warmup, kn 128: 11.50 ± 0.71 %, 1 diverged",
        "gradual warmup, kn 256: 12.00 %, 2 diverged",
        "gradual warmup, kn 512: all diverged",
    ]
    names = [series.name for series in curve_charts(found.curve_names, found.groups)[0].series]
    assert names[2:] == [
        "gradual warmup, kn 128, 1 diverged",
        "gradual warmup, kn 256, 2 diverged",
        "gradual warmup, kn 512, all diverged",
    ]


def test_the_picture_over_the_batch_marks_what_has_diverged(table):
    found, family = table
    picture = batch_figure("Figure 1", family, found.groups)
    [axes] = picture.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "64", "128", "256", "512"]
    whole, partly = axes.containers
    assert list(whole[0].get_xdata()) == [32, 64] and list(partly[0].get_xdata()) == [128, 256]
    assert partly[0].get_markerfacecolor() == "white" and partly[0].get_linestyle() == "None"
    one_seed = partly[2][0].get_segments()[1]  # no deviation, so no bar
    assert all(math.isnan(y) for _, y in one_seed)
    [cross] = [line for line in axes.lines if line.get_label() == "all seeds diverged"]
    assert list(cross.get_xdata()) == [512]
    legend = {text.get_text() for text in picture.legends[0].get_texts()}
    assert legend == {"mean ± 2 std over seeds", "without seeds that diverged", "baseline", "all seeds diverged"}


def test_the_chart_over_the_batch_marks_what_has_diverged(table):
    found, _ = table
    whole, partly, lost = batch_chart(found.groups).series
    assert whole.x == [32, 64] and not whole.mark
    assert (partly.x, partly.mark) == ([128, 256], "hollow") and partly.low[1] is None is partly.high[1]
    assert (lost.x, lost.y, lost.mark) == ([512], [None], "cross")


def test_the_page_draws_the_marks_and_says_what_its_legend_is_of(table, tmp_path):
    _, family = table
    dom = chromium(group_page("digits", [family], ["figure1"]).write(tmp_path), "--dump-dom")
    chart = dom[dom.index("<figure") : dom.index("</figure>")]
    assert [f">{kn}<" in chart for kn in (32, 64, 128, 256, 512)] == [True] * 5
    assert "<li>images per update 256:</li>" in chart  # the last batch with a number
    assert "linear rule, gradual warmup <b></b>" in chart  # its rows have other batches
    assert "without seeds that diverged <b>12 %</b>" in chart  # one seed: no deviation
    assert "all seeds diverged <b></b>" in chart


@pytest.mark.filterwarnings("error")
def test_runs_that_all_go_on_have_curves_and_no_empty_picture_over_the_batch(tmp_path):
    for row in STUDIES["figure1"].rows(DIGITS)[:2]:
        write_log(tmp_path / "runs", row, 0, [50.0, 40.0], planned=6)
    written = {file.name for file in write_report(families_at([tmp_path / "runs"]), tmp_path / "report", "digits")}
    assert "figure1.png" in written and "error_over_batch.png" not in written


def test_whether_curves_match_is_not_known_where_a_seed_diverged(table):
    _, family = table
    words = [matched_from(row, family.baseline).words for row in family.rows]
    assert words == ["from epoch 1", "from epoch 1", "-", "-", "-"]
    assert matched_from(family.baseline, family.rows[2]).words == "-"


def test_a_simulated_row_whose_seeds_all_diverged_stays_on_its_page(tmp_path):
    study = STUDIES["async"]
    for row in study.rows(DIGITS):
        shutil.copytree(ROOT / "results/digits/async/runs" / row.name, tmp_path / row.name)
    for log in tmp_path.glob("*async/*/log.jsonl"):
        log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if '"result"' not in line))
        (log.parent / "diverged.txt").write_text("error: not a number\n")
    [section] = study.sections(DIGITS, rows_by_name(families_at([tmp_path])))
    assert ["asynchronous", "all diverged", "5", "-", "-"] in section.rows
    assert "asynchronous, all diverged" in [series.name for series in section.charts[1].series]
