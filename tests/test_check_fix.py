"""`lbsgd check --fix` corrects what has one right answer, without losing a number, a block or a letter."""

import json

import pytest
from edited_jsons import edited
from test_check import errors

from lbsgd.commands.main import main
from lbsgd.config.checks.inspection import corrected, findings_of
from lbsgd.config.json_file import read_json
from lbsgd.config.keypath import get, put
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError

BUCKET = "zero_optimization.reduce_bucket_size"


def changed(**values):
    """8k.json with values at key paths; missing blocks are added."""
    config = edited()
    for key, value in values.items():
        put(config, key.replace("__", "."), value)
    return config


@pytest.mark.parametrize(
    "given, after",
    [
        ("2000000", 2000000),
        ("2e6", 2000000),
        (" 2000000.0 ", 2000000),
        ("0.5", "0.5"),
        (0.5, 0.5),
        (-3, -3),
        ("large", 6000000),
        (500_000_000, 500_000_000),
        (None, 6000000),
    ],
)
def test_a_bucket_keeps_the_number_that_stands_there(given, after):
    config = edited()
    put(config, BUCKET, given)
    assert get(corrected(config), BUCKET) == after


def test_weights_in_bfloat16_beside_fp16_are_two_precisions_and_nobody_can_say_which():
    config = changed(bf16={"enabled": True})
    assert errors(config) == ["D13", "D15"] and corrected(config) == config


@pytest.mark.parametrize("block", ["bf16", "bfloat16"])
def test_weights_in_bfloat16_become_autocast_and_keep_what_stands_in_its_block(block):
    modules = ["torch.nn.Conv2d"]
    config = changed(fp16=None, torch_autocast={"lower_precision_safe_modules": modules}, **{block: {"enabled": True}})
    autocast = {"lower_precision_safe_modules": modules, "enabled": True, "dtype": "bfloat16"}
    mended = corrected(config)
    assert mended["torch_autocast"] == autocast and block not in mended and errors(mended) == []


def test_weights_in_bfloat16_beside_another_autocast_stay():
    config = changed(fp16=None, torch_autocast={"dtype": "float16"}, bf16={"enabled": True})
    assert errors(config) == ["D13"] and corrected(config) == config


def test_two_misspelt_keys_that_mean_one_both_stay():
    config = edited(train_batch_size=None, train_batchsize=4096) | {"train_batch_sizes": 2048}
    assert errors(config).count("D02") == 2 and corrected(config) == config
    one = edited(train_batch_size=None, train_batchsize=8192)
    assert corrected(one)["train_batch_size"] == 8192


def test_a_misspelt_key_in_a_strict_block_is_not_deleted_with_its_number():
    config = changed(zero_optimization__reduce_bucket_sizes=2_000_000)
    assert errors(config) == ["D31"] and corrected(config) == config
    assert "zzz" not in corrected(changed(zero_optimization__zzz=1))["zero_optimization"]


@pytest.mark.parametrize("given, after", [(5.7, 5.7), (5.0, 5), (0.4, 0.4)])
def test_a_warmup_is_rounded_only_where_nothing_is_lost(given, after):
    params = {"warmup_num_steps": given, "warmup_min_lr": 0.01, "warmup_type": "linear"}
    config = {"train_batch_size": 256, "scheduler": {"type": "WarmupLR", "params": params}}
    assert "D46" in errors(config)
    found = corrected(config)["scheduler"]["params"]["warmup_num_steps"]
    assert found == after and type(found) is type(after)


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("text", ["η für Größe", "half a pair: \ud83d", "a \u2028 b"])
def test_letters_stay_letters_and_escapes_escapes(tmp_path, text, ascii_only):
    path = tmp_path / "ds.json"
    config = {"train_batch_size": 8, "optimizer": {"type": "sgd"}, f"{text}": {"purpose": text}}
    before = json.dumps(config, ensure_ascii=ascii_only).encode("utf-8", "backslashreplace")
    path.write_bytes(before)
    assert main(["check", "--fix", str(path)]) == 0
    assert read_json(path) == config | {"optimizer": {"type": "SGD"}}
    assert path.read_bytes() == before.replace(b"sgd", b"SGD")


def test_a_purpose_in_an_lbsgd_block_keeps_its_letters(tmp_path):
    path = tmp_path / "ds.json"
    config = edited(lbsgd__purpose="η für Größe", optimizer__params__lr=0.1)
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    assert main(["check", "--fix", str(path)]) == 0
    assert '"purpose": "η für Größe"' in path.read_text(encoding="utf-8")


def test_a_measurement_that_somebody_has_switched_on_stays_and_deepspeeds_own_timer_is_switched_off():
    config = changed(
        comms_logger={"enabled": True}, wall_clock_breakdown=True, timers={"throughput": {"enabled": True}}
    )
    assert [each.code for each in findings_of(config)] == ["D39", "D39", "D39"]
    assert corrected(config) == {**edited(), "comms_logger": {"enabled": True}, "wall_clock_breakdown": True}


def test_a_scheduler_that_is_missing_is_written_and_another_one_stays():
    missing = {key: value for key, value in edited().items() if key != "scheduler"}
    assert "D09" in errors(missing) and corrected(missing) == edited()
    other = edited(scheduler__type="OneCycle")
    assert corrected(other)["scheduler"] == other["scheduler"]


def test_offload_is_deleted_under_its_old_names_too():
    for name in ("cpu_offload", "cpu_offload_param"):
        config = changed(**{f"zero_optimization__{name}": True})
        assert errors(config) == ["D19"] and corrected(config) == edited()


def test_engines_for_other_training_are_deleted():
    config = changed(zero_optimization__zenflow={}, hybrid_engine={"enabled": True})
    assert errors(config) == ["D91", "D91"] and corrected(config) == edited()


def renamed_block(name, **beside):
    config = edited()
    return {**{name if key == "lbsgd" else key: value for key, value in config.items()}, **beside}


@pytest.mark.parametrize("name", ["lbsg", "Lbsgd", "LBSGD", "lbsgd_"])
def test_a_misspelt_lbsgd_block_is_an_error_and_the_only_one_that_stops_a_plan(name):
    """DeepSpeed does not know its values "auto", and it must not be deleted."""
    config = renamed_block(name)
    assert errors(config) == ["R21"] and not {"D02", "D03", "D21"} & {each.code for each in findings_of(config)}
    with pytest.raises(ConfigError, match=rf"^the configuration: {name} .*; rename it to lbsgd \[R21\]$") as refused:
        Plan.read(config, 1)
    assert "\n" not in str(refused.value)
    assert corrected(config) == config


@pytest.mark.parametrize("name", ["lbsg", "lbsgd2"])
def test_a_second_block_beside_ours_is_a_warning(name):
    config = renamed_block(name, lbsgd=edited()["lbsgd"])
    assert [(each.severity, each.code) for each in findings_of(config) if each.key == name] == [("warning", "D03")]
    assert errors(config) == [] and Plan.read(config, 1).global_batch == 8192 and corrected(config) == config


@pytest.mark.parametrize(
    "block",
    [
        {"lbsg": {"my_own": 1}},
        {"my_project": edited()["lbsgd"]},
        {"lsgd": {"warmup": 100, "sync_every": 8}},
        {"lbsg": {"epochs": 90}},
    ],
)
def test_a_block_that_is_no_recipe_is_another_program_s(block):
    """For example Local SGD's. Its DeepSpeed JSON stays as it is."""
    config = {"train_batch_size": 8, "gradient_clipping": 1.0, **block}
    assert errors(config) == [] and corrected(config) == config
    assert [each.code for each in findings_of(config) if each.key in block] == ["D03"]


def test_no_number_is_derived_from_a_batch_that_is_refused():
    """250 images are no whole number of workers: no learning rate follows from them, nor that warmup must go."""
    config = changed(train_batch_size=250)
    assert errors(config) == ["R02"] and corrected(config) == config
    with pytest.raises(ConfigError, match="use 224 or 256"):
        Plan.read(config, 1)
