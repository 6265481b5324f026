"""Comparisons of two runs, by their weights, checkpoints and logs, that the tests of crashes share."""

import socket

import torch

from lbsgd.report.run_log import read_run
from lbsgd.train import checkpoint

EVERY = ("--checkpoint_every", 7)
ITERATIONS = 40  # per epoch, of which there are two
HOST = socket.gethostname()


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def newest(folder):
    """Return tensors and state of the newest checkpoint."""
    return checkpoint.load(checkpoint.newest(folder / "checkpoints"))


def saved_iteration(folder):
    return newest(folder)[1]["counters"]["iteration"]


def assert_same_bits(tensors, others, names=None):
    assert tensors.keys() == others.keys()
    assert [name for name in names or tensors if not torch.equal(tensors[name], others[name])] == []


def assert_same_run(folder, whole):
    """Compare weights, statistics, momentum, random states, counters and log, to the last bit."""
    assert_same_state(folder, whole)
    assert_same_log(folder, whole)


def assert_same_state(folder, whole):
    assert_same_bits(weights(folder), weights(whole))
    (tensors, state), (expected, expected_state) = newest(folder), newest(whole)
    for kind in ("weights", "momentum", "random"):
        assert_same_bits(tensors[kind], expected[kind])
    for key in ("counters", "identity", "epoch_totals", "num_threads"):
        assert state[key] == expected_state[key]


def assert_same_log(folder, whole, statistics=True):
    """Compare logs: each iteration and epoch is there once, with all numbers of the other run except times."""
    keys = {
        "iterations": ("iteration", "epoch", "lr", "train_loss"),
        "epochs": ("epoch", "iteration", "train_loss", "train_top1_error_pct")
        + statistics * ("val_loss", "val_correct_top1"),
    }
    log, expected = read_run(folder), read_run(whole)
    for kind, names in keys.items():
        ours, theirs = ([[record[name] for name in names] for record in getattr(run, kind)] for run in (log, expected))
        assert ours == theirs
    assert log.result and (not statistics or log.result["val_top1_error_pct"] == expected.result["val_top1_error_pct"])


def assert_same_parameters(folder, whole):
    """Compare all except batch norm's statistics, whose last bits change with each save, because it averages them."""
    parameters = newest(whole)[0]["momentum"].keys()
    assert len(parameters) > 10
    assert_same_bits(weights(folder), weights(whole), parameters)
    assert_same_bits(newest(folder)[0]["momentum"], newest(whole)[0]["momentum"])
    assert_same_log(folder, whole, statistics=False)
