"""Faults that several tests bring into a run's processes."""

import time

import lbsgd.data.fake
import lbsgd.train.trainer


def slow_iterations():
    """So that a run lasts until it is stopped, on any machine, and the processes agree after each few of them."""
    lbsgd.train.trainer.AGREE_SECONDS = 0.1
    before_each_pass(lambda trainer: time.sleep(0.025))


def before_each_pass(act):
    """Calls act(trainer) before the trainer waits for a pass's images."""
    wait_for = lbsgd.train.trainer.Trainer.wait_for

    def act_and_wait(trainer, batches):
        act(trainer)
        return wait_for(trainer, batches)

    lbsgd.train.trainer.Trainer.wait_for = act_and_wait


def evaluation_never_ends():
    batches = lbsgd.data.fake.FakeEval.__iter__

    def some(self):
        yield next(batches(self))
        print("evaluating")
        time.sleep(1000)

    lbsgd.data.fake.FakeEval.__iter__ = some
