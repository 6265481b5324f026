"""Points in which DeepSpeed, torch, torchvision, FFCV and Numba lack what the paper needs. lbsgd works around them.

Each test pins one point and fails once upstream fixes it. Then delete the workaround that its docstring names.
"""

import copy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.launcher.runner import fetch_hostfile
from processes import in_processes
from stock_ffcv import with_stock_ffcv
from torch import nn
from torch.distributed import DistStoreError, TCPStore
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torchvision.ops import MultiScaleRoIAlign

from lbsgd.config.json_file import read_json
from lbsgd.train.engine import start_processes

CONFIGS = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))


@pytest.fixture(autouse=True)
def distributed(monkeypatch):
    start_processes()
    # Half precision works on any CPU, slowly. DeepSpeed only asks whether it is supported.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def engine_for(config, model=None):
    """Return an engine of plain DeepSpeed, without any part of lbsgd."""
    torch.manual_seed(0)
    model = model or nn.Linear(4, 2)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=copy.deepcopy(config))[0]


def update(engine, images=None):
    engine.backward(engine(torch.ones(1, 4, dtype=next(engine.parameters()).dtype) if images is None else images).sum())
    engine.step()


def settings(stage=0, **more):
    return {
        "train_batch_size": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        **more,
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_json_is_valid_for_plain_deepspeed_which_climbs_linearly_to_the_reference_lr(path):
    config = read_json(path)
    ramp = config["scheduler"]["params"]
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] = 1  # the documented override for one process
    engine = engine_for(config)
    assert engine.gradient_clipping() == 0.0
    assert engine.zero_optimization_stage() == config["zero_optimization"]["stage"]
    engine.lr_scheduler.step(ramp["warmup_num_steps"] // 2)
    half = (ramp["warmup_num_steps"] // 2) / max(2, ramp["warmup_num_steps"])
    expected = ramp["warmup_min_lr"] + half * (ramp["warmup_max_lr"] - ramp["warmup_min_lr"])
    assert engine.get_lr()[0] == pytest.approx(expected)
    engine.lr_scheduler.step(ramp["warmup_num_steps"] + 1)
    assert engine.get_lr()[0] == config["optimizer"]["params"]["lr"]


def test_warmup_lr_uses_its_first_lr_twice_and_its_default_ramp_is_logarithmic():
    """LinearScalingWarmupLR sets the position itself; `lbsgd check` refuses the default (D10)."""
    ramp = {"warmup_min_lr": 0.1, "warmup_max_lr": 0.6, "warmup_num_steps": 5}
    lrs = {}
    for kind in ("linear", "default"):
        params = {**ramp, "warmup_type": "linear"} if kind == "linear" else ramp
        engine = engine_for(settings(scheduler={"type": "WarmupLR", "params": params}))
        lrs[kind] = []
        for _ in range(4):
            lrs[kind].append(engine.optimizer.param_groups[0]["lr"])
            update(engine)
    assert lrs["linear"] == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert lrs["default"][2] > 0.3


def test_gradients_are_clipped_unless_the_json_says_0():
    """`lbsgd check` wants "gradient_clipping": 0.0 in every JSON (D08)."""
    config = settings()
    del config["gradient_clipping"]
    assert engine_for(config).gradient_clipping() == 1.0


def test_fp16_at_stage_0_does_not_train():
    """`lbsgd check` refuses it (D11); --precision fp16 raises the stage to 1."""
    engine = engine_for(settings(fp16={"enabled": True}))
    before = engine.module.weight.detach().clone()
    update(engine)
    assert (engine.module.weight - before).abs().max() < 1e-4  # a gradient of 1 and a lr of 0.1 should move it by 0.1


def test_the_update_in_which_the_loss_scale_grows_has_half_its_gradient():
    """train/loss_scale.py lets it grow only after the update."""
    engine = engine_for(settings(stage=1, fp16={"enabled": True, "loss_scale_window": 1, "initial_scale_power": 4}))
    moved = []
    for _ in range(2):
        before = engine.module.weight.detach().clone()
        update(engine)
        moved.append(float((before - engine.module.weight.detach()).mean()))
    # Gradients of 1 with a lr of 0.1 and a momentum of 0.9 should move the weights by 0.1 and 0.19.
    assert moved == pytest.approx([0.1, 0.14], abs=1e-3) and engine.optimizer.loss_scale == 32


def test_torchs_batch_norm_fails_in_fp16():
    """PerWorkerBatchNorm raises γ and β to float32."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    engine = engine_for(settings(stage=1, fp16={"enabled": True}), model)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        engine(torch.ones(2, 3, 4, 4, dtype=torch.half))


def test_a_channels_last_network_crashes_initialize():
    """engine.initialize converts after deepspeed.initialize, and at stage 0 only."""
    with pytest.raises(RuntimeError, match="must be divisible by 1|stride|view"):
        engine_for(settings(), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))


def test_a_parameter_without_a_dimension_crashes_initialize():
    """deepspeed_setup.building gives it a dimension while it is sent."""
    model = nn.Linear(2, 2)
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    with pytest.raises(RuntimeError, match="dim.. cannot be 0"):
        engine_for(settings(), model)


def test_torchs_fused_sgd_on_a_cpu_looks_at_no_strides():
    weight = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    weight.grad = torch.arange(24.0).view(2, 3, 2, 2)
    torch.optim.SGD([weight], 1.0, fused=True).step()
    assert not torch.equal(weight, -weight.grad)


def test_zero_links_the_momentum_of_the_first_group_only():
    """engine.link_momentum links again."""
    model = nn.Linear(4, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(groups, lr=0.1, momentum=0.9), config=settings(stage=1)
    )[0]
    update(engine)
    assert deepspeed.utils.safe_get_full_optimizer_state(model.weight, "momentum_buffer") is not None
    with pytest.raises(ValueError, match="momentum_buffer not found"):
        deepspeed.utils.safe_get_full_optimizer_state(model.bias, "momentum_buffer")


def test_overflow_advances_the_iteration_but_not_the_scheduler():
    """LinearScalingWarmupLR takes its position from the iterations, before each training forward."""
    ramp = {"warmup_min_lr": 0.1, "warmup_max_lr": 0.6, "warmup_num_steps": 5, "warmup_type": "linear"}
    engine = engine_for(settings(stage=1, scheduler={"type": "WarmupLR", "params": ramp}))
    engine.backward(engine(torch.full((1, 4), float("inf"))).sum())
    engine.step()
    assert (engine.global_steps, engine.skipped_steps, engine.lr_scheduler.last_batch_iteration) == (1, 1, -1)


def test_a_loaded_engine_adds_to_the_gradients_of_an_unfinished_iteration(tmp_path):
    """forget_at_each_load (train/unfinished.py)."""
    engine = engine_for(settings(train_batch_size=2, train_micro_batch_size_per_gpu=1))
    engine.save_checkpoint(str(tmp_path))
    update(engine)
    before = engine.module.weight.grad.clone()
    engine.load_checkpoint(str(tmp_path))
    assert engine.micro_steps == 1 and torch.equal(engine.module.weight.grad, before)


def test_a_missing_hostfile_is_only_a_warning(tmp_path):
    """The launcher's require_hosts refuses it."""
    assert fetch_hostfile(str(tmp_path / "hosts")) is None


def modules_of_a_start():
    start_processes()
    return set(sys.modules)


def test_to_read_the_list_of_operators_tries_to_compile_them_and_a_start_does_not_read_it(monkeypatch):
    """A run would take half a second longer to start on a CPU, and on a GPU warn of each operator it cannot compile."""
    assert "deepspeed.ops.op_builder.all_ops" not in in_processes(1, modules_of_a_start)[0]
    asked = []
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {})
    monkeypatch.setattr("deepspeed.ops.op_builder.builder.probe_is_compatible", asked.append)
    deepspeed.ops.__getattr__("__compatible_ops__")
    assert len(asked) > 5


def test_the_first_start_on_a_cpu_would_compile_an_operator():
    """start_processes switches it off before it joins the processes."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    assert builder is not None and builder.is_compatible(verbose=False)
    assert deepspeed.ops.__compatible_ops__[builder.NAME] is False


class OnlyOnRank0(nn.Module):
    """A layer that only one of two processes uses, as a branch of a network may be."""

    def __init__(self):
        super().__init__()
        self.first, self.extra = nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, images):
        found = self.first(images)
        return self.extra(found) if torch.distributed.get_rank() == 0 else found


def weights_with_an_unused_layer(stage):
    start_processes(timeout_seconds=10)
    config = settings(stage, train_batch_size=2)
    config["zero_optimization"] |= {"overlap_comm": True}
    engine = engine_for(config, OnlyOnRank0())
    for _ in range(3):
        update(engine, torch.ones(1, 4) * (1 + torch.distributed.get_rank()))
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_goes_wrong_when_one_process_does_not_use_a_parameter(stage):
    """train/aggregation/, which replaces the reduction, counts a missing gradient as zeros, like stage 0.

    ZeRO reduces what each process has. If gloo notices that sizes differ, it aborts. If it does not, with other
    sizes, weights are silently off by some percent.
    """
    right = in_processes(2, weights_with_an_unused_layer, 0)[0]
    try:
        wrong = in_processes(2, weights_with_an_unused_layer, stage)[0]
    except (ProcessExitedException, ProcessRaisedException):
        return
    assert max(((right[name] - wrong[name]).abs().max() / right[name].abs().max()).item() for name in right) > 0.01


def type_hash_before_and_after_ffcv_s_loader():
    import numba
    from ffcv.memory_managers.os_cache import OSCacheManager

    shared = numba.uint8[::1]
    before = hash(shared)
    OSCacheManager.state_type.fget(None)
    return before, hash(shared)


def test_ffcv_s_loader_changes_the_hash_of_types_that_numba_shares():
    """So tests make such a Loader in a separate process: tests/stock_ffcv.py."""
    before, after = with_stock_ffcv(type_hash_before_and_after_ffcv_s_loader)
    assert before != after


def test_numba_gives_different_functions_of_different_processes_one_name():
    """Numba 0.68. So data/kept_code.py, which loads both into one process, numbers functions at random."""
    code = "import numba; f = numba.njit(lambda: {}); f(); print(f.overloads[()].fndesc.mangled_name)"
    one, two = (subprocess.check_output([sys.executable, "-c", code.format(number)]) for number in (1, 2))
    assert one == two


def hosts_of_a_second_agent_that_comes_late():
    """Return how many hosts the second agent sees, if the first has already begun alone."""
    server = TCPStore("localhost", 0, is_master=True)
    agents, timeout = [], RendezvousTimeout(last_call=timedelta(seconds=2))
    for _ in range(2):
        store = TCPStore("localhost", server.port, timeout=timedelta(seconds=5))
        backend = C10dRendezvousBackend(store, "run")
        agents.append(DynamicRendezvousHandler.from_backend("run", store, backend, 1, 2, "localhost", timeout))
    first, second = agents
    assert first.next_rendezvous().world_size == 1
    timeout._set_timeouts(last_call=timedelta(minutes=1))  # neither begins alone, however slow the other is
    with ThreadPoolExecutor() as pool:
        met = pool.submit(second.next_rendezvous)
        while not first.num_nodes_waiting():
            assert not met.done(), met.exception()
            time.sleep(0.01)
        assert first.next_rendezvous().world_size == 2
        return met.result().world_size


def test_torchrun_lets_in_a_host_that_comes_late_only_where_a_variable_says_so(monkeypatch):
    """torch 2.11: the first host's agent names the workers' store only once, so a newcomer waits for it in vain.

    docs/clusters.md sets the variable that makes the agents agree on a new store for each start.
    """
    with pytest.raises(DistStoreError, match="wait timeout after 5000ms"):
        hosts_of_a_second_agent_that_comes_late()
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert hosts_of_a_second_agent_that_comes_late() == 2


@pytest.mark.parametrize("height, scale", [(64, 1 / 4), (40, 1 / 2)])
def test_torchvision_pools_every_image_by_scales_that_it_guesses_from_the_first(height, scale):
    """torchvision 0.26 takes an image's height without its padding to 64. PerForwardMaskRCNN sets the scales itself."""
    pool = MultiScaleRoIAlign(["0", "1"], output_size=2, sampling_ratio=2)
    for first_height in (height, 64):
        features = {str(level): torch.ones(1, 1, 16 >> level, 16 >> level) for level in range(2)}
        pool(features, [torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [(first_height, 64)])
    assert pool.scales == [scale, scale / 2]
