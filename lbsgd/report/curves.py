"""Tables and curves from run logs: the paper's numbers (Sec. 5.1) and its figures, of several runs over each other."""

import argparse
import json
from itertools import cycle
from pathlib import Path
from statistics import mean, median, stdev

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lbsgd.algorithm.schedule import Schedule, learning_rate
from lbsgd.disk import replace_picture
from lbsgd.errors import ConfigError, LbsgdError, print_error
from lbsgd.report.run_log import LOG_NAME, Run, final_error, read_run

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow, too light for a thin line.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def main(arguments: list[str] | None = None) -> int:
    """The command behind tools/report.py; the exit code."""
    parser = argparse.ArgumentParser(description="Lay runs over each other: a table and their curves.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or its log.jsonl")
    parser.add_argument("--output", metavar="FILE", default="curves.png", help="the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(path) for path in options.runs]
        Console().print(table(runs))
        curves(runs, options.output)
    except LbsgdError as error:
        print_error(error)
        return error.exit_code
    print(f"curves: {options.output}")
    return 0


# --- the table --------------------------------------------------------------------------------------------------------


def table(runs: list[Run]) -> Table:
    """A row for each run and, as in the paper's tables, mean ± std of the runs that differ only in their seed."""
    rows = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption_justify="left",
        caption="\ntop-1 errors in %; val, train: median of last 5 epochs",
    )
    rows.add_column("run", overflow="fold")
    for name in ("kn", "k", "η", "epochs", "val", "best\nval", "train", "images\n/s"):
        rows.add_column(name, justify="right", no_wrap=True)
    for name, run in zip(_names(runs), runs):
        rows.add_row(escape(name), *_recipe_cells(run), *map(_percent, _errors(run)), _speed_cell(run))
    rows.add_section()
    for seeds in _seed_groups(runs):
        errors = [final_error(run.epochs) for run in seeds]
        spread = f"{mean(errors):.2f} ± {stdev(errors):.2f}"
        rows.add_row(f"mean of {len(seeds)} ± std", *_recipe_cells(seeds[0]), spread)
    return rows


def _names(runs: list[Run]) -> list[str]:
    """The runs' folders, with only as much of their paths as it takes to tell them apart."""
    paths = [run.path.resolve() for run in runs]
    places = [path.parent if path.name == LOG_NAME else path.with_suffix("") for path in paths]
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(set(places)):
            break
    return names


def _recipe_cells(run: Run) -> list[str]:
    done, planned = len(run.epochs), run.run["recipe"]["epochs"]
    return [
        str(run.run["global_batch"]),
        str(run.run["num_workers"]),
        f"{run.run['schedule']['reference_lr']:g}",
        str(done) if done == planned else f"{done}/{planned}",
    ]


def _errors(run: Run) -> tuple[float | None, float | None, float | None]:
    """Final validation error, the best of any epoch, final training error."""
    best = min((epoch["val_top1_error_pct"] for epoch in run.epochs), default=None)
    return final_error(run.epochs), best, final_error(run.epochs, "train_top1_error_pct")


def _speed_cell(run: Run) -> str:
    # The median, for the first iterations and those after an evaluation are slow.
    speeds = [record["images_per_second"] for record in run.iterations if record["images_per_second"] is not None]
    return f"{median(speeds):.0f}" if speeds else "-"


def _seed_groups(runs: list[Run]) -> list[list[Run]]:
    """The complete runs of each recipe that was run with several seeds, each once."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.result and run.epochs:
            groups.setdefault(_all_but_seed(run), []).append(run)
    return [group for group in groups.values() if len({run.run["recipe"]["seed"] for run in group}) == len(group) > 1]


def _all_but_seed(run: Run) -> str:
    """What the runs of one row share. How their work was divided among processes is not part of it."""
    numbers = {key: run.run[key] for key in ("model", "global_batch", "precision", "schedule")}
    recipe = {**run.run["recipe"], "seed": None}
    return json.dumps([numbers, recipe, run.run["config"]["optimizer"], len(run.epochs)], sort_keys=True)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# --- the picture ------------------------------------------------------------------------------------------------------


def curves(runs: list[Run], path: str | Path) -> None:
    """Draw the runs into a file, whole or not at all; ConfigError when it cannot be written."""
    picture = figure(runs)
    try:
        replace_picture(Path(path), picture)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def figure(runs: list[Run]):
    """Matplotlib figure: top-1 error over epochs, training dashed and validation solid, and the learning rate below."""
    from matplotlib.figure import Figure  # Half a second: only when something is drawn.

    picture = Figure(figsize=(10, 6), layout="constrained")
    error, lr = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, run, colour in zip(_names(runs), runs, cycle(COLOURS)):
        _draw(run, name, colour, error, lr)
    error.set(ylabel="top-1 error (%)", ylim=(0, 100))
    lr.set(xlabel="epochs", ylabel="learning rate")
    lr.set_xlim(left=0)
    if any(run.iterations for run in runs):  # matplotlib refuses a logarithmic axis of nothing
        lr.set_yscale("log")
        lr.yaxis.set_major_formatter("{x:g}")
    for axes in (error, lr):
        axes.grid(alpha=0.3)
    _legend(picture, error)
    return picture


def _draw(run: Run, name: str, colour: str, error, lr) -> None:
    def line(axes, records, key, style, **look):
        # A few points are marked, for one alone makes no line; many would hide the dashes.
        marker = "." if len(records) < 30 else ""
        axes.plot(
            [record["epoch"] for record in records],
            [record[key] for record in records],
            marker + style,
            color=colour,
            **look,
        )

    final = _percent(final_error(run.epochs))
    line(error, run.epochs, "train_top1_error_pct", "--", linewidth=1, markersize=3)
    line(error, run.epochs, "val_top1_error_pct", "-", linewidth=2, label=f"{name}  {final}")
    line(lr, _learning_rates(run), "lr", "-")


def _learning_rates(run: Run) -> list[dict]:
    """Of every iteration up to the last one logged: the log holds every tenth or so, which would draw steps as slopes."""
    settings = run.run["schedule"]
    schedule = Schedule(**{**settings, "decay_iterations": tuple(settings["decay_iterations"])})
    per_epoch = run.run["iterations_per_epoch"]
    done = max([record["iteration"] + 1 for record in run.iterations] + [len(run.epochs) * per_epoch], default=0)
    return [{"epoch": t / per_epoch, "lr": learning_rate(t, schedule)} for t in range(done)]


def _legend(picture, error) -> None:
    """Beside the axes, where it hides no curve. A colour is a run; the dashes are explained once, in grey."""
    runs, _ = error.get_legend_handles_labels()
    validation = error.plot([], [], color="grey", linewidth=2, label="validation")
    training = error.plot([], [], "--", color="grey", linewidth=1, label="training")
    picture.legend(handles=runs + validation + training, title="final validation error (%)", loc="outside right upper")
