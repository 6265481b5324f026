"""`lbsgd check`: every trap is a finding with code, key, reason and fix. DeepSpeed really refuses each error."""

import copy
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from edited_jsons import WRONG, edited
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from locked import as_nobody
from rich.console import Console

from lbsgd.commands.check_screen import print_inspections
from lbsgd.commands.main import main
from lbsgd.commands.plan_figure import in_terminal, stretches
from lbsgd.config.accepted.schema import VERSIONS, accepted
from lbsgd.config.checks import inspection
from lbsgd.config.checks.inspection import Inspection, corrected, findings_of, inspect
from lbsgd.config.derive import NO_WARMUP
from lbsgd.config.json_file import read_json, write_json
from lbsgd.config.keypath import differences, get, put
from lbsgd.config.memory import NETWORKS, memory
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.config.prediction import predict, reduction_of
from lbsgd.config.traffic import Machines
from lbsgd.disk import is_stream
from lbsgd.errors import ConfigError

FOREIGN = Path(__file__).parent / "fixtures" / "foreign"
SHIPPED_FOLDER = Path(__file__).parent.parent / "ds_configs"
SHIPPED = sorted(SHIPPED_FOLDER.glob("**/*.json"))


def codes(config):
    return [finding.code for finding in findings_of(config)]


def errors(config):
    return [finding.code for finding in findings_of(config) if finding.severity == "error"]


# --- with an lbsgd block ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, code, key, words", WRONG, ids=[f"{row[1]}-{row[2]}" for row in WRONG])
def test_what_a_plan_refuses_is_a_finding(changes, code, key, words):
    if code == "F05":  # needs the number of GPUs
        return
    found = [finding for finding in findings_of(edited(**changes)) if (finding.code, finding.key) == (code, key)]
    assert len(found) == 1 and found[0].severity == "error" and found[0].fix
    assert all(word in str(found[0]) for word in words)


@pytest.mark.parametrize("lr, points", [(0.1, 17.93), (0.566, 2.48), (1.6, 0.53), (6.4, 0.31), (3.0, None)])
def test_a_wrong_learning_rate_says_what_it_cost_the_paper(lr, points):
    [finding] = [finding for finding in findings_of(edited(optimizer__params__lr=lr)) if finding.code == "R01"]
    assert finding.points == points and (points is None) == ("points" not in finding.message)


def test_corrected_files_are_as_they_should_be():
    """Each mistake in 8k.json that has one right answer is undone; the lbsgd block's intent is kept."""
    whole = read_json(FOREIGN.parent.parent.parent / "ds_configs/8k.json")
    undone = 0
    for changes, code, _, _ in WRONG:
        mended = corrected(edited(**changes))
        undone += mended == whole
        if errors(mended):
            assert errors(mended) == [error for error in errors(edited(**changes)) if error in errors(mended)], code
    assert undone >= 9
    sqrt = edited(lbsgd__linear_scaling={"rule": "sqrt"})
    assert get(corrected(sqrt), "optimizer.params.lr") == pytest.approx(0.1 * 32**0.5)
    assert get(corrected(sqrt), "lbsgd.linear_scaling.rule") == "sqrt"


@pytest.mark.parametrize(
    "key, value",
    [
        ("zero_optimization.overlap_comm", "maybe"),
        ("zero_optimization.allgather_bucket_size", -1),
        ("fp16.loss_scale", -5),
        ("fp16.initial_scale_power", "big"),
        ("communication_data_type", "float16"),
        ("tensorboard.enabled", "perhaps"),
    ],
)
def test_a_value_that_deepspeed_refuses_is_found_beside_an_lbsgd_block(key, value):
    config = edited()
    put(config, key, value)
    assert [(each.code, each.key) for each in findings_of(config) if each.severity == "error"] == [("D70", key)]
    with pytest.raises(ConfigError, match=key):
        Plan.read(config, 1)


@pytest.mark.parametrize(
    "key, value, code",
    [
        ("fp16.enabled", "maybe", "D27"),
        ("steps_per_print", "often", "D24"),
        ("zero_optimization.reduce_bucket_size", "large", "D51"),
        ("optimizer.params.momentum", "x", "R05"),
        ("gradient_predivide_factor", 0, "D63"),
        ("communication_data_type", "float32", "D61"),
    ],
)
def test_a_refused_value_is_one_error_where_another_rule_says_more(key, value, code):
    config = edited()
    put(config, key, value)
    assert [each.code for each in findings_of(config) if each.key == key] == [code]


# --- other people's ---------------------------------------------------------------------------------------------------

EXPECTED = {
    "trainer_zero3_auto": [],
    "cifar_tutorial": [],
    "imagenet_script_passes_sgd": [],
    "resnet_sgd_zero1": ["D18"],
    "lowercase_sgd": ["D06", "D18", "D33", "D47"],
    "bert_onebit_adam": ["D06"],
    "zero_of_2020": ["D33"],
    "elastic_cluster": ["D01", "D01", "D01", "D49"],
    "gpt_neox_style": ["D01", "D31"],
    "misspelt": ["D48"],
    "both_halves": ["D15", "D31", "D31", "D49"],
    "with_comments": [],
    "twice": ["J01"],
    "nothing_to_say": [],
}
WARNED = {
    "trainer_zero3_auto": {"D10"},
    "cifar_tutorial": {"D10", "D43"},
    "imagenet_script_passes_sgd": {"D08", "D39", "D73"},
    "resnet_sgd_zero1": {"D08", "D10", "D37", "D43", "D46"},
    "gpt_neox_style": {"D32"},
    "misspelt": {"D02", "D03", "D08", "D32"},
    "both_halves": {"D30", "D32"},
    "with_comments": {"J02"},
    "zero_of_2020": {"D03"},
}


@pytest.mark.parametrize("path", sorted(FOREIGN.glob("*.json")), ids=lambda path: path.stem)
def test_other_projects_files_have_exactly_the_findings_that_they_should(path):
    findings = inspect(str(path)).findings
    assert sorted(f.code for f in findings if f.severity == "error") == EXPECTED[path.stem]
    assert {f.code for f in findings if f.severity == "warning"} == WARNED.get(path.stem, set())
    assert all(f.key and f.message and f.fix for f in findings)
    assert len(EXPECTED) == len(list(FOREIGN.glob("*.json"))) >= 10


def test_a_file_with_nothing_to_say_has_no_finding_at_all_but_the_timer_that_is_on_by_default():
    [finding] = inspect(str(FOREIGN / "nothing_to_say.json")).findings
    assert (finding.code, finding.severity, finding.key) == ("D90", "note", "timers.throughput.enabled")
    silent = read_json(FOREIGN / "nothing_to_say.json") | {"timers": {"throughput": {"enabled": False}}}
    assert findings_of(silent) == ()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"D54": None}),  # WarmupLR alone never decays
        ({"scheduler": None}, {"D52": 1.1}),  # no warmup
        ({"optimizer.params.lr": 0.1, "scheduler": None}, {"D52": 1.1, "D53": 17.93}),
        ({"scheduler.params.warmup_max_lr": 0.566}, {"D53": 2.48, "D54": None}),
        ({"train_batch_size": 256, "optimizer.params.lr": 0.1, "scheduler": None}, {}),
        ({"optimizer.type": "AdamW", "optimizer.params.lr": 0.1, "scheduler": None}, {}),
    ],
)
def test_sgd_over_large_minibatches_is_told_what_the_paper_measured(changes, expected):
    rates = {"optimizer.params.lr": 3.2, "scheduler.params.warmup_max_lr": 3.2}
    config = with_changes({"train_batch_size": 8192, **rates, **changes})
    notes = {finding.code: finding.points for finding in findings_of(config) if finding.severity == "note"}
    assert {code: points for code, points in notes.items() if code in ("D52", "D53", "D54")} == expected


LAMB = {"type": "Lamb", "params": {"lr": 0.001}}
SGD = {
    "train_batch_size": 1,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_type": "linear"}},
    "timers": {"throughput": {"enabled": False}},
}
OFFLOADED = {"zero_optimization.offload_optimizer": {"device": "cpu"}}
IN_FP32 = {"data_types.grad_accum_dtype": "fp32"}
BF16_STATES = {"enabled": True, "bf16_optimizer_states": True}
REFUSED = [
    ("D01", {"elasticity": {}}),
    ("D01", {"nebula": {"enabled": False}}),
    ("D01", {"zero_optimization.mics_shard_size": 2}),
    ("D04", {"train_batch_size": "many"}),
    ("D49", {"train_batch_size": None}),
    ("D49", {"train_batch_size": 3, "train_micro_batch_size_per_gpu": 2}),
    ("D06", {"optimizer.type": "sgd"}),
    ("D06", {"optimizer.type": "OneBitAdam"}),
    ("D06", {"optimizer.type": "LARS"}),
    ("D15", {"fp16.enabled": True, "bf16.enabled": True}),
    ("D17", {"zero_optimization.stage": 4}),
    ("D18", {"zero_allow_untested_optimizer": None}),
    ("D26", {"scheduler.params.warmup_typ": "linear"}),
    ("D31", {"zero_optimization.bucket": 1}),
    ("D31", {"fp16.dtype": 1}),
    ("D31", {"compile.enabled": True}),
    ("D33", {"optimizer.params.max_grad_norm": 1.0}),
    ("D34", {"zero_optimization.stage": 2, "prescale_gradients": True}),
    ("D34", {"zero_optimization.stage": 2, "gradient_predivide_factor": 2.0}),
    ("D35", {"zero_optimization.stage": 0, "data_types.grad_accum_dtype": "bf16"}),
    ("D36", {"fp16.fp16_master_weights_and_grads": True, "fp16.enabled": True}),
    ("D45", {"scheduler.params": None}),
    ("D45", {"scheduler.type": "WarmupDecayLR"}),
    ("D46", {"scheduler.params.warmup_num_steps": 5.0}),
    ("D47", {"scheduler": {"type": "StepLR", "params": {"step_size": 9}}}),
    ("D48", {"scheduler.type": "WarmupLr"}),
    ("D29", {"scheduler": "WarmupLR"}),
    ("D77", {"data_types.param_dtype": "bf16"}),
    ("D77", {"bf16.enabled": True, "data_types.param_dtype": "fp32"}),
    ("D83", {"bf16.enabled": True, "data_types.buffer_dtype": "double"}),
    ("D78", {"fp16.enabled": True, "fp16.min_loss_scale": 0}),
    ("D78", {"fp16.enabled": True, "fp16.loss_scale_window": -1}),
    ("D79", {"zero_optimization": {"stage": 0, "compute_grad_norm": False}}),
    ("D79", {"zero_optimization": {"stage": 3, "compute_grad_norm": False}}),
    ("D80", {"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}}),
    ("D89", {"gradient_allreduce_op": "sum", "zero_optimization.stage": 3}),
    ("D89", {"gradient_allreduce_op": "SUM", "zero_optimization.stage": 3}),
    ("D89", {"gradient_allreduce_op": "sum", "zero_optimization.zenflow": {}}),
    ("D89", {"gradient_allreduce_op": "sum", "compile.deepcompile": True}),
    ("D96", {"managed_gradient_accumulation": False, "zero_optimization": {"stage": 1, "overlap_comm": "yes"}}),
    ("D96", {"managed_gradient_accumulation": False, "compile.deepcompile": True}),
    ("D34", {"prescale_gradients": True, "zero_optimization": {"stage": 2, "reduce_scatter": 1}}),
    ("D36", {"bf16": BF16_STATES, "zero_optimization.stage": 0}),
    ("D36", {"bf16": BF16_STATES}),
    ("D36", {"bf16.bf16_optimizer_states": True}),
    ("D36", {"bfloat16": BF16_STATES}),
    ("D36", {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}),
    ("D92", {"zero_optimization.zenflow": {}}),
    ("D93", {"data_efficiency.data_sampling.curriculum_learning.enabled": True}),
    ("D93", {"data_efficiency.data_sampling.dynamic_batching.enabled": True}),
    ("D93", {"data_efficiency.data_routing.random_ltd.enabled": True}),
    ("D95", {"zero_optimization.allgather_bucket_size": 3}),
    ("D95", {"zero_optimization": {"stage": 2, "allgather_bucket_size": "3"}}),
    ("D35", {"data_types.grad_accum_dtype": "x"}),
    ("D35", {"zero_optimization.stage": 3, "data_types.grad_accum_dtype": True}),
    ("D70", {"tensor_parallel.dtype": "fp16"}),
    ("D81", {"zero_optimization.zenflow": {"select_strategy": "x"}}),
    ("D81", {"zero_optimization.zenflow": {"select_interval": "5"}}),
    ("D81", {"zero_optimization.zenflow": {"update_interval": 0}}),
    ("D82", {"optimizer.params.fused": True, "optimizer.params.foreach": True}),
]
TAKEN = (
    {"bf16.enabled": True, "data_types.param_dtype": "bf16"},
    {"data_types.param_dtype": "float", "data_types.buffer_dtype": "double"},
    {"bf16.enabled": True, "data_types.buffer_dtype": "torch.float32"},
    {"fp16.enabled": True, "fp16.loss_scale": "128", "fp16.loss_scale_window": 500.0},
    {"fp16.enabled": True, "fp16.loss_scale_window": "1000", "fp16.min_loss_scale": 5.0},
    {"fp16.enabled": True, "fp16.loss_scale": 128, "fp16.loss_scale_window": 0, "fp16.min_loss_scale": 0},
    {"zero_optimization.leaf_module": {"classes": "a.B"}},
    {"zero_optimization": {"stage": 1, "leaf_module": None}},
    {"zero_optimization.compute_grad_norm": False},
    {"optimizer.params.fused": True},
    {"gradient_allreduce_op": "sum"},
    {"gradient_allreduce_op": "sum", "prescale_gradients": True, "zero_optimization": {"stage": 2}},
    {"gradient_allreduce_op": "sum", "gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 2}},
    {"gradient_allreduce_op": "sum", "gradient_predivide_factor": "2", "zero_optimization.stage": 0},
    {"bf16": BF16_STATES | {"bf16_master_weights_and_grads": True}},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "data_types.grad_accum_dtype": "fp32"},
    {"fp16.fp16_master_weights_and_grads": 0},
    {"zero_optimization": {"stage": 3, "allgather_bucket_size": 3}},
    {"data_types.grad_accum_dtype": "half"},
)


def with_changes(changes):
    config = copy.deepcopy(SGD)
    for key, value in changes.items():
        put(config, key, value)
    return config


@pytest.fixture
def plain_deepspeed(monkeypatch):
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    from lbsgd.train.engine import start_processes

    start_processes()
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)

    def initialize(config):
        model = torch.nn.Linear(4, 2)
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=copy.deepcopy(config))[0]

    return initialize


@pytest.mark.parametrize("code, changes", REFUSED, ids=[f"{code}-{'-'.join(changes)}" for code, changes in REFUSED])
def test_deepspeed_refuses_what_is_called_an_error(plain_deepspeed, code, changes):
    config = with_changes(changes)
    assert code in errors(config)
    # AssertionError, ValueError, TypeError, ValidationError, DeepSpeedConfigError ...
    with pytest.raises(Exception):  # noqa: B017  DeepSpeed has no base class for them
        plain_deepspeed(config)
    mended = corrected(config)
    if not errors(mended) and get(mended, "optimizer.type") == "SGD":  # DeepSpeed would compile its own Adam
        plain_deepspeed(mended)


@pytest.mark.parametrize("changes", TAKEN, ids=["-".join(changes) for changes in TAKEN])
def test_deepspeed_takes_what_is_called_no_error(plain_deepspeed, changes):
    assert errors(with_changes(changes)) == []
    plain_deepspeed(with_changes(changes))


@pytest.mark.parametrize(
    "changes, versions",
    [
        ({"data_types.param_dtype": "bf16"}, ["0.19"]),
        ({"fp16.enabled": True, "fp16.min_loss_scale": 0}, ["0.19"]),
        ({"fp16.enabled": True, "fp16.loss_scale_window": 0}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"zero_optimization.offload_optimizer": {"ratio": 0.5}}, ["0.16", "0.17", "0.18", "0.19"]),
        (OFFLOADED | {"zero_optimization.zenflow": {"update_interval": 0}}, ["0.16", "0.19"]),  # 0.16 knows no ZenFlow
        ({"zero_optimization.zenflow": {}}, ["0.16", "0.17", "0.18", "0.19"]),
        (OFFLOADED | {"zero_optimization.zenflow": {}}, ["0.16"]),
        ({"fp16.auto_cast": True}, ["0.17", "0.18", "0.19"]),
        ({"zero_optimization.allgather_bucket_size": 3}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"zero_optimization": {"stage": 3, "allgather_bucket_size": 3}}, []),
        ({"data_types.grad_accum_dtype": "x"}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"data_types.grad_accum_dtype": "int8"}, ["0.19"]),
        ({"zero_optimization": {"stage": 0}, "bf16.enabled": True, **IN_FP32}, ["0.18", "0.19"]),
        ({"zero_optimization": {"stage": 0}, "fp16.enabled": True, **IN_FP32}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"zero_optimization.stage": 3, "gradient_allreduce_op": "sum"}, ["0.19"]),
        ({"bf16": BF16_STATES}, ["0.17", "0.18", "0.19"]),
        ({"bf16": BF16_STATES | {"bf16_master_weights_and_grads": True}}, ["0.17"]),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, ["0.17", "0.18", "0.19"]),
        ({"data_efficiency.data_sampling.dynamic_batching.enabled": True}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"tensor_parallel.dtype": "fp16"}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"optimizer": LAMB, "fp16": {"enabled": True, "loss_scale": 128}}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"optimizer": LAMB, "fp16": {"enabled": False, "loss_scale": 128}}, ["0.17", "0.18", "0.19"]),
        ({"optimizer": LAMB, "bf16": {"enabled": True}}, ["0.16"]),
        ({"optimizer": {"type": "OneBitAdam", "params": {"max_iter": 5}}}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5.0}}}, ["0.19"]),
        ({"sparse_attention": {"mode": "bigbird"}}, ["0.19"]),
        ({"sparse_attention": {"mode": "squares"}}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"progressive_layer_drop": {"theta": 0.5}}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"progressive_layer_drop": {"enabled": False}}, ["0.19"]),
        ({"progressive_layer_drop": {"enabled": True, "theta": 0.5}}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"elasticity": {"enabled": 5, "max_train_batch_size": 100}}, ["0.16", "0.17", "0.18", "0.19"]),
        ({"elasticity": {"enabled": False, "max_train_batch_size": 100}}, ["0.19"]),
        ({"autotuning.enabled": [False]}, ["0.16", "0.17", "0.18", "0.19"]),
    ],
)
def test_a_refusal_is_that_of_its_versions(changes, versions):
    """Asked with tools/deepspeed_oracle.py and the sources of all four versions."""
    config = with_changes(changes)
    wrong = [v for v in VERSIONS if any(each.severity == "error" for each in findings_of(config, v))]
    assert wrong == versions


@pytest.mark.parametrize("version", VERSIONS)
def test_no_key_of_a_shipped_file_is_unknown_to_a_version(version):
    """0.16 reads the fp16 block key by key, and most keys only if it is enabled."""
    for path in SHIPPED:
        found = [(each.code, each.key) for each in findings_of(read_json(path), version)]
        assert not {"D02", "D03", "D32"} & {code for code, _ in found}, path
        later = {"data_types.keep_in_fp32_modules"} if version != "0.19" else set()
        later |= {"torch_autocast"} if version == "0.16" else set()
        assert {key for code, key in found if code == "D87"} <= later


@pytest.mark.parametrize(
    "changes, version, code, words",
    [
        ({"fp16": {"enabled": True, "hysteresys": 2}}, "0.16", "D32", "did you mean hysteresis?"),
        ({"bfloat16": {"enable": True}}, "0.16", "D32", "did you mean enabled?"),
        ({"expert_parallel": {"top_kk": 2}}, "0.19", "D32", "did you mean top_k?"),
        ({"expert_parallel": {"enabled": True, "top_k": 2}}, "0.19", None, ""),
        ({"expert_parallel": {"top_k": 2}}, "0.18", "D87", "use DeepSpeed 0.19 or newer"),
        ({"torch_autocast": {"enabled": True}}, "0.16", "D87", "use DeepSpeed 0.17 or newer"),
        ({"data_types": {"buffer_dtype": "fp16"}}, "0.17", "D87", "use DeepSpeed 0.19 or newer"),
        ({"zero_optimization": {"compute_grad_norm": True}}, "0.18", "D31", "use DeepSpeed 0.19 or newer"),
        ({"a.b": 1}, "0.16", "D03", "delete it"),
    ],
)
def test_a_key_that_a_later_version_reads_is_no_typing_error(changes, version, code, words):
    config = {"train_batch_size": 256, "gradient_clipping": 0.0, **changes}
    found = [each for each in findings_of(config, version) if each.code in ("D02", "D03", "D31", "D32", "D87")]
    assert [each.code for each in found] == [code] * bool(code)
    assert all(words in each.fix for each in found)


def test_bf16_sets_the_stage_at_which_gradients_are_reduced_in_float32():
    for name in ("8k", "8k_zero2"):
        overrides = Overrides(precision="bf16", settings=() if name == "8k" else ("lbsgd.aggregation=null",))
        plan = Plan.read(SHIPPED_FOLDER / f"{name}.json", 8, overrides=overrides)
        assert (plan.precision, plan.zero_stage, plan.warnings) == ("bf16", 0, ())
    settings = ("zero_optimization.stage=1",)  # applied after --precision
    plan = Plan.read(SHIPPED_FOLDER / "8k.json", 8, overrides=Overrides(precision="bf16", settings=settings))
    [warning] = plan.warnings
    assert plan.zero_stage == 1 and "zero_optimization.stage" in warning and "D88" in warning


def test_bf16_takes_what_stage_0_refuses_out_of_the_block():
    config = edited()
    config["zero_optimization"]["compute_grad_norm"] = False
    plan = Plan.read(config, 8, overrides=Overrides(precision="bf16"))
    assert "compute_grad_norm" not in plan.config["zero_optimization"]


@pytest.mark.parametrize(
    "autocast, stage, found",
    [
        ({"enabled": True, "dtype": "bfloat16"}, 1, True),
        ({"enabled": True, "dtype": "bfloat16"}, 2, True),
        ({"enabled": True, "dtype": "bfloat16"}, 0, False),
        ({"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}, 1, False),  # float32 everywhere
        ({"enabled": False, "dtype": "bfloat16"}, 1, False),
    ],
)
def test_zero_under_autocast_is_said(autocast, stage, found):
    config = edited(fp16=None, torch_autocast=autocast, zero_optimization__stage=stage)
    severities = {each.severity for each in findings_of(config) if each.code == "D88"}
    assert severities == ({"warning"} if found else set())
    plain = {each.severity for each in findings_of(without(config, "lbsgd")) if each.code == "D88"}
    assert plain == ({"note"} if found else set())
    assert "D88" not in {each.code for each in findings_of(without(config, "lbsgd"), "0.16")}


@pytest.mark.parametrize("key, value", [("sequence_parallel_size", 2), ("tensor_parallel.autotp_size", 2)])
@pytest.mark.parametrize("aggregation", [None, {"hierarchy": "auto"}])
def test_processes_that_share_a_network_or_a_sequence_are_refused_with_any_aggregation(key, value, aggregation):
    config = edited(lbsgd__aggregation=aggregation)
    put(config, key, value)
    assert errors(config) == ["D64"]
    with pytest.raises(ConfigError, match=key):
        Plan.read(config, 8)


MEASURED = "timers.throughput.enabled"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"timers": None}, [("D90", "note", MEASURED)]),
        ({"timers": {"throughput": {}}}, [("D90", "note", MEASURED)]),
        ({"timers": {"throughput": {"synchronized": False}}}, []),
        ({"timers": {"throughput": {"enabled": True, "synchronized": False}}}, []),
        ({"timers": {"throughput": {"enabled": True}}}, [("D39", "warning", MEASURED)]),
        ({"comms_logger": {"enabled": True}}, [("D39", "warning", "comms_logger.enabled")]),
        ({"comms_logger": {"enabled": False}}, []),
        ({"wall_clock_breakdown": True}, [("D39", "warning", "wall_clock_breakdown")]),
    ],
)
def test_what_makes_the_host_wait_is_found_where_it_is_on_by_default_too(changes, expected):
    found = [(each.code, each.severity, each.key) for each in findings_of(with_changes(changes))]
    assert [each for each in found if each[0] in ("D39", "D90")] == expected


@pytest.mark.parametrize(
    "changes, versions",
    [
        ({"bf16.enabled": True}, ["0.19"]),
        ({"bf16.enabled": True, "data_types.buffer_dtype": "bf16"}, []),
        ({"bf16.enabled": True, "data_types.buffer_dtype": "fp32"}, ["0.19"]),
        ({"bf16.enabled": True, "data_types": {"buffer_dtype": "bf16", "keep_in_fp32_modules": ["mean"]}}, ["0.19"]),
        ({"fp16.enabled": True, "data_types.buffer_dtype": "torch.float16"}, []),
    ],
)
def test_batch_norm_fails_in_the_versions_that_leave_its_statistics_in_float32(changes, versions):
    config = with_changes(changes)
    assert [v for v in VERSIONS if "D57" in {each.code for each in findings_of(config, v)}] == versions


def test_an_elastic_checkpoint_of_sgd_fails_only_when_it_is_loaded(plain_deepspeed, tmp_path):
    import torch

    config = with_changes({"zero_optimization.elastic_checkpoint": True})
    assert errors(config) == [] and "D37" in codes(config)
    for changes in (config, with_changes({})):
        engine = plain_deepspeed(changes)
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        engine.save_checkpoint(str(tmp_path))
        if "D37" in codes(changes):
            with pytest.raises(AssertionError):
                engine.load_checkpoint(str(tmp_path))
    assert engine.load_checkpoint(str(tmp_path))[0]


def test_deepspeed_takes_what_has_no_error(plain_deepspeed):
    assert codes(SGD) == ["D55"]  # a note: it is unused if the program passes an optimizer
    plain_deepspeed(SGD)
    assert errors(with_changes({"data_types.zzz": 1})) == []
    plain_deepspeed(
        with_changes({"data_types.zzz": 1, "optimizer.zzz": 1, "scheduler.zzz": 1, "zzz": 1})
    )  # D32, D03: silence


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_exit_code_says_whether_there_are_errors(capsys):
    assert main(["check", *map(str, sorted((FOREIGN.parent.parent.parent / "ds_configs").glob("**/*.json")))]) == 0
    assert "0 errors" in capsys.readouterr().out
    assert main(["check", str(FOREIGN / "lowercase_sgd.json")]) == 1
    assert main(["check", "no/such.json"]) == 2
    assert "no/such.json: cannot be read" in capsys.readouterr().err


def test_a_folder_is_the_deepspeed_jsons_in_it(tmp_path, capsys):
    assert main(["check", str(FOREIGN.parent.parent.parent / "ds_configs")]) == 0
    assert "40 files: 0 errors, 16 warnings" in capsys.readouterr().out
    assert main(["check", str(tmp_path)]) == 2 and "holds no .json file" in capsys.readouterr().err
    for name in ("node_modules", ".git", "environment", "inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ds.json").write_text(json.dumps({**SGD, "elasticity": {}}))
    (tmp_path / "environment" / "pyvenv.cfg").touch()
    (tmp_path / "inner" / "ds.json").write_text(json.dumps(SGD))
    for name, text in (("package", '{"name": "x"}'), ("list", "[1]"), ("broken", "{"), ("binary", "\0")):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "commented.json").write_text('{"train_batch_size": 8, // images\n}')
    (tmp_path / "theirs.json").write_text('{"name": "x"}', encoding="utf-16")
    os.mkfifo(tmp_path / "pipe.json")  # without a writer
    assert main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "inner/ds.json" in out and "commented.json" in out and "2 files" in out
    assert "5 other JSONs passed over: no DeepSpeed JSON" in out
    assert main(["check", str(tmp_path), "--deepspeed", "0.18..0.19"]) == 0
    assert "5 other JSONs passed over: no DeepSpeed JSON" in capsys.readouterr().out
    (tmp_path / "commented.json").unlink()
    (tmp_path / "inner" / "ds.json").unlink()
    assert main(["check", str(tmp_path)]) == 2 and "holds 5 JSONs, and none is DeepSpeed's" in capsys.readouterr().err


def test_a_version_is_chosen_and_stands_in_the_output(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**SGD, "elasticity": {"enabled": False}}))
    assert main(["check", str(path)]) == 1 and "plain DeepSpeed 0.19.8" in capsys.readouterr().out
    assert main(["check", str(path), "--deepspeed", "0.18"]) == 0 and "DeepSpeed 0.18.9" in capsys.readouterr().out
    assert main(["check", str(path), "--deepspeed", "0.18", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deepspeed"] == "0.18.9"


def test_a_range_of_versions_is_a_table_of_what_changes(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**without(SGD, "gradient_clipping"), "elasticity": {"enabled": False}, "time": 1}))
    assert main(["check", str(path), "--deepspeed", "0.16..0.19"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][1:] == ["DeepSpeed", "0.16.9,", "0.17.6,", "0.18.9,", "0.19.8"]
    assert ["D01", "elasticity", "-", "-", "-", "error"] in lines
    assert ["D08", "gradient_clipping", "-", "-", "-", "warning"] in lines
    assert not [line for line in lines if line[:1] == ["D03"]]  # the same in all versions
    assert main(["check", str(path), "--deepspeed", "0.16..0.18"]) == 0


@pytest.mark.parametrize("columns, listed", [(60, True), (100, False)])
def test_that_table_fits_the_terminal(tmp_path, capsys, monkeypatch, columns, listed):
    monkeypatch.setattr("lbsgd.report.lines.on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps({**SGD, "data_types": {"keep_in_fp32_modules": ["a"]}}))
    main(["check", "ds.json", "--deepspeed", "0.16..0.19"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert any("keep_in_fp32_modules: 0.16 " in line for line in lines) is listed


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--deepspeed", "0.15"], ["0.15", "known are 0.16"]),
        (["--deepspeed", ""], ["--deepspeed : known are 0.16"]),
        (["--deepspeed", "0.19..0.16"], ["runs backwards", "0.16..0.19"]),
        (["--deepspeed", "0.16..0.19", "--fix"], ["--fix", "one version"]),
        (["--deepspeed", "0.16..0.19", "--for", "accelerate"], ["--for", "one version"]),
    ],
)
def test_a_wrong_version_is_one_line(flags, words, capsys):
    assert main(["check", str(FOREIGN / "twice.json"), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words)


def without(config, key):
    return {name: value for name, value in config.items() if name != key}


def test_findings_for_machines_are_json(capsys):
    assert main(["check", "--json", *map(str, sorted(FOREIGN.glob("*.json")))]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == sum(map(len, EXPECTED.values())) and len(found["files"]) == len(EXPECTED)
    finding = next(each for file in found["files"] for each in file["findings"] if each["code"] == "D18")
    assert finding.keys() == {"severity", "code", "key", "message", "fix", "points"}


def test_fix_writes_the_corrected_file_and_says_what_changed(tmp_path, capsys):
    path = tmp_path / "theirs.json"
    path.write_text((FOREIGN / "resnet_sgd_zero1.json").read_text())
    assert main(["check", "--fix", str(path)]) == 0
    out = capsys.readouterr().out
    for line in (
        "scheduler.params.warmup_num_steps: 3125.0 -> 3125",
        "zero_allow_untested_optimizer: (none) -> true",
    ):
        assert line in out
    assert out.count("    fixed ") == 2  # no warning is corrected, because DeepSpeed takes these files
    left = sum(finding.severity == "warning" for finding in findings_of(read_json(path)))
    assert f"2 fixed, left: {left} warnings" in out and f"the file as it was in {path}.orig" in out
    assert errors(read_json(path)) == []
    assert (tmp_path / "theirs.json.orig").read_text() == (FOREIGN / "resnet_sgd_zero1.json").read_text()
    before = path.read_bytes()
    assert main(["check", "--fix", str(path)]) == 0 and path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_what_can_be_checked_is_and_what_cannot_is_told(tmp_path, capsys):
    good, gone = tmp_path / "good.json", tmp_path / "gone.json"
    good.write_text('{"train_batch_size": 256, "elasticity": null}')
    assert main(["check", str(gone), str(good)]) == 2
    said = capsys.readouterr()
    assert "D01" in said.out and said.err.startswith(f"error: {gone}: cannot be read") and said.err.count("\n") == 1
    assert main(["check", "--deepspeed", "0.18..0.19", str(good), str(gone)]) == 2
    said = capsys.readouterr()
    assert "1 finding the same in all" in said.out and said.err.startswith(f"error: {gone}: cannot be read")
    before = good.read_bytes()
    assert main(["check", "--fix", str(good), str(gone)]) == 2 and good.read_bytes() == before


@pytest.mark.parametrize(
    "text, message, fix",
    [
        ("", "is empty", "give a DeepSpeed JSON"),
        ("# nothing but a comment", "is no strict JSON in line 1, column 1 (", "correct it"),
        ('\ufeff{"lbsgd": {}}', "begins with a byte order mark", "save it without one"),
        ("[]", "holds no JSON object", "give a DeepSpeed JSON"),
        ('{"a": 1, "a": 2}', 'has the key "a" twice', "keep one"),
        ('{"lbsgd": {},\n"a": Infinity}', "has in line 2 Infinity, which is no strict JSON", "write a number"),
        ('{"lbsgd": {},}', "is no strict JSON in line 1, column 1", "correct it: strict JSON has no comments and"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence_and_one_fix(tmp_path, text, message, fix):
    path = tmp_path / "ds.json"
    path.write_text(text)
    [finding] = inspect(str(path)).findings
    assert (finding.code, finding.key) == ("J01", "file")
    assert finding.message.startswith(message) and finding.fix.startswith(fix)


@pytest.mark.parametrize(
    "key, fix",
    [
        ("warmpu", "did you mean warmup?"),
        ("warmup.epoch", "did you mean epochs?"),
        ("decay.zzz", "delete it; the keys there are epochs, factor, iterations"),
    ],
)
def test_an_unknown_key_in_the_block_is_answered_by_those_that_are_known_there(key, fix):
    config = read_json(SHIPPED_FOLDER / "8k.json")
    put(config["lbsgd"], key, 1)
    [finding] = [each for each in findings_of(config) if each.code == "R10"]
    assert finding.fix.startswith(fix)


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("profile_step", [1, 1.5, True, -1], [None, "3", [], {}]),
        ("module_depth", [0, -2, True], [None, 1.5, "1", []]),
        ("recompute_fwd_factor", [0.5, True], [None, "1", []]),
        ("output_file", [None, "", "x", 0, []], [True, 3]),
    ],
)
def test_a_value_that_ends_the_flops_profiler_is_an_error(name, good, bad):
    """Each was tried with DeepSpeed 0.19.8, in which bad values end the first updates with a TypeError."""
    for values, expected in ((good, 0), (bad, 1)):
        for value in values:
            config = {"train_batch_size": 4, "flops_profiler": {"enabled": True, name: value}}
            assert errors(config).count("D97") == expected, value
            config["flops_profiler"]["enabled"] = False
            assert "D97" not in errors(config)


def test_fix_deletes_a_key_that_is_null(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 256, "gradient_clipping": 0.0, "elasticity": null}')
    assert main(["check", "--fix", str(path)]) == 0
    assert "elasticity: null -> (none)" in capsys.readouterr().out
    assert "elasticity" not in read_json(path) and main(["check", str(path)]) == 0


@pytest.mark.parametrize(
    "text, after",
    [
        ('{"train_batch_size": 8, "gradient_clipping": "nan"}', "nan"),
        ('{"train_batch_size": 8, "gradient_clipping": "1e999"}', "1e999"),
        ('{"train_batch_size": 8, "gradient_clipping": 0.0, "gradient_predivide_factor": 0.0}', 0.0),
        ('{"train_batch_size": 8, "gradient_clipping": "0.5"}', 0.5),
    ],
)
def test_fix_writes_only_numbers_that_deepspeed_takes(tmp_path, text, after):
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert main(["check", "--fix", str(path)]) == (after != 0.5)
    assert list(read_json(path).values())[-1] == after and len(list(tmp_path.iterdir())) == 1 + (after == 0.5)


@pytest.mark.parametrize("number, word", [("1e999", "1e999"), ("-1e999", "-1e999"), ("1" * 5000, "5000 digits")])
def test_a_number_that_cannot_be_held_is_one_finding(tmp_path, number, word):
    path = tmp_path / "ds.json"
    path.write_text(f'{{"train_batch_size": 8, "weight_decay": {number}, "elasticity": {{}}}}')
    before = path.read_bytes()
    [finding] = inspect(str(path), fix=True).findings
    assert finding.code == "J01" and word in finding.message and path.read_bytes() == before


def test_fix_writes_through_a_symlink_keeps_the_mode_and_takes_no_file_of_others(tmp_path):
    path, real, theirs = tmp_path / "ds.json", tmp_path / "real.json", tmp_path / "ds.json.tmp"
    real.write_text(json.dumps({"train_batch_size": 8, "optimizer": {"type": "sgd"}}))
    real.chmod(0o600)
    path.symlink_to(real)
    for name in ("ds.json.tmp", "real.json.tmp", "ds.json.orig.tmp"):
        (tmp_path / name).write_text("theirs")
    assert main(["check", "--fix", str(path)]) == 0
    assert path.is_symlink() and read_json(real)["optimizer"]["type"] == "SGD" and theirs.read_text() == "theirs"
    assert {each.stat().st_mode & 0o777 for each in (real, tmp_path / "ds.json.orig")} == {0o600}
    names = ["ds.json", "ds.json.orig", "ds.json.orig.tmp", "ds.json.tmp", "real.json", "real.json.tmp"]
    assert sorted(each.name for each in tmp_path.iterdir()) == names


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_json(tmp_path / "ds.json", SGD)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", SGD)
    assert json.loads(os.read(reader, 10_000)) == SGD and [each.name for each in tmp_path.iterdir()] == ["pipe"]
    os.close(reader)


@pytest.mark.parametrize("through_a_link", [False, True])
def test_the_name_of_an_open_file_is_a_stream_that_goes_on_where_it_stands(tmp_path, through_a_link):
    """So `--output /dev/stdout` works with `> FILE`, and what is printed later stands behind it."""
    path = tmp_path / "out.json"
    with open(path, "w") as file:
        print("before", file=file, flush=True)
        name = Path(f"/dev/fd/{file.fileno()}")
        if through_a_link:
            (tmp_path / "link").symlink_to(name)
            name = tmp_path / "link"
        write_json(name, {})
        print("after", file=file)
    assert path.read_text() == "before\n{}\nafter\n"
    (tmp_path / "link").unlink(missing_ok=True)
    assert [*tmp_path.iterdir()] == [path]


def test_a_pipe_is_written_into_by_the_name_of_its_open_end():
    reader, writer = os.pipe()
    write_json(f"/proc/self/fd/{writer}", SGD)
    assert json.loads(os.read(reader, 10_000)) == SGD
    os.close(writer)
    with pytest.raises(ConfigError, match=rf"^/dev/fd/{writer}: cannot be written \(Bad file descriptor\)"):
        write_json(f"/dev/fd/{writer}", SGD)
    os.close(reader)


def test_a_file_in_the_memory_of_dev_is_a_file(tmp_path):
    for place in (tmp_path / "ds.json", tmp_path / "new.json", tmp_path):
        assert not is_stream(place)
    if os.access("/dev/shm", os.W_OK):
        with tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".json") as file:
            assert not is_stream(Path(file.name))


def test_a_stream_is_not_corrected(tmp_path, capsys):
    """It is not opened either: without a writer a pipe would never end."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("ds.json", "open.json"):
        (tmp_path / name).write_text(json.dumps({"train_batch_size": 8, "optimizer": {"type": "sgd"}}))
    before = (tmp_path / "ds.json").read_bytes()
    with open(tmp_path / "open.json", "rb") as file:
        for name in (tmp_path / "pipe", f"/dev/fd/{file.fileno()}"):
            assert main(["check", "--fix", str(tmp_path / "ds.json"), str(name)]) == 2
            said = f"error: {name}: --fix cannot correct a pipe or standard input; name a file\n"
            assert capsys.readouterr().err == said
    assert (tmp_path / "ds.json").read_bytes() == before and len([*tmp_path.iterdir()]) == 3


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 8, "elasticity": {}}))
    before = (tmp_path / "ds.json").read_bytes()
    assert main(["check", "--fix", ""]) == 2 and "a name is empty" in capsys.readouterr().err
    assert (tmp_path / "ds.json").read_bytes() == before


@pytest.mark.parametrize(
    "changes, code, points, words",
    [
        ({"train_batch_size": 512, "lbsgd.warmup": NO_WARMUP}, "R04", None, "1.1 points at 8192 images"),
        ({"lbsgd.warmup": NO_WARMUP}, "R04", 1.1, "1.1 points at 8192 images"),
        ({"train_batch_size": 1024, "lbsgd.batch_norm.zero_last_gamma": False}, "R13", None, "0.24 points at 256"),
        ({"lbsgd.linear_scaling.base_lr": 0.05}, "R09", 0.53, "0.53 points at 8192 images"),
        ({"train_batch_size": 16384}, "R20", 1.19, "1.19 points at 16384 images"),
        ({"train_batch_size": 24576}, "R20", None, "1.19 points at 16384 images"),
        ({"train_batch_size": 12288}, "R20", None, "matches the baseline (Fig. 1)"),
        ({"lbsgd.batch_norm.per_worker_batch": 16}, "R22", None, "is 16: another loss function than that of n = 32"),
    ],
)
def test_points_are_those_of_the_batch_at_which_the_paper_lost_them(changes, code, points, words):
    config = edited()
    for key, value in changes.items():
        put(config, key, value)
    [finding] = [each for each in findings_of(corrected(config)) if each.code == code]
    assert finding.points == points and words in finding.message


def test_another_n_is_found_where_it_is_used_and_the_paper_s_is_known():
    """On smaller data another n may be right. Batch norm over all processes has no n, and has a rule of its own."""
    for changes, codes in (
        ({"batch_norm": {"per_worker_batch": 256}}, ["R22"]),
        ({"batch_norm": {"per_worker_batch": 32}}, []),
        ({"batch_norm": {"per_worker_batch": 256}, "num_images": 50_000}, []),
        ({"batch_norm": {"per_worker_batch": 256, "scope": "all"}}, ["R14"]),
    ):
        config = edited(train_micro_batch_size_per_gpu=256)
        config["lbsgd"] |= changes
        assert [each.code for each in findings_of(corrected(config))] == codes


@pytest.mark.parametrize("base_lr", [0.001, 0.03, 0.08, 0.15, 0.3, 1.0])
def test_a_base_learning_rate_that_the_paper_did_not_try_has_no_points(base_lr):
    config = edited(lbsgd__linear_scaling={"base_lr": base_lr})
    found = [each for each in findings_of(corrected(config)) if each.code == "R09"]
    assert all(each.points is None and "points" not in each.message for each in found)
    assert bool(found) == (not 0.051 < base_lr < 0.199)


@pytest.mark.parametrize("written", [7, "x", 0, -1, 1.5, 512])
def test_a_number_of_passes_that_no_run_takes_is_found(written):
    config = edited(gradient_accumulation_steps=written)
    assert [each.code for each in findings_of(config)] == ["F07"]
    assert corrected(config) == edited()
    for world_size in (1, 2, 4, 8, 64, 256):
        with pytest.raises(ConfigError, match="gradient_accumulation_steps"):
            Plan.read(config, world_size)


def test_a_number_of_passes_that_some_run_takes_is_not_found():
    config = edited(gradient_accumulation_steps=4)
    assert findings_of(config) == () and Plan.read(config, 64).accumulation_steps == 4


def test_gradient_noise_in_fp16_is_found_before_the_run():
    config = edited(lbsgd__diagnostics={"gradient_noise": 100})
    assert errors(config) == ["R18"]
    with pytest.raises(ConfigError, match="R18"):
        Plan.read(config, 256)
    assert errors(edited("8k_bf16", lbsgd__diagnostics={"gradient_noise": 100})) == []


def test_what_may_not_be_read_in_a_folder_is_passed_by_and_told_and_as_a_name_is_one_line(capsys):
    with tempfile.TemporaryDirectory() as name, as_nobody(name):
        folder = Path(name)
        (folder / "ds.json").write_text(json.dumps(SGD))
        (folder / "locked").mkdir()
        (folder / "locked" / "ds.json").write_text(json.dumps(SGD))
        (folder / "locked").chmod(0)
        (folder / "closed.json").write_text(json.dumps(SGD))
        (folder / "closed.json").chmod(0)
        assert main(["check", name]) == 0
        said = capsys.readouterr()
        assert "ds.json" in said.out and "closed" not in said.out
        assert said.err.splitlines() == [
            f"{name}/{place} cannot be read (Permission denied), passed over" for place in ("closed.json", "locked")
        ]
        (folder / "ds.json").unlink()
        assert main(["check", name]) == 2
        assert f"holds no .json file; {name}/closed.json cannot be read (Perm" in capsys.readouterr().err
        assert main(["check", f"{name}/locked/ds.json"]) == 2
        assert "cannot be read (Permission denied)" in capsys.readouterr().err
        (folder / "locked").chmod(0o700)


def test_a_name_that_is_too_long_is_one_line(capsys):
    assert main(["check", "a" * 300 + ".json"]) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        '{"train_batch_size": 8, // images\n "train_batch_size": 16}',
        '{"train_batch_size": 8, # images\n "fp16": {"enabled": true, "enabled": false}}',
    ],
)
def test_a_key_that_stands_twice_in_hjson_is_refused_as_deepspeed_refuses_it(tmp_path, text, capsys):
    path = tmp_path / "ds.json"
    path.write_text(text)
    [finding] = inspect(str(path)).findings
    assert finding.code == "J01" and "twice" in finding.message
    assert main(["check", str(tmp_path)]) == 1 and "J01" in capsys.readouterr().out


def test_a_key_stands_for_no_block_where_it_holds_a_text():
    found = {each.key: each.code for each in findings_of({"commet": "x", "zero_optimisation": {"stage": 1}})}
    assert (found["commet"], found["zero_optimisation"]) == ("D03", "D02")  # comet is a block


@pytest.mark.parametrize(
    "config",
    [
        {"commet": "ResNet-50, 8 GPUs", "train_batch_size": 1},  # resembles comet
        {"checkpoints": "runs", "time": "12:00", "train_batch_size": 1},  # checkpoint, timers
        {"tensorboard_dir": "logs", "train_batch_size": 1},
        {"train_batch_size": 8.0, "zero_optimization": {"stage": "2"}},  # which DeepSpeed converts
        {"vocab_size": 30522, "hidden_size": 1024},  # other projects' files
        {"optimizer": {"type": "Adam", "args": {"lr": 0.001}}, "lr_scheduler": {"type": "StepLR"}},
        {"name": "x", "version": "1.0.0", "optimizer": "adam"},
    ],
)
def test_fix_does_not_touch_what_deepspeed_takes_nor_what_is_no_deepspeed_json(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    main(["check", "--fix", str(path)])
    assert json.loads(path.read_text()) == config and len(list(tmp_path.iterdir())) == 1


def test_fix_keeps_every_original(tmp_path):
    path = tmp_path / "ds.json"
    for number in (1, 2, 3):
        path.write_text(json.dumps({"train_batch_size": number, "optimizer": {"type": "sgd"}}))
        assert main(["check", "--fix", str(path)]) == 0
    kept = [json.loads((tmp_path / name).read_text())["train_batch_size"] for name in KEPT]
    assert kept == [1, 2, 3]


def test_fix_keeps_the_text_that_it_read_where_another_one_corrects_the_file_at_the_same_time(tmp_path, monkeypatch):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 8, "optimizer": {"type": "sgd"}}))
    before = path.read_bytes()

    def meanwhile(*arguments):
        monkeypatch.undo()
        assert main(["check", "--fix", str(path)]) == 0
        return corrected(*arguments)

    monkeypatch.setattr(inspection, "corrected", meanwhile)
    assert main(["check", "--fix", str(path)]) == 0
    assert [(tmp_path / name).read_bytes() for name in KEPT[:2]] == [before, before]
    assert read_json(path)["optimizer"]["type"] == "SGD" and len([*tmp_path.iterdir()]) == 3


KEPT = ("ds.json.orig", "ds.json.orig.2", "ds.json.orig.3")


def test_a_removed_optimizer_is_not_replaced(tmp_path):
    """Its arguments go with it, because it is unknown which of them were meant for its successor."""
    params = {"lr": 2e-4, "freeze_step": 250, "cuda_aware": False}
    path = tmp_path / "one_bit.json"
    path.write_text(json.dumps({"train_batch_size": 4, "optimizer": {"type": "OneBitAdam", "params": params}}))
    assert main(["check", "--fix", str(path)]) == 1
    assert read_json(path)["optimizer"]["params"] == params


def test_fix_leaves_a_file_without_errors_as_it_was_to_the_byte(tmp_path):
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(edited()))  # not laid out as the tool would
    before = path.read_bytes()
    assert main(["check", "--fix", str(path)]) == 0 and path.read_bytes() == before


def test_fix_does_not_touch_what_it_cannot_read(tmp_path, capsys):
    path = tmp_path / "commented.json"
    path.write_text((FOREIGN / "with_comments.json").read_text())
    main(["check", "--fix", str(path)])
    assert path.read_text() == (FOREIGN / "with_comments.json").read_text()
    assert "because comments would be lost" in " ".join(capsys.readouterr().out.split())


# --- anything at all --------------------------------------------------------------------------------------------------

KNOWN = accepted()
OTHER_WORDS = """type params lr stage enabled warmup_type warmup_num_steps epochs num_images warmup kind
    linear_scaling base_lr base_batch rule batch_norm per_worker_batch device dtype SGD WarmupLR auto linear
    gradual none a.b""".split()
words = st.sampled_from(
    sorted(
        KNOWN.top_level
        | KNOWN.removed
        | KNOWN.field_names(KNOWN.blocks["zero_optimization"])
        | KNOWN.field_names(KNOWN.blocks["fp16"])
        | set(EXPECTED)
        | {*OTHER_WORDS, "", "é\n"}
    )
)
leaves = st.one_of(
    st.none(), st.booleans(), words, st.integers(), st.integers(10**300, 10**320), st.floats(), st.text(max_size=5)
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)
BASES = [
    edited(),
    edited("256"),
    edited("digits"),
    *(read_json(path) for path in sorted(FOREIGN.glob("*.json")) if path.stem not in ("twice", "with_comments")),
]


NOWHERE = Console(file=open(os.devnull, "w", encoding="utf-8"), highlight=False, width=100, force_terminal=True)


def paths(config, prefix=""):
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}.")


PLACES = [st.lists(st.sampled_from(sorted(paths(base))), min_size=1, max_size=4) for base in BASES]
WHICH = st.integers(0, len(BASES) - 1)


@st.composite
def broken_configs(draw):
    """Any object, or a real file with anything in some of its places."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.dictionaries(words, values, max_size=6))
    which = draw(WHICH)
    config = copy.deepcopy(BASES[which])
    for path in draw(PLACES[which]):
        try:
            put(config, path, draw(values))
        except ConfigError:
            pass
    return config


def never_a_traceback(config):
    findings = findings_of(config)
    print_inspections([Inspection("any.json", config, findings, differences(config, corrected(config)))], NOWHERE)
    try:
        plan = Plan.read(config, 1)
        for size in NETWORKS.values():
            reduction = reduction_of(replace(plan, world_size=1000), size)
            predict(plan.global_batch, plan.accumulation_steps, 1000, reduction, Machines(), "ring")
            memory(plan, size, plan.zero_stage)
        if plan.num_iterations:
            in_terminal(plan), stretches(plan)
        assert not [finding for finding in findings if finding.severity == "error"]
    except ConfigError as error:
        assert str(error)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(broken_configs())
def test_no_file_makes_a_traceback(config):
    never_a_traceback(config)


@pytest.mark.slow
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck))
@given(broken_configs())
def test_ten_thousand_files_make_no_traceback(config):
    never_a_traceback(config)


@pytest.mark.parametrize("kind", ["MuAdam", "MuSGD", "Muon", "OneBitAdam", "ZeroOneAdam", "OneBitLamb", "Lion"])
def test_an_optimizer_whose_arguments_nobody_knows_makes_no_traceback(kind):
    never_a_traceback({"train_batch_size": 8, "optimizer": {"type": kind, "params": {"lr": 0.1}}})


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.builds(
            "{}={}".format,
            st.sampled_from(sorted(paths(BASES[0]))),
            st.one_of(values.map(lambda value: json.dumps(value, default=str)), st.text(max_size=9)),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_no_setting_makes_a_traceback(texts):
    try:
        Plan.read(BASES[0], 1, overrides=Overrides(settings=tuple(texts)))
    except ConfigError as error:
        assert str(error)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(str.encode),
        st.builds(
            lambda text, at, junk: text[:at] + junk + text[at:],
            st.sampled_from([path.read_bytes() for path in sorted(FOREIGN.glob("*.json"))]),
            st.integers(0, 800),
            st.binary(max_size=9),
        ),
    )
)
def test_no_bytes_make_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    assert inspect(str(path)).file == str(path)


@pytest.mark.parametrize("key", ['"a"', "a"], ids=["json", "hjson"])
@pytest.mark.parametrize("levels, ends", [(100_000, 0), (500, 500), (200, 200)])
def test_a_file_nested_without_end_is_one_finding(tmp_path, key, levels, ends):
    path = tmp_path / "deep.json"
    path.write_text(f"{{{key}: " * levels + "1" + "}" * ends)
    assert [finding.code for finding in inspect(str(path)).findings] == ["J01"]


@pytest.mark.parametrize(
    "arguments, head, words",
    [
        (["check", "--deepspeed", "0.18..0.19"], "", "0 findings the same in all"),
        (["plan"], "", "k 256 workers"),
        (["check", "--deepspeed", "0.19"], "# no strict JSON, so it is read as Hjson\n", "J02"),
    ],
)
def test_a_pipe_is_read_once(arguments, head, words, capsys):
    config = SGD if head else read_json(FOREIGN.parent.parent.parent / "ds_configs" / "8k.json")
    read, write = os.pipe()
    os.write(write, (head + json.dumps(config)).encode()), os.close(write)
    main([*arguments, f"/dev/fd/{read}"])
    os.close(read)
    out = capsys.readouterr().out
    assert words in out and not any(code in out for code in ("J01", "D49"))  # for an empty file


SWITCHES = [
    ("D37", "zero_optimization.elastic_checkpoint", {0: False, "no": False, 1: True}),
    ("D37", "checkpoint.load_universal", {0: False, "off": False, "yes": True}),
    ("D41", "zero_optimization.overlap_comm", {1: False, "yes": False, 0: True}),
]


@pytest.mark.parametrize(
    "code, key, found_with",
    [
        ("D36", "fp16.fp16_master_weights_and_grads", {0: False, "no": False, 1: True}),
        ("D12", "fp16.auto_cast", {1: False, "on": False, 0: True, "no": True}),
    ],
)
def test_a_switch_beside_an_lbsgd_block_too(code, key, found_with):
    for value, is_found in found_with.items():
        config = read_json(SHIPPED_FOLDER / "8k.json")
        put(config, key, value)
        assert (code in codes(config)) == is_found, value


@pytest.mark.parametrize("code, key, found_with", SWITCHES, ids=[key for _, key, _ in SWITCHES])
def test_a_switch_in_a_plain_json_is_read_as_deepspeed_reads_it(code, key, found_with):
    for value, is_found in found_with.items():
        config = with_changes({"zero_optimization": {"stage": 2}, key: value})
        assert (code in {each.code for each in findings_of(config)}) == is_found, value


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("batch_norm", 5, "is 5; give a block of keys"),
        ("epochs", "90", 'is "90", and must be a whole number; write 90'),
        ("batch_norm.per_worker_batch", 0, "is 0; give a number greater than 0"),
        ("seed", 2**32, "is 4294967296; give a number less than 4294967296"),
        ("augmentation.resolution", 10_001, "is 10001; give a number of at most 10000"),
        ("linear_scaling.base_lr", 0, "is 0; give a number of at least 1e-12"),
        ("warmup.start_fraction", 5e-324, "is 5e-324; give a number of at least 1e-12"),
        ("linear_scaling.rule", "x", 'is "x"; give "linear", "sqrt" or "fixed"'),
        ("paper_error_pct", [1], "is [1]; give a list of at least 2"),
        ("paper_error_pct", [1, 2, 3], "is [1, 2, 3]; give a list of at most 2"),
        ("purpose", "a\nb", 'is "a\\nb"; give one line of text'),
        (
            "augmentation.crop_scale",
            [1, 2],
            "[1.0, 2.0] must be two shares of the image, smaller first, up to 1; correct it",
        ),
    ],
)
def test_a_wrong_value_in_the_block_is_told_in_plain_words(key, value, words):
    config = edited()
    put(config, f"lbsgd.{key}", value)
    [found] = [each for each in findings_of(config) if each.code == "R12"]
    assert f"{found.message}; {found.fix}" == words


@pytest.mark.parametrize("torch, refused", [("2.11.0", True), ("2.12.0", False), ("2.15.0+cpu", False)])
def test_adagrad_in_half_precision_is_refused_until_torch_2_11(monkeypatch, torch, refused):
    monkeypatch.setattr("lbsgd.config.checks.deepspeed_validators.installed", lambda package: torch)
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "Adagrad", "params": {"lr": 0.01}},
        "bf16": {"enabled": True},
    }
    assert ("D84" in errors(config)) == refused


def test_a_file_in_a_folder_that_nobody_can_read_is_an_error_as_it_is_by_name(tmp_path, capsys):
    (tmp_path / "ds.json").write_bytes(json.dumps(SGD).encode("utf-16"))
    assert main(["check", str(tmp_path / "ds.json")]) == 1
    said = capsys.readouterr().out
    assert "J01" in said and main(["check", str(tmp_path)]) == 1 and capsys.readouterr().out == said


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_file_in_a_folder_is_passed_over_by_name_and_by_name_it_is_an_error(content, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps(SGD))
    (tmp_path / "placeholder.json").write_text(content)
    assert main(["check", "--json", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert (
        said.err == f"{tmp_path}/placeholder.json is empty, passed over\n" and json.loads(said.out)["passed_over"] == 0
    )
    assert main(["check", str(tmp_path / "placeholder.json")]) == 1 and "J01" in capsys.readouterr().out


def test_the_name_of_an_empty_file_moves_no_cursor(tmp_path, capsys):
    (tmp_path / "ds.json").write_text(json.dumps(SGD))
    (tmp_path / "\x1b[2J.json").touch()
    main(["check", str(tmp_path)])
    assert capsys.readouterr().err == f"{tmp_path}/?[2J.json is empty, passed over\n"
