"""The page of one run, which can stay open in a browser while the run trains."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lbsgd.algorithm.schedule import learning_rate
from lbsgd.config.generate import PAPER
from lbsgd.report.curves import schedule_of
from lbsgd.report.measure import Measure
from lbsgd.report.page import Chart, Fact, Page, Section, Series
from lbsgd.report.recipe import flat, shown, that_counts
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.training_time import trained_for
from lbsgd.units import duration, size

SPREAD = "spread of batch-norm means over workers, of the standard deviation"
POINTS = 300  # of a curve over iterations
# Keys of the recipe that each data set sets for itself.
NOT_COMPARED = ("epochs", "num_images", "seed", "purpose", "paper_error_pct")


def run_page(run: LoggedRun, warnings: Sequence[str] = (), ended: str = "") -> Page:
    """Return the page of a run: its curves, its configuration with differences from the paper, and its command.

    ended: why a run without a result has stopped
    """
    header, environment = run.header, run.header.get("environment", {})
    place = Path(environment.get("data", "")).name
    return Page(
        title=f"{header['model']}, kn = {header['global_batch']:,}" + (f", {place}" if place else ""),
        status=status(run, ended),
        sections=(
            *(Section(note=f"warning: {warning}") for warning in warnings),
            Section(charts=charts_of(run)),
            *noise_sections(run),
            *skipped_sections(run),
            *memory_sections(run),
            Section("Configuration", "marked: not the paper's (Sec. 5.1)", facts=configuration(header)),
            Section("Environment", facts=facts_of(environment), command=command_of(environment)),
        ),
        finished=run.result is not None or bool(ended),
    )


def status(run: LoggedRun, ended: str = "") -> str:
    """Return how far the run is, its error so far, and the time left, or the training time once it has ended."""
    done, planned, measure = run.epochs_done, run.planned_epochs, run.measures[0]
    said = "no evaluation yet" if run.epochs else "no epoch is finished yet"
    if run.value is not None:
        said = f"{measure.name} {measure.words(run.value)}, {measure.how_of(run.epochs)}"
    time = trained_for(run)
    trained = f", trained in {time}" if time else ""
    if run.result is not None:
        return f"finished after {done:.4g} epochs{trained}: {said}"
    if ended:
        return f"ended after {done:.4g} of {planned:.4g} epochs{trained}: {said}; {ended}"
    seconds = [record["seconds"] for record in run.epochs[-5:]]
    left = f", about {duration(mean(seconds) * (planned - done))} left" if seconds and done < planned else ""
    return f"epoch {done:.4g} of {planned:.4g}{left}: {said}"


def charts_of(run: LoggedRun) -> list[Chart]:
    planned = run.planned_epochs
    losses = [series_of(run, name, key) for name, key in (("validation", "val_loss"), ("training", "train_loss"))]
    return [
        *(judged_chart(run, measure) for measure in run.headlines),
        Chart("loss", losses, xmax=planned),
        lr_chart([("learning rate", run)], planned),
    ]


def series_of(run: LoggedRun, name: str, key: str) -> Series:
    """Return a number over the epochs that have it. Some epochs may not be evaluated, and some numbers unknown."""
    curve = run.curve(key)
    return Series(name, list(curve), list(curve.values()))


def judged_chart(run: LoggedRun, measure: Measure) -> Chart:
    """Return a measure over epochs, also on the training images if the task computes it there."""
    keys = [("validation", measure.key), *([("training", measure.training)] if measure.training else [])]
    lines = [series_of(run, name, key) for name, key in keys]
    return Chart(measure.name, lines, unit=measure.unit, xmax=run.planned_epochs)


def noise_sections(run: LoggedRun) -> list[Section]:
    """Return the noise scale next to the batch in use, if the run measured it."""
    found = [record for record in run.iterations if record.get("noise_scale") is not None]
    if not found:
        return []
    epochs, batch = [record["epoch"] for record in found], run.header["global_batch"]
    scale = Series("noise scale tr Σ / |G|²", epochs, [record["noise_scale"] for record in found])
    used = Series("global batch in use", epochs, [batch] * len(epochs))
    note = "far above the noise scale, a larger batch gains little (McCandlish et al. 2018)"
    charts = [Chart("noise scale, images", [scale, used], log=True)]
    for title, key in (("|w| / |g| over the layers", "weight_to_gradient"), (SPREAD, "batch_norm_spread")):
        charts += layer_charts(title, [(record["epoch"], record.get(key)) for record in found])
    return [Section("Gradient noise", note, charts=charts)]


def layer_charts(title: str, measured: Sequence[tuple[float, dict[str, float] | None]]) -> list[Chart]:
    """Return a chart of the largest, the median and the smallest of the layers' numbers, if there are any."""
    known = [(epoch, sorted(by_layer.values())) for epoch, by_layer in measured if by_layer]
    if not known:
        return []
    epochs = [epoch for epoch, _ in known]
    picks = (("largest", -1), ("median", None), ("smallest", 0))
    lines = [Series(name, epochs, [row[len(row) // 2 if at is None else at] for _, row in known]) for name, at in picks]
    return [Chart(title, lines, log=True)]


def skipped_sections(run: LoggedRun) -> list[Section]:
    """Return the share of updates that fp16's overflow skipped, if there were any."""
    skipped = [(record["epoch"], record.get("skipped_iterations", 0)) for record in run.epochs]
    if not any(count for _, count in skipped):
        return []
    shares = [100 * count / (epoch * run.header["iterations_per_epoch"]) for epoch, count in skipped]
    line = Series("skipped so far", [epoch for epoch, _ in skipped], shares)
    note = "a few at the start are fp16's search for its loss scale; a share that keeps growing is a run that diverges"
    return [Section("Updates skipped for overflow", note, charts=[Chart("share of the iterations", [line], unit="%")])]


def memory_sections(run: LoggedRun) -> list[Section]:
    """Return the peak of a GPU's memory next to the estimate, if the run was on a GPU."""
    peaks = [record["peak_memory_bytes"] for record in run.epochs if "peak_memory_bytes" in record]
    if not peaks:
        return []
    peak, held = max(peaks), max(record.get("peak_reserved_bytes", 0) for record in run.epochs)
    facts = [Fact("peak, in tensors", size(peak)), Fact("peak, held by torch", size(held))]
    if estimate := run.header.get("memory_estimate_bytes"):
        facts.append(Fact("estimate of lbsgd plan", f"{size(estimate)}; the peak is {peak / estimate:.0%} of it"))
    return [Section("Memory of a GPU", "of rank 0", facts=facts)]


def lr_chart(runs: Sequence[tuple[str, LoggedRun]], xmax: float) -> Chart:
    """Return the learning rates of runs."""
    series = [Series(name, *lr_points(run)) for name, run in runs]
    return Chart("learning rate", series, log=True, step=True, xmax=xmax)


def lr_points(run: LoggedRun) -> tuple[list[float], list[float]]:
    """Return epochs and learning rates of some hundred finished iterations, including both sides of each jump.

    A last point marks the end of the last iteration, where the curves over epochs end. A run on ImageNet has half a
    million iterations, too many for a page that training waits for.
    """
    schedule, per_epoch = schedule_of(run), run.header["iterations_per_epoch"]
    done = max([round(run.epochs_done * per_epoch), *(record["iteration"] + 1 for record in run.iterations[-1:])])
    jumps = (schedule.warmup_iterations, *schedule.decay_iterations)
    chosen = {*range(0, done, max(1, done // POINTS)), done - 1, *(t for jump in jumps for t in (jump - 1, jump))}
    shown = sorted(t for t in chosen if 0 <= t < done)
    lrs = [learning_rate(t, schedule) for t in shown]
    return [t / per_epoch for t in (*shown, *([done] if shown else []))], lrs + lrs[-1:]


def configuration(header: dict[str, Any]) -> list[Fact]:
    """Return the numbers of the run, and the paper's if they differ."""
    paper = {} if header["recipe"].get("detection") else flat(PAPER["lbsgd"])
    if paper and header["global_batch"] <= header["recipe"]["linear_scaling"]["base_batch"]:
        paper |= {"warmup.kind": "none", "warmup.epochs": 0}  # Sec. 5.1: above 256 images only
    facts = [
        Fact("global batch", f"kn = {header['global_batch']:,} = k {header['num_workers']} x n {per_worker(header)}"),
        Fact("learning rate", f"η = {header['schedule']['reference_lr']:g}"),
        Fact("precision", str(header["precision"])),
    ]
    for key, value in that_counts(header["recipe"]).items():
        other = key in paper and key not in NOT_COMPARED and paper[key] != value
        facts.append(Fact(key, shown(value), shown(paper[key]) if other else None))
    return facts


def per_worker(header: dict[str, Any]) -> int:
    return header["recipe"]["batch_norm"]["per_worker_batch"]


def facts_of(environment: dict[str, Any]) -> list[Fact]:
    packages = environment.get("packages", {})
    facts = {key: value for key, value in environment.items() if key not in ("command", "packages")}
    facts["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return [Fact(name, str(value)) for name, value in facts.items() if value]


def command_of(environment: dict[str, Any]) -> str:
    command = environment.get("command", [])
    return shlex.join(["python", *map(str, command)]) if command else ""
