"""An engine's whole state, in at least float32 on the CPU, for any world size and ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lbsgd.algorithm.grouped_norm import at_least_float32
from lbsgd.algorithm.sgd import lr_factor
from lbsgd.train.engine import (
    MOMENTUM,
    full_momentum,
    full_parameter,
    set_momentum,
    set_parameter,
    spread_parameters,
)
from lbsgd.train.trained import trained
from lbsgd.train.unfinished import forget_iteration


@dataclass
class EngineState:
    """A run's whole weights and momentum, in at least float32 on the CPU, for any world size and ZeRO stage."""

    weights: dict[str, torch.Tensor]  # parameters (the float32 masters under fp16) and buffers, by state_dict name
    momentum: dict[str, torch.Tensor]  # u of (9) or v of (10), by parameter name; empty before the first update
    counters: dict[str, Any]  # iterations, updates skipped by overflow, loss scale, last lr applied


def gather_state(engine, keep: bool = True) -> EngineState:
    """Gather the whole state from all processes, which must all call this. Without `keep` a process only takes part."""
    state = EngineState({}, {}, counters(engine))
    own = trained(engine)
    for name, tensor in engine.module.state_dict().items():
        whole = full_parameter(engine, own[name]) if name in own else tensor
        if keep:
            state.weights[name] = to_host(whole)
    if engine.global_steps > engine.skipped_steps:
        link_momentum(engine)
        for name, parameter in own.items():
            whole = full_momentum(engine, parameter)
            if keep:
                state.momentum[name] = to_host(whole)
    return state


def restore_state(engine, state: EngineState) -> None:
    """Put a gathered state into an engine of any world size and ZeRO stage. All processes must call this.

    Gradients of an unfinished iteration are dropped.
    """
    restore_counters(engine, state.counters)
    forget_iteration(engine)
    engine.module.load_state_dict(state.weights)
    if state.momentum:
        allocate_momentum(engine, state.counters["last_lr"])
    for name, parameter in trained(engine).items():
        set_parameter(engine, parameter, state.weights[name])
        if state.momentum:
            set_momentum(engine, parameter, state.momentum[name])
    spread_parameters(engine)


def allocate_momentum(engine, last_lr: float | None) -> None:
    """Give the optimizer its state after the first step, with zeros, because ZeRO has none to write into before."""
    sgd = engine.basic_optimizer
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter][MOMENTUM] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if last_lr is not None:
                sgd.state[parameter]["last_lr"] = last_lr * lr_factor(group)
    link_momentum(engine)


def link_momentum(engine) -> None:
    """Let DeepSpeed's accessors find the momentum of every group.

    DeepSpeed links all groups after the first group's first step, when the others do not have momentum yet.
    """
    if engine.zero_optimization():
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the CPU, contiguous, in at least float32."""
    return at_least_float32(tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format))


SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine) -> dict[str, Any]:
    """Return the engine's progress: iterations, skipped updates, the last lr applied, fp16's loss scale."""
    found = {
        "iteration": engine.global_steps,
        "skipped_iterations": engine.skipped_steps,
        "last_lr": last_lr(engine.basic_optimizer),
    }
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if engine.fp16_enabled() and scaler is not None and scaler.dynamic:
        found["loss_scaler"] = {name: getattr(scaler, name) for name in SCALER_FIELDS}
    return found


def last_lr(sgd) -> float | None:
    """Return the learning rate that form (10) applied last, without group factors; None before, and in form (9)."""
    known = ((group, sgd.state.get(parameter, {})) for group in sgd.param_groups for parameter in group["params"])
    return next((state["last_lr"] / lr_factor(group) for group, state in known if "last_lr" in state), None)


def restore_counters(engine, state: dict[str, Any]) -> None:
    """Set the engine's counters and schedule to what `counters` returned."""
    engine.global_steps = state["iteration"]
    engine.skipped_steps = state["skipped_iterations"]
    engine.global_samples = state["iteration"] * engine.train_batch_size()
    engine.lr_scheduler.step(state["iteration"])
    if engine.fp16_enabled() and "loss_scaler" in state:
        for name, value in state["loss_scaler"].items():
            setattr(engine.optimizer.loss_scaler, name, value)
