"""`lbsgd check` on other projects' DeepSpeed JSONs: its findings are true, and it finds what hurts."""

import json

import pytest

from lbsgd.commands.main import main
from lbsgd.config.checks.in_library import in_library
from lbsgd.config.checks.inspection import Inspection, findings_of

SGD = {
    "train_batch_size": 8192,
    "gradient_clipping": 0.0,
    "timers": {"throughput": {"enabled": False}},
    "optimizer": {"type": "SGD", "params": {"lr": 3.2, "momentum": 0.9}},
}
ADAM = {**SGD, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}
LINEAR = {"warmup_min_lr": 0.1, "warmup_num_steps": 780, "warmup_type": "linear"}


def found(config, code, library=None, version=None):
    findings = findings_of(config, version)
    if library:
        findings = in_library(Inspection("ds.json", config, findings), library).findings
    return [finding for finding in findings if finding.code == code]


@pytest.mark.parametrize(
    "lr, kind, highest, key",
    [
        (0.1, "WarmupLR", {"warmup_max_lr": 3.2}, None),
        (3.2, "WarmupLR", {"warmup_max_lr": 0.1}, "scheduler.params.warmup_max_lr"),
        (0.1, "WarmupLR", {}, "optimizer.params.lr"),
        (0.1, "WarmupLR", {"warmup_max_lr": "auto"}, "optimizer.params.lr"),
        (0.1, "WarmupDecayLR", {"warmup_max_lr": "auto", "total_num_steps": "auto"}, "optimizer.params.lr"),
        (0.1, "OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 3.2}, None),
        (3.2, "OneCycleLR", {"max_lr": 0.1, "total_steps": 14000}, "scheduler.params.max_lr"),
        (0.1, "StepLR", {"step_size": 30}, "optimizer.params.lr"),
    ],
)
def test_a_large_minibatch_is_judged_by_the_learning_rate_that_it_has(lr, kind, highest, key):
    params = {**LINEAR, **highest} if kind.startswith("Warmup") else highest
    config = {**SGD, "optimizer": {"type": "SGD", "params": {"lr": lr, "momentum": 0.9}}}
    config["scheduler"] = {"type": kind, "params": params}
    assert [finding.key for finding in found(config, "D53")] == ([key] if key else [])


@pytest.mark.parametrize(
    "kind, versions", [("WarmupLR", ["0.16"]), ("WarmupDecayLR", ["0.16", "0.17", "0.18", "0.19"])]
)
def test_a_warmup_without_its_end_has_a_default_for_it(kind, versions):
    params = {**LINEAR, **({"total_num_steps": 14000} if kind == "WarmupDecayLR" else {})}
    config = {**SGD, "scheduler": {"type": kind, "params": params}}
    told = {version: found(config, "D44", version=version) for version in ("0.16", "0.17", "0.18", "0.19")}
    assert [version for version, findings in told.items() if findings] == versions
    [finding] = told["0.16"]
    assert "goes to 0.001, its default" in finding.message and finding.fix == "give scheduler.params.warmup_max_lr: 3.2"


@pytest.mark.parametrize(
    "sizes, told",
    [
        ({"train_batch_size": 256}, True),
        ({"train_batch_size": 256, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 2}, True),
        ({"train_batch_size": 256, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 1}, False),
    ],
)
def test_a_predivision_is_told_where_the_number_of_processes_may_be_it(sizes, told):
    config = {**sizes, "gradient_predivide_factor": 8, "zero_optimization": {"stage": 3, "reduce_scatter": False}}
    assert bool(found(config, "D59")) == told


@pytest.mark.parametrize(
    "key", ["zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"]
)
@pytest.mark.parametrize("stage, told", [(0, True), (1, True), (2, True), (3, False)])
def test_what_zero_plus_plus_quantizes_is_quantized_at_stage_3_alone(key, stage, told):
    assert bool(found({**ADAM, "zero_optimization": {"stage": stage, key: True}}, "D50")) == told


@pytest.mark.parametrize(
    "kind, fix",
    [
        ("FusedAdam", 'use "Adam"'),
        ("DeepSpeedCPUAdam", 'use "Adam"'),
        ("LARS", "name one that DeepSpeed knows"),
        ("Adagrat", 'use "Adagrad"'),
    ],
)
def test_an_unknown_optimizer_is_not_to_be_deleted(kind, fix):
    config = {**SGD, "optimizer": {"type": kind, "params": {"lr": 0.1}}, "fp16": {"enabled": True}}
    assert [finding.fix for finding in found(config, "D06")] == [fix]
    assert not found(config, "D11"), "nothing is known of its updates"


@pytest.mark.parametrize(
    "params, fp16, zero, versions",
    [
        ({}, {}, {}, ["0.17"]),
        ({}, {"loss_scale": 128}, {}, ["0.16", "0.17"]),
        ({"torch_adam": True}, {"loss_scale": 128}, {}, []),
        ({}, {"loss_scale": 128}, {"stage": 1}, []),
    ],
)
def test_fp16_around_deepspeeds_own_adam_fails_at_stage_0_in_earlier_versions(params, fp16, zero, versions):
    config = {**ADAM, "optimizer": {"type": "Adam", "params": {"lr": 0.001, **params}}}
    config |= {"fp16": {"enabled": True, **fp16}, "zero_optimization": zero}
    assert [
        version for version in ("0.16", "0.17", "0.18", "0.19") if found(config, "D11", version=version)
    ] == versions


@pytest.mark.parametrize("kind", ["OneBitAdam", "ZeroOneAdam", "OneBitLamb"])
def test_a_one_bit_optimizer_moves_the_weights_where_it_is_there(kind):
    config = {**SGD, "optimizer": {"type": kind, "params": {"lr": 0.1}}, "fp16": {"enabled": True}}
    told = {code: [v for v in ("0.18", "0.19") if found(config, code, version=v)] for code in ("D06", "D11", "D73")}
    assert told == {"D06": ["0.19"], "D11": [], "D73": ["0.18"]}
    plain, with_a_block = (found({**config, **block}, "D06", version="0.19")[0].fix for block in ({}, {"lbsgd": {}}))
    assert plain.startswith(("use Adam", "use Lamb")) and with_a_block.startswith("use SGD")  # as D56 advises


@pytest.mark.parametrize("name", ["select_strategy", "select_interval", "update_interval"])
def test_zenflow_knows_the_word_auto_and_hugging_face_refuses_it(name):
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = {**ADAM, "zero_optimization": {**offload, "zenflow": {name: "auto"}}}
    assert not found(config, "D21")
    refused = [library for library in ("transformers", "accelerate", "lightning", "deepspeed")
               if found(config, "L04", library)]  # fmt: skip
    assert refused == ["transformers", "accelerate"]


@pytest.mark.parametrize("left_out, code", [("gradient_clipping", "D08"), ("train_batch_size", "D49")])
def test_lightning_writes_clipping_and_micro_batch_where_they_are_left_out(left_out, code):
    config = {key: value for key, value in ADAM.items() if key != left_out}
    assert found(config, code) and found(config, code, "transformers") and not found(config, code, "lightning")


def test_lightning_does_not_mend_batches_that_do_not_fit():
    assert found({**ADAM, "train_batch_size": 100, "train_micro_batch_size_per_gpu": 32}, "D49", "lightning")


QUANTIZED = {
    "shared_parameters": {"enabled": True, "quantization_type": "symmetric", "quantize_weight_in_forward": True},
    "different_groups": {"wq1": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["attention.self"]}},
}


@pytest.mark.parametrize("version, code", [("0.16", None), ("0.17", None), ("0.18", None), ("0.19", "D01")])
def test_a_block_that_needs_keys_of_its_own_is_no_refused_value(version, code):
    config = {**ADAM, "compression_training": {"weight_quantization": QUANTIZED}}
    errors = [finding.code for finding in findings_of(config, version) if finding.severity == "error"]
    assert errors == ([code] if code else [])
    assert found({**ADAM, "steps_per_print": {"every": 10}}, "D70", version=version)


@pytest.mark.parametrize("writer, key", [({}, ""), ({"type": "FAST"}, ".data_parallel")])
def test_a_writer_of_checkpoints_without_its_key_is_told_once(writer, key):
    assert [each.key for each in found({**ADAM, "checkpoint": {"writer": writer}}, "D70")] == [
        f"checkpoint.writer{key}"
    ]


@pytest.mark.parametrize("flags", [[], ["--gpus", "8"]], ids=["as many GPUs as fit", "8 GPUs"])
def test_a_plan_of_a_file_without_an_lbsgd_block_says_that_and_nothing_of_the_paper(tmp_path, capsys, flags):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ADAM))
    assert main(["plan", str(path), *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "ds.json: has no lbsgd block" in err


def test_a_table_of_versions_breaks_its_lines_between_words_on_a_terminal(tmp_path, capsys, monkeypatch):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**ADAM, "zero_optimization": {"stage": 1, "stage3_param_persitence_threshold": 10}}))
    arguments = ["check", "--deepspeed", "0.18..0.19", str(path)]
    assert main(arguments) == 1
    piped = capsys.readouterr().out.splitlines()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(arguments) == 1
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, piped)) > 100 and max(map(len, shown[1:])) <= 60
    assert " ".join(shown).split() == " ".join(piped).split()


def test_a_file_is_checked_once_under_however_many_names(tmp_path, capsys):
    inner = tmp_path / "inner"
    inner.mkdir()
    for name, config in (("a", ADAM), ("b", ADAM), ("other", {"name": "x"})):
        (inner / f"{name}.json").write_text(json.dumps(config))
    (tmp_path / "link.json").symlink_to(inner / "a.json")
    (inner / "empty.json").touch()
    names = [inner / "b.json", tmp_path, inner, inner / "a.json"]
    assert main(["check", *map(str, names)]) == 0
    out, err = capsys.readouterr()
    assert "2 files: 0 errors" in out and "1 other JSON passed over" in out and err.count("is empty") == 1
    assert out.index("inner/b.json") < out.index("inner/a.json") and "link.json" not in out
    named = [inner / "empty.json", inner / "other.json"]
    assert main(["check", str(inner), *map(str, named)]) == 1
    out, err = capsys.readouterr()
    assert "4 files: " in out and "passed over" not in out + err
