"""DeepSpeed does what the entries of `lbsgd check` say about it, with the optimizer and scheduler of each entry."""

import pytest
from processes import in_processes

from lbsgd.config.checks.inspection import findings_of

SMALL = {"train_batch_size": 1, "gradient_clipping": 0.0, "steps_per_print": 1000}
FP16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}


def severity(config, code):
    return next((finding.severity for finding in findings_of(config) if finding.code == code), None)


@pytest.fixture
def weights_after(monkeypatch):
    """Train Linear(4, 2), whose gradients are 1. Return its bias after each update, minus the first."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    from lbsgd.train.engine import start_processes

    start_processes()
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)

    def train(config, updates):
        model = torch.nn.Linear(4, 2)
        torch.nn.init.zeros_(model.bias)
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        moved = []
        for _ in range(updates):
            engine.backward(engine(torch.ones(1, 4, dtype=model.bias.dtype)).sum())
            engine.step()
            moved.append(abs(model.bias[0].item()))
        return moved

    return train


@pytest.mark.parametrize("buffers, works", [(None, False), ("fp32", False), ("bf16", True)])
def test_d57_torchs_batch_norm_fails_unless_its_buffers_have_the_type_of_the_weights(weights_after, buffers, works):
    import deepspeed
    import torch

    config = {**SMALL, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "bf16": {"enabled": True}}
    if buffers:
        config["data_types"] = {"buffer_dtype": buffers}
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    engine = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)[0]
    images = torch.ones(2, 3, 5, 5, dtype=torch.bfloat16)
    assert severity(config, "D57") == (None if works else "note")
    if works:
        assert engine(images).dtype == torch.bfloat16
    else:
        with pytest.raises(RuntimeError):
            engine(images)


@pytest.mark.parametrize("stage, dtype", [(0, "float32"), (1, "bfloat16"), (2, "bfloat16")])
def test_d88_zero_reduces_in_the_type_of_the_autocast(weights_after, stage, dtype):
    import deepspeed
    import torch

    config = {
        **SMALL,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    }
    assert severity(config, "D88") == ("note" if stage else None)
    network = torch.nn.Linear(4, 2)
    engine = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)[0]
    types = set(engine.optimizer.ipg_buckets) if stage else {engine.communication_data_type}
    assert types == {getattr(torch, dtype)}


@pytest.mark.parametrize("enabled", [False, True])
def test_d94_auto_cast_without_fp16_casts_images_all_the_same(weights_after, enabled):
    optimizer = {"type": "SGD", "params": {"lr": 100.0}}
    zero = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    config = {**SMALL, **zero, "optimizer": optimizer, "fp16": {"enabled": enabled, "auto_cast": True}}
    assert severity(config, "D94") == (None if enabled else "error")
    if enabled:
        weights_after(config, 1)
    else:
        with pytest.raises(RuntimeError, match="dtype"):
            weights_after(config, 1)


@pytest.mark.parametrize("momentum, power", [(0.0, 16), (0.0, 10)])
def test_d11_sgd_makes_updates_too_small_by_the_loss_scale(weights_after, momentum, power):
    optimizer = {"type": "SGD", "params": {"lr": 100.0, "momentum": momentum}}
    config = {**SMALL, **FP16, "optimizer": optimizer, "fp16": {"enabled": True, "initial_scale_power": power}}
    assert severity(config, "D11") == "error" and severity(config, "D73") is None
    assert weights_after(config, 8)[-1] == pytest.approx(8 * 100.0 / 2**power, rel=0.01)


def test_d73_adam_moves_the_weights_all_the_same(weights_after):
    optimizer = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}
    config = {**SMALL, **FP16, "optimizer": optimizer}
    assert severity(config, "D11") is None and severity(config, "D73") == "warning"
    assert weights_after(config, 8)[-1] == pytest.approx(0.08, rel=0.1)


@pytest.mark.parametrize("optimizer", [{"type": "SGD"}, {"type": "AdamW"}], ids=lambda each: each["type"])
@pytest.mark.parametrize(
    "kind, params, key",
    [
        ("WarmupLR", {}, "warmup_min_lr"),
        ("WarmupDecayLR", {"total_num_steps": 100}, "warmup_min_lr"),
        ("WarmupCosineLR", {"total_num_steps": 100}, "warmup_min_ratio"),
    ],
)
def test_d43_the_first_two_updates_move_nothing_and_the_advised_key_helps(weights_after, optimizer, kind, params, key):
    arguments = {"lr": 0.1, **({"torch_adam": True, "weight_decay": 0.0} if optimizer["type"] == "AdamW" else {})}
    params = {"warmup_num_steps": 10, "warmup_type": "linear", **params}
    config = {
        **SMALL,
        "optimizer": {**optimizer, "params": arguments},
        "scheduler": {"type": kind, "params": params},
    }
    [finding] = [finding for finding in findings_of(config) if finding.code == "D43"]
    assert finding.key == f"scheduler.params.{key}"
    first, second, third = weights_after(config, 3)
    assert first == second == 0 < third
    params[key] = 0.05
    assert severity(config, "D43") is None
    first, second = weights_after(config, 2)
    assert second > 0 and (first == 0 if kind == "WarmupCosineLR" else first > 0)


def test_d74_a_learning_rate_of_0_moves_nothing(weights_after):
    config = {**SMALL, "optimizer": {"type": "SGD", "params": {"lr": 0}}}
    assert severity(config, "D74") == "error" and weights_after(config, 3)[-1] == 0


@pytest.mark.parametrize("kind, highest", [("WarmupDecayLR", 0.001), ("WarmupLR", 0.1)])
def test_d44_without_its_end_warmup_decay_ends_at_its_default(weights_after, kind, highest):
    params = {"warmup_min_lr": 0.0001, "warmup_num_steps": 2, "warmup_type": "linear"}
    params |= {"total_num_steps": 100} if kind == "WarmupDecayLR" else {}
    config = {**SMALL, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    config["scheduler"] = {"type": kind, "params": params}
    assert severity(config, "D44") == ("warning" if highest < 0.1 else None)
    moved = weights_after(config, 4)
    assert moved[3] - moved[2] == pytest.approx(highest, rel=0.02)


@pytest.mark.parametrize("total, warning", [(10, None), (5, "warning"), (3, "warning")])
@pytest.mark.parametrize("kind", ["WarmupDecayLR", "WarmupCosineLR"])
def test_d58_after_a_warmup_of_all_steps_nothing_moves(weights_after, kind, total, warning):
    params = {"total_num_steps": total, "warmup_num_steps": 5, "warmup_type": "linear"}
    params |= {"warmup_max_lr": 0.1} if kind == "WarmupDecayLR" else {"cos_min_ratio": 0.0}
    config = {**SMALL, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    config["scheduler"] = {"type": kind, "params": params}
    assert severity(config, "D58") == warning
    moved = weights_after(config, 8)
    assert (moved[7] == moved[6]) == bool(warning)


def biases_after_an_update(configs):
    import deepspeed
    import torch

    from lbsgd.train.engine import start_processes

    start_processes()
    biases = []
    for config in configs:
        model = torch.nn.Linear(4, 2)
        torch.nn.init.zeros_(model.bias)
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        with deepspeed.zero.GatheredParameters(model.bias):
            biases.append(abs(model.bias[0].item()))
    return biases


def test_d59_zero_3_divides_twice_by_a_factor_that_is_the_number_of_processes():
    config = {
        **SMALL,
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "reduce_scatter": False},
    }
    configs = [
        {**config, "gradient_predivide_factor": factor, "prescale_gradients": prescale}
        for factor, prescale in ((2, False), (4, False), (2, True))
    ]
    assert [severity(config, "D59") for config in configs] == ["warning", None, None]
    assert in_processes(2, biases_after_an_update, configs) == [[0.5, 1.0, 1.0]] * 2


@pytest.mark.parametrize("maximize", [False, True])
def test_d69_an_optimizer_with_maximize_climbs(weights_after, maximize):
    import deepspeed
    import torch

    optimizer = {"type": "SGD", "params": {"lr": 0.1, "maximize": maximize}}
    config = {**SMALL, "optimizer": optimizer}
    assert severity(config, "D69") == ("warning" if maximize else None)
    network = torch.nn.Linear(4, 2)
    before = network(torch.ones(1, 4)).sum().item()
    engine = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)[0]
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    assert (network(torch.ones(1, 4)).sum().item() > before) == maximize


@pytest.mark.parametrize("least, most, falls", [(0.1, 0.4, False), (0.4, 0.1, True), (0.4, None, True)])
def test_d68_a_warmup_from_above_its_end_goes_down(weights_after, least, most, falls):
    params = {"warmup_min_lr": least, "warmup_max_lr": most, "warmup_num_steps": 4, "warmup_type": "linear"}
    params = {name: value for name, value in params.items() if value is not None}
    optimizer = {"type": "SGD", "params": {"lr": 0.1}}
    config = {**SMALL, "optimizer": optimizer, "scheduler": {"type": "WarmupLR", "params": params}}
    assert severity(config, "D68") == ("warning" if falls else None)
    first, *_, before, last = weights_after(config, 8)
    assert first == pytest.approx(least) and last - before == pytest.approx(most or 0.1)


@pytest.mark.parametrize("steps, said", [(2, "note"), (10, "note"), (11, None), (1, None)])
def test_d38_a_warmup_of_a_few_updates_is_noted(steps, said):
    params = {"warmup_min_lr": 0.01, "warmup_num_steps": steps, "warmup_type": "linear"}
    assert severity({**SMALL, "scheduler": {"type": "WarmupLR", "params": params}}, "D38") == said
