"""The blocks of docs/in_your_project.md in the real libraries: two processes train like lbsgd.initialize."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from oracle import BOUND, distance
from processes import in_processes
from small_engine import recipe
from test_reuse import COUNTED_DDP, AllReduces, images_and_labels, run_block, with_json
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset

import lbsgd
from lbsgd.config.keypath import automatic_keys, get, put
from lbsgd.config.libraries.automatic import FILLED
from lbsgd.config.libraries.needs import needs_of
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError
from lbsgd.train.engine import start_processes
from lbsgd.train.engine_state import gather_state
from lbsgd.train.hugging_face import seed_worker

UPDATES = 6


def config_of():
    """Six updates of two passes on two processes, a pass of two workers: four of warmup, then η, then a tenth of it."""
    config = recipe(micro_batch=16)
    config["lbsgd"] |= {"epochs": 3, "warmup": {"kind": "gradual", "epochs": 2}, "decay": {"epochs": [2.5]}}
    config["scheduler"]["params"]["warmup_num_steps"] = 4
    return config


# Where the block's library keeps what it trains.
ENGINES = {"transformers": "trainer.model_wrapped", "accelerate": "engine", "lightning": "trainer.model"}


class Recorder:
    """The learning rates that an optimizer really used, whoever called it."""

    def __enter__(self):
        self.lrs = []
        self.hook = register_optimizer_step_pre_hook(self.note)
        return self

    def note(self, optimizer, arguments, keywords):
        if isinstance(optimizer, torch.optim.SGD):
            self.lrs.append([group["lr"] for group in optimizer.param_groups])

    def __exit__(self, *error):
        self.hook.remove()


def trained(block, folder, without=(), **names):
    """Run a block. Return its model's state and the learning rates of its updates."""
    with Recorder() as recorder:
        names = run_block(block, folder, without, **names)
    if block in ENGINES:
        assert type(eval(ENGINES[block], names)).__name__ == "DeepSpeedEngine"
    state = gather_state(names["engine"]).weights if block == "own_loop" else names["model"].state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}, recorder.lrs


def reference(folder, build=oracle.network):
    return trained("own_loop", folder, model=build(), dataset=images_and_labels())


def floats(state, prefix=""):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if "num_batches" not in name}


def assert_same(results, prefix="", library="library"):
    """On each process, learning rates, statistics and weights of the library's run equal those of lbsgd.initialize."""
    for ours, (state, lrs) in ((each["lbsgd"], each[library]) for each in results):
        assert len(lrs) == UPDATES and lrs == ours[1]
        assert distance(floats(state, prefix), floats(ours[0])) < BOUND


def assert_other(results, variants):
    """A mistake would be noticed."""
    for variant in variants:
        state, lrs = results[0][variant]
        differs = distance(floats(state), floats(results[0]["lbsgd"][0]))
        assert differs > 100 * BOUND or lrs != results[0]["lbsgd"][1], variant


# --- what Hugging Face's libraries hand to DeepSpeed ------------------------------------------------------------------

UNFILLED = ("zero_optimization.allgather_bucket_size", "scheduler.params.warmup_type", "optimizer.params.momentum")


class HandedOver(Exception):
    """Carries the JSON that DeepSpeed would have got."""


def handed_over(run):
    """The JSON that a library passes to deepspeed.initialize, or the error that it raises instead."""
    import deepspeed

    def initialize(**keywords):
        raise HandedOver(keywords["config_params"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", initialize)
        try:
            run()
        except HandedOver as handed:
            return handed.args[0]
        except ValueError as error:
            return str(error)


def automatic(keys):
    """A JSON in which these keys are "auto"."""
    config = {"optimizer": {"type": "AdamW", "params": {}}, "scheduler": {"type": "WarmupDecayLR", "params": {}}}
    config["zero_optimization"] = {"stage": 2}
    for key in keys:
        put(config, key, "auto")
    return config


def fillings(library, run):
    """What becomes of the keys that must be filled in, with all on "auto" together, and of others one by one."""
    handed = handed_over(lambda: run(automatic(FILLED[library])))
    return handed, {key: handed_over(lambda key=key: run(automatic([key]))) for key in UNFILLED}


def assert_fillings(found):
    filled, unfilled = found
    assert isinstance(filled, dict), filled
    assert list(automatic_keys(filled)) == []
    assert get(filled, "gradient_clipping") == 1.0 and get(filled, "scheduler.params.warmup_min_lr") == 0
    for key, said in unfilled.items():
        assert f"`{key}` not found in kwargs" in said


# --- transformers ----------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    """A network as the Trainer needs it: its forward returns the loss first."""

    def __init__(self):
        super().__init__()
        self.network = oracle.network()

    def forward(self, images, labels):
        logits = self.network(images)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


class WithLossAndKeywords(WithLoss):
    """A network whose forward takes more arguments than it needs, like Hugging Face's own. Its loss is still a mean."""

    def forward(self, images, labels, **keywords):
        return super().forward(images, labels)


class Named(Dataset):
    """Images and labels under the names of the forward's arguments."""

    def __init__(self):
        self.pairs = images_and_labels()

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return dict(zip(("images", "labels"), self.pairs[index], strict=True))


QUIET = ("**needs.arguments)", "**needs.arguments, save_strategy='no', report_to=[], disable_tqdm=True)")
OWN_LOADER = {  # the Trainer's, which uses its own random permutation
    "a plain Trainer": [("(lbsgd.LargeMinibatchTrainer, transformers.Trainer)", "(PlainTrainer)")],
}


def in_transformers(folder):
    import transformers
    from accelerate.state import DistributedType, PartialState
    from safetensors.torch import load_file

    # On a GPU the backend is detected. On a CPU, with DeepSpeed, each process would take itself for the only one.
    PartialState._prepare_backend = lambda *arguments: ("gloo", DistributedType.NO)
    start_processes()
    results = {"lbsgd": reference(folder)}
    names = dict(world_size=2, dataset=Named())
    results["library"] = trained("transformers", folder, [QUIET], model=WithLoss(), **names)
    torch.distributed.barrier()  # the first process has written
    results["saved"] = load_file(f"{folder}/runs/mine/model.safetensors")

    results["keywords"] = trained("transformers", folder, [QUIET], model=WithLossAndKeywords(), **names)

    class PlainTrainer(transformers.Trainer):
        def __init__(self, plan, **arguments):
            super().__init__(**arguments)

    alone = [QUIET, *OWN_LOADER["a plain Trainer"], (", parts=True", "")]
    results["JSON alone"] = trained("transformers", folder, alone, model=WithLoss(), PlainTrainer=PlainTrainer, **names)
    results["refused"] = refusals(folder, **names)
    results["fillings"] = fillings("transformers", lambda config: hand_to_trainer(transformers, folder, config))
    return results


def hand_to_trainer(transformers, folder, config):
    """Start transformers' own Trainer, as far as DeepSpeed."""
    model = WithLoss()
    model.config = SimpleNamespace(hidden_size=8)
    options = dict(report_to=[], save_strategy="no", disable_tqdm=True, max_steps=10)
    args = transformers.TrainingArguments(folder, deepspeed=config, **options)
    transformers.Trainer(model=model, args=args, train_dataset=Named()).train()


def without(key):
    return "deepspeed=needs.config", f"deepspeed={{k: v for k, v in needs.config.items() if k != '{key}'}}"


def refusals(folder, **names):
    """What the Trainer, or the mixin before it, says about arguments that differ from the plan's."""
    said = {}
    for name, change in {
        "passes": ("**needs.arguments", "**needs.arguments | {'gradient_accumulation_steps': 1}"),
        "batch": ("**needs.arguments", "**needs.arguments | {'per_device_train_batch_size': 8}"),
        "data": ("num_images=len(dataset)", "num_images=192"),
        "passes left out": without("gradient_accumulation_steps"),
        "no ZeRO block": without("zero_optimization"),
    }.items():
        with pytest.raises((ValueError, AssertionError)) as caught:
            run_block("transformers", folder, [QUIET, change], model=WithLoss(), **names)
        said[name] = str(caught.value)
    return said


def test_transformers_trainer_trains_the_same(tmp_path):
    results = in_processes(2, in_transformers, str(with_json(tmp_path, config_of())), imports="transformers.trainer")
    assert_same(results, "network.")
    assert_same(results, "network.", "keywords")
    saved, (state, _) = results[0]["saved"], results[0]["library"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    ours, (state, lrs) = results[0]["lbsgd"], results[0]["JSON alone"]
    assert [lr for (lr,) in lrs] == pytest.approx([0.05, 0.05, 0.1375, 0.225, 0.3125, 0.4])  # one late, and no decay
    assert distance(floats(state, "network."), floats(ours[0])) > 100 * BOUND
    assert "per_device_train_batch_size=8; the plan needs" in results[0]["refused"]["batch"]
    assert "gradient_accumulation_steps=1; the plan needs" in results[0]["refused"]["passes"]
    assert "train_dataset has 128 images and the plan 192" in results[0]["refused"]["data"]
    assert "64 != 16 * 1 * 2" in results[0]["refused"]["passes left out"]  # L01 of lbsgd check
    assert "Please specify the ZeRO optimization config" in results[0]["refused"]["no ZeRO block"]  # L03
    assert_fillings(results[0]["fillings"])  # L04, L05


class TrainerOfNothing:
    """Replaces transformers.Trainer where nothing is trained."""

    def __init__(self, **given):
        self.optimizer = self.lr_scheduler = self.optimizer_cls_and_kwargs = None
        self.__dict__.update(given)


@dataclass
class Arguments:
    """Replaces transformers.TrainingArguments, which take seconds to make."""

    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    ignore_data_skip: bool = False
    world_size: int = 1
    deepspeed: str | None = None

    def __init__(self, **given):
        self.__dict__.update(given)


class MixedIn(lbsgd.LargeMinibatchTrainer, TrainerOfNothing):
    pass


@pytest.mark.parametrize("fewer", [{}, {"max_steps": 3}])
def test_a_plan_that_is_counted_in_iterations_trains_in_transformers_too(fewer):
    config = config_of()
    # Counted in iterations of 8 images, the base batch.
    lengths = {"iterations": 48, "warmup": {"kind": "gradual", "iterations": 4}, "decay": {"iterations": [40]}}
    config["lbsgd"] = {key: value for key, value in config["lbsgd"].items() if key != "epochs"} | lengths
    plan = Plan.read(config, 1)
    arguments = needs_of(plan, "transformers", parts=True).arguments
    assert arguments["max_steps"] == 6
    options = dict(model=oracle.network(), train_dataset=range(plan.num_images))
    MixedIn(args=Arguments(**arguments | fewer), plan=plan, **options).create_optimizer()
    for given, said in (("bf16", "has bf16=True; the plan needs bf16=False"), ("ignore_data_skip", "leave it out")):
        with pytest.raises(ConfigError, match=said):
            MixedIn(args=Arguments(**arguments | {given: True}), plan=plan, **options).create_optimizer()


def test_a_trainer_that_takes_each_process_for_the_only_one_is_refused_before_it_trains():
    plan = Plan.read(config_of(), 2)
    arguments = Arguments(**needs_of(plan, "transformers", parts=True).arguments)
    trainer = MixedIn(args=arguments, plan=plan, model=oracle.network(), train_dataset=range(plan.num_images))
    with pytest.raises(ConfigError, match=r"for 2 processes, and the Trainer knows of 1,[^\n]* use_cpu=True$"):
        trainer.create_optimizer()
    arguments.world_size = 2
    with pytest.raises(ConfigError, match="torch.distributed knows of 1"):  # the next check
        trainer.create_optimizer()


# --- Accelerate ------------------------------------------------------------------------------------------------------

ACCELERATE_MISTAKES = {
    "a prepared scheduler": [
        ("engine, sgd = accelerator.prepare(model, parts.optimizer)",
         "engine, sgd, parts_scheduler = accelerator.prepare(model, parts.optimizer, parts.scheduler)"),
        ("parts.scheduler.step()", "parts_scheduler.step()"),
    ],
    "a prepared loader": [
        ("in DataLoader(dataset, batch_sampler=parts.sampler)",
         "in accelerator.prepare(DataLoader(dataset, batch_sampler=parts.sampler))"),
    ],
}  # fmt: skip


ON_CPU = ("**needs.arguments)", "**needs.arguments, kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')])")


def in_accelerate(folder):
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    start_processes()
    results = {"lbsgd": reference(folder)}
    for name, changes in {"library": [], **ACCELERATE_MISTAKES}.items():
        names = dict(model=oracle.network(), world_size=2, dataset=images_and_labels())
        names["InitProcessGroupKwargs"] = InitProcessGroupKwargs
        results[name] = trained("accelerate", folder, [ON_CPU, *changes], **names)
        AcceleratorState._reset_state(reset_partial_state=True)
    results["fillings"] = fillings("accelerate", hand_to_accelerator)
    return results


def hand_to_accelerator(config):
    """Prepare with Accelerate, as far as DeepSpeed."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DummyOptim, DummyScheduler

    model = oracle.network()
    model.config = SimpleNamespace(hidden_size=8)
    optimizer = DummyOptim(model.parameters())
    scheduler, loader = DummyScheduler(optimizer, total_num_steps=10), DataLoader(images_and_labels(), batch_size=4)
    try:
        Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)).prepare(model, optimizer, scheduler, loader)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_workers_of_all_processes_draw_differently_and_loaders_are_as_the_arguments_say():
    import transformers

    drawn = set()
    for first in (0, 2):  # two processes of two workers, which torch seeds alike
        for number in range(2):
            torch.manual_seed(42 + number)
            seed_worker(number, first)
            drawn.add((torch.rand(1).item(), np.random.rand(), random.random()))
    assert len({each for draws in drawn for each in draws}) == 12

    class Trainer(lbsgd.LargeMinibatchTrainer, transformers.Trainer):
        pass

    trainer = Trainer.__new__(Trainer)
    trainer.train_dataset, trainer.model = Named(), WithLoss()
    trainer.data_collator = transformers.default_data_collator
    trainer.label_names, trainer._signature_columns = ["labels"], None
    trainer.args = args = SimpleNamespace(
        dataloader_num_workers=2,
        dataloader_pin_memory=False,
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=3,
        process_index=1,
        remove_unused_columns=True,
    )
    sampler = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(Named()), 4, drop_last=True)
    trainer._parts = SimpleNamespace(sampler=sampler)
    loader = trainer.get_train_dataloader()
    assert loader.persistent_workers and loader.prefetch_factor == 3 and loader.worker_init_fn.keywords == {"first": 2}
    batch = loader.collate_fn([{**Named()[0], "index": 5}])
    assert "index" not in batch and "labels" in batch

    drawn = []
    args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_prefetch_factor = 0, False, None
    for args.process_index in range(2):  # which the Trainer seeds alike
        torch.manual_seed(42)
        trainer._seeded = False
        for _ in range(2):  # a second training goes on
            trainer.get_train_dataloader()
            drawn += [torch.rand(1).item(), np.random.rand(), random.random()]
    assert len(set(drawn)) == 12


def test_accelerate_trains_the_same(tmp_path):
    results = in_processes(2, in_accelerate, str(with_json(tmp_path, config_of())))
    assert_same(results)
    assert_other(results, ACCELERATE_MISTAKES)
    assert_fillings(results[0]["fillings"])


# --- Lightning -------------------------------------------------------------------------------------------------------

SILENT = ("logger=False", "logger=False, enable_checkpointing=False, enable_progress_bar=False")
LIGHTNING_MISTAKES = {
    "a loss divided twice": [(" * plan.accumulation_steps", "")],
    "statistics of each process": [("    lbsgd.agree_statistics(self.network)", "    pass")],
}


def in_lightning(folder):
    import lightning.pytorch.strategies.deepspeed as module
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    # Lightning allows DeepSpeed only on CUDA, though nothing else in its strategy needs a GPU.
    DeepSpeedStrategy.setup_environment = DDPStrategy.setup_environment
    DeepSpeedStrategy.root_device = torch.device("cpu", 0)  # DeepSpeed is given its index
    module._validate_device_index_selection = lambda devices: None
    start_processes()
    results = {"lbsgd": reference(folder)}
    for name, changes in {"library": [], **LIGHTNING_MISTAKES}.items():
        names = dict(model=oracle.network(), world_size=2, dataset=images_and_labels())
        results[name] = trained("lightning", folder, [SILENT, *changes], **names)
    given = ("DeepSpeedStrategy(config=", "DeepSpeedStrategy(config={'gradient_accumulation_steps': 2} | ")
    with pytest.raises(Exception, match="Do not set `gradient_accumulation_steps`"):  # L02 of lbsgd check
        run_block("lightning", folder, [SILENT, given], **names)
    return results


def test_lightning_trains_the_same(tmp_path):
    results = in_processes(2, in_lightning, str(with_json(tmp_path, config_of())), imports="lightning.pytorch")
    assert_same(results)
    assert_other(results, LIGHTNING_MISTAKES)


# --- timm ------------------------------------------------------------------------------------------------------------

TIMM_MISTAKES = {
    "buffers broadcast": [("broadcast_buffers=False", "broadcast_buffers=True")],
    "the first process's statistics": [("reduce=True", "reduce=False")],
}


class OfTimmsLayers(nn.Module):
    """Batch norms that contain their activation, a smooth one: at 6 x 6 a whole timm network amplifies rounding."""

    def __init__(self):
        import timm

        super().__init__()
        torch.manual_seed(0)
        self.first = timm.layers.ConvNormAct(3, 8, 3, act_layer=nn.GELU)
        self.second = timm.layers.ConvNormAct(8, 16, 3, act_layer=nn.GELU)
        self.head = timm.layers.ClassifierHead(16, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def in_timm(folder):
    start_processes()
    results, counted = {"lbsgd": reference(folder, OfTimmsLayers)}, AllReduces()
    for name, changes in {"library": COUNTED_DDP, **TIMM_MISTAKES}.items():
        names = dict(model=OfTimmsLayers(), world_size=2, dataset=images_and_labels(), counted=counted)
        results[name] = trained("timm", folder, changes, **names)
    return {**results, "all-reduces": counted.number}


def test_the_loop_of_timms_script_trains_the_same(tmp_path):
    results = in_processes(2, in_timm, str(with_json(tmp_path, config_of())))
    assert_same(results)
    assert_other(results, TIMM_MISTAKES)
    assert [each["all-reduces"] for each in results] == [UPDATES, UPDATES]  # one bucket, once per update
