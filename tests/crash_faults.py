"""Faults that tests inject into a run's processes. Only this file depends on the internals of the trainer."""

import os
import time

import lbsgd.data.fake
import lbsgd.train.agreement
from lbsgd.train.reporter import Reporter
from lbsgd.train.trainer import Trainer


def agree_every(seconds):
    """Let the processes exchange stop requests this often."""
    lbsgd.train.agreement.AGREE_SECONDS = seconds


def before_each_pass(act):
    """Call act(trainer) before the trainer takes the images of each pass."""
    update = Trainer.update

    def act_and_take(trainer, batches):
        while True:
            act(trainer)
            yield next(batches)

    def update_acting(trainer, batches):
        update(trainer, act_and_take(trainer, batches))

    Trainer.update = update_acting


def after_each_agreement(act):
    """Call act(trainer) each time the processes have exchanged stop requests."""
    after_pass = Trainer.after_pass

    def agree_and_act(trainer, *arguments):
        after_pass(trainer, *arguments)
        if trainer.agreement.passes == 0:
            act(trainer)

    Trainer.after_pass = agree_and_act


def after_each_report(act):
    """Call act(trainer, iteration) after each iteration's report."""
    report = Trainer.report_iteration

    def report_and_act(trainer, iteration):
        report(trainer, iteration)
        act(trainer, iteration)

    Trainer.report_iteration = report_and_act


def hang_timeout_once_it_trains(seconds):
    """Set the guard's timeout only once training has begun, because the start may take long on a busy machine."""
    before_each_pass(lambda trainer: setattr(trainer.guard, "hang_timeout", seconds))


def is_rank(rank):
    """Return whether this process is the one with that rank."""
    return int(os.environ["RANK"]) == rank


class Lingers:
    """Slows each pass down to a second from this iteration on, so that no run ends before a test has acted on it."""

    def __init__(self, iteration, usual_seconds=0.0):
        self.iteration, self.usual_seconds = iteration, usual_seconds

    def __call__(self):
        before_each_pass(lambda trainer: time.sleep(1 if trainer.iteration >= self.iteration else self.usual_seconds))


def slow_iterations():
    """Let a run last until it is stopped, with its processes agreeing every few passes."""
    agree_every(0.1)
    Lingers(60, usual_seconds=0.025)()


def evaluation_never_ends():
    batches = lbsgd.data.fake.FakeEval.__iter__

    def some(self):
        yield next(batches(self))
        print("evaluating")
        time.sleep(1000)

    lbsgd.data.fake.FakeEval.__iter__ = some


def rank_0_writes_for_ever():
    """Let rank 0 hang while it writes the record of the first epoch, while the others begin the next one."""
    report = Reporter.report

    def never(reporter, kind, record):
        report(reporter, kind, record)
        if kind == "epoch":
            print("writing")
            time.sleep(1000)

    Reporter.report = never
    before_each_pass(lambda trainer: print("the next epoch") if trainer.epochs_done == 1 else None)
