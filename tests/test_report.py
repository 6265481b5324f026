"""Tables and curves show the numbers of the logs, and nothing else, where a reader looks for them."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread
from pictures import require_whole
from rich.console import Console

from lbsgd.commands.main import main
from lbsgd.config.schema import Recipe
from lbsgd.errors import ConfigError
from lbsgd.report.curves import COLOURS, curves, figure, learning_rates
from lbsgd.report.figures import band_figure
from lbsgd.report.group_page import band_of
from lbsgd.report.groups import ended_after, group_runs
from lbsgd.report.measure import TOP1, as_data
from lbsgd.report.run_log import RunLog, read_run, require_reportable
from lbsgd.report.run_page import charts_of
from lbsgd.report.tables import error_table

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "report.py"


def write(folder, *, val, kn=128, lr=0.2, seed=0, epochs=None, world_size=1, finished=True, model="resnet50", **more):
    """Write a run with the validation errors `val` per epoch; training errors are 1 lower, lr falls 0.2 to 0.02."""
    run = {
        "model": model,
        "global_batch": kn,
        "num_workers": kn // 32,
        "iterations_per_epoch": 1,
        "precision": "fp32",
        "recipe": recipe_of(kn, epochs or len(val), seed),
        "schedule": {
            "base_lr": lr,
            "reference_lr": lr,
            "warmup_kind": "none",
            "warmup_iterations": 0,
            "decay_iterations": [3],
            "decay_factor": 0.1,
        },
        "config": {"optimizer": {"type": "SGD"}},
        "world_size": world_size,
        **more,
    }
    with RunLog(folder, run) as log:
        for t, error in enumerate(val):
            log.iteration(
                {
                    "iteration": t,
                    "epoch": float(t),
                    "lr": 0.2 if t < 3 else 0.02,
                    "train_loss": 2.3,
                    "images_per_second": 50.0 if t == 0 else 160.0 + t,
                    "data_wait_pct": 0.4,
                }
            )
            log.epoch(
                {
                    "epoch": t + 1,
                    "train_loss": 2.3,
                    "train_top1_error_pct": 9.0 if error is None else error - 1,
                    **({} if error is None else {"val_top1_error_pct": error}),
                    "seconds": 8.0,
                }
            )
        if finished:
            log.result()
    return read_run(folder)


def recipe_of(kn, epochs, seed):
    scaling, warmup = {"base_batch": kn}, {"kind": "none", "epochs": 0.0}
    recipe = Recipe.model_validate({"epochs": epochs, "num_images": 1536, "linear_scaling": scaling, "warmup": warmup})
    return {**recipe.model_dump(), "seed": seed}


def rows(runs, width=80):
    """Print the table and split each line into words: two lines of heads, a rule, then the rows from [3] on."""
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(error_table(runs, width))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    return [line.split() for line in lines if line.strip()]


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_row_holds_the_numbers_of_its_run(tmp_path):
    run = write(tmp_path / "8k", val=[90.0, 24.0, 26.0, 22.0, 25.0, 23.0], kn=8192, lr=3.2)
    above, header, _, row, _, time = rows([run])
    assert above == ["best", "training"] and header == ["run", "kn", "k", "η", "epochs", "val", "val", "train", "time"]
    # val: the median of 24 26 22 25 23; time: 6 epochs of 8 s
    assert row == ["8k", "8192", "256", "3.2", "6", "24.00", "22.00", "23.00", "0:00:48"]
    assert time == "training time: h:mm:ss, without evaluations".split()


def test_a_wide_terminal_shows_how_fast_a_run_trained_and_on_how_many_processes(tmp_path):
    run = write(tmp_path / "8k", val=[90.0, 24.0, 26.0, 22.0, 25.0, 23.0], kn=8192, world_size=16)
    above, _, _, row, *_ = rows([run], width=87)
    assert above[-2:] == ["images", "training"]
    assert row[-2:] == ["162", "0:00:48"]  # images/s: the median of 50 161 162 163 164 165
    assert rows([run], width=97)[3][-3:] == ["162", "0:00:48", "16"]
    told = "is shown from 80 columns on, the speed from 87 and the number of processes from 97"
    assert told in (ROOT / "docs/running.md").read_text()


def test_the_speed_is_that_of_whole_epochs_where_the_log_has_it(tmp_path):
    run = write(tmp_path / "8k", val=[90.0, 24.0, 26.0], kn=8192)
    for speed, record in zip((300.0, 400.0, 410.0), run.epochs, strict=True):
        record["images_per_second"] = speed  # a published log also has the slow first iteration of each epoch
    assert rows([run], width=87)[3][-2] == "400"


def test_a_run_under_way_shows_how_far_it_is(tmp_path):
    assert rows([write(tmp_path / "a", val=[50.0, 40.0], epochs=90, finished=False)])[3][4:6] == ["2/90", "45.00"]
    assert rows([write(tmp_path / "b", val=[], epochs=90, finished=False)])[3][4:] == ["0/90", "-", "-", "-", "-"]


def test_runs_of_one_recipe_are_summarised_as_mean_and_std_over_seeds(tmp_path):
    runs = [
        write(tmp_path / f"seed{seed}", val=[90.0, error, error, error], seed=seed, world_size=seed + 1)
        for seed, error in enumerate([6.0, 7.0, 9.5])
    ]
    # mean 22.5 / 3; deviations -1.5, -0.5, 2: std = sqrt((2.25 + 0.25 + 4) / 2) = 1.80. GPUs are no part of a recipe.
    assert rows(runs)[-3] == "mean of 3 ± std 128 4 0.2 4 7.50 ± 1.80".split()


@pytest.mark.parametrize(
    "other",
    [
        dict(seed=0),  # the same seed is no second sample
        dict(seed=1, kn=256),
        dict(seed=1, model="resnet101"),
        dict(seed=1, finished=False),
        dict(seed=1, val=[9.0], epochs=2),  # ended early
        dict(seed=1, data="other images"),
        dict(seed=1, val=[None, None]),  # finished without a number
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path, other):
    first = write(tmp_path / "a", val=[9.0, 8.0])
    second = write(tmp_path / "b", **{"val": [9.0, 7.0], **other})
    assert not any("mean" in row for row in rows([first, second])[:-1])


def test_means_of_several_rows_are_told_apart(tmp_path):
    places = [(name, seed) for name in ("plain", "wd[a]") for seed in (0, 1)]
    runs = [
        write(tmp_path / name / f"seed{seed}", val=[9.0], seed=seed, config={"optimizer": {"type": name}})
        for name, seed in places
    ]
    assert [row[:4] for row in rows(runs)[-4:-2]] == ["plain: mean of 2".split(), "wd[a]: mean of 2".split()]


def test_rows_come_by_network_and_batch_and_seeds_in_their_order_whatever_that_of_the_runs(tmp_path):
    made = [("resnet50", 256, 1), ("resnet50", 128, 0), ("resnet18", 512, 0), ("resnet50", 256, 0)]
    runs = [write(tmp_path / str(at), val=[9.0], model=m, kn=kn, seed=seed) for at, (m, kn, seed) in enumerate(made)]
    rows = [
        [(run.header["model"], run.header["global_batch"], run.header["recipe"]["seed"]) for run in row.runs]
        for row in group_runs(runs)
    ]
    assert rows == [made[2:3], made[1:2], [made[3], made[0]]]


def test_a_copy_of_a_seed_leaves_the_mean_of_the_others(tmp_path):
    runs = [write(tmp_path / str(place), val=[9.0, 8.0 + seed], seed=seed) for place, seed in enumerate((0, 0, 1))]
    assert rows(runs)[-3][:4] == "mean of 2 ±".split() and rows(runs)[-3][-3:] == "8.75 ± 0.35".split()


def test_seeds_without_a_number_have_no_mean_and_no_traceback(tmp_path):
    runs = [write(tmp_path / str(seed), val=[None, None], seed=seed) for seed in (0, 1)]
    first, second, *caption = rows(runs)[3:]
    assert first[5:7] == second[5:7] == ["-", "-"] and caption[0][0] == "top-1"


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path):
    runs = [write(tmp_path / kn / "seed0", val=[9.0]) for kn in ("256", "8k")]
    assert [row[0] for row in rows(runs)[3:5]] == ["256/seed0", "8k/seed0"]
    log = runs[0].path.rename(tmp_path / "baseline.jsonl")
    assert [row[0] for row in rows([read_run(log), runs[1]])[3:5]] == ["baseline", "seed0"]


def test_imagenet_rows_fit_in_80_columns(tmp_path):
    runs = [
        write(tmp_path / f"resnet50-64k-{seed}", val=[33.96, 34.0], kn=65536, lr=25.6, seed=seed) for seed in range(2)
    ]
    assert [row[0] for row in rows(runs)[3:5]] == ["resnet50-64k-0", "resnet50-64k-1"]  # in one piece


def test_a_folder_name_in_brackets_is_no_markup(tmp_path):
    assert rows([write(tmp_path / "[bold]", val=[9.0])])[3][0] == "[bold]"


# --- the picture ------------------------------------------------------------------------------------------------------


def test_curves_are_those_of_the_log(tmp_path):
    error, lr = figure(write(tmp_path, val=[80.0, 40.0, 20.0, 10.0])).axes
    drawn = [(line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in error.lines]
    assert drawn == [("--", [1, 2, 3, 4], [79, 39, 19, 9]), ("-", [1, 2, 3, 4], [80, 40, 20, 10])]
    [line] = lr.lines
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.2, 0.2, 0.02, 0.02])
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4] and line.get_drawstyle() == "steps-post"  # a decay is a drop


def test_an_epoch_that_was_not_evaluated_is_no_gap(tmp_path):
    runs = [write(tmp_path / f"{seed}", val=[80.0, None, 20.0, 10.0], seed=seed) for seed in (0, 1)]
    training, validation = figure(runs[0]).axes[0].lines
    assert list(training.get_xdata()) == [1, 2, 3, 4] and list(validation.get_xdata()) == [1, 3, 4]
    assert list(validation.get_ydata()) == [80, 20, 10]
    [chart, *_] = charts_of(runs[0])
    assert {line.name: (list(line.x), list(line.y)) for line in chart.series}["validation"] == ([1, 3, 4], [80, 20, 10])
    assert runs[0].value == 20  # the median of the numbers that exist
    runs.append(write(tmp_path / "2", val=[70.0, 50.0, None, 10.0], seed=2))
    band = band_of("rule", runs, "val_top1_error_pct")  # for the epochs in which all were evaluated
    assert list(band.x) == [1, 4] and list(band.y) == [pytest.approx(230 / 3), 10]


def test_a_run_that_ends_inside_an_epoch_has_reached_its_plan_however_it_is_rounded(tmp_path):
    """10,000 iterations of 3,062 per epoch: 3 + 814/3062 is one step of float64 below 10000/3062."""
    run = write(tmp_path, val=[80.0])
    run.header.update(iterations_per_epoch=3062, num_iterations=10_000)
    run.header["recipe"]["epochs"] = None
    for epoch, reached in ((3 + 814 / 3062, True), (10_000 / 3062, True), (9_999 / 3062, False)):
        run.epochs[-1]["epoch"] = epoch
        assert run.reached_its_plan == reached and (ended_after(run) is None) == reached
        require_reportable(run)


def test_the_learning_rate_is_drawn_up_to_the_last_iteration_that_the_log_tells_of(tmp_path):
    run = write(tmp_path, val=[80.0, 40.0], epochs=9)
    run.iterations.append({**run.iterations[-1], "iteration": 4})
    assert learning_rates(run) == pytest.approx([0.2, 0.2, 0.2, 0.02, 0.02])
    run.header["iterations_per_epoch"], run.epochs[-1]["epoch"] = 49, 27 / 49  # times 49 that is a little less than 27
    assert len(learning_rates(run)) == 27


def test_every_line_of_the_picture_is_a_curve_of_the_run(tmp_path):
    picture = figure(write(tmp_path / "a", val=[80.0, 40.0]))
    assert all(len(line.get_xdata()) for axes in picture.axes for line in axes.lines)
    assert [handle.get_color() for handle in picture.legends[0].legend_handles] == [COLOURS[0]]


def test_the_axis_reaches_as_far_as_a_recipes_own_numbers(tmp_path):
    run = write(tmp_path / "8k", val=[499.0, 470.0, 480.0])
    for unit, top in (("%", 100), ("", 1.05 * 499)):
        run.header["judged_by"] = as_data([replace(TOP1, unit=unit)])
        assert figure(run).axes[0].get_ylim() == (0, pytest.approx(top))


def test_axes_and_legend_say_what_is_drawn(tmp_path):
    picture = figure(write(tmp_path / "8k", val=[24.0, 23.74, 23.7]))
    error, lr = picture.axes
    assert (error.get_ylabel(), lr.get_ylabel(), lr.get_xlabel()) == ("top-1 error (%)", "learning rate", "epochs")
    assert error.get_shared_x_axes().joined(error, lr) and error.get_ylim() == (0, 100)
    (legend,) = picture.legends
    assert legend.get_title().get_text() == "final validation error (%)"
    assert [text.get_text() for text in legend.get_texts()] == ["8k  23.74"]
    assert error.get_title("left") == "solid: validation   dashed: training"


def test_a_folder_s_name_is_no_formula(tmp_path):
    write(tmp_path / r"a$\foo$b", val=[24.0, 23.7])
    curves(read_run(tmp_path / r"a$\foo$b"), tmp_path / "curves.png")


def test_no_label_is_cut_off_and_the_legend_hides_no_curve(tmp_path):
    picture = figure(write(tmp_path / "resnet50-65536", val=[99.9] * 90, kn=65536))
    require_whole(picture)


def test_a_run_of_one_iteration_is_a_visible_point(tmp_path):
    error, lr = figure(write(tmp_path, val=[90.0])).axes
    assert [line.get_marker() for line in (*error.lines[:2], *lr.lines)] == [".", ".", "."]


def test_marks_do_not_hide_the_dashes_of_a_long_run(tmp_path):
    error, lr = figure(write(tmp_path, val=[90.0] * 40)).axes
    assert {line.get_marker() for line in (*error.lines, *lr.lines)} == {"None"}


def test_a_run_killed_before_its_first_record_is_still_drawn(tmp_path):
    young = write(tmp_path / "young", val=[], epochs=2, finished=False)
    curves(young, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert figure(young).legends[0].get_texts()[0].get_text() == "young  -"


def test_the_picture_shows_the_run_in_its_colour(tmp_path):
    curves(write(tmp_path / "run", val=[90.0, 50.0, 20.0]), tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")[:, :, :3]
    assert pixels.shape[:2] == (900, 1500)
    red, green, blue = (int(COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5))
    assert (abs(pixels - [red, green, blue]) < 0.02).all(axis=2).sum() > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "run"]


@pytest.mark.parametrize(
    ("lrs", "numbers"),
    [
        ((0.2, 1.6), "0.2 0.5 1"),
        ((0.0003, 0.003), "0.0005 0.001 0.002"),
        ((0.25, 0.45), "0.3 0.4"),
        ((0.2, 0.2), "0.1 1"),
        ((1e-6, 3.2), "1e-06 0.0001 0.01 1"),
        ((0.001, 0.01), "0.001 0.01"),
        ((0.112, 0.155), "0.112 0.155"),  # not round, because no round one lies between them
    ],
)
def test_the_learning_rates_of_an_axis_are_few_plain_numbers_side_by_side(tmp_path, lrs, numbers):
    rows = group_runs([write(tmp_path / f"{n}", val=[9.0], kn=128 * (n + 1), lr=lr) for n, lr in enumerate(lrs)])
    several, single = band_figure("Table 1", ["small", "large"], rows), figure(rows[0].runs[0])
    for picture in (several, single):
        picture.draw_without_rendering()
        axis = picture.axes[-1].yaxis
        labels = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
        assert 2 <= len(labels) <= 4
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert [label.get_text() for label in several.axes[-1].get_yticklabels()] == numbers.split()


def test_the_axis_of_epochs_begins_with_the_training_and_counts_whole_epochs(tmp_path):
    rows = group_runs([write(tmp_path / "a", val=[90.0, 80.0, 70.0, 60.0])])
    for picture in (band_figure("four epochs", ["a"], rows), figure(rows[0].runs[0])):
        axes = picture.axes[-1]
        assert axes.get_xlim()[0] == 0 and all(tick == int(tick) for tick in axes.get_xticks())


def test_the_curves_of_a_run_take_the_width_of_the_picture(tmp_path):
    picture = figure(write(tmp_path / "a_name_of_many_letters", val=[90.0, 80.0]))
    picture.draw_without_rendering()
    assert all(axes.get_position().width > 0.85 for axes in picture.axes)


def test_more_rows_than_colours_are_all_drawn(tmp_path):
    rows = group_runs([write(tmp_path / str(kn), val=[90.0, 50.0], kn=kn) for kn in range(1, 10)])
    picture = band_figure("nine", [str(row.global_batch) for row in rows], rows)
    assert [len(axes.lines) for axes in picture.axes] == [9, 9, 9] and len(picture.legends[0].get_texts()) == 9


@pytest.mark.parametrize(
    "name, reason",
    [
        ("curves.txt", "choose .png, .svg or .pdf"),
        ("curves", "choose .png"),
        ("missing/curves.png", "cannot write .*missing/curves.png: No such file"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused(tmp_path, name, reason):
    run = write(tmp_path / "run", val=[9.0])
    with pytest.raises(ConfigError, match=reason):
        curves(run, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_leaves_the_current_folder_alone(tmp_path):
    write(tmp_path / "a", val=[9.0, 8.0])
    write(tmp_path / "b", val=[9.0, 6.0], seed=1)
    done = subprocess.run([sys.executable, TOOL, "a", "b/log.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "mean of 2 ± std" in done.stdout
    assert not list(tmp_path.glob("*.*"))  # files go to --output_dir, nothing into the current folder


@pytest.fixture
def two_of_four_are_bad(tmp_path):
    """A folder of four runs, two of them without a complete log."""
    for name in "abcd":
        write(tmp_path / "runs" / name, val=[9.0, 8.0], seed=ord(name))
    (tmp_path / "runs/b/log.jsonl").write_text("hello\n")
    (tmp_path / "runs/d/log.jsonl").write_text("")
    return tmp_path / "runs"


BAD = ("b/log.jsonl, line 1: not a run log: not JSON", "d/log.jsonl, line 1: not a run log: no complete line")


def test_every_bad_log_is_one_line_and_the_others_are_shown(two_of_four_are_bad, capsys):
    assert main(["report", str(two_of_four_are_bad), str(two_of_four_are_bad / "b"), "nowhere"]) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines() if "128" in line] == ["a", "c", "mean"]
    assert "mean of 2 ± std" in out and out.endswith("these tables lack what cannot be read: 3 errors\n")
    assert err.splitlines() == [
        *(f"error: {two_of_four_are_bad}/{bad}; mend it, or leave it out" for bad in BAD),
        "error: no run log at nowhere: give the folder of a run, which holds log.jsonl",
    ]


def test_bad_logs_are_told_where_the_others_make_no_table(two_of_four_are_bad, tmp_path, capsys):
    for name, code in (("e", "1"), ("f", "2")):
        write(tmp_path / name, val=[9.0], kn=256, seed=ord(name), environment={"code": code})
    assert main(["report", str(tmp_path)]) == 2
    *logs, last = capsys.readouterr().err.splitlines()
    assert len(logs) == 2 and "were run by different code of lbsgd" in last


def test_no_files_are_written_without_the_runs_of_bad_logs(two_of_four_are_bad, tmp_path, capsys):
    assert main(["report", str(two_of_four_are_bad), "--output_dir", str(tmp_path / "new")]) == 2
    *logs, last = capsys.readouterr().err.splitlines()
    assert len(logs) == 2 and not (tmp_path / "new").exists()
    assert last == f"error: {tmp_path}/new: nothing is written there, because these runs would be missing"


@pytest.mark.parametrize("flags", [("--output_dir", "made"), ("--table", "table1")])
def test_flags_about_runs_are_refused_where_only_a_page_is_updated(tmp_path, capsys, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("no region")
    assert main(["report", "--update", "page.md", *flags]) == 2
    assert f"{flags[0]} is about the RUNs that you name; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_update_names_all_bad_logs_of_all_files_in_one_line_and_writes_none(two_of_four_are_bad, tmp_path, capsys):
    whole = Path(__file__).parents[1] / "results/digits/runs"
    files = []
    for name, places in (("good", [whole]), ("one", [whole, "runs/b"]), ("other", ["runs", "runs/e"])):
        regions = [f"<!-- report {place} --table table1 -->\nold\n<!-- end of report -->\n" for place in places]
        files.append(tmp_path / f"{name}.md")
        files[-1].write_text("".join(regions))
    assert main(["report", *(word for file in files for word in ("--update", str(file)))]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: 3 run logs cannot be read: ")
    assert all(err.count(bad) == 1 for bad in (*BAD, f"no run log at {tmp_path}/runs/e"))
    assert all("table1 -->\nold\n" in file.read_text() for file in files)


def test_a_folder_that_cannot_be_read_is_told_because_it_may_hold_a_run(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", val=[9.0])
    write(tmp_path / "b/seed0", val=[9.0])
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: cannot read {tmp_path}/b: Permission denied; mend it, or leave it out\n"


def test_the_tool_explains_itself_with_its_command_line():
    assert TOOL.read_text().startswith('"""python tools/report.py RUN [RUN ...] [--output_dir DIR]\n')


def test_reading_logs_imports_nothing_heavy():
    code = (
        "import sys, lbsgd.report.run_log, lbsgd.train.progress, lbsgd.report.curves\n"
        "print(*sorted({'torch', 'numpy', 'matplotlib', 'deepspeed', 'ffcv'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
