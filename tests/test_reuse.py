"""The code blocks of docs/in_your_project.md run as printed there, and train what they say."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from oracle import BOUND, distance
from PIL import Image
from processes import in_processes
from small_engine import recipe
from stock_ffcv import with_stock_ffcv
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lbsgd
from lbsgd.algorithm.schedule import Schedule, learning_rate
from lbsgd.algorithm.shuffle import epoch_order
from lbsgd.config.json_file import write_json
from lbsgd.convert.convert import convert
from lbsgd.data.beton import BetonFile
from lbsgd.errors import ConfigError
from lbsgd.train.engine_state import gather_state
from lbsgd.train.parts import build_optimizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "in_your_project.md"]
BLOCKS = {
    name: code
    for page in PAGES
    for name, code in re.findall(r"<!-- test: (\w+) -->\n```\w+\n(.*?)```", page.read_text(), flags=re.DOTALL)
}
CONFIGS = sorted((ROOT / "ds_configs").glob("**/*.json"))


def images_and_labels(size=6):
    """Two of the oracle's global batches, as a data set."""
    images, labels = (torch.cat(parts) for parts in zip(oracle.global_batch(0), oracle.global_batch(1), strict=True))
    return TensorDataset(F.interpolate(images, size=size) if size != 6 else images, labels)


def run_block(name, folder, without=(), **names):
    """Run a block in a folder that holds its JSON. `without` replaces parts of the code, to see it fail."""
    code = BLOCKS[name]
    for part, other in without:
        assert part in code
        code = code.replace(part, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, names)
    return names


DDP = "DistributedDataParallel(model, broadcast_buffers=False)"
NO_SYNC = "nullcontext() if last or network is model else network.no_sync()"
COUNTED_DDP = [(DDP, f"counted({DDP})")]


class AllReduces:
    """Counts the all-reduces of a network in DDP."""

    def __init__(self):
        self.number = 0

    def __call__(self, network):
        network.register_comm_hook(None, self.reduce)
        return network

    def reduce(self, group, bucket):
        self.number += 1
        return allreduce_hook(group, bucket)


def with_json(folder, config):
    """The folder with the JSON under the name that the blocks read."""
    (folder / "ds_configs").mkdir(parents=True, exist_ok=True)
    write_json(folder / "ds_configs/8k.json", config)
    return folder


def test_the_pages_blocks_are_all_there():
    assert set(BLOCKS) == {
        "plain",
        "own_loop",
        "without_deepspeed",
        "warmup_schedule",
        "single_parts",
        "overlay",
        "shared_shuffle_sampler",
        "shared_shuffle_order",
        "for_library",
        "transformers",
        "accelerate",
        "lightning",
        "timm",
    }


# --- 1. plain DeepSpeed
# -------------------------------------------------------------------------------------------------

WITHOUT_LBSGD = """
import os, sys
sys.modules["lbsgd"] = None                             # import lbsgd raises
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed, json, torch
from deepspeed.accelerator import get_accelerator
vars(deepspeed.ops)["__compatible_ops__"] = {{}}
get_accelerator().is_fp16_supported = lambda: True      # slow on some CPUs; DeepSpeed only asks
deepspeed.init_distributed()
code = {code!r}
for path in {paths!r}:
    model = torch.nn.Linear(4, 2)
    exec(code.replace("ds_configs/8k_bf16.json", path))
    ramp, lrs = config["scheduler"]["params"], []
    for _ in range(ramp["warmup_num_steps"] + 3):       # DeepSpeed calls step() after each update
        lrs.append(engine.get_lr()[0])
        scheduler.step()
    x = torch.ones(1, 4, dtype=next(engine.parameters()).dtype)
    before = engine.module.weight.detach().clone()
    engine.backward(engine(x).float().mean() / 4)       # a gradient that 2^16, the first loss scale, does not overflow
    engine.step()
    print(json.dumps({{"path": path, "lrs": lrs, "clipping": engine.gradient_clipping(),
                      "stage": engine.zero_optimization_stage(),
                      "moved": bool((engine.module.weight != before).any())}}))
"""


@pytest.fixture(scope="module")
def in_plain_deepspeed():
    """What every shipped JSON does without lbsgd."""
    from lbsgd.processes.ports import free_port

    script = WITHOUT_LBSGD.format(code=BLOCKS["plain"], paths=[str(path) for path in CONFIGS])
    environment = {
        **os.environ,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        record["path"]: record for record in map(json.loads, re.findall(r"^\{.*\}$", done.stdout, flags=re.MULTILINE))
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_json_trains_in_plain_deepspeed_and_gradual_warmup_climbs_linearly_to_the_reference_lr(
    in_plain_deepspeed, path
):
    config, found = json.loads(path.read_text()), in_plain_deepspeed[str(path)]
    lr, ramp = config["optimizer"]["params"]["lr"], config["scheduler"]["params"]
    assert found["clipping"] == 0.0 and found["stage"] == config["zero_optimization"]["stage"] and found["moved"]
    lrs, W = found["lrs"], ramp["warmup_num_steps"]
    assert lrs[-1] == lr
    if config["lbsgd"]["warmup"]["kind"] == "gradual":
        base = ramp["warmup_min_lr"]
        if "detection" not in config["lbsgd"]:
            assert base == config["lbsgd"]["linear_scaling"]["base_lr"]  # for a detector a third of its lr
        assert lrs == pytest.approx(
            [base, *(base + (lr - base) * t / W for t in range(W)), lr, lr]
        )  # one iteration late
        assert lrs[0] < lr
    else:
        assert set(lrs) == {lr}


# --- 2. one's own loop
# --------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Batch norm in one, two and three dimensions, under arbitrary names."""

    def __init__(self):
        super().__init__()
        self.flat, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.b = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.narrow, self.c = nn.Linear(32, 16), nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        x = F.gelu(self.a(self.flat(x)))
        x = F.gelu(self.b(self.deep(x.unsqueeze(1)))).mean((3, 4)).flatten(1)
        return self.out(F.gelu(self.c(self.narrow(x))))


def torchvision_model():
    import torchvision

    return torchvision.models.resnet18(num_classes=5, zero_init_residual=True)


def timm_model():
    import timm

    return timm.create_model("resnet18", num_classes=5, zero_init_last=True)


def one_epoch(**options):
    """Two updates of 64 images, the first a warmup."""
    config = recipe(**options)
    config["lbsgd"] |= {"epochs": 1, "warmup": {"kind": "gradual", "epochs": 0.5}, "decay": {"epochs": []}}
    config["scheduler"]["params"]["warmup_num_steps"] = 1
    return config


@pytest.mark.parametrize("build, num_norms, size", [(torchvision_model, 20, 32), (timm_model, 20, 32), (Mixed, 3, 6)])
def test_a_loop_of_ones_own_trains_a_model_of_anybodys(tmp_path, build, num_norms, size):
    torch.manual_seed(0)
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = run_block(
        "own_loop", with_json(tmp_path, one_epoch(micro_batch=32)), model=model, dataset=images_and_labels(size)
    )
    engine, plan = names["engine"], names["plan"]
    assert engine.global_steps == 2 == plan.num_iterations and plan.accumulation_steps == 2
    norms = [module for module in engine.module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == num_norms and {norm.per_worker_batch for norm in norms} == {8}
    decay, no_decay = engine.basic_optimizer.param_groups
    assert (len(no_decay["params"]), no_decay["weight_decay"], decay["weight_decay"]) == (2 * num_norms, 0.0, 0.01)
    after = engine.module.state_dict()
    assert all(after[name].isfinite().all() for name in after)
    assert all(
        not torch.equal(after[name], before[name]) for name in after if name.endswith(("weight", "running_mean"))
    )


def test_batch_norm_of_any_dimension_makes_the_run_independent_of_how_it_is_divided(tmp_path):
    def weights(micro_batch):
        torch.manual_seed(0)
        config = recipe(micro_batch=micro_batch)
        names = run_block("own_loop", with_json(tmp_path, config), model=Mixed(), dataset=images_and_labels())
        assert names["engine"].global_steps == 20
        return gather_state(names["engine"]).weights

    whole = {name: tensor for name, tensor in weights(64).items() if "num_batches" not in name}
    assert distance(weights(8), whole) < BOUND


def test_a_batch_norm_that_does_more_is_refused_with_its_name(tmp_path):
    class Whitening(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="1 is a Whitening, neither torch's own batch norm nor timm's BatchNormAct2d"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), Whitening(4))
        run_block("own_loop", with_json(tmp_path, one_epoch()), model=model, dataset=images_and_labels())


# --- 3. without DeepSpeed
# -----------------------------------------------------------------------------------------------

PLAN = "plan = lbsgd.Plan.read("
FSDP2 = [  # replaces the parameters
    (PLAN, f"from torch.distributed.fsdp import fully_shard; fully_shard(model); {PLAN}"),
    (DDP, "model"),
    (NO_SYNC, "nullcontext(model.set_requires_gradient_sync(last))"),
]
PARTS = "lbsgd.parts_for(model, plan, num_images=len(dataset))"
BROKEN = {
    "statistics that move in every pass": [(PARTS, f"{PARTS}; lbsgd.convert_batch_norm(model, plan.micro_batch)")],
    "weight decay on gamma and beta": [(PARTS, f"{PARTS}; sgd.param_groups[1]['weight_decay'] = 0.01")],
    "no schedule": [(", scheduler.step()", "")],
    "the schedule of other data": [(", num_images=len(dataset)", "")],
    "a shuffle for each process": [(PARTS, f"{PARTS}; sampler.seed = RANK")],
    "a loss not divided by the passes": [("/ plan.accumulation_steps)", "/ 1)")],
}


def for_other_data(micro_batch):
    """The oracle's JSON, written for half as many images, with another seed and form of momentum than the defaults."""
    config = recipe(micro_batch=micro_batch, momentum={"form": "lr_inside"})
    config["lbsgd"] |= {"num_images": 64, "seed": 3}
    config["scheduler"]["params"]["warmup_num_steps"] = 5
    return config


def with_mistakes():
    """That JSON with 6 updates instead of 20, which show every mistake."""
    config = for_other_data(8)
    config["lbsgd"] |= {"epochs": 3, "decay": {"epochs": []}}
    return config


RIGHT = {"torch": COUNTED_DDP, "FSDP2": FSDP2}
RUNS = {
    "32": (for_other_data(32), RIGHT),
    "8": (for_other_data(8), RIGHT),
    "mistakes": (with_mistakes(), {"torch": COUNTED_DDP, **BROKEN}),
}


def both_ways(folder):
    """On two processes each: the DeepSpeed run, and those without, also with mistakes."""
    folder, states = Path(folder), {}
    for run, (config, loops) in RUNS.items():
        names = run_block("own_loop", folder / run, model=oracle.network(), dataset=images_and_labels())
        states["deepspeed", run] = gather_state(names["engine"]).weights
        common = dict(config=config, world_size=2, dataset=images_and_labels(), RANK=torch.distributed.get_rank())
        for name, changes in loops.items():
            counted = AllReduces()
            names = run_block("without_deepspeed", folder, changes, model=oracle.network(), counted=counted, **common)
            states["all-reduces", name, run] = counted.number
            state = names["model"].state_dict()
            states[name, run] = {
                key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
                for key, tensor in state.items()
            }
    return states


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    for run, (config, _) in RUNS.items():
        with_json(folder / run, config)
    return in_processes(2, both_ways, str(folder))


def of_floats(weights):
    return {name: tensor for name, tensor in weights.items() if "num_batches" not in name}


@pytest.mark.parametrize("wrapper", ["torch", "FSDP2"])
@pytest.mark.parametrize("run", ["32", "8"])  # 1 and 4 passes
def test_without_deepspeed_two_processes_train_the_same_weights(two_processes, wrapper, run):
    for states in two_processes:
        expected = of_floats(states["deepspeed", run])
        assert distance(states[wrapper, run], expected) < BOUND


@pytest.mark.parametrize("run", ["32", "8"])  # 2 and 8 passes
def test_without_deepspeed_one_process_trains_the_same_weights(two_processes, run, tmp_path):
    config, common = RUNS[run][0], {"world_size": 1, "dataset": images_and_labels()}
    names = run_block("without_deepspeed", tmp_path, [(DDP, "model")], model=oracle.network(), config=config, **common)
    expected = of_floats(two_processes[0]["deepspeed", run])
    assert distance(names["model"].state_dict(), expected) < BOUND


@pytest.mark.parametrize("run", ["32", "8"])
def test_without_deepspeed_gradients_are_averaged_once_in_an_update(two_processes, run):
    for states in two_processes:
        assert states["all-reduces", "torch", run] == 20  # the network fills one of DDP's buckets


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_in_that_loop_would_be_seen(two_processes, mistake):
    states = two_processes[0]
    expected = of_floats(states["deepspeed", "mistakes"])
    assert distance(states["torch", "mistakes"], expected) < BOUND
    assert distance(states[mistake, "mistakes"], expected) > 100 * BOUND


def test_the_parts_without_deepspeed_do_not_import_it():
    code = (
        "import sys, lbsgd; lbsgd.LargeMinibatchLR, lbsgd.LargeMinibatchSGD, lbsgd.MomentumCorrectedSGD, "
        "lbsgd.decay_groups, "
        "lbsgd.convert_batch_norm, lbsgd.SharedShuffleSampler, lbsgd.agree_statistics, lbsgd.Plan, lbsgd.parts_for; "
        "assert not {'deepspeed', 'ffcv', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_seeds_interface_is_a_view_of_the_same_function(tmp_path):
    names = run_block("warmup_schedule", tmp_path)
    schedule = lbsgd.Plan.read(ROOT / "ds_configs/8k.json", 8).schedule
    assert names["rule"].scaled_lr == pytest.approx(3.2)
    assert names["lrs"] == [pytest.approx(learning_rate(t, schedule), rel=1e-12) for t in range(14_040)]
    small = lbsgd.LargeMinibatchSGD(0.1, 256, 128)
    assert small.warmup_schedule(0, 0, 10) == 0.05 and small.warmup_schedule(30, 0, 10) == pytest.approx(0.005)


def test_the_parts_one_by_one_are_those_of_the_papers_json(tmp_path):
    plan = lbsgd.Plan.read(ROOT / "ds_configs/1k.json", 1, overrides=lbsgd.Overrides(micro_batch=256))
    torch.manual_seed(0)
    by_hand, whole = Mixed(), Mixed()
    names = run_block("single_parts", tmp_path, model=by_hand, dataset=range(plan.num_images))
    parts = lbsgd.parts_for(whole, plan)
    assert names["scheduler"].schedule == parts.scheduler.schedule and plan.accumulation_steps == 4
    assert [str(layer) for layer in by_hand.modules()] == [str(layer) for layer in whole.modules()]
    for group, expected in zip(names["sgd"].param_groups, parts.optimizer.param_groups, strict=True):
        assert [p.shape for p in group.pop("params")] == [p.shape for p in expected.pop("params")]
        assert group == expected


def test_the_scheduler_is_torchs_own_kind_and_goes_on_where_its_state_was_taken():
    schedule = Schedule(0.1, 0.8, "gradual", 4, (6,))

    def optimizer():
        groups = [{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)]
        return torch.optim.SGD([*groups, {"params": [nn.Parameter(torch.ones(1))], "lr_factor": 2.0}], lr=9.0)

    sgd = optimizer()
    scheduler = lbsgd.LargeMinibatchLR(sgd, schedule)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    lrs = []
    for _ in range(8):
        lrs.append([group["lr"] for group in sgd.param_groups])
        assert lrs[-1] == scheduler.get_last_lr()
        sgd.step(), scheduler.step()
    assert lrs == [[times * learning_rate(t, schedule) for times in (1, 1, 2)] for t in range(8)]
    resumed = optimizer()
    other = lbsgd.LargeMinibatchLR(resumed, schedule)
    halfway = lbsgd.LargeMinibatchLR(optimizer(), schedule)
    for _ in range(3):
        halfway.optimizer.step(), halfway.step()
    other.load_state_dict(json.loads(json.dumps(halfway.state_dict())))
    assert [group["lr"] for group in resumed.param_groups] == [t * learning_rate(3, schedule) for t in (1, 1, 2)]
    resumed.step(), other.step()
    assert resumed.param_groups[1]["lr"] == learning_rate(4, schedule)


def test_a_step_to_an_epoch_is_refused_because_the_schedule_counts_updates():
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=9.0)
    scheduler = lbsgd.LargeMinibatchLR(sgd, Schedule(0.1, 0.8, "gradual", 4, (6,)))
    sgd.step(), scheduler.step()
    for epoch in (0, 2):
        with pytest.raises(
            ConfigError, match=rf"^scheduler.step\({epoch}\): [^\n]* updates, not epochs; [^\n]*move_to"
        ):
            scheduler.step(epoch)
    assert scheduler.last_epoch == 1


def test_a_group_s_own_learning_rate_is_refused_rather_than_replaced():
    schedule = Schedule(0.1, 0.8, "gradual", 4)

    def sgd(**group):
        one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        return torch.optim.SGD([{"params": [one]}, {"params": [other], **group}], lr=0.8)

    with pytest.raises(
        ValueError, match=r"^parameter group 1 has .* its own, 0.08, .* give the group lr_factor, [^\n]*$"
    ):
        lbsgd.LargeMinibatchLR(sgd(lr=0.08), schedule)
    optimizer = sgd(lr_factor=0.1)
    for _ in range(2):  # once as built, and once as the schedule leaves it and a resumed run finds it
        lbsgd.LargeMinibatchLR(optimizer, schedule)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.01])


def test_timms_layer_decay_scales_the_schedule_as_timms_own_schedulers_do():
    from timm import create_model
    from timm.optim import param_groups_layer_decay
    from timm.scheduler import StepLRScheduler

    schedule, model = Schedule(0.1, 0.8, "gradual", 2), create_model("resnet10t", num_classes=4)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    sgd = lbsgd.MomentumCorrectedSGD(groups, lr=0.8)
    ours, scales = lbsgd.LargeMinibatchLR(sgd, schedule), [group["lr_scale"] for group in groups]
    theirs = StepLRScheduler(sgd, decay_t=100)
    assert len(set(scales)) > 2
    for t in range(4):
        ours.move_to(t)
        lrs = [group["lr"] for group in sgd.param_groups]
        theirs.update_groups(learning_rate(t, schedule))
        assert lrs == [group["lr"] for group in sgd.param_groups] == [learning_rate(t, schedule) * s for s in scales]


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor():
    """Compiled and captured steps of an optimizer read that tensor, and would not see a float in its place."""
    schedule, lr = Schedule(0.125, 1.0, "gradual", 7), torch.tensor(9.0)
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = lbsgd.LargeMinibatchLR(sgd, schedule)
    held = sgd.param_groups[0]["lr"]
    for change, expected in (
        (lambda: None, 0.125),
        (lambda: (sgd.step(), scheduler.step()), 0.25),
        (lambda: scheduler.move_to(3), 0.5),
        (lambda: scheduler.load_state_dict({"last_epoch": 5}), 0.75),
    ):
        change()
        assert sgd.param_groups[0]["lr"] is held and held == pytest.approx(expected)


def test_the_parts_leave_the_kernel_to_torch_unless_the_json_chooses_one():
    """FSDP2's parameters, which are DTensors, have no fused kernel. The engine's are plain tensors."""
    model, config = nn.Linear(2, 2), recipe()
    plan = lbsgd.Plan.read(config, 1)
    assert lbsgd.parts_for(model, plan).optimizer.defaults["fused"] is None
    assert build_optimizer(model, plan).defaults["fused"] is True
    config["optimizer"]["params"]["fused"] = True
    assert lbsgd.parts_for(model, lbsgd.Plan.read(config, 1)).optimizer.defaults["fused"] is True


# --- 4. overlays
# --------------------------------------------------------------------------------------------------------


def test_an_overlay_prints_every_number_that_it_changes(capsys):
    command = shlex.split(BLOCKS["overlay"])
    from lbsgd.commands.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert command[0] == "lbsgd" and main(command[1:]) == 0
    out = capsys.readouterr().out
    for change in (
        "train_batch_size: 8192 -> 4096",
        "optimizer.params.lr: 3.2 -> 1.6",
        "lbsgd.warmup.epochs: 5 -> 2",
        "scheduler.params.warmup_num_steps: 780 -> 624",
    ):
        assert change in out


NUM_IMAGES = 600  # two iterations of 256, and a remainder that an epoch leaves out


def labels_seen(name, folder, **names):
    """The labels of each epoch in a block whose loop does nothing."""
    seen = {0: [], 1: []}
    run_block(name, folder, [("...", "seen[epoch] += labels.flatten().tolist()")], seen=seen, **names)
    return seen


def in_the_shared_order(labels):
    return {epoch: labels[epoch_order(NUM_IMAGES, 0, epoch)[:512]].tolist() for epoch in (0, 1)}


def test_a_plain_data_loader_takes_the_shared_shuffle(tmp_path):
    numbers = torch.arange(NUM_IMAGES)
    assert labels_seen(
        "shared_shuffle_sampler", tmp_path, dataset=TensorDataset(numbers, numbers)
    ) == in_the_shared_order(numbers)


class Crops(Dataset):
    """A data set whose items are the numbers that a random transform would draw."""

    def __len__(self):
        return 64

    def __getitem__(self, number):
        return float(torch.rand(()))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_seed_that_the_page_names_gives_each_process_and_epoch_crops_of_its_own(num_workers):
    [seeding] = re.findall(r"`(torch\.manual_seed\(.*\))`", PAGES[1].read_text())

    def crops(rank, epoch, code):
        sampler = lbsgd.SharedShuffleSampler(64, global_batch=64, micro_batch=32, world_size=2, rank=rank)
        exec(code, dict(torch=torch, seed=0, world_size=2, rank=rank, epoch=epoch))
        [batch] = DataLoader(Crops(), batch_sampler=sampler, num_workers=num_workers)
        return tuple(batch.tolist())

    with torch.random.fork_rng():
        assert crops(0, 0, "torch.manual_seed(seed)") == crops(1, 0, "torch.manual_seed(seed)")
        assert len({crops(rank, epoch, seeding) for rank in range(2) for epoch in range(2)}) == 4


def test_ffcv_s_own_loader_takes_the_shared_shuffle(tmp_path):
    for split, count in (("train", NUM_IMAGES), ("val", 10)):
        for number in range(count):
            path = tmp_path / "images" / split / f"class{number % 10}" / f"{number:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 12), (number % 256, 0, 0)).save(path)
    convert(tmp_path / "images", tmp_path, max_side=500, num_processes=1)
    labels = BetonFile.open(tmp_path / "train.beton").labels
    assert with_stock_ffcv(labels_seen, "shared_shuffle_order", tmp_path) == in_the_shared_order(labels)
