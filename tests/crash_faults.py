"""Faults that several tests bring into a run's processes."""

import time

import lbsgd.data.fake
import lbsgd.train.agreement
import lbsgd.train.trainer


def slow_iterations():
    """So that a run lasts until it is stopped, on any machine, and the processes agree after each few of them."""
    lbsgd.train.agreement.AGREE_SECONDS = 0.1
    before_each_pass(lambda trainer: time.sleep(0.025))


def before_each_pass(act):
    """Call act(trainer) before the trainer takes the images of a pass."""
    update = lbsgd.train.trainer.Trainer.update

    def act_and_take(trainer, batches):
        while True:
            act(trainer)
            yield next(batches)

    def update_acting(trainer, batches):
        update(trainer, act_and_take(trainer, batches))

    lbsgd.train.trainer.Trainer.update = update_acting


def evaluation_never_ends():
    batches = lbsgd.data.fake.FakeEval.__iter__

    def some(self):
        yield next(batches(self))
        print("evaluating")
        time.sleep(1000)

    lbsgd.data.fake.FakeEval.__iter__ = some
