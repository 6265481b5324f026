"""`lbsgd config --from FILE --for LIBRARY`, `lbsgd check --for LIBRARY FILE`, and the parts, without the libraries."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_engine import recipe
from test_codes import merged
from test_reuse import BLOCKS
from torch import nn

import lbsgd
from lbsgd import LargeMinibatchTrainer
from lbsgd.algorithm.schedule import learning_rate
from lbsgd.algorithm.shuffle import epoch_order
from lbsgd.commands.main import main
from lbsgd.config.checks import clashes
from lbsgd.config.checks.in_library import in_library
from lbsgd.config.checks.inspection import Inspection, findings_of, inspect
from lbsgd.config.checks.rule import rules_of
from lbsgd.config.json_file import read_json, write_json
from lbsgd.config.keypath import paths_to_auto, put
from lbsgd.config.libraries.arguments import CALLS, LIBRARIES, arguments_of
from lbsgd.config.libraries.needs import missing, needs_of
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError

ROOT = Path(__file__).parent.parent
EIGHT_K = ROOT / "ds_configs/8k.json"
SHIPPED = sorted((ROOT / "ds_configs").glob("*k*.json"))


def written(arguments, capsys):
    """The JSON, and the words printed next to it."""
    assert main(["config", *shlex.split(arguments)]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def codes(config, library):
    inspection = Inspection("example", config, findings_of(config))
    return [finding.code for finding in in_library(inspection, library).findings]


def test_transformers_gets_the_number_of_passes_and_the_arguments_that_repeat_the_file(capsys):
    config, beside = written(f"--from {EIGHT_K} --for transformers --gpus 8 --micro_batch 256", capsys)
    expected = read_json(EIGHT_K) | {"train_micro_batch_size_per_gpu": 256, "gradient_accumulation_steps": 4}
    del expected["lbsgd"]["aggregation"]  # it says "auto", a word that Hugging Face refuses anywhere
    assert config == expected
    names = {"TrainingArguments": dict, "__builtins__": {}}
    assert eval(beside, names) == {
        "deepspeed": "FILE",
        "per_device_train_batch_size": 256,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.0,
        "learning_rate": 3.2,
        "weight_decay": 0.0001,
        "warmup_steps": 780,
        "fp16": True,
        "bf16": False,
        "num_train_epochs": 90,
    }
    assert "not in a JSON alone: the decay of the learning rate, batch norm over n images" in beside


@pytest.mark.parametrize(
    "file, lost",
    [
        (
            "ablations/8k_constant_warmup.json",
            "the constant warmup, batch norm over n images, no weight decay on batch norm,",
        ),
        (
            "detection/mask_rcnn_16.json",
            "frozen batch norm, no weight decay on batch norm, the learning rate of biases, no",
        ),
        ("ablations/8k_sync_bn.json", "batch norm over all images, no weight decay on batch norm,"),
        (
            "ablations/8k_no_momentum_correction.json",
            "momentum without its correction, batch norm over n images, no weight decay on batch norm,",
        ),
    ],
)
def test_what_a_json_alone_loses_is_that_of_its_recipe(file, lost):
    [remark] = missing(Plan.read(ROOT / "ds_configs" / file, 1))
    assert f"the decay of the learning rate, {lost}" in remark


@pytest.mark.parametrize(
    "library, file, passes, arguments",
    [
        ("accelerate", "8k.json", 32, {"gradient_accumulation_steps": 32, "mixed_precision": "fp16"}),
        ("accelerate", "8k_bf16.json", 32, {"gradient_accumulation_steps": 32, "mixed_precision": "no"}),
        ("lightning", "8k.json", None, {"precision": "16-mixed", "accumulate_grad_batches": 32, "max_epochs": 90}),
        ("lightning", "8k_bf16.json", None, {"precision": "32-true", "accumulate_grad_batches": 32, "max_epochs": 90}),
        ("deepspeed", "8k_fp32.json", 32, {}),
    ],
)
def test_the_other_libraries_get_theirs(library, file, passes, arguments):
    needs = needs_of(Plan.read(ROOT / "ds_configs" / file, 8), library)
    assert needs.config.get("gradient_accumulation_steps") == passes
    assert (needs.call, needs.arguments) == (CALLS[library], arguments)


def test_arguments_repeat_what_the_file_says_and_not_what_it_leaves_to_the_library():
    config = {"optimizer": {"params": {"betas": [0.8, 0.95], "eps": 1e-7, "lr": "auto"}}, "fp16": {"enabled": "auto"}}
    assert arguments_of(config, "transformers") == {
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "bf16": False,
    }
    assert arguments_of(config, "accelerate") == arguments_of(config, "lightning") == {}


@pytest.mark.parametrize("library, epochs", [("transformers", "num_train_epochs"), ("lightning", "max_epochs")])
def test_a_run_counted_in_iterations_is_so_many_steps(library, epochs):
    plan = Plan.read(ROOT / "ds_configs/detection/mask_rcnn_16.json", 8)
    arguments = needs_of(plan, library).arguments
    assert arguments["max_steps"] == plan.num_iterations == 160_000 and epochs not in arguments


def test_a_written_file_is_planned_on_the_processes_that_its_passes_leave(tmp_path, capsys):
    path = str(tmp_path / "8k.json")
    flags = f"--from {EIGHT_K} --for transformers --gpus 8 --micro_batch 256 --output {path}"
    assert main(["config", *shlex.split(flags)]) == 0 and main(["plan", path]) == 0
    assert "world size 8 x micro batch 256 x 4 passes" in capsys.readouterr().out
    assert main(["plan", path, "--micro_batch", "128"]) == 0  # another micro batch makes the written number invalid
    assert "world size 64 x micro batch 128 x 1 pass\n" in capsys.readouterr().out


def test_a_file_that_leaves_clipping_out_leaves_it_free():
    config = {"train_batch_size": 8}  # DeepSpeed 0.19 clips at 1.0, older versions do not: D08
    assert "max_grad_norm" not in arguments_of(config, "transformers")
    assert arguments_of({**config, "gradient_clipping": 0.0}, "transformers")["max_grad_norm"] == 0.0


def test_detection_makes_no_file_from_another(capsys):
    assert main(["config", "--from", str(EIGHT_K), "--for", "accelerate", "--gpus", "8", "--detection"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--detection" in said and "--from" in said


@pytest.mark.parametrize("library", LIBRARIES)
def test_parts_take_the_place_of_optimizer_and_schedule(library):
    plan = Plan.read(EIGHT_K, 8)
    alone, parts = needs_of(plan, library), needs_of(plan, library, parts=True)
    left_out = {"aggregation"} if library in ("transformers", "accelerate") else set()
    block = {key: value for key, value in plan.config["lbsgd"].items() if key not in left_out}
    replaced = {"optimizer": plan.config["optimizer"], "scheduler": plan.config["scheduler"], "lbsgd": block}
    assert alone.config == parts.config | replaced
    assert not {"optimizer", "scheduler", "lbsgd"} & parts.config.keys()
    assert not {"learning_rate", "weight_decay", "warmup_steps"} & parts.arguments.keys()
    more = {
        "transformers": {"ddp_broadcast_buffers": False, "seed": 0},
        "lightning": {"use_distributed_sampler": False},
    }
    found = {name: value for name, value in parts.arguments.items() if name not in alone.arguments}
    assert found == more.get(library, {})


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_written_has_nothing_that_clashes(path, parts, library):
    needs = needs_of(Plan.read(path, 8), library, parts)
    assert not {"error", "warning"} & {
        finding.severity for finding in in_library(Inspection("file", needs.config, ()), library).findings
    }
    if not parts:
        written, shipped = Plan.read(needs.config, 8), Plan.read(path, 8)
        assert written.identity() == shipped.identity() and written.schedule == shipped.schedule  # still the same run
        assert '"auto"' not in json.dumps(needs.config) or library in ("lightning", "deepspeed")


def test_the_block_of_the_page_writes_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    assert main(shlex.split(BLOCKS["for_library"])[1:]) == 0
    assert "deepspeed='8k_transformers.json'" in capsys.readouterr().out
    assert main(["check", "--for", "transformers", "8k_transformers.json"]) == 0
    assert "per_device_train_batch_size=256, gradient_accumulation_steps=4" in capsys.readouterr().out


@pytest.mark.parametrize("parts", ["", "--parts"])
def test_deepspeeds_own_call_names_the_file_that_was_written(parts, tmp_path, capsys):
    path = str(tmp_path / "it.json")
    assert main(f"config --from {EIGHT_K} --for deepspeed --gpus 8 {parts} --output {path}".split()) == 0
    assert f"config={path!r})" in capsys.readouterr().out


def test_flags_change_the_file_as_they_change_a_run(capsys):
    flags = "--gpus 4 --global_batch 4096 --precision fp32 --zero_stage 2 --epochs 30 --set lbsgd.decay.epochs=[20]"
    config, _ = written(f"--from {EIGHT_K} --for deepspeed {flags}", capsys)
    assert config["optimizer"]["params"]["lr"] == 1.6 and config["scheduler"]["params"]["warmup_num_steps"] == 1560
    assert "fp16" not in config and config["zero_optimization"]["stage"] == 2 and config["lbsgd"]["epochs"] == 30
    assert config["gradient_accumulation_steps"] == 4096 // (4 * 32)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (f"--from {EIGHT_K} --gpus 8", "give --from, --for and --gpus together"),
        ("--for transformers --gpus 8", "give --from, --for and --gpus together"),
        (f"--from {EIGHT_K} --for transformers", "give --from, --for and --gpus together"),
        ("--parts --global_batch 256", "give --from, --for and --gpus together"),
        (f"--from {EIGHT_K} --for transformers --gpus 96", "256 workers"),
        ("--from no.json --for transformers --gpus 8", "no.json"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["config", *shlex.split(arguments), "--output", "out.json"]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_unknown_library_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--for", "keras", str(EIGHT_K)])
    assert "invalid choice: 'keras'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'keras' is none of the libraries transformers, accelerate"):
        needs_of(Plan.read(EIGHT_K, 8), "keras")


# --- check -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", rules_of(clashes), ids=lambda rule: rule.code)
def test_an_example_triggers_its_code_and_no_other_rule_of_a_library(rule):
    base = {library: needs_of(Plan.read(EIGHT_K, 8), library).config for library in LIBRARIES}
    found = {library: set(codes(merged(base[library], rule.example), library)) for library in LIBRARIES}
    ours = {library: {code for code in of if code[0] == "L"} - {"L07"} for library, of in found.items()}
    if rule.code == "L07":
        assert {library for library in LIBRARIES if "L07" in found[library]} == set(LIBRARIES) - {"deepspeed"}
        assert not any(ours.values())
    else:
        assert set().union(*ours.values()) - {"L04"} == {rule.code} - {"L04"} and any(
            rule.code in of for of in ours.values()
        )


@pytest.mark.parametrize(
    "library, expected", [("transformers", ["L01"]), ("accelerate", ["L01"]), ("lightning", []), ("deepspeed", [])]
)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_as_it_is_would_fail_in_hugging_faces_libraries(path, library, expected):
    findings = in_library(inspect(str(path)), library).findings
    refused = [*paths_to_auto(read_json(path)["lbsgd"])] if library in ("transformers", "accelerate") else []
    errors = [finding.code for finding in findings if finding.severity == "error"]
    assert errors == [*expected, *["L04"] * len(refused)]


def test_on_the_right_number_of_processes_is_said(capsys):
    assert main(["check", "--for", "transformers", str(EIGHT_K)]) == 1
    assert "transformers takes 1: 8192 = 32 x 1 x N holds on 256 processes only" in capsys.readouterr().out


@pytest.mark.parametrize("key, expected", [("lbsgd.epochs", ["R12"]), ("lbsgd", ["D29", "R12"]), ("lbsgd.purpose", [])])
def test_no_library_is_said_to_fill_in_an_auto_of_the_lbsgd_block(key, expected):
    config = read_json(EIGHT_K)
    put(config, key, "auto")
    assert [finding.code for finding in findings_of(config) if finding.severity == "error"] == expected


def test_for_a_library_its_own_rule_of_auto_replaces_the_general_one():
    config = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
              "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 1}}  # fmt: skip
    assert "D21" in [finding.code for finding in findings_of(config)]
    found = {library: codes(config, library) for library in ("transformers", "lightning")}
    assert not any("D21" in each for each in found.values())
    assert [code for code in found["transformers"] if code[0] == "L"] == ["L05", "L07"]
    assert [code for code in found["lightning"] if code[0] == "L"] == ["L02", "L04", "L04", "L04", "L07"]


def test_a_file_that_cannot_be_read_keeps_its_finding(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    assert [finding.code for finding in in_library(inspect(str(tmp_path / "bad.json")), "transformers").findings] == [
        "J01"
    ]


def test_a_folder_is_checked_for_a_library_too(tmp_path, capsys):
    write_json(tmp_path / "a.json", {"train_batch_size": 8, "gradient_clipping": 0.0})
    assert main(["check", "--for", "accelerate", "--json", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)["files"][0]["findings"]
    assert [each["code"] for each in found if each["code"][0] == "L"] == ["L03", "L07"]


# --- the parts, without a library ------------------------------------------------------------------------------------


class BareTrainer:
    """The part of transformers.Trainer that the mixin builds on."""

    def __init__(self, model, args, train_dataset, optimizers=(None, None)):
        self.model, self.args, self.train_dataset = model, args, train_dataset
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs, self.state, self.data_collator = None, SimpleNamespace(global_step=0), None

    def _get_collator_with_removed_columns(self, data_collator, description):
        return data_collator

    def training_step(self):
        return [group["lr"] for group in self.optimizer.param_groups]


@dataclass
class Scheduled:
    """The arguments of transformers for optimizer, schedule, resume and processes, with its defaults."""

    optim: str = "adamw_torch"
    adam_beta1: float = 0.9
    weight_decay: float = 0.0
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    data_seed: int | None = None
    ignore_data_skip: bool = False
    world_size: int = 1
    deepspeed: str | None = None


class OurTrainer(LargeMinibatchTrainer, BareTrainer):
    pass


def trainer(optimizers=(None, None), **changed):
    plan = Plan.read(recipe(), 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    arguments = needs_of(plan, "transformers", parts=True).arguments | changed
    loading = dict(dataloader_num_workers=0, dataloader_pin_memory=False, process_index=0)
    loading |= dict(dataloader_persistent_workers=False, dataloader_prefetch_factor=None)
    args = Scheduled(**{name: arguments.pop(name) for name in vars(Scheduled()) if name in arguments})
    vars(args).update(arguments | loading)
    return OurTrainer(model, args, range(plan.num_images), optimizers=optimizers, plan=plan)


def test_an_update_that_overflow_skipped_shifts_no_later_learning_rate_of_the_trainers():
    ours = trainer()
    ours.create_optimizer()
    scheduler = ours.create_scheduler(num_training_steps=20)
    schedule = ours.plan.schedule
    assert ours.training_step() == [learning_rate(0, schedule)] * 2
    ours.optimizer.step(), scheduler.step()
    ours.state.global_step = 4  # it counted three updates for which it did not step the scheduler
    assert ours.training_step() == [learning_rate(4, schedule)] * 2 != [learning_rate(1, schedule)] * 2
    assert scheduler.get_last_lr() == [learning_rate(4, schedule)] * 2


def test_each_training_of_the_trainer_begins_without_momentum():
    ours = trainer()
    first = ours.create_optimizer()
    assert ours.create_optimizer() is first
    ours.optimizer = None  # as when train() is called again
    assert ours.create_optimizer() is not first
    assert ours.create_scheduler(num_training_steps=20).optimizer is ours.optimizer


def test_the_loader_takes_the_epoch():
    ours = trainer()
    ours.data_collator = list
    loader = ours.get_train_dataloader()
    first = [image for batch in loader for image in batch]
    loader.set_epoch(1)
    second = [image for batch in loader for image in batch]
    assert first == epoch_order(len(first), 0, 0).tolist() and second == epoch_order(len(first), 0, 1).tolist()


@pytest.mark.parametrize(
    "name, value",
    [
        ("gradient_accumulation_steps", 2),
        ("per_device_train_batch_size", 4),
        ("max_grad_norm", 1.0),
        ("fp16", True),
        ("seed", 3),
    ],
)
def test_arguments_that_are_not_the_plans_are_refused_before_training(name, value):
    with pytest.raises(ConfigError, match=f"^TrainingArguments has {name}={value}; the plan needs {name}="):
        trainer(**{name: value}).create_optimizer()


@pytest.mark.parametrize(
    "name, value",
    [
        ("optim", "adafactor"),
        ("adam_beta1", 0.5),
        ("weight_decay", 0.5),
        ("learning_rate", 7.0),
        ("lr_scheduler_type", "cosine"),
        ("warmup_steps", 50),
        ("data_seed", 7),
    ],
)
def test_arguments_of_another_optimizer_schedule_or_shuffle_are_refused(name, value):
    said = f"^TrainingArguments has {name}={value!r}, and the plan makes optimizer, schedule and shuffle; leave it out$"
    with pytest.raises(ConfigError, match=said):
        trainer(**{name: value}).create_optimizer()


def test_arguments_that_say_the_same_as_the_plan_are_accepted():
    plan = trainer().plan
    trainer(**needs_of(plan, "transformers").arguments).create_optimizer()  # what lbsgd prints without the parts
    same = dict(learning_rate=plan.schedule.reference_lr, optim="sgd", data_seed=plan.recipe.seed)
    trainer(**same, weight_decay=plan.config["optimizer"]["params"]["weight_decay"]).create_optimizer()


@pytest.mark.parametrize("optimizers", [("adam", None), (None, "cosine")])
def test_an_optimizer_beside_the_plans_is_refused(optimizers):
    with pytest.raises(ConfigError, match="^the plan makes optimizer and schedule: leave out optimizers"):
        trainer(optimizers=optimizers)


@pytest.mark.parametrize("dataset", [None, iter([1, 2])])
def test_data_without_a_length_are_one_line(dataset):
    ours = trainer()
    ours.train_dataset = dataset
    with pytest.raises(ConfigError, match="^train_dataset is missing or has no length"):
        ours.create_optimizer()


def test_fewer_epochs_do_not_move_the_schedule():
    trainer(num_train_epochs=1).create_optimizer()


def test_data_of_another_size_are_refused():
    ours = trainer()
    ours.train_dataset = range(100)
    with pytest.raises(ConfigError, match="^train_dataset has 100 images and the plan 128"):
        ours.create_optimizer()


def test_parts_are_for_the_processes_that_are_there():
    with pytest.raises(
        ConfigError, match="^the plan is for 2 processes, and torch.distributed knows of 1; read the plan"
    ):
        lbsgd.parts_for(nn.BatchNorm2d(3), Plan.read(recipe(), 2))


@pytest.mark.parametrize("num_images", [127, 1_281_167])
def test_parts_for_data_of_another_size_are_refused(num_images):
    words = f"^the training data has {num_images:,} images and the plan 128; give Plan.read the size of the data$"
    with pytest.raises(ConfigError, match=words):
        lbsgd.parts_for(nn.BatchNorm2d(3), Plan.read(recipe(), 1), num_images=num_images)


def test_parts_follow_the_plan():
    config = recipe(momentum={"form": "lr_inside", "correction": False}, micro_batch=16)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plan = Plan.read(config, 1)
    optimizer, scheduler, sampler = lbsgd.parts_for(model, plan, num_images=128)
    assert (optimizer.form, optimizer.correction) == ("lr_inside", False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert (model[1].per_worker_batch, model[1].passes) == (8, 4) and len(sampler) == 8
    assert scheduler.schedule == plan.schedule and sampler.sampler is sampler
