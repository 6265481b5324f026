"""Batch norm in other people's loops, libraries and tools behaves like torch's own classes, whatever they do."""

import copy
import pickle
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import timm
import torch
import torch._dynamo
import torchvision
from processes import in_processes
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import lbsgd
from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm

N = 4  # images of one worker


def images(num, seed=0, size=8):
    return 3 * torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed)) + 1


def small(**options):
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(6, **options), nn.BatchNorm2d(4, **options)
    return nn.Sequential(nn.Conv2d(3, 6, 3), first, nn.ReLU(), nn.Conv2d(6, 4, 3), second)


def ours(passes=1, **options):
    return convert_batch_norm(small(**options), N, passes=passes)


def backward(model, x):
    model(x).square().mean().backward()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def statistics(model):
    return torch.cat([buffer.flatten().double() for buffer in model.buffers()])


def assert_same(model, other, **tolerance):
    """Compare gradients and statistics."""
    torch.testing.assert_close(gradient(model), gradient(other), **tolerance)
    torch.testing.assert_close(statistics(model), statistics(other), **tolerance)


# --- networks of torchvision and timm --------------------------------------------------------------------------------

NETWORKS = {
    "torchvision's ResNet-18": lambda: torchvision.models.resnet18(num_classes=10),
    "torchvision's MobileNetV3": lambda: torchvision.models.mobilenet_v3_small(num_classes=10, dropout=0.0),
    "timm's ResNet-10": lambda: timm.create_model("resnet10t", num_classes=10),
    "timm's RegNetX, norms with activation": lambda: timm.create_model("regnetx_002", num_classes=10),
    "timm's MobileNetV3, norms with activation": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request):
    torch.manual_seed(0)
    return request.param()


def norms(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def test_one_worker_is_torch_bit_for_bit_and_two_are_the_mean_of_torch_on_each(network):
    x, labels = images(2 * N, size=32), torch.arange(2 * N)
    alone, pair = (convert_batch_norm(copy.deepcopy(network), N) for _ in range(2))
    assert norms(pair) and all(isinstance(norm, PerWorkerBatchNorm) for norm in norms(pair).values())
    assert list(pair.state_dict()) == list(network.state_dict())
    workers = [copy.deepcopy(network) for _ in range(2)]
    losses = [F.cross_entropy(w(x_w), y) for w, x_w, y in zip(workers, x.split(N), labels.split(N), strict=True)]
    F.cross_entropy(alone(x[:N]), labels[:N]).backward()
    F.cross_entropy(pair(x), labels).backward()
    for loss in losses:
        loss.backward()
    assert torch.equal(gradient(alone), gradient(workers[0]))
    torch.testing.assert_close(statistics(alone), statistics(workers[0]), rtol=1e-6, atol=1e-6)
    mean = sum(map(gradient, workers)) / 2
    assert (gradient(pair) - mean).abs().max() < 1e-3 * mean.abs().max()
    torch.testing.assert_close(statistics(pair), sum(map(statistics, workers)) / 2, rtol=1e-4, atol=1e-4)
    network.load_state_dict(pair.state_dict())
    assert torch.equal(pair.eval()(x[:3]), network.eval()(x[:3]))


def test_a_batch_norm_of_timm_keeps_its_drop_and_activation_and_is_still_timms():
    layer = timm.layers.BatchNormAct2d(3, act_layer=nn.Hardswish, drop_layer=lambda: nn.Dropout(0.5))
    plain, kept = nn.BatchNorm2d(3), (layer.act, layer.drop, layer.weight, layer.running_var)
    convert_batch_norm(layer, N)
    assert all(a is b for a, b in zip((layer.act, layer.drop, layer.weight, layer.running_var), kept, strict=True))
    x = images(2 * N)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    expected = F.hardswish(F.dropout(torch.cat([plain(part) for part in x.split(N)]), 0.5))
    assert torch.equal(y, expected) and "per_worker_batch=4" in repr(layer)
    assert isinstance(pickle.loads(pickle.dumps(layer)), timm.layers.BatchNormAct2d)
    assert isinstance(timm.utils.model.freeze_batch_norm_2d(layer), timm.layers.FrozenBatchNormAct2d)


def test_timms_synchronised_batch_norm_is_converted_with_its_activation():
    layer = timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(3))
    x = images(2 * N)
    assert torch.equal(convert_batch_norm(layer, N)(x), convert_batch_norm(nn.BatchNorm2d(3), N)(x).relu())


def test_a_refused_model_is_left_as_it_was():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Own(3))
    with pytest.raises(ValueError, match="1 is a Own, neither torch's own batch norm nor timm's"):
        convert_batch_norm(model, N)
    assert type(model[0]) is nn.BatchNorm2d and not model._forward_pre_hooks


@pytest.mark.parametrize("in_torchscript", [torch.jit.script, lambda model: torch.jit.trace(model.eval(), images(N))])
def test_a_batch_norm_in_torchscript_is_refused_rather_than_left_torchs(in_torchscript):
    model = nn.Sequential(in_torchscript(small()))
    with pytest.raises(ValueError, match="0.1 is a BatchNorm2d in TorchScript, .* before torch.jit.script"):
        convert_batch_norm(model, N)
    assert convert_batch_norm(model.requires_grad_(False), N) is model  # for example a teacher


def test_a_batch_norm_in_an_exported_graph_is_refused_unless_it_is_frozen():
    model = small()
    graph = torch.export.export(model, (images(N),)).module()
    with pytest.raises(ValueError, match=r"0 computes batch norm in its graph \(batch_norm\), .* before torch.export$"):
        convert_batch_norm(nn.Sequential(graph), N)
    frozen = torch.export.export(model.eval(), (images(N),)).module()
    assert convert_batch_norm(frozen, N) is frozen
    convert_batch_norm(torch.fx.symbolic_trace(model), N)  # which keeps its modules


def test_a_lazy_batch_norm_is_converted_once_it_has_channels():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="1 is a LazyBatchNorm2d, still without channels; run one forward before"):
        convert_batch_norm(model, N)
    model(images(N))
    assert isinstance(convert_batch_norm(model, N)[1], PerWorkerBatchNorm)


def test_torchscript_takes_the_trained_weights_in_the_network_as_it_was():
    plain = small()
    model = convert_batch_norm(copy.deepcopy(plain), N)
    model(images(2 * N))
    with pytest.raises(ValueError, match="load this network's state_dict into the network as it was"):
        torch.jit.script(model)
    plain.load_state_dict(model.state_dict())
    x = images(3)
    assert torch.equal(torch.jit.script(plain.eval())(x), model.eval()(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("make", [torchvision.models.resnet18, lambda: timm.create_model("regnetx_002")])
def test_features_are_extracted_at_the_nodes_that_torchs_batch_norms_have(make):
    torch.manual_seed(0)
    plain = make()
    model = convert_batch_norm(copy.deepcopy(plain), N)
    if not isinstance(plain, timm.models.RegNet):  # outside timm its own layers are no leaves
        assert get_graph_node_names(model) == get_graph_node_names(plain)
    node = [name for name in get_graph_node_names(model)[0] if name in norms(plain)][3]
    x = images(2 * N, size=32)
    extract, seen = create_feature_extractor(model, [node]), []
    norms(plain)[node].register_forward_hook(lambda *call: seen.append(call[-1].clone()))
    for part in x.split(N):
        plain(part)
    torch.testing.assert_close(extract(x)[node], torch.cat(seen), rtol=1e-4, atol=1e-4)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    """Runs a body under gradient checkpointing, as two segments."""

    def __init__(self, body, use_reentrant=False):
        super().__init__()
        self.body, self.use_reentrant = body, use_reentrant

    def forward(self, x):
        for part in (self.body[:3], self.body[3:]):
            x = checkpoint(part, x, use_reentrant=self.use_reentrant)
        return x


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("passes, workers", [(1, 1), (10, 2)])
def test_a_compiled_network_is_one_graph_and_the_same_network(compiler, backend, passes, workers):
    model, eager = ours(passes), ours(passes)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in range(2 * passes):
        for each in (compiled, eager):
            backward(each, images(workers * N, seed))
    assert_same(model, eager, rtol=1e-4, atol=1e-6)
    assert model[1].num_batches_tracked == 2 and compiler["stats"]["unique_graphs"] == 1


def test_an_iteration_may_begin_compiled_and_end_as_it_is(compiler):
    model, eager = ours(passes=2), ours(passes=2)
    backward(torch.compile(model, backend="aot_eager"), images(N))
    backward(model, images(N, 1))
    for seed in range(2):
        backward(eager, images(N, seed))
    assert_same(model, eager)


def test_compiled_blocks_of_one_class_share_their_graphs(compiler):
    model, eager = (
        nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(10))) for _ in "12"
    )
    eager.load_state_dict(model.state_dict())
    for each in (model, eager):
        convert_batch_norm(each, N, passes=2)
    for block in model:
        block.compile(backend="aot_eager")
    for seed in range(4):
        for each in (model, eager):
            backward(each, images(2 * N, seed))
    assert_same(model, eager, rtol=1e-3, atol=1e-5)
    assert compiler["stats"]["unique_graphs"] <= 2


def test_statistics_are_recomputed_from_compiled_forwards(compiler):
    model, eager = ours(passes=3), ours(passes=3)
    for each, run in ((model, torch.compile(model, backend="aot_eager")), (eager, eager)):
        with torch.no_grad(), lbsgd.recomputing_statistics(each):
            run(images(2 * N))
    torch.testing.assert_close(statistics(model), statistics(eager))


# --- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradient_checkpointing_moves_statistics_once(use_reentrant, passes):
    model, plain = ours(passes), ours(passes)
    checkpointed = Checkpointed(model, use_reentrant)
    for seed in range(2 * passes):
        backward(checkpointed, images(2 * N, seed).requires_grad_())
        backward(plain, images(2 * N, seed))
    assert_same(model, plain)
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_inside_a_compiled_network_too(compiler, backend):
    model, plain = ours(passes=2), ours(passes=2)
    compiled = torch.compile(Checkpointed(model), backend=backend)
    for seed in range(4):
        backward(compiled, images(2 * N, seed))
        backward(plain, images(2 * N, seed))
    assert_same(model, plain, rtol=1e-4, atol=1e-6)
    assert model[1].num_batches_tracked == 2


def test_a_compiled_segment_under_gradient_checkpointing_too(compiler):
    model, plain = ours(passes=2), ours(passes=2)
    segment = torch.compile(model, backend="aot_eager")
    for seed in range(4):
        checkpoint(segment, images(2 * N, seed), use_reentrant=False).square().mean().backward()
        backward(plain, images(2 * N, seed))
    assert_same(model, plain, rtol=1e-4, atol=1e-6)


# --- who else moves statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("passes", [1, 3, 32])
def test_update_bn_takes_in_every_batch_as_with_torchs(passes, momentum):
    model, plain = ours(passes, momentum=momentum), small(momentum=momentum)
    batches = [images(N, seed) for seed in range(5)]
    for each in (model, plain):
        swa_utils.update_bn(batches, each)
    torch.testing.assert_close(statistics(model), statistics(plain), rtol=1e-5, atol=1e-5)
    assert model[1].momentum == momentum


def test_update_bn_between_two_passes_leaves_the_iteration_alone():
    model, undisturbed = ours(passes=2), ours(passes=2)
    for each in (model, undisturbed):
        each(images(N))
    swa_utils.update_bn([images(N, seed) for seed in range(3)], model)
    for buffer, before in zip(model.buffers(), undisturbed.buffers(), strict=True):
        buffer.copy_(before)
    for each in (model, undisturbed):
        each(images(N, 1))
    assert torch.equal(statistics(model), statistics(undisturbed)) and model[1].num_batches_tracked == 1


def test_loading_a_state_begins_an_iteration():
    """A pass that the state does not include, here a broken one, is not averaged with later passes."""
    model, undisturbed = ours(passes=2), ours(passes=2)
    model(images(N) * float("nan"))
    model.load_state_dict(undisturbed.state_dict())
    for seed in range(2):
        for each in (model, undisturbed):
            each(images(N, seed))
    assert torch.equal(statistics(model), statistics(undisturbed)) and model[1].num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [None, 1.0])  # the mean over all iterations, and the last one
@pytest.mark.parametrize("workers", [1, 2])
def test_without_a_momentum_or_with_1_the_statistics_are_of_whole_iterations(workers, momentum):
    model, plain = ours(passes=2, momentum=momentum), ours(momentum=momentum)
    for seed in range(3):
        plain(images(2 * workers * N, seed))
        for half in images(2 * workers * N, seed).split(workers * N):
            model(half)
    for ours_, theirs in zip(norms(model).values(), norms(plain).values(), strict=True):
        torch.testing.assert_close(ours_.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours_.running_var, theirs.running_var)
        assert ours_.last is not None
        torch.testing.assert_close(ours_.last, theirs.last)


def test_a_momentum_of_1_shows_each_forward_by_itself_as_precise_batch_norms_want_it():
    model, plain = ours(passes=4), small()
    for each in (model, plain):
        for norm in norms(each).values():
            norm.momentum = 1.0
        each(images(N))
    torch.testing.assert_close(statistics(model), statistics(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_lives_by_itself(use_buffers):
    models, averages = [ours(passes=2), small()], []
    for model in models:
        average = swa_utils.AveragedModel(model, use_buffers=use_buffers)
        for seed in range(2):
            for _ in range(2 if model is models[0] else 1):  # passes, each of one worker with the same images
                model(images(N, seed))
            average.update_parameters(model)
        averages.append(average)
    torch.testing.assert_close(*map(statistics, averages), rtol=1e-5, atol=1e-6)
    before = statistics(models[0])
    averages[0](images(N))
    averages[0](images(N))
    assert averages[0].module[1].num_batches_tracked == 3 or use_buffers
    assert torch.equal(statistics(models[0]), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [dict(track_running_stats=False), dict(affine=False), dict(momentum=None)])
def test_options_of_torchs_batch_norm_mean_what_they_mean_there(options, training):
    model, plain = ours(**options).train(training), small(**options).train(training)
    for seed in range(3):
        assert torch.equal(model(images(N, seed)), plain(images(N, seed)))
    if list(plain.buffers()):
        torch.testing.assert_close(statistics(model), statistics(plain))


def test_switching_tracking_off_keeps_the_statistics_that_there_are():
    model, plain = ours(), small()
    for each in (model, plain):
        each(images(N))
        for norm in norms(each).values():
            norm.track_running_stats = False
        each(images(N, 1))
    torch.testing.assert_close(statistics(model), statistics(plain))
    torch.testing.assert_close(model.eval()(images(3)), plain.eval()(images(3)))


@pytest.mark.parametrize("freeze", [nn.Module.eval, lambda norm: setattr(norm, "track_running_stats", False)])
def test_frozen_batch_norms_stay_and_the_others_are_recomputed(freeze):
    model = ours().train()
    freeze(model[1])
    frozen, moving = (model[i].running_mean.clone() for i in (1, 4))
    with torch.no_grad(), lbsgd.recomputing_statistics(model):
        model(images(2 * N))
    assert torch.equal(model[1].running_mean, frozen) and not torch.equal(model[4].running_mean, moving)


def test_a_network_without_batch_norm_has_nothing_to_do():
    model = convert_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), N)
    with torch.no_grad(), lbsgd.recomputing_statistics(model):
        model(images(N))
    lbsgd.agree_statistics(model)
    assert not model._forward_pre_hooks and not model._forward_hooks


class Siamese(nn.Module):
    """Uses its batch norm twice in one forward, on different images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.conv(2 * x - 1))


@pytest.mark.parametrize("passes, compiled", [(1, False), (2, False), (4, False), (2, True)])
def test_a_module_used_twice_in_one_forward_has_the_same_statistics_for_any_number_of_passes(
    compiler, passes, compiled
):
    model, plain = convert_batch_norm(Siamese(), N, passes=passes), convert_batch_norm(Siamese(), N)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for seed in range(2):
        x = images(4 * N, seed)
        plain(x)
        for part in x.split(4 * N // passes):
            run(part)
    torch.testing.assert_close(statistics(model), statistics(plain))
    assert model.norm.num_batches_tracked == 4
    assert torch.equal(statistics(model), statistics(plain)) or compiled


def test_one_use_alone_is_torchs_order_of_two_moves():
    model, plain = convert_batch_norm(Siamese(), N), Siamese()
    for each in (model, plain):
        each(images(N))
    torch.testing.assert_close(statistics(model), statistics(plain))


# --- rows that are no images -----------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Normalises the tokens of all images as separate rows, as timm's LeViT does."""

    def __init__(self, checkpointing=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.checkpointing = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4), checkpointing

    def rows(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)  # (N, tokens, C)
        return self.norm(x.flatten(0, 1)).reshape_as(x)

    def forward(self, name=None, x=None, scales=None):
        return checkpoint(self.rows, x, use_reentrant=False) if self.checkpointing else self.rows(x)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_one_worker_s_images_are_normalised_together(compiler, checkpointing, compiled):
    model, plain = convert_batch_norm(Tokens(checkpointing), N, passes=2), Tokens()
    run = torch.compile(model, backend="aot_eager", fullgraph=not checkpointing) if compiled else model
    for seed in range(2):
        for _ in range(2):  # passes, each of one worker with the same images
            run("images", x=images(N, seed)).pow(3).mean().mul(0.5).backward()
        plain(x=images(N, seed)).pow(3).mean().backward()
    assert_same(model, plain, rtol=1e-4, atol=1e-5)
    assert model.norm.num_batches_tracked == 2


def test_rows_of_several_workers_are_refused_with_the_numbers():
    model = convert_batch_norm(Tokens(), N)
    with pytest.raises(ValueError, match=r"makes 288 rows of 8 images .* a micro batch of 4$"):
        model(x=images(2 * N), scales=torch.ones(N))  # the rows may be those of 8 images, or of 4
    assert model.rows(images(2 * N)).shape == (2 * N, 36, 4)  # outside a forward the images are not known


@dataclass
class Given:
    pixels: torch.Tensor


class Inside(Tokens):
    """Takes its images out of what it is given."""

    def forward(self, given, get=lambda given: given):
        return self.rows(get(given))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "put, get",
    [
        (lambda x: {"x": x}, lambda given: given["x"]),
        (lambda x: (torch.ones(2), {"x": [x]}), lambda given: given[1]["x"][0]),
        (Given, lambda given: given.pixels),
        (list, torch.stack),
    ],
)
def test_images_inside_of_other_inputs_are_found(compiler, put, get, compiled):
    model, plain = convert_batch_norm(Inside(), N), Inside()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(run(put(images(N)), get), plain(put(images(N)), get), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"makes 288 rows of 8 images"):
        model(put(images(2 * N)), get)


class Pooled(nn.Module):
    """Normalises images, or what `pool` makes of them; its other inputs hold no images."""

    def __init__(self, pool=lambda x: x):
        super().__init__()
        self.norm, self.pool = nn.BatchNorm2d(3), pool

    def forward(self, *inputs, x=None):
        found = [x, *inputs] if x is not None else inputs
        return self.norm(self.pool(next(each for each in found if torch.is_tensor(each) and each.dim() == 4)))


def of_a_graph(x):
    """Put each two rows into one, as a graph network does to nodes."""
    return x.unflatten(0, (-1, 2)).mean(1)


@pytest.mark.parametrize(
    "inputs, pool",
    [
        (lambda x: [torch.ones(1), x], None),
        (lambda x: [torch.ones(2), x, torch.ones(50, 4)], None),
        (lambda x: [x, torch.ones(N, 2), torch.ones(3 * N)], None),
        (lambda x: [x, torch.ones(2, 50), torch.zeros(len(x))], of_a_graph),
        (lambda x: [{"boxes": torch.ones(3, 4), "cycle": None}, x], None),
        (lambda x: [x, [{"boxes": torch.ones(number, 4)} for number in (1, 2 * N, 5)]], None),
        (lambda x: [np.ones(3), x], None),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_the_images_whatever_other_tensors_there_are(inputs, pool, workers):
    pool = pool or (lambda x: x)
    model, plain = convert_batch_norm(Pooled(pool), N), Pooled(pool)
    x = images(workers * N * (2 if pool is of_a_graph else 1))
    torch.testing.assert_close(model(*inputs(x)), torch.cat([plain.norm(part) for part in pool(x).split(N)]))


@pytest.mark.parametrize("collate", [list, tuple])
@pytest.mark.parametrize("num_boxes", [1, N, 2 * N, 64])
def test_a_detectors_lists_of_images_and_boxes_have_as_many_images_whatever_the_boxes(collate, num_boxes):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.BatchNorm1d(3)

        def forward(self, images, targets):
            return self.head(self.norm(torch.stack(images)).mean((2, 3)).repeat_interleave(16, 0))

    model, plain = convert_batch_norm(Detector(), N), Detector()
    targets = [{"boxes": torch.ones(num_boxes, 4), "labels": torch.ones(num_boxes)} for _ in range(N)]
    given = collate(images(N)), collate(targets)
    torch.testing.assert_close(model(*given), plain(*given))
    alone = convert_batch_norm(Inside(), N)
    with pytest.raises(ValueError, match="makes 288 rows of 8 images"):
        alone(collate(images(2 * N)), lambda given: torch.stack(list(given)))


@dataclass
class Odd:
    pixels: torch.Tensor
    unset: object = field(init=False)


def test_inputs_that_cannot_be_walked_through_to_their_end_are_no_error():
    model, given = convert_batch_norm(Inside(), N), Odd(images(N))
    model(given, lambda given: given.pixels)
    given.unset = given  # a circle
    model(given, lambda given: given.pixels)
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    model({"ragged": ragged, "x": images(N)}, lambda given: given["x"])


def test_a_block_compiled_alone_is_compiled_once_whatever_else_the_network_is_given(compiler):
    model = convert_batch_norm(Pooled(), N)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    model.norm.compile(backend=count, fullgraph=True, dynamic=False)
    for number in range(1, 12):
        model(images(N), [{"boxes": torch.ones(number, 4)}])
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0"])
def test_networks_of_timm_that_normalise_tokens_or_windows_are_torchs_on_one_worker(name):
    torch.manual_seed(0)
    plain, x = timm.create_model(name, num_classes=4), images(N, size=224)
    model = convert_batch_norm(copy.deepcopy(plain), N)
    for each in (model, plain):
        torch.manual_seed(1)  # for the head's dropout
        out = each(x)
        (sum(out) if isinstance(out, tuple) else out).square().sum().backward()
    assert torch.equal(gradient(model), gradient(plain))
    torch.testing.assert_close(statistics(model), statistics(plain), rtol=1e-5, atol=1e-6)


# --- copies, files and graphs ----------------------------------------------------------------------------------------


def reloaded(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate, compiled", [(copy.deepcopy, False), (reloaded, False), (copy.deepcopy, True)])
def test_a_copy_in_the_middle_of_an_iteration_goes_on_by_itself(compiler, duplicate, compiled):
    model = ours(passes=2)
    model(images(N))
    twin = duplicate(model)
    run = torch.compile(twin, backend="aot_eager") if compiled else twin
    run(images(N, 1))
    assert twin[1].num_batches_tracked == 1 and model[1].num_batches_tracked == 0
    model(images(N, 1))
    torch.testing.assert_close(statistics(twin), statistics(model))
    for norm in norms(twin).values():
        assert norm._forwards is twin[1]._forwards is not model[1]._forwards


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_network_is_the_network(strict):
    model = ours()
    model(images(N))
    evaluated = torch.export.export(model.eval(), (images(3),), strict=strict).module()
    torch.testing.assert_close(evaluated(images(3)), model(images(3)))
    twin = copy.deepcopy(model).train()
    trained = torch.export.export(twin, (images(2 * N),), strict=strict)
    assert not any("lbsgd" in str(node.target) for node in trained.graph.nodes)
    torch.testing.assert_close(trained.module()(images(2 * N)), model.train()(images(2 * N)))


def test_an_exported_graph_that_would_have_to_count_passes_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^an exported graph cannot count the 2 passes of an iteration[^\n]*$"):
        torch.export.export(ours(passes=2), (images(N),), strict=False)


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_gradients_of_gradients_are_those_of_finite_differences(workers):
    layer = convert_batch_norm(nn.BatchNorm2d(2).double(), N)
    x = images(workers * N, size=1)[:, :2].double().requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_a_gradient_penalty_is_the_sum_of_torchs_on_each_worker():
    model, plain, x = ours().double(), small().double(), images(2 * N).double()

    def penalty(network, x):
        x = x.detach().requires_grad_()
        (grad_x,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        grad_x.square().sum().backward()

    penalty(model, x)
    for part in x.split(N):
        penalty(plain, part)
    torch.testing.assert_close(gradient(model), gradient(plain))


@pytest.mark.parametrize("workers", [1, 2])
def test_torch_func_gives_the_same_gradient_and_moves_the_statistics(workers):
    model, plain, x = ours(passes=2), ours(passes=2), images(workers * N)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    for _ in range(2):
        gradients = torch.func.grad(loss)(parameters)
        plain.zero_grad()
        backward(plain, x)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(statistics(model), statistics(plain), rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 1


def test_vmap_is_refused_in_one_line_as_long_as_statistics_would_move():
    model, x = ours(), torch.stack([images(2 * N, seed) for seed in range(3)])
    with pytest.raises(ValueError, match=r"^torch.vmap cannot move [^\n]* track_running_stats to False[^\n]*$"):
        torch.vmap(model)(x)
    for norm in norms(model).values():
        norm.track_running_stats = False
    for mode in (True, False):
        model.train(mode)
        torch.testing.assert_close(torch.vmap(model)(x), torch.stack([model(part) for part in x]))


def in_ddp(compiled):
    torch.distributed.init_process_group("gloo")
    said = {}
    for broadcast in (True, False):
        network = torch.compile(ours(), backend="eager") if compiled else ours()
        network = DistributedDataParallel(network, broadcast_buffers=broadcast)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                backward(network, images(N))
        said[broadcast] = sum("broadcast_buffers=False" in str(each.message) for each in caught)
    return said


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_ddp_that_overwrites_the_statistics_is_warned_of_once_by_the_first_process(processes, compiled):
    first, *others = in_processes(processes, in_ddp, compiled)
    assert first == {True: processes - 1, False: 0} and others == [{True: 0, False: 0}] * (processes - 1)
