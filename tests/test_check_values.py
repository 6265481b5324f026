"""`lbsgd check` judges a value as DeepSpeed reads it, and lets no nonsense reach a plan or a run."""

import copy
import inspect
import json

import hjson
import pytest
from deepspeed import DeepSpeedEngine
from edited_jsons import edited
from test_check import errors

from lbsgd.config.accepted.schema import accepted
from lbsgd.config.checks.deepspeed_switches import OF_OPTIMIZER, OF_SCHEDULER
from lbsgd.config.checks.deepspeed_values import OF_MUON
from lbsgd.config.checks.in_library import in_library
from lbsgd.config.checks.inspection import as_hjson, corrected, findings_of
from lbsgd.config.checks.inspection import inspect as inspect_file
from lbsgd.config.keypath import put
from lbsgd.config.plan import Plan
from lbsgd.config.schema import Recipe
from lbsgd.errors import ConfigError

PLAIN = {"train_batch_size": 8, "gradient_clipping": 0.0, "timers": {"throughput": {"enabled": False}}}
NVME = {"device": "nvme", "nvme_path": "/local_nvme"}
SGD = {"type": "SGD", "params": {"lr": 0.1}}


def with_value(config, key, value):
    """A copy with a value at a key path; missing blocks are added."""
    config = copy.deepcopy(config)
    put(config, key, value) if value is not None else put(config, key, NULL)
    return json.loads(json.dumps(config).replace(json.dumps(NULL), "null"))


NULL = "null, which put would delete"


def found(config, key):
    """Code and severity of all findings about a key."""
    return [(each.code, each.severity) for each in findings_of(config) if each.key == key]


@pytest.mark.parametrize(
    "base, key, value, code",
    [
        ("8k", "fp16.fp16_master_weights_and_grads", 0, None),
        ("8k", "fp16.fp16_master_weights_and_grads", "off", None),
        ("8k", "fp16.fp16_master_weights_and_grads", 1, "D36"),
        ("8k", "fp16.fp16_master_weights_and_grads", "maybe", "D70"),
        ("8k", "fp16.auto_cast", 1, None),
        ("8k", "fp16.auto_cast", "yes", None),
        ("8k", "fp16.auto_cast", 0, "D12"),
        ("8k", "fp16.auto_cast", None, "D70"),
        ("8k", "managed_gradient_accumulation", 1, None),
        ("8k", "managed_gradient_accumulation", 0, "D23"),
        ("8k", "managed_gradient_accumulation", "false", "D27"),
        ("8k", "zero_allow_untested_optimizer", 1, None),
        ("8k", "zero_allow_untested_optimizer", 0, "D18"),
        ("8k", "zero_allow_untested_optimizer", "no", "D27"),
        ("8k", "gradient_allreduce_op", "MEAN", None),
        ("8k", "gradient_allreduce_op", "Sum", "D05"),
        ("8k", "gradient_allreduce_op", "median", "D70"),
        ("digits", "communication_data_type", "fp32", None),
        ("digits", "communication_data_type", "FP32", None),
        ("digits", "communication_data_type", "BF16", "D22"),
        ("8k_zero2", "prescale_gradients", None, None),
        ("8k_zero2", "prescale_gradients", True, "D34"),
    ],
)
def test_a_value_is_called_what_it_is_to_deepspeed(base, key, value, code):
    codes = [each for each, _ in found(with_value(edited(base), key, value), key)]
    assert codes[:1] == ([code] if code else []), codes


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("dump_state", "false", 'is "false", and DeepSpeed takes it for true'),
        ("disable_allgather", [], "is [], and DeepSpeed takes it for false"),
        ("checkpoint.use_node_local_storage", 2, "is 2, and DeepSpeed takes it for true"),
        ("flops_profiler.detailed", "", 'is "", and DeepSpeed takes it for false'),
        ("optimizer.params.fused", "no", 'is "no", and DeepSpeed takes it for true'),
        ("fp16.enabled", "off", 'is "off", and DeepSpeed takes it for false'),
        ("torch_autocast.enabled", "off", 'is "off", and DeepSpeed takes it for true'),
    ],
)
def test_a_switch_says_what_deepspeed_takes_it_for(key, value, words):
    for base, severity in ((edited(), "error"), ({**PLAIN, "optimizer": SGD}, "warning")):
        [finding] = [each for each in findings_of(with_value(base, key, value)) if each.code == "D27"]
        assert (finding.key, finding.message, finding.severity) == (key, words, severity)


@pytest.mark.parametrize(
    "key, value",
    [
        ("gradient_clipping", False),
        ("gradient_accumulation_steps", True),
        ("fp16.initial_scale_power", True),
        ("zero_optimization.sub_group_size", True),
        ("zero_optimization.stage3_max_live_parameters", False),
        ("optimizer.params.weight_decay", False),
        ("train_batch_size", True),
        ("steps_per_print", True),
        ("optimizer.params.lr", True),
        ("zero_optimization.stage", True),
    ],
)
def test_true_or_false_for_a_number_is_told(key, value):
    plain = {**PLAIN, "optimizer": SGD, "zero_optimization": {"stage": 1}}
    [told] = [each for each in findings_of(with_value(plain, key, value)) if (each.code, each.key) == ("D62", key)]
    said = f"is {str(value).lower()}, and DeepSpeed takes it for {int(value)}"
    assert (told.message, told.severity) == (said, "warning")
    assert "error" in [severity for _, severity in found(with_value(edited(), key, value), key)]
    assert "D62" not in dict(found(with_value(plain, key, int(value)), key))


def test_true_or_false_in_a_switch_or_a_text_is_right_and_a_refused_one_is_told_once():
    scheduler = {"type": "WarmupLR", "params": {"warmup_type": True}}
    config = {**PLAIN, "optimizer": SGD, "scheduler": scheduler, "wall_clock_breakdown": True}
    assert "D62" not in [each.code for each in findings_of(with_value(config, "optimizer.params.nesterov", True))]
    assert found(with_value(config, "fp16.loss_scale", True), "fp16.loss_scale") == [("D70", "error")]


@pytest.mark.parametrize("value", [True, False, 0, 1, 1.0, None])
def test_a_switch_that_is_clear_is_no_finding(value):
    assert found(with_value(edited(), "dump_state", value), "dump_state") == []


@pytest.mark.parametrize(
    "key, value, code",
    [
        ("aio.block_size", "1MB", "D70"),
        ("aio.queue_depth", 0.5, "D70"),
        ("activation_checkpointing.number_checkpoints", -1, "D70"),
        ("data_efficiency.data_sampling.num_workers", "abc", "D70"),
        ("data_efficiency.seed", 10**30, "D70"),
        ("flops_profiler.top_modules", "abc", "D97"),
        ("flops_profiler.profile_step", "abc", "D97"),
        ("zero_optimization.reduce_bucket_size", 10**12, "D70"),
        ("steps_per_print", 10**30, "D24"),
        ("gradient_predivide_factor", None, "D63"),
        ("gradient_predivide_factor", 1e30, "D63"),
        ("optimizer.params.momentum", 1, "R05"),
        ("optimizer.params.weight_decay", 1e30, "R05"),
        ("fp16.initial_scale_power", 64, "D78"),
        ("fp16.initial_scale_power", -(10**30), "D78"),
        ("fp16.loss_scale", 1e30, "D78"),
        ("fp16.loss_scale", 1e-30, "D78"),
        ("fp16.loss_scale", "nan", "D78"),
        ("fp16.hysteresis", 0, "D78"),
        ("fp16.hysteresis", 10**30, "D78"),
        ("fp16.min_loss_scale", 2**16 + 1, "D78"),
        ("lbsgd.augmentation.resolution", 10**5, "R12"),
    ],
)
def test_a_value_that_would_end_the_run_is_an_error_that_names_its_key(key, value, code):
    assert (code, "error") in found(with_value(edited(), key, value), key)


@pytest.mark.parametrize(
    "key, value",
    [
        ("aio.block_size", 1048576),
        ("zero_optimization.reduce_bucket_size", 10**9),
        ("optimizer.params.momentum", 0.999),
        ("fp16.initial_scale_power", 32),
        ("fp16.loss_scale", 128),
        ("fp16.hysteresis", 1),
        ("fp16.min_loss_scale", 2**16),
        ("gradient_predivide_factor", 8),
    ],
)
def test_a_value_that_can_be_used_is_no_error(key, value):
    assert errors(with_value(edited(), key, value)) == []


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e12}}}, "optimizer.params.lr"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 10**30]}}}, "optimizer.params.betas"),
        ({"optimizer": {"params": {"lr": 1e12}}}, None),  # an unused block
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 10**30}}}, None),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 10**400}}}, "scheduler.params.step_size"),
        ({"zero_optimization": {"stage": 0, "reduce_bucket_size": 10**13}}, None),  # stage 0 has no such bucket
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 10**13}}, "zero_optimization.reduce_bucket_size"),
        ({"aio": {"block_size": "1MB"}}, None),
        (
            {"aio": {"block_size": "1MB"}, "zero_optimization": {"stage": 3, "offload_param": NVME}},
            "aio.block_size",
        ),
        ({"fp16": {"enabled": True, "hysteresis": 0}, "zero_optimization": {"stage": 1}}, None),
    ],
)
def test_a_plain_number_is_refused_where_deepspeed_computes_with_it(changes, refused):
    found = [each for each in findings_of({**PLAIN, **changes}) if each.severity == "error"]
    assert [(each.code, each.key) for each in found] == ([("D70", refused)] if refused else [])


def test_a_batch_below_one_worker_is_told_one_number_that_fits():
    config = edited(train_batch_size=1, train_micro_batch_size_per_gpu=1)
    assert [each.fix for each in findings_of(config) if each.code == "R02"] == [
        "k = kn/n workers must be whole: use 32"
    ]


# --- the sweep --------------------------------------------------------------------------------------------------------

NONSENSE = ("abc", "", -1, 1e30, 10**30, [], {}, "1e-3", float("nan"))
UNHARMED = {  # nonsense that harms no run
    "fp16.loss_scale_window": [10**30],  # the scale never rises
    "fp16.loss_scale": ["1e-3"],  # DeepSpeed reads it as a number
    "lbsgd.purpose": ["abc", "1e-3"],
    "lbsgd.decay.epochs": [[]],
    "data_types.keep_in_fp32_modules": [[]],
    "torch_autocast.lower_precision_safe_modules": ["abc", "", [], {}, "1e-3"],  # the block is off
    "zero_optimization.allgather_bucket_size": [10**30],  # all weights are gathered at once
    "flops_profiler.profile_step": [-1, 1e30, 10**30, float("nan")],  # never reached by an update
    "flops_profiler.module_depth": [-1],  # all depths
    "flops_profiler.top_modules": [-1, 10**30],
    "flops_profiler.recompute_fwd_factor": [-1, 1e30, 10**30, float("nan")],  # only changes a number that is printed
    "flops_profiler.output_file": ["abc", "", [], {}, "1e-3"],  # an empty name means no file
}


def leaves(config, path=""):
    """Key paths of all values that are not blocks."""
    for key, value in config.items():
        yield from leaves(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}"]


def swept():
    """Key paths of the shipped file, of the lbsgd block, and of the blocks that DeepSpeed reads key by key."""
    whole = json.loads(Recipe.model_validate(edited()["lbsgd"]).model_dump_json())
    unchecked = [key for key, taken in accepted().keys.items() if not taken and key.partition(".")[0] not in LEFT_OUT]
    return sorted({*leaves(edited()), *(f"lbsgd.{key}" for key in leaves(whole)), *unchecked})


LEFT_OUT = ("autotuning", "expert_parallel", "optimizer", "scheduler")  # D40; its own checks, if enabled; above


@pytest.mark.parametrize("key", swept())
def test_nonsense_passes_neither_check_nor_plan(key):
    passed = []
    for value in NONSENSE:
        config = with_value(edited(), key, value)
        wrong = errors(config)
        try:
            Plan.read(config, 256)
            passed.append(value)
            assert not wrong, (value, wrong)
        except ConfigError as error:
            assert wrong and key.rpartition(".")[0] in str(error), value
        corrected(config)
    assert json.dumps(passed) == json.dumps(UNHARMED.get(key, [])), key


# --- what DeepSpeed ignores in silence -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block, values",
    [
        ("torch_autocast", {"dtype": "bfloat16"}),
        ("fp16", {"loss_scale": 0, "initial_scale_power": 16}),
        ("bf16", {"check_grad_overflow": True}),
        ("bfloat16", {"check_grad_overflow": True}),
    ],
)
def test_a_precision_that_nobody_switched_on_is_told(block, values):
    assert ("D98", "warning") in found({**PLAIN, "optimizer": SGD, block: values}, block)
    assert found({**PLAIN, "optimizer": SGD, block: {**values, "enabled": False}}, block) == []
    ours = edited(zero_optimization={"stage": 0}, fp16=None) | {block: values}
    assert ("D98", "error") in found(ours, block)


def test_a_leftover_block_beside_the_precision_that_is_on_is_no_mistake():
    autocast = {"enabled": True, "dtype": "bfloat16"}
    assert found({**PLAIN, "optimizer": SGD, "fp16": {"loss_scale": 0}, "torch_autocast": autocast}, "fp16") == []


def test_a_misspelt_key_of_autocast_is_told_in_plain_deepspeed_too():
    config = {**PLAIN, "optimizer": SGD, "torch_autocast": {"enabled": True, "dtyp": "bfloat16"}}
    assert found(config, "torch_autocast") == [("D28", "warning")]


@pytest.mark.parametrize(
    "sent_as, scaled, told",
    [
        ("fp16", False, True),
        ("FP16", False, True),
        ("fp16", True, False),
        ("fp16", "auto", False),
        ("bf16", False, False),
    ],
)
def test_unscaled_gradients_that_are_sent_in_float16_are_told_in_plain_deepspeed_too(sent_as, scaled, told):
    config = {**PLAIN, "optimizer": SGD, "communication_data_type": sent_as, "fp16": {"enabled": scaled}}
    assert found(config, "communication_data_type") == [("D22", "warning")] * told


@pytest.mark.parametrize(
    "key, switch",
    [
        ("optimizer.params.maximize", "false"),
        ("optimizer.params.nesterov", "no"),
        ("scheduler.params.cycle_momentum", "false"),
    ],
)
def test_a_text_in_the_place_of_an_argument_that_is_a_switch_is_told(key, switch):
    config = {**PLAIN, "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
    if key.startswith("scheduler"):
        config["scheduler"] = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}}
    assert found(with_value(config, key, switch), key) == [("D27", "warning")]
    assert found(with_value(config, key, False), key) == []


def test_the_switches_are_all_arguments_of_torch_and_deepspeed_whose_default_is_one():
    import deepspeed.ops.adagrad
    import deepspeed.ops.adam
    import deepspeed.ops.lamb
    import deepspeed.ops.lion
    from deepspeed.runtime import lr_schedules
    from torch import optim

    def switches(*modules):
        classes = {each for module in modules for each in vars(module).values() if inspect.isclass(each)}
        made = [each for each in classes if "torch" in each.__module__ or "deepspeed" in each.__module__]
        parameters = [each for kind in made for each in inspect.signature(kind.__init__).parameters.values()]
        return {each.name for each in parameters if isinstance(each.default, bool)}

    ops = deepspeed.ops.adam, deepspeed.ops.lion, deepspeed.ops.lamb, deepspeed.ops.adagrad
    known = {*OF_OPTIMIZER, "adamw_mode", "overlap_step", "offload"}  # the last three are no arguments of a JSON
    assert switches(optim, *ops) <= known
    assert switches(optim.lr_scheduler, lr_schedules) <= {*OF_SCHEDULER, "step_size"}


def test_an_argument_that_muon_ignores_is_told_with_the_one_that_is_meant():
    config = {**PLAIN, "optimizer": {"type": "Muon", "params": {"lr": 0.01, "weight_decy": 0.1}}}
    (finding,) = [each for each in findings_of(config) if each.code == "D67"]
    assert finding.key == "optimizer.params.weight_decy" and finding.fix == "did you mean weight_decay?"
    assert OF_MUON >= {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS}


def test_findings_are_unique():
    config = {**PLAIN, "optimizer": {"type": "AdamW", "Params": {"lr": 0.1}}, "scheduler": {"parms": {}}}
    for each in (config, edited() | {"scheduler": {**edited()["scheduler"], "parms": {}}}):
        keys = [(finding.code, finding.key) for finding in findings_of(each)]
        assert len(keys) == len(set(keys))


# --- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float16"])
def test_gradients_of_float32_weights_are_not_added_up_in_16_bits_beside_an_lbsgd_block(dtype):
    config = edited(fp16=None, data_types={"grad_accum_dtype": dtype}, lbsgd__aggregation=None)
    assert ("D35", "error") in found(config, "data_types.grad_accum_dtype")


def test_an_offload_needs_its_folder_and_zero():
    def offloading(stage, name, **device):
        zero = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 1000, name: device}
        return {**PLAIN, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}, "zero_optimization": zero}

    key = "zero_optimization.offload_param.nvme_path"
    assert found(offloading(3, "offload_param", device="nvme"), key) == [("D99", "error")]
    assert found(offloading(3, "offload_param", device="nvme", nvme_path="/nvme"), key) == []
    key = "zero_optimization.offload_optimizer"
    assert found(offloading(0, "offload_optimizer", device="cpu"), key) == [("D66", "warning")]
    assert found(offloading(2, "offload_optimizer", device="cpu"), key) == []


@pytest.mark.parametrize("kind, params", [("RMSprop", {}), ("Lamb", {}), ("AdamW", {"torch_adam": True})])
def test_an_optimizer_that_is_not_built_for_the_cpu_may_stand_beside_an_offload_at_stage_0(kind, params):
    optimizer = {"type": kind, "params": {"lr": 0.001, **params}}
    zero = {"stage": 0, "offload_optimizer": {"device": "cpu"}}
    assert "D66" not in {
        each.code for each in findings_of({**PLAIN, "optimizer": optimizer, "zero_optimization": zero})
    }


@pytest.mark.parametrize("least, expected", [(0, [("D74", "error")]), (0.1, [])])
def test_a_warmup_down_to_0_moves_the_weights_and_one_from_0_to_0_does_not(least, expected):
    warm = {"warmup_min_lr": least, "warmup_max_lr": 0, "warmup_num_steps": 10, "warmup_type": "linear"}
    config = {**PLAIN, "optimizer": SGD, "scheduler": {"type": "WarmupLR", "params": warm}}
    assert found(config, "scheduler.params.warmup_max_lr") == expected


@pytest.mark.parametrize("name, meant", [("steplr", "StepLR"), ("warmuplr", "WarmupLR"), ("StepLr", "StepLR")])
def test_a_scheduler_of_another_case_is_corrected(name, meant):
    params = {"step_size": 30} if meant == "StepLR" else {}
    config = {**PLAIN, "optimizer": SGD, "scheduler": {"type": name, "params": params}}
    assert corrected(config)["scheduler"]["type"] == meant


# --- a file ----------------------------------------------------------------------------------------------------------


def test_plain_deepspeed_reads_whole_floats_as_whole_numbers(tmp_path):
    """It uses hjson. A program that reads the file with Python's json sees floats."""
    path = tmp_path / "ds.json"
    warm = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 1000.0, "warmup_type": "linear"}
    path.write_text(json.dumps({**PLAIN, "optimizer": SGD, "scheduler": {"type": "WarmupLR", "params": warm}}))
    said = {each.code: each.severity for each in inspect_file(str(path)).findings}
    assert said["D46"] == "warning" and "error" not in said.values()
    for library, severity in (("deepspeed", "warning"), ("transformers", "error")):
        in_it = in_library(inspect_file(str(path)), library).findings
        assert {each.severity for each in in_it if each.code == "D46"} == {severity}
    cycle = {"max_lr": 0.1, "total_steps": 1000, "pct_start": 1.0}
    path.write_text(json.dumps({**PLAIN, "optimizer": SGD, "scheduler": {"type": "OneCycleLR", "params": cycle}}))
    errors = [each.key for each in inspect_file(str(path)).findings if each.severity == "error"]
    assert errors == ["scheduler.params.pct_start"]


def test_what_hjson_makes_of_numbers_is_what_deepspeed_s_parser_makes_of_them():
    for text in ("1e3", "5.0", "-2.0", "0.5", "1e22", "3", "9999999999.0", "10000000000.0"):
        ours, theirs = as_hjson(json.loads(text)), hjson.loads(f'{{"a": {text}}}')["a"]
        assert ours == theirs and type(ours) is type(theirs), text


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("decay.epochs", "10,20", 'lbsgd.decay.epochs is "10,20", and must be a list; write [10, 20] [R12]'),
        ("decay.epochs", "[10, 20", 'lbsgd.decay.epochs is "[10, 20", and must be a list; write [10, 20] [R12]'),
        ("epochs", "90", 'lbsgd.epochs is "90", and must be a whole number; write 90 [R12]'),
        ("warmup.epochs", "few", 'lbsgd.warmup.epochs is "few"; give a number [R12]'),
        ("epochs", "[30,60]", 'lbsgd.epochs is "[30,60]"; give a whole number [R12]'),
        ("epochs", "null", 'lbsgd.epochs is "null"; give a whole number [R12]'),
        ("epochs", "true", 'lbsgd.epochs is "true"; give a whole number [R12]'),
        ("epochs", "-3", 'lbsgd.epochs is "-3"; give a whole number [R12]'),
        ("warmup.epochs", "NaN", 'lbsgd.warmup.epochs is "NaN"; give a number [R12]'),
        ("decay.epochs", "3", 'lbsgd.decay.epochs is "3"; give a list [R12]'),  # within the warmup
        ("decay.epochs", [80, 30], "lbsgd.decay.epochs [80.0, 30.0] must ascend; correct it [R12]"),
        ("batch_norm.statistics", "recomputed", "lbsgd.batch_norm.statistics_images is needed with statistics"),
        ("decay.epochs", [3], "lbsgd.decay at epoch 3 is inside the 5 of warmup"),
    ],
)
def test_a_value_of_the_block_is_named_with_its_whole_key_and_the_form_it_should_have(key, value, said):
    config = edited()
    put(config, f"lbsgd.{key}", value)
    assert [str(each)[: len(said)] for each in findings_of(config) if each.code == "R12"] == [said]


def test_one_wrong_value_does_not_hide_how_another_is_written():
    config = edited(lbsgd__epochs="90", lbsgd__num_images="many", lbsgd__decay__epochs="30, 60")
    found = {each.key: each.fix for each in findings_of(config) if each.code == "R12"}
    assert found == {
        "lbsgd.epochs": "write 90", "lbsgd.num_images": "give a whole number", "lbsgd.decay.epochs": "write [30, 60]"
    }  # fmt: skip
