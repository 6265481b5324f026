"""Prepare DeepSpeed to build an engine for a plan: its JSON, refusals of what it cannot do, and two patches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lbsgd.config.plan import Plan
from lbsgd.disk import allow_open_files
from lbsgd.errors import ConfigError
from lbsgd.processes.connection import OTHER_FILES
from lbsgd.processes.environment import WAY_OUT, Processes
from lbsgd.train.aggregation.phases import timeout_of
from lbsgd.units import counted

SOCKETS = 12  # to each other process: 6 with halving/doubling on CPUs, and 2 of the store on rank 0 (measured)


def require_device(processes: Processes, kind: str) -> None:
    """Raise ConfigError if GPUs compute, and this host has fewer of them than processes. kind: what computes."""
    if kind == "cuda" and processes.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {processes.local_rank} finds {torch.cuda.device_count()} GPUs on its host; give the host "
            "fewer slots, or start tasks that see all GPUs of their host"
        )


def allow_sockets(processes: Processes, kind: str) -> None:
    """Raise this process's limit of open files for gloo, as far as its host allows. kind: what computes.

    Each of gloo's groups connects every process to every other, so a thousand files (the limit of many systems) are too
    few for 170 processes. NCCL connects each to a few. If the host allows too few, `explained` says so.
    """
    if kind != "cuda" and processes.world_size > 1:
        allow_open_files(SOCKETS * processes.world_size + OTHER_FILES)


def require_as_many(processes: Processes) -> None:
    """Raise ConfigError if a program's processes have already met, but the environment gives another world size."""
    met = torch.distributed.get_world_size()
    if met != processes.world_size:
        raise ConfigError(
            f"torch.distributed has {counted(met, 'process')}, and this one's environment tells of "
            f"{processes.world_size}; {WAY_OUT}"
        )


def share_timeout(copy: dist.ProcessGroup, device: torch.device) -> None:
    """Give DeepSpeed's copy of the first group the timeout of that group.

    torch has given it its own: 30 minutes with gloo, and with NCCL 10, after which NCCL aborts the process.
    """
    backend: Any = copy._get_backend(device)
    # With TORCH_DISTRIBUTED_DEBUG=DETAIL torch wraps it.
    getattr(backend, "wrapped_pg", backend)._set_default_timeout(timeout_of(device))


def require_arithmetic(precision: str, accelerator: Any) -> None:
    """Raise ConfigError, naming the alternatives, if fp16 is asked for and the device cannot compute in it."""
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"this device ({accelerator.device_name()}) cannot compute in fp16; use --precision bf16 or "
            "--precision fp32"
        )


def require_bare(model: torch.nn.Module, engine_class: type) -> None:
    """Raise ConfigError for an engine, and for a network in a wrapper that sends images or gradients to other GPUs."""
    if isinstance(model, engine_class):
        raise ConfigError("the network is an engine already; give engine.module to train it anew")
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ConfigError(
            f"the network is in a {type(model).__name__}, and the engine does that work itself; give its .module"
        )


def require_real(model: torch.nn.Module, plan: Plan) -> None:
    """Raise ConfigError for complex weights if DeepSpeed would keep only their real parts or could not reduce them."""
    if plan.zero_stage:
        why = f"ZeRO stage {plan.zero_stage} would lose its imaginary part; use zero_optimization.stage 0"
    elif plan.world_size > 1 and not plan.aggregates:
        why = f"DeepSpeed cannot reduce its gradient, as it has to because {plan.own_reduction}; add that block"
    else:
        return
    for name, parameter in model.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise ConfigError(
                f"{name} of the network is complex, and {why}, or use a real parameter behind torch.view_as_complex"
            )


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """Return the JSON for DeepSpeed, without our block and without the key for lines that lbsgd prints itself."""
    config = {key: value for key, value in plan.config.items() if key not in ("lbsgd", "steps_per_print")}
    zero = dict(config.get("zero_optimization", {}))
    if plan.aggregates:  # ZeRO would reduce in its own hooks, before ours
        zero["overlap_comm"] = False
    if leaves_gradients_in_place(plan):
        zero["contiguous_gradients"] = False  # else DeepSpeed would copy each gradient there, in its own hook
    if plan.zero_stage in (1, 2) and not config.get("gradient_clipping") and "offload_optimizer" not in zero:
        # Nothing reads the norm, which makes each update wait for the device, and silently skip gradients that are NaN.
        zero.setdefault("compute_grad_norm", False)
    timers = config.get("timers", {})
    # DeepSpeed's throughput timer, on by default, waits for the GPU at every pass.
    throughput = {"enabled": False, **timers.get("throughput", {})}
    return {**config, "timers": {**timers, "throughput": throughput}, "zero_optimization": zero}


def leaves_gradients_in_place(plan: Plan) -> bool:
    """Whether ZeRO 1 has nothing to do with the gradients until the update, because lbsgd aggregates them."""
    return plan.zero_stage == 1 and plan.aggregates


def refusal(plan: Plan, error: Exception) -> ConfigError:
    """Return an error with DeepSpeed's own words, in one line, for what it refuses when it builds its engine."""
    if isinstance(error, ValidationError):  # an unknown key or a wrong value in a block that DeepSpeed checks itself
        [details, *_] = error.errors()
        key = ".".join(map(str, details["loc"]))
        return ConfigError(
            f"{plan.name}: DeepSpeed refuses {key} in its {error.title}: {details['msg']}; correct or delete it"
        )
    words = " ".join(str(error).split())[:300] or "it does not say why"
    if isinstance(error, ImportError):
        return ConfigError(
            f"{plan.name}: DeepSpeed lacks a package ({words}); install it, or delete the block that asks"
        )
    return ConfigError(
        f"{plan.name}: DeepSpeed refuses the JSON ({type(error).__name__}: {words}); correct or delete what it names"
    )


def require_planned_passes(passes: int, plan: Plan) -> None:
    """Raise ConfigError if DeepSpeed would move the weights after another number of passes than the plan."""
    if passes != plan.accumulation_steps:
        raise ConfigError(
            f"{plan.name}: DeepSpeed would move the weights after {passes:g} passes, and the plan after "
            f"{plan.accumulation_steps}; delete the key that divides a network or a sequence among processes"
        )


@contextmanager
def building(engine_class: Any) -> Iterator[None]:
    """Let a DeepSpeed engine made inside send zero-dimensional parameters, for which 0.19.8 raises.

    Its warning of an optimizer that was not tested with ZeRO is suppressed, because tests/test_oracle.py tests ours.
    """
    logger, send = logging.getLogger("DeepSpeed"), engine_class._broadcast_model

    def others(record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()

    def send_all(engine: Any) -> None:
        scalars = [parameter for parameter in engine.module.parameters() if parameter.dim() == 0]
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        send(engine)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    logger.addFilter(others)
    engine_class._broadcast_model = send_all
    try:
        yield
    finally:
        logger.removeFilter(others)
        engine_class._broadcast_model = send
