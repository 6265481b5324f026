"""Describe the arguments of optimizers and schedulers: names from signatures, values by trials."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import itertools
import textwrap
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import deepspeed_oracle
import torch
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import lr_schedules
from deepspeed_probe import describe

NUM_STEPS = 50
CANDIDATES: tuple[Any, ...] = (100, 0.1, 0.5, 1, [1, 2], "min", {})  # for required arguments
BESIDE = {"nesterov": {"momentum": 0.9}}  # other arguments that an argument needs; a rule knows this pair (D25)
ONE_BIT = {"onebitadam": "adam.OnebitAdam", "zerooneadam": "zoadam.ZeroOneAdam", "onebitlamb": "lamb.OnebitLamb"}
NOT_JSON = ("params", "optimizer", "deepspeed", "self", "args", "kwargs")


def of_torch() -> dict[str, Any]:
    """Return torch's optimizers and schedulers."""
    optimizers = {name: thing for name, thing in vars(torch.optim).items() if is_subclass(thing, torch.optim.Optimizer)}
    scheduler = torch.optim.lr_scheduler.LRScheduler
    schedulers = {
        name: thing
        for name, thing in vars(torch.optim.lr_scheduler).items()
        if is_subclass(thing, scheduler) and not name.startswith("_")
    }
    return {
        "version": torch.__version__.split("+")[0],
        "optimizers": {
            name: {
                **entry(thing, OptimizerTrial(thing)),
                **({"cycles_momentum": True} if cycles_momentum(name) else {}),
            }
            for name, thing in optimizers.items()
        },
        "schedulers": {name: entry(thing, SchedulerTrial(thing)) for name, thing in schedulers.items()},
    }


def own_schedulers() -> dict[str, Any]:
    """Return DeepSpeed's schedulers."""
    names = [name for name in lr_schedules.VALID_LR_SCHEDULES if hasattr(lr_schedules, name)]
    return {name: entry(thing := getattr(lr_schedules, name), SchedulerTrial(thing)) for name in names}


def own_optimizers() -> dict[str, Any]:
    """Return the optimizers that DeepSpeed builds itself, by their lower-case names."""
    found: dict[str, Any] = {}
    for name in ds_config.DEEPSPEED_OPTIMIZERS:
        config = {"train_batch_size": 1, "optimizer": {"type": name, "params": {"lr": 1e-3}}}
        why = deepspeed_oracle.refusal(config, 2)
        if "UnboundLocalError" in why or "ModuleNotFoundError" in why:  # the package mup, or mpi4py for 1-bit Adam
            found[name] = {
                "needs": "another package",
                **({"params": names_of(ONE_BIT[name])} if name in ONE_BIT else {}),
            }
        elif why:
            found[name] = {"required": [], "params": {}, "refused": why.split("\n")[0]}
        else:
            found[name] = own_entry(name, type(deepspeed_oracle.basic_optimizer(config)))
    return found


def names_of(place: str) -> dict[str, Any]:
    """Return the argument names of a class that cannot be tried here, with any value allowed."""
    module, _, name = place.rpartition(".")
    return dict.fromkeys(
        parameters(getattr(importlib.import_module(f"deepspeed.runtime.fp16.onebit.{module}"), name)), {}
    )


def own_entry(name: str, thing: type) -> dict[str, Any]:
    """Return the arguments of an optimizer that DeepSpeed builds: its class's, and those that the engine removes."""
    momentum = {"cycles_momentum": True} if cycles_momentum(name) else {}
    if engine_takes(name, {"an_argument_that_nothing_knows": 1}):
        arguments = ("lr", "momentum", "weight_decay", "betas", "eps")
        described = {each: describe(partial(engine_takes_one, name, each)) for each in arguments}
        return {"required": [], "any_argument": True, **momentum, "params": described}
    found = entry(thing, OptimizerTrial(thing))
    for each in ("torch_adam", "adam_w_mode", "fp32_optimizer_states"):
        if each not in found["params"] and engine_takes(name, {each: False}):
            found["params"][each] = {}
    if name in ("adam", "adamw"):
        found["params"]["adam_w_mode"] = {}  # the engine takes any value as true or false
    return {**found, **momentum}


def engine_takes_one(name: str, argument: str, value: Any) -> bool:
    return engine_takes(name, {argument: value})


def engine_takes(name: str, arguments: dict[str, Any]) -> bool:
    """Whether DeepSpeed's engine builds and steps an optimizer with these arguments."""
    params = {"lr": 1e-3, **arguments}
    why = deepspeed_oracle.refusal({"train_batch_size": 1, "optimizer": {"type": name, "params": params}}, 2)
    return not why or why.startswith("the weights")


def cycles_momentum(name: str) -> bool:
    """Whether schedulers that cycle the momentum work with an optimizer, because it has a momentum or betas."""
    cycle = {"type": "CyclicLR", "params": {"base_lr": 0.001, "max_lr": 0.01}}
    optimizer = {"type": name, "params": {"lr": 1e-3}}
    return not deepspeed_oracle.refusal({"train_batch_size": 1, "optimizer": optimizer, "scheduler": cycle}, 2)


def is_subclass(thing: Any, parent: type) -> bool:
    return isinstance(thing, type) and issubclass(thing, parent) and thing is not parent


def parameters(thing: type) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a constructor that a JSON can give."""
    found = inspect.signature(thing.__init__).parameters  # type: ignore[misc]
    return {name: each for name, each in found.items() if name not in NOT_JSON}


def entry(thing: type, trial: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the required arguments of a class, and the values that each argument accepts."""
    known = parameters(thing)
    required = [name for name, each in known.items() if each.default is inspect.Parameter.empty]
    base, either = working(trial, required), []
    if base is None:  # one or two optional arguments may be needed after all
        either = [
            list(more)
            for number in (1, 2)
            for more in itertools.combinations(known, number)
            if not set(more) & set(required) and working(trial, [*required, *more], (100,))
        ]
        either = [more for more in either if not any(set(less) < set(more) for less in either)]
        base = working(trial, [*required, *either[0]], (100,)) if either else None
    if base is None:
        return {"refused": reason(trial, required), "required": required, "params": dict.fromkeys(known, {})}
    texts = words(thing)
    return {
        "required": required,
        **({"either": either} if either else {}),
        "params": {name: describe(argument(trial, {**base, **BESIDE.get(name, {})}, name), texts) for name in known},
    }


def working(
    trial: Callable[[dict[str, Any]], bool], required: list[str], candidates: tuple[Any, ...] = CANDIDATES
) -> dict[str, Any] | None:
    """Return values of the required arguments that work together; None if there are none."""
    for values in itertools.product(candidates, repeat=len(required)):
        base = dict(zip(required, values, strict=True))
        if trial(base):
            return base
    return None


def reason(trial: Any, required: list[str]) -> str:
    """Return why a class works with no JSON."""
    return "its required arguments cannot stand in a JSON" if required else trial.why


def argument(trial: Callable[[dict[str, Any]], bool], base: dict[str, Any], name: str) -> Callable[[Any], bool]:
    """Return the trial of one argument, together with others that work."""
    return lambda value: trial({**base, name: value})


def words(thing: type) -> list[str]:
    """Return the short texts in a class's source, some of which may be values of its arguments."""
    try:
        source = textwrap.dedent(inspect.getsource(thing))
    except OSError:  # a class without source
        return []
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return sorted({text for text in texts if isinstance(text, str) and text.isidentifier() and len(text) < 20})[:40]


class OptimizerTrial:
    """Whether an optimizer of torch can be built with arguments, and stepped. `why` has the last reason if not."""

    def __init__(self, thing: type):
        self.thing, self.why = thing, ""

    def __call__(self, arguments: dict[str, Any]) -> bool:
        with quiet():
            try:
                self.run(arguments)
            except Exception as error:  # noqa: BLE001  any error is its refusal
                self.why = f"{type(error).__name__}: {error}"[:120]
                return False
        return True

    def run(self, arguments: dict[str, Any]) -> None:
        network = torch.nn.Linear(4, 2)
        optimizer = self.thing(network.parameters(), **arguments)
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.ones(1, 4)).sum().backward()
            optimizer.step()


class SchedulerTrial(OptimizerTrial):
    """Whether a scheduler can be built with arguments, and stepped as DeepSpeed's engine steps it."""

    def run(self, arguments: dict[str, Any]) -> None:
        optimizer = torch.optim.SGD(torch.nn.Linear(4, 2).parameters(), lr=1e-3, momentum=0.9)
        scheduler = self.thing(optimizer, **arguments)
        for _ in range(2 if {"total_steps", "epochs"} & set(arguments) else NUM_STEPS):
            optimizer.step()
            self.step(scheduler)
            if not isinstance(optimizer.param_groups[0]["lr"], (int, float, torch.Tensor)):
                raise TypeError("the learning rate is no number")

    @staticmethod
    def step(scheduler: Any) -> None:
        try:
            scheduler.step()
        except TypeError:  # the engine then passes the batch size
            scheduler.step(1)


@contextlib.contextmanager
def quiet() -> Any:
    """Silence warnings and standard output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
