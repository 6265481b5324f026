"""Quickly made run logs in the shape of a grid, with errors of each row and seed chosen by the test."""

from lbsgd.experiments.catalogue import DATA_SETS
from lbsgd.experiments.checkout import ROOT
from lbsgd.experiments.grid import Job
from lbsgd.experiments.launch import plan_of
from lbsgd.report.run_log import RunLog

DIGITS = DATA_SETS["digits"]


def write_log(runs, row, seed, errors, train=None, code="one code", script="one", planned=None, model="resnet18"):
    """A run of a row of digits with these validation errors, one per epoch. `train` are its training errors.

    planned: its epochs, if more than there are errors, for an unfinished run
    """
    plan = plan_of(Job(row, seed), DIGITS, ROOT)
    environment = {
        "command": ["recipes/resnet18.py", "--seed", str(seed)],
        "code": code,
        "script": script,
        "data": "data/digits_1536_ffcv",
    }
    header = {"model": model, **plan.as_dict(), "environment": environment}
    header["recipe"]["epochs"] = planned or len(errors)
    folder = Job(row, seed).folder(runs)
    with RunLog(folder, header) as log:
        for number, error in enumerate(errors):
            at = {"iteration": number * plan.iterations_per_epoch, "epoch": float(number), "lr": 0.1, "train_loss": 1.0}
            log.iteration({**at, "images_per_second": 100.0, "data_wait_pct": 1.0})
            errors_of_epoch = {"train_top1_error_pct": (train or errors)[number], "val_top1_error_pct": error}
            log.epoch({"epoch": number + 1, "train_loss": 1.0, **errors_of_epoch, "seconds": 60.0})
        if planned in (None, len(errors)):
            log.result()
    return folder


def write_rows(runs, rows, errors, epochs=6):
    """Runs of several rows. errors[row's name] has one error per seed, the same in all epochs."""
    for row in rows:
        for seed, error in enumerate(errors[row.name]):
            write_log(runs, row, seed, [error] * epochs)
