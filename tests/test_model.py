"""The network of Sec. 5.1: torchvision's layers, the paper's initial values."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from lbsgd.algorithm.resnet import resnet
from lbsgd.commands.recipe_task import require_task
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError
from lbsgd.train.returned import require_loss

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def network():
    return resnet("resnet50", num_classes=1000, seed=0)


def test_the_state_dict_is_torchvisions(network):
    theirs = torchvision.models.resnet50().state_dict()
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


def test_the_stride_is_on_the_3x3_convolution(network):
    block = network.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_the_last_gamma_of_each_of_the_16_blocks_is_0_and_every_other_is_1(network):
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    last = {name for name in norms if name.endswith("bn3")}
    assert len(norms) == 53 and len(last) == 16
    for name, norm in norms.items():
        assert (norm.weight == (0 if name in last else 1)).all() and (norm.bias == 0).all(), name
    assert all(
        (module.weight == 1).all()
        for module in resnet("resnet50", 10, zero_last_gamma=False).modules()
        if isinstance(module, nn.BatchNorm2d)
    )


def test_the_fully_connected_layer_is_drawn_with_a_standard_deviation_of_0_01(network):
    assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert (network.fc.bias == 0).all()


def test_convolutions_are_drawn_as_he_et_al_do(network):
    weight = network.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)


def test_every_process_builds_the_same_network_from_the_seed_and_draws_nothing_else():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = resnet("resnet18", 10, seed=3), resnet("resnet18", 10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.conv1.weight, resnet("resnet18", 10, seed=4).conv1.weight)


def test_the_generators_of_gpus_stay_as_they_were(monkeypatch):
    """torch.manual_seed would seed them, too, and nothing would restore them."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(5)
    assert seeded == [5]
    resnet("resnet18", 10, seed=3)
    assert seeded == [5]


def test_the_weights_are_those_of_the_cpu_on_the_default_device():
    with torch.device("meta"):
        network = resnet("resnet18", 10, seed=3)
    assert all(tensor.is_meta for tensor in network.state_dict().values())


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match=r"'mobilenet_v3_small' is none .*resnet101.*override `network\(\)` in your"):
        resnet("mobilenet_v3_small", 10)


def test_the_documented_recipe_of_another_network_builds_it_the_same_on_every_process(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    section = (ROOT / "docs/running.md").read_text().split("## Another network")[1]
    names = {"__name__": "recipe"}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    plan = Plan.read(ROOT / "ds_configs/256.json", 1)
    one, other = (names["MobileNet"]().network(10, plan).state_dict() for _ in range(2))
    assert "classifier.3.weight" in one and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_documented_recipe_of_another_loss_is_a_task_with_that_loss(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    section, names = (ROOT / "docs/running.md").read_text().split("## Another loss")[1], {"__name__": "recipe"}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    task, logits = names["Smoothed"](), torch.tensor([[2.0, 0.0], [3.0, 1.0]], requires_grad=True)
    require_task(task)
    loss, [wrong] = require_loss(task.loss(lambda images: logits.half(), (None, torch.tensor([0, 1]))), task)
    smoothed = torch.tensor([[0.95, 0.05], [0.05, 0.95]])
    assert loss.isclose(-(smoothed * logits.log_softmax(1)).sum(1).mean()) and wrong == 1


def test_the_documented_fine_tuning_takes_all_weights_but_the_last_layer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/running.md").read_text().split("## Fine-tuning")[1]
    code, names = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {"__name__": "recipe"}
    given = resnet("resnet50", 1000, seed=5).state_dict()
    torch.save(given, re.search(r'torch.load\("(.*?)"', code)[1])
    exec(code, names)
    network = names["FineTuned"]().network(7, Plan.read(ROOT / "ds_configs/256.json", 1))
    found = network.state_dict()
    assert found["fc.weight"].shape == (7, 2048) and found["fc.weight"].std() > 0
    assert all(torch.equal(found[name], given[name]) for name in given if not name.startswith("fc."))
    frozen = {name.split(".")[0] for name, each in network.named_parameters() if not each.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}


@pytest.mark.parametrize(
    ("recipe", "task", "layers"),
    [
        ("digits", "DigitsResNet", 8),
        ("digits_resnet14", "DeeperDigitsResNet", 14),
        ("cifar10", "SmallResNet", 8),
        ("cifar10_resnet14", "DeeperSmallResNet", 14),
    ],
)
def test_the_small_networks_have_the_layers_of_their_names(monkeypatch, recipe, task, layers):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    task = getattr(importlib.import_module(recipe), task)()
    network = task.network(10, Plan.read(ROOT / "ds_configs/digits/256.json", 1))
    weights = {
        name: weight for name, weight in network.named_parameters() if weight.ndim > 1 and "downsample" not in name
    }
    assert task.name == f"resnet{layers}" and len(weights) == layers
    last_gammas = [weight for name, weight in network.named_parameters() if name.endswith("bn2.weight")]
    assert len(last_gammas) == (layers - 2) // 2 and not any(map(torch.any, last_gammas))
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
