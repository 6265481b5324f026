"""Put the paper's mathematics into DeepSpeed, for recipes and for other projects. Only this file imports DeepSpeed.

    engine, plan = lbsgd.initialize(model, "ds_configs/8k.json", num_images=1281167)
    loss = cross_entropy(engine(images).float(), labels)      # one pass of plan.micro_batch images
    engine.backward(loss)
    engine.step()                                             # the last of accumulation_steps passes moves the weights

Where DeepSpeed 0.19.8 differs from the paper, this file corrects it. tests/test_upstream.py pins each point.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out itself, with a warning

import deepspeed
import deepspeed.utils.pin_memory  # an engine imports it when Python frees it, perhaps amid another import
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch.distributed import HashStore, PrefixStore, Store

from lbsgd.algorithm.fused_blocks import fuse_blocks
from lbsgd.algorithm.schedule import Schedule, learning_rate
from lbsgd.algorithm.sgd import lr_factor
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan, plan_for
from lbsgd.errors import ConfigError, one_line
from lbsgd.processes.environment import Processes, master
from lbsgd.train.aggregation.aggregation import attach
from lbsgd.train.aggregation.alike import require_alike
from lbsgd.train.deepspeed_setup import (
    allow_sockets,
    building,
    deepspeed_config,
    refusal,
    require_arithmetic,
    require_as_many,
    require_bare,
    require_device,
    require_planned_passes,
    require_real,
    share_timeout,
)
from lbsgd.train.device_rules import lay_out, norm_implementation
from lbsgd.train.loss_scale import grow_after_the_update
from lbsgd.train.parts import build_optimizer, convert_network, require_network
from lbsgd.train.trained import hold_to_plan
from lbsgd.train.unfinished import forget_at_each_load
from lbsgd.train.zero_host import spare_the_host

MOMENTUM = "momentum_buffer"  # torch.optim.SGD's name for u
PYTHONS_REFUSALS = ValueError, AssertionError, NotImplementedError, ImportError, OSError
REFUSALS = (*PYTHONS_REFUSALS, DeepSpeedConfigError, ZeRORuntimeException)


class LinearScalingWarmupLR(WarmupLR):
    """Extends DeepSpeed's WarmupLR to the paper's whole schedule (Sec. 2.2, 5.1), positioned absolutely.

    step(t) sets the lr of update t. DeepSpeed calls step() after each applied update, but not after one that fp16
    overflow skipped. So `initialize` positions it before each training forward by the number of iterations whose images
    were consumed, and a skipped update shifts nothing. WarmupLR alone lags by one iteration.
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
        lr = self.lr_of(self.last_batch_iteration)
        return [lr * lr_factor(group) for group in self.optimizer.param_groups]

    def lr_of(self, iteration: int) -> float:
        """Return the learning rate of any update of the run, for groups without their own factor."""
        return learning_rate(iteration, self.schedule)

    def load_state_dict(self, state: dict) -> None:
        self.step(state["last_batch_iteration"])


def start_processes(timeout_seconds: float = 600, store: Store | None = None) -> Processes:
    """Join the processes of this run, or stay alone if no launcher started us. Nothing is compiled.

    store              where the processes have already met; by default they meet at MASTER_ADDR:MASTER_PORT
    timeout_seconds    a collective call that takes longer raises

    Raises ConfigError if the processes cannot meet.
    """
    processes = Processes.from_environment()
    accelerator = deepspeed.accelerator.get_accelerator()
    require_device(processes, accelerator.device_name())
    allow_sockets(processes, accelerator.device_name())
    # This all-reduce is for inference, and compiles for a minute on a CPU. Reading the list compiles trial programs.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if processes.alone:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed's engine needs it
    if torch.distributed.is_initialized():
        require_as_many(processes)
    else:
        if deepspeed.comm.comm.cdb is not None:  # left by an earlier process group, as after a test
            deepspeed.utils.groups._release_process_group_references()
        if processes.alone:
            store = HashStore()  # no port: our children would take variables that we set for a launcher's
        elif store is None:
            master()  # else DeepSpeed asks for mpi4py
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
                f"({one_line(error)}); if the port is taken, give the launcher another --master_port"
            ) from error
    accelerator.set_device(processes.local_rank)  # before the first collective call
    return processes


def initialize(
    model: torch.nn.Module,
    config: Plan | str | Path | dict,
    num_images: int | None = None,
    overrides: Overrides | None = None,
) -> tuple[deepspeed.DeepSpeedEngine, Plan]:
    """Return a DeepSpeed engine that trains `model` by the paper's algorithm, and the plan that it follows.

    model         any network; its batch norms, found by type, become per-worker ones (Sec. 2.3), and their γ and β are
                  left out of weight decay (Sec. 5.1)
    config        a DeepSpeed JSON with an `lbsgd` block (its path, or parsed), or a `Plan`
    num_images    size of the training data, from which iterations are derived
    overrides     values that replace the JSON's

    Raises ConfigError if JSON, processes, data or device do not fit together, or if networks differ between processes.
    """
    require_network(model)
    require_bare(model, deepspeed.DeepSpeedEngine)
    start_processes()
    plan = plan_for(torch.distributed.get_world_size(), config, num_images, overrides)
    require_arithmetic(plan.precision, deepspeed.accelerator.get_accelerator())
    require_real(model, plan)
    how, _ = norm_implementation(plan, deepspeed.accelerator.get_accelerator().device_name())
    convert_network(model, plan, how)
    if how == "triton":
        fuse_blocks(model)
    require_alike(model, plan)
    engine, scheduler = deepspeed_engine(model, plan)
    attach(engine, plan)
    hold_to_plan(engine, plan)
    forget_at_each_load(engine)
    engine.module.register_forward_pre_hook(
        lambda module, _: scheduler.step(engine.global_steps) if module.training else None
    )
    return engine, plan


def deepspeed_engine(model: torch.nn.Module, plan: Plan) -> tuple[deepspeed.DeepSpeedEngine, LinearScalingWarmupLR]:
    """Return DeepSpeed's engine and its scheduler for a plan. Raises ConfigError if DeepSpeed refuses."""
    lay_out(model, torch.contiguous_format)  # DeepSpeed cannot send weights in channels_last to other processes
    optimizer, config = build_optimizer(model, plan), deepspeed_config(plan)
    try:
        with building(deepspeed.DeepSpeedEngine):
            engine, _, _, scheduler = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=config,
                lr_scheduler=lambda optimizer: LinearScalingWarmupLR(optimizer, plan.schedule),
            )
    except REFUSALS as error:
        raise refusal(plan, error) from error
    require_planned_passes(engine.gradient_accumulation_steps(), plan)
    share_timeout(deepspeed.utils.groups._clone_world_group(), engine.device)
    if plan.zero_stage == 0:
        lay_out(engine.module)  # not under ZeRO, which flattens weights and would lose their layout
        # One process has nothing to aggregate. DeepSpeed would copy all gradients into one buffer and back.
        engine.enable_backward_allreduce = plan.world_size > 1
    else:
        spare_the_host(engine.optimizer)
    if plan.precision == "fp16":  # at ZeRO stage 1 or 2, because the rules refuse it at 0
        grow_after_the_update(engine.optimizer)
    return engine, scheduler


# --- access to ZeRO's state, for engine_state.py. It keeps none of an empty parameter ---------------------------------


def full_parameter(engine, parameter) -> torch.Tensor:
    """Return a whole parameter, in float32. Collective under ZeRO."""
    return safe_get_full_fp32_param(parameter) if engine.zero_optimization() and parameter.numel() else parameter


def full_gradient(engine, parameter) -> torch.Tensor:
    """Return a parameter's whole reduced gradient, between the last backward and the step. Collective under ZeRO."""
    return safe_get_full_grad(parameter) if engine.zero_optimization() else parameter.grad


def set_parameter(engine, parameter, value: torch.Tensor) -> None:
    """Set ZeRO's float32 master of a parameter. At stage 0 the module's state_dict already holds everything."""
    if engine.zero_optimization():
        safe_set_full_fp32_param(parameter, value.to(parameter.device))


def spread_parameters(engine) -> None:
    """Copy ZeRO's masters into the weights that the network computes with, on all processes."""
    if engine.zero_optimization():
        engine.optimizer.update_lp_params()


def full_momentum(engine, parameter) -> torch.Tensor:
    """Return a parameter's whole momentum, zeros before its first gradient. Collective under ZeRO."""
    if engine.zero_optimization() and parameter.numel():
        return safe_get_full_optimizer_state(parameter, MOMENTUM)
    momentum = engine.basic_optimizer.state.get(parameter, {}).get(MOMENTUM)
    return torch.zeros_like(parameter) if momentum is None else momentum


def set_momentum(engine, parameter, value: torch.Tensor) -> None:
    """Set a parameter's momentum. `allocate_momentum` must have made room for it."""
    if engine.zero_optimization():
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), MOMENTUM)
    else:
        engine.basic_optimizer.state[parameter][MOMENTUM].copy_(value)
