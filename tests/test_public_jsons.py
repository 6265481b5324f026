"""`lbsgd check` on the content of public DeepSpeed JSONs: dropped features, keys of other libraries, comments."""

import json
import re

import pytest
from edited_jsons import edited

from lbsgd.commands.main import main
from lbsgd.config.checks.in_library import in_library
from lbsgd.config.checks.inspection import Inspection, corrected, findings_of, inspect
from lbsgd.config.json_file import write_json
from lbsgd.config.keypath import get, put

SGD = {
    "train_batch_size": 256,
    "gradient_clipping": 0.0,
    "timers": {"throughput": {"enabled": False}},
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
}


def found(config, code, library=None, version="0.19"):
    findings = findings_of(config, version)
    if library:
        findings = in_library(Inspection("ds.json", config, findings), library).findings
    return [finding for finding in findings if finding.code == code]


def technique(enabled):
    return {"shared_parameters": {"enabled": enabled, "method": "l1"}, "different_groups": {"a": {"modules": ["b"]}}}


OFF = {"sparse_pruning": technique(False), "layer_reduction": {"enabled": False, "keep_number_layer": 5}}
ON = {"sparse_pruning": technique(False), "channel_pruning": technique(True)}


@pytest.mark.parametrize(
    "key, value, is_off",
    [
        ("compression_training", ON, False),
        ("compression_training", {"layer_reduction": {"enabled": True}}, False),
        ("compression_training", OFF, True),
        ("compression_training", {}, True),
        ("sparse_attention", {"mode": "fixed", "block": 16}, False),
        ("zero_optimization.zeropp_loco_param", {"err_beta": 0.8}, False),
        ("quantize_training", {"quantize_bits": {"start_bits": 12}, "fp16_mixed_quantize": {"enabled": False}}, False),
        ("eigenvalue", {"enabled": True}, False),
        ("eigenvalue", {"enabled": False, "verbose": True}, True),
        ("elasticity", {"enabled": True, "max_train_batch_size": 256}, False),
        ("sparse_gradients", True, False),
        ("sparse_gradients", False, True),
    ],
)
def test_a_removed_feature_is_deleted_only_where_all_of_it_is_off(key, value, is_off):
    block, _, name = key.rpartition(".")
    config = {**SGD, block: {name: value}} if block else {**SGD, name: value}
    [finding] = found(config, "D01")
    assert (finding.key, finding.severity) == (key, "error")
    left = found(corrected(config, "0.19"), "D01")
    assert not left if is_off else left == [finding]
    assert is_off or finding.fix != "delete it"


def test_fix_says_by_its_exit_code_that_a_feature_that_is_on_stays(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**SGD, "compression_training": ON}))
    assert main(["check", "--fix", "--deepspeed", "0.19", str(path)]) == 1
    assert "compression_training was removed" in capsys.readouterr().out
    assert json.loads(path.read_text())["compression_training"] == ON


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("curriculum_learning", {"enabled": True}, "data_efficiency.data_sampling.curriculum_learning"),
        ("amp", {"enabled": True, "opt_level": "O1"}, "fp16, bf16 or torch_autocast"),
        ("elasticity", {"enabled": True}, "set train_batch_size"),
        ("sparse_attention", {"mode": "fixed"}, "or use DeepSpeed 0.18"),
        ("quantize_training", {"quantize_groups": 16}, "delete it and train without it"),
        ("amp", {"enabled": False}, "delete it"),
    ],
)
def test_a_removed_feature_names_its_successor(key, value, words):
    [finding] = found({**SGD, key: value}, "D01")
    assert words in finding.fix


@pytest.mark.parametrize(
    "name, number",
    [
        ("reduce_bucket_size", "6000000"),
        ("stage3_prefetch_bucket_size", "6000000"),
        ("stage3_param_persistence_threshold", "100000"),
    ],
)
def test_a_size_that_is_worked_out_from_the_network_has_a_number_of_its_own(name, number):
    """A threshold of 6000000 would keep all of ResNet-50's weights whole on every GPU. DeepSpeed's default is 1e5."""
    config = {**SGD, "zero_optimization": {"stage": 3, name: "auto"}}
    [finding] = found(config, "L06", "transformers")
    assert finding.severity == "note" and "model.config.hidden_size" in finding.message
    assert finding.fix.endswith(f"such as {number}")


@pytest.mark.parametrize(
    "optimizer, severity, code",
    [
        (None, "warning", "D73"),
        ({"type": "auto"}, "warning", "D73"),
        ({"type": "AdamW", "params": {"lr": 0.001}}, "warning", "D73"),
        ({"type": "SGD", "params": {"lr": 0.1}}, "error", "D11"),
    ],
)
def test_fp16_at_stage_0_is_an_error_only_with_an_optimizer_that_is_named(optimizer, severity, code):
    """Most programs whose JSON lacks the block pass their own AdamW, whose updates have their full size."""
    config = {**SGD, "optimizer": optimizer, "fp16": {"enabled": True}}
    config = {key: value for key, value in config.items() if value is not None}
    [finding] = found(config, "D11") + found(config, "D73")
    assert (finding.code, finding.severity) == (code, severity)
    unnamed = code == "D73" and "AdamW" not in str(optimizer)
    assert ("SGD makes every update 65536 times too small" in finding.message) == (unnamed or code == "D11")


ACCELERATE = """compute_environment: LOCAL_MACHINE
deepspeed_config:
  {inner}
  zero3_init_flag: true
distributed_type: DEEPSPEED
mixed_precision: bf16
num_processes: 8
"""
NPM = {"name": "my-project", "version": "1.0.0", "type": "module", "scripts": {"test": "jest"}, "dependencies": {}}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "gradient_checkpointing": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    "text, words",
    [
        (json.dumps(NPM), "name a DeepSpeed JSON"),
        (json.dumps(MODEL), "name a DeepSpeed JSON"),
        (ACCELERATE.format(inner="deepspeed_config_file: conf/ds.json"), "check conf/ds.json"),
        (ACCELERATE.format(inner="gradient_clipping: 1.0"), "deepspeed_config_file"),
        (json.dumps({"compute_environment": "LOCAL", "deepspeed_config": {"zero_stage": 2}}), "deepspeed_config_file"),
    ],
)
def test_a_file_of_another_kind_is_one_error_and_stays_as_it_is(tmp_path, text, words):
    path = tmp_path / "other"
    path.write_text(text)
    for fix in (False, True):
        inspection = inspect(str(path), fix)
        [finding] = inspection.findings
        assert (finding.code, finding.severity) == ("J03", "error") and words in finding.fix
    assert path.read_text() == text


@pytest.mark.parametrize(
    "config, codes",
    [
        ({"train_batchsize": 256}, {"D02", "D49"}),
        ({"zero_optimisation": {"stage": 1}, "my_project": {"a": 1}}, {"D02", "D03"}),
        ({"optimizer": {"type": "Adam"}, "name": "mine"}, {"D49", "D03"}),
        ({"fp16": {}, "comment": "half precision"}, {"D49"}),
        ({}, {"D49"}),
    ],
)
def test_a_deepspeed_json_with_mistakes_in_its_keys_is_still_judged(tmp_path, config, codes):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert codes <= {finding.code for finding in inspect(str(path)).findings}


@pytest.mark.parametrize(
    "fp16, stage, versions",
    [
        ({}, 1, ["0.17", "0.18", "0.19"]),
        ({}, 0, ["0.17"]),
        ({"loss_scale": 1}, 0, ["0.17", "0.18", "0.19"]),
        ({"loss_scale": 128}, 1, ["0.17", "0.18"]),
    ],
)
@pytest.mark.parametrize("steps_per_print", [None, 1])
def test_skipped_updates_are_unseen_where_deepspeed_prints_none_whatever_steps_per_print_is(
    fp16, stage, versions, steps_per_print
):
    """Four skipped updates with each version showed: 0.16 logs them; 0.19 warns under ZeRO if the scale is static.

    At stage 0 of later versions D11 says more: the loss is not scaled at all.
    """
    config = {**SGD, "fp16": {"enabled": True, **fp16}, "zero_optimization": {"stage": stage}}
    config |= {"steps_per_print": steps_per_print} if steps_per_print else {}
    told = {version: found(config, "D42", version=version) for version in ("0.16", "0.17", "0.18", "0.19")}
    assert [version for version, findings in told.items() if findings] == versions
    assert all("engine.skipped_steps" in finding.fix for [finding] in (told["0.17"],))


@pytest.mark.parametrize(
    "changes, code, key, fix",
    [
        ({"fp16": {"enabled": True, "dynamic_loss_scale": True}}, "D31", "fp16.dynamic_loss_scale",
         "use fp16.loss_scale, in which 0 is dynamic"),
        ({"gradient_accumulation_dtype": "fp32"}, "D03", "gradient_accumulation_dtype",
         "use data_types.grad_accum_dtype"),
        ({"max_grad_norm": 1.0}, "D03", "max_grad_norm", "use gradient_clipping"),
        ({"optimizer": {"type": "AdamW", "params": {}, "weight_decay": 0.1}}, "D32", "optimizer.weight_decay",
         "move it into optimizer.params"),
        ({"scheduler": {"type": "WarmupLR", "params": {}, "warmup_num_steps": 10}}, "D32", "scheduler.warmup_num_steps",
         "move it into scheduler.params"),
        ({"optimizer": {"type": "AdamW", "params": {}, "name": "x"}}, "D32", "optimizer.name", "delete it"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 0.1}}}, "D71", "optimizer.params.learning_rate",
         "use lr"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_deca": 0.1}}}, "D71", "optimizer.params.weight_deca",
         "did you mean weight_decay?"),
        ({"scheduler": {"type": "cosine", "params": {}}}, "D48", "scheduler.type", "use WarmupCosineLR"),
        ({"scheduler": {"type": "mine", "params": {}}}, "D48", "scheduler.type", "name one that DeepSpeed knows"),
        ({"bf16": True}, "D29", "bf16", 'write {"enabled": true}'),
        ({"zero_optimization": 2}, "D29", "zero_optimization", 'write {"stage": 2}'),
        ({"csv_monitor": "yes"}, "D29", "csv_monitor", "give it as a block of keys: {...}"),
        ({"train_batchsize": "256"}, "D02", "train_batchsize", "did you mean train_batch_size?"),
        ({"train_batchsize": "auto"}, "D02", "train_batchsize", "did you mean train_batch_size?"),
        ({"steps_per_prin": "often"}, "D03", "steps_per_prin", "delete it unless you read it"),
    ],
)  # fmt: skip
def test_a_key_of_another_place_or_library_is_answered_by_deepspeeds(changes, code, key, fix):
    [finding] = [finding for finding in findings_of({**SGD, **changes}, "0.19") if finding.key == key]
    assert (finding.code, finding.fix) == (code, fix)


def paths(config, before=""):
    """Yield the key paths of all blocks and values."""
    for key, value in config.items():
        yield f"{before}{key}"
        if isinstance(value, dict):
            yield from paths(value, f"{before}{key}.")


@pytest.mark.parametrize("path", paths(edited()))
def test_a_key_that_is_not_there_is_not_called_null(path):
    config = edited()
    put(config, path, None)
    absent = [finding for finding in findings_of(config, "0.19") if get(config, finding.key, 0) == 0]
    assert not [str(finding) for finding in absent if "null" in finding.message]


def test_a_warmup_of_0_steps_is_a_whole_number_that_is_not_positive():
    config = {**SGD, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}
    [finding] = found(config, "D46")
    assert finding.message == "is 0, and DeepSpeed wants a positive whole number"


@pytest.mark.parametrize("version, code", [("0.16", "D27"), ("0.19", "D70")])
@pytest.mark.parametrize("block", ["fp16", "torch_autocast"])
def test_a_switch_that_is_refused_is_told_once(version, code, block):
    config = {**SGD, block: {"enabled": "CONFIG_FP16_ENABLED,"}}
    assert len([each for each in findings_of(config, version) if each.key == f"{block}.enabled"]) <= 1
    if block == "fp16":
        assert [each.code for each in findings_of(config, version) if each.key == "fp16.enabled"] == [code]


@pytest.mark.parametrize("key", ["_comment", "comment", "comments", "_read_the_docs", "//", "#", "//1", "$schema"])
@pytest.mark.parametrize("value", ["take care", ["take", "care"], {"of": "it"}])
def test_a_comment_in_a_key_is_no_unknown_key(key, value):
    config = {**SGD, key: value, "my_project": 1}
    assert [finding.key for finding in findings_of(config) if finding.code in ("D02", "D03")] == ["my_project"]


@pytest.mark.parametrize(
    "library, severity",
    [
        (None, "error"),
        ("deepspeed", "error"),
        ("accelerate", "error"),
        ("lightning", "error"),
        ("transformers", "note"),
    ],
)
def test_images_are_cast_that_are_given_by_position_and_the_trainer_gives_them_by_keyword(library, severity):
    config = {**SGD, "fp16": {"enabled": False, "auto_cast": True}}
    [finding] = found(config, "D94", library)
    assert finding.severity == severity and "by position" in finding.message
    assert ("the Trainer gives them by keyword" in finding.message) == (library == "transformers")


def folder_of_jsons(folder, with_timer, without):
    """A folder of JSONs, some of which get the note D90."""
    for number in range(with_timer + without):
        config = {key: value for key, value in SGD.items() if key != "timers" or number >= with_timer}
        (folder / f"{number}.json").write_text(json.dumps({**config, "my_project": number}))
    return str(folder)


@pytest.mark.parametrize("with_timer, without, at_the_end", [(2, 2, True), (4, 0, True), (2, 3, False), (3, 0, False)])
def test_a_note_of_half_of_four_or_more_files_is_told_once_at_the_end(
    tmp_path, capsys, with_timer, without, at_the_end
):
    assert main(["check", folder_of_jsons(tmp_path, with_timer, without)]) == 0
    said = capsys.readouterr().out
    files = with_timer + without
    assert said.count("D90") == (1 if at_the_end else with_timer)
    assert (f"in {with_timer} of {files} files:" in said) == at_the_end
    assert said.count("D03") == files, "a warning stays with its file"
    assert f"{files} files: 0 errors, {files} warnings, {files + with_timer} notes" in said
    if at_the_end:
        assert said.index("D90") > said.rindex("D03") and "1 warning, 2 notes (2 at the end)" in said
        assert f"in {files} of {files} files:" in said, "D55"


@pytest.mark.parametrize("columns", [60, 100])
def test_notes_at_the_end_fit_a_terminal(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    folder_of_jsons(tmp_path, 4, 0)
    assert main(["check", "."]) == 0
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()  # no colours
    assert sum("D90" in line for line in lines) == 1 and max(map(len, lines)) <= columns


def test_machines_get_every_note_of_every_file(tmp_path, capsys):
    assert main(["check", "--json", folder_of_jsons(tmp_path, 4, 0)]) == 0
    assert capsys.readouterr().out.count("D90") == 4


def test_fix_shortens_a_block_that_it_deletes(tmp_path, capsys):
    path = tmp_path / "ds.json"
    write_json(path, {**SGD, "compression_training": {f"layer_{number}": technique(False) for number in range(40)}})
    assert main(["check", "--fix", "--deepspeed", "0.19", str(path)]) == 0
    said = capsys.readouterr().out
    assert 'compression_training: {"layer_0": ' in said and "... -> (none)" in said
    assert max(map(len, said.splitlines())) < 300 + len(str(path))
