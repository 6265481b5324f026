"""Save a run's whole state in checkpoints, which a thread writes while training goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from lbsgd.algorithm.batch_norm_statistics import agree_statistics
from lbsgd.config.keypath import get
from lbsgd.errors import DivergedError
from lbsgd.processes.ending import from_rank_0
from lbsgd.report.lines import fact
from lbsgd.train import checkpoint
from lbsgd.train.aggregation.resume import saved_choice, say_other_sums, tell_of_another_order
from lbsgd.train.engine_state import EngineState, gather_state, restore_state
from lbsgd.train.random_states import (
    gather_random_states,
    random_states,
    restore_random_states,
    seed_random_numbers,
)
from lbsgd.train.run import Every


class Reached(NamedTuple):
    """How far an epoch had got: its totals over all processes, and the seconds it took."""

    totals: torch.Tensor
    epoch_seconds: float


class BeforeUpdate(NamedTuple):
    """The state before an iteration, for a checkpoint if the iteration is given up halfway."""

    sums: torch.Tensor
    random: dict[str, torch.Tensor]


class Saver:
    """The checkpoints of one run. Every process has a saver, and rank 0's writes.

    identity     what a resumed run must have in common with them
    described    more plain data for state.json
    every        how often to save in addition to the end of each epoch
    say          prints a line, on rank 0
    """

    def __init__(
        self,
        engine,
        folder: Path,
        identity: dict[str, Any],
        described: dict[str, Any],
        every: Every | None = None,
        say: Callable[[str], None] = print,
    ):
        self.engine, self.folder, self.identity, self.described = engine, folder, identity, described
        self.every, self.say = every or Every(), say
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lbsgd checkpoint")
        self.writing: Future | None = None
        self.gone_on: checkpoint.GoneOn | None = None
        self.newest: Path | None = None  # on rank 0: the checkpoint that this run wrote last or resumed from
        self.saved_iteration, self.saved_time = engine.global_steps, time.monotonic()

    def due_by_iterations(self) -> bool:
        return (
            self.every.iterations is not None
            and self.engine.global_steps - self.saved_iteration >= self.every.iterations
        )

    def due_by_time(self) -> bool:
        """Decide by this process's clock. The processes must agree before they act on it."""
        return self.every.minutes is not None and time.monotonic() - self.saved_time >= 60 * self.every.minutes

    def save(self, reached: Reached, random: dict[str, torch.Tensor] | None = None) -> None:
        """Copy the state and let a thread of rank 0 write it. All processes must call this.

        random: this process's random states, by default the present ones.
        Raises DivergedError if weights are not numbers, because such a checkpoint must not replace a good one.
        """
        agree_statistics(self.engine.module)
        self.require_finite_weights()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        state = gather_state(self.engine, keep=rank == 0)
        states = gather_random_states(random or random_states(rank), self.engine.device)
        self.saved_iteration, self.saved_time = self.engine.global_steps, time.monotonic()
        if rank > 0:
            return
        tensors = {
            "weights": state.weights,
            "momentum": state.momentum,
            "random": states,
        }
        described = {
            "counters": state.counters,
            "identity": self.identity,
            "epoch_totals": reached.totals.tolist(),
            "epoch_seconds": reached.epoch_seconds,
            "world_size": world_size,
            "num_threads": torch.get_num_threads(),
            "aggregation": saved_choice(self.engine),
            **self.described,
        }
        self.wait()  # one at a time, so that a slow disk holds up training instead of filling memory
        self.writing = self.thread.submit(self.write, self.engine.global_steps, tensors, described)

    def write(self, iteration: int, tensors: dict, described: dict[str, Any]) -> bool:
        """Write a checkpoint. If the disk fails, print a line and return False."""
        try:
            self.newest = checkpoint.save(self.folder, iteration, tensors, described, self.gone_on)
        except OSError as error:
            self.say(
                f"warning: the checkpoint of iteration {iteration} could not be written ({error}); the one before it "
                "stands, training goes on, and the next one is tried"
            )
            return False
        return True

    def wait(self) -> bool:
        """Wait until what was saved is on the disk. Return False if that failed, which has been printed."""
        return self.writing.result() if self.writing else True

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()

    def require_finite_weights(self) -> None:
        """Raise DivergedError on all processes if a weight is not a number on one of them."""
        if broken := self.broken_weights():
            self.stop(f"after iteration {self.engine.global_steps - 1} the weights {broken} are not numbers")

    def broken_weights(self) -> str | None:
        """Return weights that are not numbers on any process, or None. All processes must call this."""
        state = self.engine.module.state_dict().items()
        named = [(name, tensor) for name, tensor in state if tensor.is_floating_point() or tensor.is_complex()]
        finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)  # a broken GPU may be the only one with such weights
        return None if finite.all() else named[int(finite.argmin())][0]  # the only wait for the device

    def stop(self, reason: str) -> NoReturn:
        """Raise DivergedError with the reason and the newest checkpoint. All processes must call this."""
        kept = from_rank_0(self.newest_written)  # rank 0 alone has the folder, and may still be writing
        raise DivergedError(
            f"{reason}; "
            + (f"the newest checkpoint is {kept}" if kept else "no checkpoint was written yet")
            + "; look at the learning rate and the data"
        )

    def newest_written(self) -> Path | None:
        """Return, on rank 0, the checkpoint that this run wrote last or resumed from, None without any."""
        self.wait()
        return self.newest

    def restore(self, to_train: bool = True) -> Reached:
        """Put the newest whole checkpoint into the engine, to train on or to evaluate. All processes must call this.

        Rank 0 reads it and sends it to the others. World size, micro batch and passes may differ from those of the run
        that wrote it.
        Raises CheckpointError if the checkpoint is of another recipe, network or data, or if none is whole.
        """
        tensors, found, self.gone_on = from_rank_0(lambda: checkpoint.load_newest(self.folder, self.identity, self.say))
        self.newest = self.gone_on.path
        restore_state(self.engine, EngineState(tensors["weights"], tensors["momentum"], found["counters"]))
        if to_train:
            self.restore_bits(tensors["random"], found)
        self.saved_iteration = self.engine.global_steps
        return Reached(torch.tensor(found["epoch_totals"], dtype=torch.float64), found["epoch_seconds"])

    def restore_bits(self, random: dict[str, torch.Tensor], found: dict[str, Any]) -> None:
        """At the checkpoint's world size, restore random states and number of threads, so that every bit is the same.

        At another one, each process draws random numbers anew from (seed, rank, iteration). Say what changes the last
        bits, and if the recipe's script is another one than before.
        """
        if found.get("script") not in (None, self.described.get("script")):
            self.say_on_rank_0(
                "warning: the recipe's script has changed since the checkpoint; if it now trains something else, begin "
                "a new run in another --output_dir"
            )
        worlds = (found["world_size"], dist.get_world_size())
        tell_of_another_order(self.engine, found.get("aggregation"), worlds, self.say_on_rank_0)
        if worlds[0] == worlds[1]:
            restore_random_states(random, dist.get_rank())
            self.restore_threads(found["num_threads"])
            before, now = (get(state, "plan.config", {}) for state in (found, self.described))
            say_other_sums(self.engine, before, now, self.say_on_rank_0)
        else:
            seed = get(self.described, "plan.recipe.seed", 0)
            seed_random_numbers(seed, dist.get_rank(), self.engine.global_steps)

    def restore_threads(self, saved: int) -> None:
        """Use the checkpoint's number of threads, because with another number sums on a CPU differ in their last bits.

        If the user gives another number, or there are fewer cores, the present number stays.
        """
        own = torch.get_num_threads()
        if saved == own or self.engine.device.type != "cpu":
            return
        if saved > own or "OMP_NUM_THREADS" in os.environ:
            said = f"{own}; the checkpoint has {saved}, so the last bits of sums may differ"
        else:
            torch.set_num_threads(saved)
            said = f"{saved} as in the checkpoint, for the same bits, of {own} cores"
        self.say_on_rank_0(fact("threads", said))

    def say_on_rank_0(self, line: str) -> None:
        """Say a line on rank 0."""
        if dist.get_rank() == 0:
            self.say(line)
