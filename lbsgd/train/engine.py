"""Our mathematics inside DeepSpeed: the one door for recipes and for other projects, and the only file to import it.

    engine, plan = lbsgd.initialize(model, "ds_configs/8k.json", num_images=1281167)
    loss = cross_entropy(engine(images).float(), labels)      # once a pass, each of plan.micro_batch images
    engine.backward(loss)
    engine.step()                                             # moves the weights at the last of accumulation_steps passes

What DeepSpeed 0.19.8 does otherwise than the paper is put right here; tests/test_upstream.py pins each point.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find by itself, with a warning

import deepspeed
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from pydantic import ValidationError
from torch.distributed import PrefixStore

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.schedule import Schedule, learning_rate
from lbsgd.algorithm.sgd import MomentumCorrectedSGD, decay_groups
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError, TrainingError
from lbsgd.processes.launcher import Processes, free_port

MOMENTUM = "momentum_buffer"  # torch.optim.SGD's name for u


class LinearScalingWarmupLR(WarmupLR):
    """DeepSpeed's WarmupLR extended by the paper's whole schedule (Sec. 2.2, 5.1), positioned absolutely.

    step(t) sets the lr of update t. DeepSpeed calls step() after each applied update, and not after one that fp16
    overflow skipped; `initialize` therefore positions it before each training forward by the number of iterations whose
    images were consumed, so that a skipped update shifts nothing. WarmupLR alone lags by one iteration.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule):
        self.schedule = schedule
        super().__init__(
            optimizer,
            warmup_min_lr=learning_rate(0, schedule),
            warmup_max_lr=schedule.reference_lr,
            warmup_num_steps=max(1, schedule.warmup_iterations),
            warmup_type="linear",
            last_batch_iteration=0,
        )
        self.step(0)

    def get_lr(self) -> list[float]:
        return [self.lr_of(self.last_batch_iteration)] * len(self.optimizer.param_groups)

    def lr_of(self, iteration: int) -> float:
        """Learning rate of any update of the run."""
        return learning_rate(iteration, self.schedule)

    def load_state_dict(self, state: dict) -> None:
        self.step(state["last_batch_iteration"])


def start_processes(timeout_seconds: float = 600, store: PrefixStore | None = None) -> Processes:
    """Joins the processes of this run (a single one where no launcher started us), compiling nothing.

    store: where they have met already; else they meet at MASTER_ADDR:MASTER_PORT. A collective call that takes longer than
    timeout_seconds raises. Raises ConfigError where they cannot meet.
    """
    processes = Processes.from_environment()
    accelerator = deepspeed.accelerator.get_accelerator()
    if not torch.distributed.is_initialized():
        # DeepSpeed's shared-memory all-reduce serves inference only, and compiles for a minute on the first CPU start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if processes.alone:
            processes.export(master_port=free_port())
        timeout = timedelta(seconds=timeout_seconds)
        if store is not None:
            torch.distributed.init_process_group(
                accelerator.communication_backend_name(),
                store=PrefixStore("torch", store),
                rank=processes.rank,
                world_size=processes.world_size,
                timeout=timeout,
            )
        try:
            deepspeed.init_distributed(timeout=timeout)
        except torch.distributed.DistNetworkError as error:
            raise ConfigError(
                f"cannot join the other processes at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                f"({str(error).splitlines()[0]}); if the port is taken, give the launcher another --master_port"
            ) from error
    accelerator.set_device(processes.local_rank)  # before the first collective call
    return processes


def step(engine) -> None:
    """engine.step(); where fp16's loss scale cannot fall any further, which DeepSpeed finds on all processes at once, a
    TrainingError that names the iteration."""
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise TrainingError(
            f"the gradients of iteration {engine.global_steps} overflow fp16 at the smallest loss scale; look at "
            "the learning rate and the data, or use bf16"
        ) from error


def initialize(
    model: torch.nn.Module,
    config: Plan | str | Path | dict,
    num_images: int | None = None,
    overrides: Overrides = Overrides(),
) -> tuple[deepspeed.DeepSpeedEngine, Plan]:
    """A DeepSpeed engine that trains `model` by the paper's algorithm, and the plan that it follows.

    model: any network; its batch norms, found by type, become per-worker ones (Sec. 2.3), and their γ and β are left out
    of weight decay (Sec. 5.1). config: a DeepSpeed JSON with an `lbsgd` block (its path, or parsed), or a `Plan`.
    num_images: size of the training data; iterations are derived from it.
    Raises ConfigError where JSON, processes, data or device cannot go together.
    """
    start_processes()
    world_size = torch.distributed.get_world_size()
    plan = config if isinstance(config, Plan) else Plan.read(config, world_size, num_images, overrides)
    if plan.world_size != world_size:
        raise ConfigError(
            f"the plan is for {plan.world_size} processes, but {world_size} run; read it for {world_size}"
        )
    require_precision(plan.precision)
    norm = plan.recipe.batch_norm
    convert_batch_norm(model, norm.per_worker_batch, plan.accumulation_steps, norm.statistics, norm.scope)
    try:
        engine, _, _, scheduler = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, plan),
            config=deepspeed_config(plan),
            lr_scheduler=lambda optimizer: LinearScalingWarmupLR(optimizer, plan.schedule),
        )
    except ValidationError as error:  # an unknown key or a wrong value in a block that DeepSpeed checks itself
        [details, *_] = error.errors()
        raise ConfigError(
            f"{plan.name}: DeepSpeed refuses {'.'.join(map(str, details['loc']))} in its {error.title}: "
            f"{details['msg']}; correct or delete it"
        ) from error
    if plan.zero_stage == 0:
        if memory_format(engine.device) is torch.channels_last:
            engine.module.to(memory_format=torch.channels_last)  # before initialize, and under ZeRO, DeepSpeed fails
        # One process has nothing to aggregate; DeepSpeed would copy all gradients into one buffer and back.
        engine.enable_backward_allreduce = world_size > 1
    engine.module.register_forward_pre_hook(
        lambda module, _: scheduler.step(engine.global_steps) if module.training else None
    )
    return engine, plan


def build_optimizer(model: torch.nn.Module, plan: Plan) -> MomentumCorrectedSGD:
    """SGD as the JSON's optimizer block and the `lbsgd` block have it, with batch norm in a group of its own."""
    params, recipe = dict(plan.config["optimizer"]["params"]), plan.recipe
    # One kernel for the whole update: 2.7 times as fast as torch's default on a CPU (docs/experiments.md).
    params.setdefault("fused", recipe.momentum.form == "lr_outside" and not params.get("foreach"))
    groups = decay_groups(model, params.pop("weight_decay"), recipe.weight_decay.on_batch_norm)
    return MomentumCorrectedSGD(groups, **params, form=recipe.momentum.form, correction=recipe.momentum.correction)


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """What DeepSpeed is given: the JSON, less the block that is ours and the lines that lbsgd prints itself."""
    config = {key: value for key, value in plan.config.items() if key not in ("lbsgd", "steps_per_print")}
    # Its throughput timer waits for the GPU at every pass.
    return {"timers": {"throughput": {"enabled": False}}, **config}


def require_precision(precision: str) -> None:
    """Raises ConfigError where the device cannot compute in fp16, naming what it can."""
    accelerator = deepspeed.accelerator.get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"this device ({accelerator.device_name()}) cannot compute in fp16; use --precision bf16 or "
            "--precision fp32"
        )


def memory_format(device: torch.device) -> torch.memory_format:
    """Tensor cores want channels_last; on CPU our batch norm is faster without (docs/experiments.md)."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


# --- the access to ZeRO's state that checkpoints need -------------------------------------------------------------------


@dataclass
class EngineState:
    """Weights and momentum of a run in float32 on the CPU, whole, whatever the world size and ZeRO stage."""

    weights: dict[str, torch.Tensor]  # parameters (the float32 masters under fp16) and buffers, by state_dict name
    momentum: dict[str, torch.Tensor]  # u of (9) or v of (10), by parameter name; empty before the first update
    counters: dict[str, Any]  # iterations, updates that overflow skipped, loss scale, last lr applied


def gather_state(engine, keep: bool = True) -> EngineState:
    """The whole state, gathered from all processes; all of them must call it. Without `keep` only to take part."""
    host = to_host if keep else lambda tensor: tensor
    weights = {name: host(tensor) for name, tensor in engine.module.state_dict().items()}
    momentum = {}
    updated = engine.global_steps > engine.skipped_steps
    if updated:
        link_momentum(engine)
    for name, parameter in trainable(engine):
        weights[name] = host(full_parameter(engine, parameter))
        if updated:
            momentum[name] = host(full_momentum(engine, parameter))
    return EngineState(weights, momentum, counters(engine))


def restore_state(engine, state: EngineState) -> None:
    """Puts a gathered state into an engine of any world size and ZeRO stage; all processes must call it."""
    engine.module.load_state_dict(state.weights)
    if state.momentum:
        allocate_momentum(engine, state.counters["last_lr"])
    for name, parameter in trainable(engine):
        if engine.zero_optimization():
            safe_set_full_fp32_param(parameter, state.weights[name].to(parameter.device))
        if state.momentum:
            set_momentum(engine, parameter, state.momentum[name].to(parameter.device))
    if engine.zero_optimization():
        engine.optimizer.update_lp_params()  # masters -> the weights that the network computes with, on all processes
    restore_counters(engine, state.counters)


def trainable(engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, contiguous, in float32 (integers stay integers)."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def full_parameter(engine, parameter) -> torch.Tensor:
    return safe_get_full_fp32_param(parameter) if engine.zero_optimization() else parameter


def full_momentum(engine, parameter) -> torch.Tensor:
    if engine.zero_optimization():
        return safe_get_full_optimizer_state(parameter, MOMENTUM)
    momentum = engine.basic_optimizer.state[parameter].get(MOMENTUM)
    return torch.zeros_like(parameter) if momentum is None else momentum  # none where no gradient has come yet


def allocate_momentum(engine, last_lr: float | None) -> None:
    """The optimizer's state as after its first step, with zeros in it: ZeRO has none to write into before."""
    sgd = engine.basic_optimizer
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter][MOMENTUM] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if last_lr is not None:
                sgd.state[parameter]["last_lr"] = last_lr
    link_momentum(engine)


def link_momentum(engine) -> None:
    """Lets DeepSpeed's accessors find the momentum of every group: it links all groups after the first group's first
    step, when the others have none yet."""
    if engine.zero_optimization():
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def set_momentum(engine, parameter, value: torch.Tensor) -> None:
    if engine.zero_optimization():
        safe_set_full_optimizer_state(parameter, value, MOMENTUM)
    else:
        engine.basic_optimizer.state[parameter][MOMENTUM].copy_(value)


SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine) -> dict[str, Any]:
    states = engine.basic_optimizer.state.values()
    found = {
        "iteration": engine.global_steps,
        "skipped_iterations": engine.skipped_steps,
        "last_lr": next((state["last_lr"] for state in states if "last_lr" in state), None),
    }
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if engine.fp16_enabled() and scaler.dynamic:
        found["loss_scaler"] = {name: getattr(scaler, name) for name in SCALER_FIELDS}
    return found


def restore_counters(engine, state: dict[str, Any]) -> None:
    engine.global_steps = state["iteration"]
    engine.skipped_steps = state["skipped_iterations"]
    engine.micro_steps = state["iteration"] * engine.gradient_accumulation_steps()
    engine.global_samples = state["iteration"] * engine.train_batch_size()
    engine.lr_scheduler.step(state["iteration"])
    if engine.fp16_enabled() and "loss_scaler" in state:
        for name, value in state["loss_scaler"].items():
            setattr(engine.optimizer.loss_scaler, name, value)
