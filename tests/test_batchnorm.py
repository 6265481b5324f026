"""Sec. 2.3: each worker normalises its own n images on any hardware. Sec. 5.2: the statistics for evaluation."""

import copy
import itertools
import sys
import warnings
from collections import Counter
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.batch_norm_moves import Move, move_together
from lbsgd.algorithm.batch_norm_statistics import agree_statistics, recomputing_statistics
from lbsgd.algorithm.choices import Statistics
from lbsgd.algorithm.per_worker_batch_norm import (
    PerWorkerBatchNorm,
    PerWorkerBatchNorm1d,
    PerWorkerBatchNorm2d,
    PerWorkerBatchNorm3d,
)

N = 8  # images of one worker
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def images(num, *shape, seed=0, dtype=torch.float32, memory_format=torch.contiguous_format):
    """Return images whose mean and variance drift, so that no two workers have equal statistics."""
    shape = shape or (5, 4, 4)
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(1, 3, num, dtype=torch.float64).view(-1, *[1] * len(shape))
    x = torch.randn(num, *shape, dtype=torch.float64, generator=generator) * drift + drift.square()
    return x.to(dtype).contiguous(memory_format=memory_format)


def randomised(layer):
    """Give the layer γ and β other than 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
        layer.bias.copy_(torch.randn(layer.num_features, generator=generator))
    return layer


def without(removed, kind, **options):
    """Return a float64 layer without its γ or its β."""
    ours = {} if kind is nn.BatchNorm2d else {"per_worker_batch": N, **options}
    layer = randomised(kind(5, dtype=torch.float64, **ours))
    layer.register_parameter(removed, None)
    return layer


def batch_norm_in_float64(x, weight, bias, n, eps=1e-5):
    """Apply the definition, one worker at a time. Return y and each worker's mean and unbiased variance."""
    dims = [0, *range(2, x.dim())]
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    outputs, means, variances = [], [], []
    for group in x.double().split(n):
        mean, var = group.mean(dims), group.var(dims, correction=0)
        y = (group - mean.view(per_channel)) / (var + eps).sqrt().view(per_channel)
        outputs.append(y * weight.double().view(per_channel) + bias.double().view(per_channel))
        means.append(mean)
        variances.append(group.var(dims, correction=1))
    return torch.cat(outputs), torch.stack(means), torch.stack(variances)


# --- the normalisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, shape",
    [
        (PerWorkerBatchNorm1d, (6,)),
        (PerWorkerBatchNorm1d, (6, 5)),
        (PerWorkerBatchNorm2d, (6, 4, 3)),
        (PerWorkerBatchNorm3d, (6, 2, 4, 3)),
        (PerWorkerBatchNorm, (6, 4)),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_worker_normalises_its_own_n_images(kind, shape, workers):
    layer, x = randomised(kind(6, per_worker_batch=N)), images(workers * N, *shape)
    expected, _, _ = batch_norm_in_float64(x, layer.weight, layer.bias, N)
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=5e-6)


def test_normalising_the_whole_micro_batch_would_be_another_network():
    layer, x = randomised(PerWorkerBatchNorm2d(5, per_worker_batch=N)), images(4 * N)
    plain = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    assert (layer(x) - plain).abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
def test_output_and_gradient_are_bit_equal_to_torch_on_each_worker(dtype, memory_format):
    layer = randomised(PerWorkerBatchNorm2d(5, per_worker_batch=N))
    if dtype is torch.float64:
        layer.double()
    x = images(3 * N, dtype=dtype, memory_format=memory_format).requires_grad_()
    grad_y = images(3 * N, seed=1, dtype=dtype, memory_format=memory_format)
    y = layer(x)
    grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad_y)

    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    for g in range(3):
        worker = slice(g * N, (g + 1) * N)
        x_g = x.detach()[worker].requires_grad_()
        y_g = F.batch_norm(x_g, torch.zeros_like(weight), torch.zeros_like(weight), weight, bias, training=True)
        y_g.backward(grad_y[worker])
        assert torch.equal(y[worker], y_g) and torch.equal(grads[0][worker], x_g.grad)
    torch.testing.assert_close(grads[1:], (weight.grad, bias.grad))
    for tensor in (y, grads[0]):
        assert tensor.dtype is dtype and tensor.is_contiguous(memory_format=memory_format)


def ways_to_lie(shape, seed):
    """Return 2 N images, (N, *shape), with each kind of memory layout, by its name."""
    (channels, *pixels), num = shape, 2 * N

    def draw(*shape):
        return images(shape[0], *shape[1:], seed=seed, dtype=torch.float64)

    every_other = tuple(slice(None, None, 2) for _ in pixels)
    return {
        "contiguous": draw(num, *shape),
        "channels last": draw(num, *pixels, channels).movedim(-1, 1),
        "channels last, every other image": draw(2 * num, *pixels, channels).movedim(-1, 1)[::2],
        "channels last, half of the channels": draw(num, *pixels, 2 * channels).movedim(-1, 1).chunk(2, 1)[1],
        "pixels transposed": draw(num, channels, *reversed(pixels)).permute(0, 1, *range(len(pixels) + 1, 1, -1)),
        "images last": draw(*shape, num).movedim(-1, 0),
        "every other image": draw(2 * num, *shape)[::2],
        "every other pixel": draw(num, channels, *(2 * size for size in pixels))[(..., *every_other)],
        "half of the channels": draw(num, 2 * channels, *pixels).chunk(2, 1)[1],
        "one value for all pixels": draw(num, channels, *(1 for _ in pixels)).expand(num, *shape),
        "one value for all channels": draw(num, 1, *pixels).expand(num, *shape),
    }


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 4, 3), (5, 2, 4, 3)], ids=["NC", "NCL", "NCHW", "NCDHW"])
def test_images_and_gradients_may_lie_in_memory_in_any_way(shape):
    """In most of these layouts, aten's CPU kernels read the mean of a group where they should write it."""
    gradients = ways_to_lie(shape, seed=1) | {"a sum's": torch.ones((), dtype=torch.float64).expand(2 * N, *shape)}
    for (way, x), (way_of_grad, grad_y) in itertools.product(ways_to_lie(shape, seed=0).items(), gradients.items()):
        layer = randomised(PerWorkerBatchNorm(5, momentum=1.0, per_worker_batch=N, dtype=torch.float64))
        leaves = [x.detach().requires_grad_(), layer.weight, layer.bias]
        y = layer(leaves[0])
        exact = [leaf.detach().requires_grad_() for leaf in leaves]
        expected, means, variances = batch_norm_in_float64(*exact, N)
        found = [y, *torch.autograd.grad(y, leaves, grad_y), layer.running_mean, layer.running_var]
        right = [expected, *torch.autograd.grad(expected, exact, grad_y), means.mean(0), variances.mean(0)]
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=f"{way}, its gradient {way_of_grad}")


def test_a_micro_batch_of_several_workers_has_the_mean_gradient_of_the_workers_apart():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).double()
    ours = convert_batch_norm(copy.deepcopy(network), N)
    x, labels = images(4 * N, 3, 6, 6, dtype=torch.float64), torch.arange(4 * N) % 10
    F.cross_entropy(ours(x), labels).backward()
    for x_g, labels_g in zip(x.split(N), labels.split(N), strict=True):
        (F.cross_entropy(network(x_g), labels_g) / 4).backward()
    for name, expected in network.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, expected.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("removed", ["weight", "bias"])
@pytest.mark.parametrize("workers", [1, 2])
def test_without_beta_or_gamma_the_other_one_acts(removed, workers):
    layer, plain = (without(removed, kind) for kind in (PerWorkerBatchNorm2d, nn.BatchNorm2d))
    x = images(workers * N, dtype=torch.float64)
    expected = torch.cat([plain(x_w) for x_w in x.split(N)])
    [parameter], [of_torch] = layer.parameters(), plain.parameters()
    (gradient,) = torch.autograd.grad(expected.square().sum(), of_torch)

    def loss(parameter):  # under torch.func, which uses the formula
        y = torch.func.functional_call(layer, {name: parameter for name, _ in layer.named_parameters()}, (x,))
        return y.square().sum(), y

    y = layer(x)
    transformed, y_transformed = torch.func.grad(loss, has_aux=True)(parameter.detach())
    for found in (y, y_transformed):
        torch.testing.assert_close(found, expected)
    for found in (torch.autograd.grad(y.square().sum(), parameter)[0], transformed):
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_those_of_finite_differences(affine):
    layer = PerWorkerBatchNorm2d(2, affine=affine, per_worker_batch=3, dtype=torch.float64)
    x = images(6, 2, 2, 2, dtype=torch.float64).requires_grad_()
    parameters = dict(randomised(layer).named_parameters()) if affine else {}

    def normalise(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(parameters, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(normalise, (x, *parameters.values()))


def test_only_what_needs_a_gradient_gets_one():
    layer, x = PerWorkerBatchNorm2d(5, per_worker_batch=N), images(2 * N)
    layer.bias.requires_grad_(False)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is None and x.grad is None
    layer.weight.requires_grad_(False)
    assert not layer(x).requires_grad
    layer(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None and layer.bias.grad is None


@pytest.mark.parametrize("micro_batch", [0, 4, 12])
def test_a_micro_batch_that_cuts_a_worker_is_refused_with_the_numbers_and_the_cure(micro_batch):
    said = (
        rf"^a micro batch of {micro_batch} images is no multiple of the 8 [^\n]* as batch_sampler[^\n]* model.eval\(\)"
    )
    with pytest.raises(ValueError, match=said):
        PerWorkerBatchNorm2d(5, per_worker_batch=N)(images(micro_batch))


def test_a_single_value_a_channel_has_no_variance():
    with pytest.raises(ValueError, match="one value per channel"):
        PerWorkerBatchNorm1d(5, per_worker_batch=1)(images(4, 5))


@pytest.mark.parametrize("wrong", [{"per_worker_batch": 0}, {"passes": 0}, {"statistics": "mean"}, {"scope": "node"}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        PerWorkerBatchNorm2d(5, **{"per_worker_batch": N, **wrong})


# --- running statistics ----------------------------------------------------------------------------------------------


def train(layer, x, micro_batch):
    layer.train()
    for micro in x.split(micro_batch):
        layer(micro)
    return layer


def moved_once(x, momentum=0.1):
    """Return the running statistics after one iteration from 0 and 1: the mean over workers, in float64."""
    _, means, variances = batch_norm_in_float64(x, torch.ones(5), torch.zeros(5), N)
    return momentum * means.mean(0), 1 - momentum + momentum * variances.mean(0)


def test_without_the_package_triton_a_network_made_for_it_trains(monkeypatch):
    monkeypatch.setitem(sys.modules, "lbsgd.algorithm.fused_norm", None)  # as if its import of triton failed
    model = convert_batch_norm(nn.BatchNorm2d(2), 4, implementation="triton")
    assert model(torch.randn(8, 2, 3, 3)).isfinite().all()


def test_running_statistics_do_not_know_how_many_passes_an_iteration_took():
    x = images(64)
    layers = [
        train(PerWorkerBatchNorm2d(5, per_worker_batch=N, passes=passes), x, micro_batch)
        for micro_batch, passes in ((64, 1), (8, 8), (16, 4))
    ]
    mean, var = moved_once(x)
    for layer in layers:
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)
        assert layer.num_batches_tracked == 1
        assert torch.equal(layer.running_mean, layers[0].running_mean)
        assert torch.equal(layer.running_var, layers[0].running_var)


def test_statistics_moved_at_every_pass_would_differ():
    x = images(64)
    wrong = train(PerWorkerBatchNorm2d(5, per_worker_batch=N, passes=1), x, 8)
    assert wrong.num_batches_tracked == 8
    assert (wrong.running_mean - moved_once(x)[0]).abs().min() > 1


def test_statistics_rest_until_the_iteration_is_complete():
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N, passes=4)
    train(layer, images(3 * N), N)
    assert not layer.running_mean.any() and layer.num_batches_tracked == 0
    layer.eval()(images(N))  # evaluation does not count
    train(layer, images(N), N)
    assert layer.running_mean.all() and layer.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_worker_and_one_pass_are_torch_batch_norm(momentum):
    ours, torchs = PerWorkerBatchNorm2d(5, momentum=momentum, per_worker_batch=N), nn.BatchNorm2d(5, momentum=momentum)
    for seed in range(5):
        x = images(N, seed=seed)
        assert torch.equal(ours(x), torchs(x))
    for name, expected in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=2e-7, atol=0)
    x = images(3)
    ours.load_state_dict(torchs.state_dict())
    assert torch.equal(ours.eval()(x), torchs.eval()(x))  # evaluation takes any number of images


class Calls(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def two_layers():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, momentum=0.3)
    return nn.Sequential(*layers, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))


@pytest.mark.parametrize("statistics", ["average", "first_worker"])
def test_the_statistics_of_a_network_move_at_once_and_as_each_layer_s_by_itself(statistics):
    together, apart = (convert_batch_norm(two_layers(), 2, statistics=statistics) for _ in "12")
    for seed in (1, 2):
        x = images(6, 3, 5, 5, seed=seed)
        with Calls() as calls:
            together(x)
        for part in apart:  # the network is never run as a whole
            x = part(x)
    assert calls.count["_foreach_lerp_"] == 2 and calls.count["lerp_"] == 0  # one for each momentum
    for ours, theirs in zip(together.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # means over workers may add in another order


def test_moves_of_any_kind_are_those_of_one_after_the_other(monkeypatch):
    """The layers differ in type, momentum or number of groups, and a forward uses some of them twice."""
    lerp = torch._foreach_lerp_

    def each_once(tensors, *arguments):  # or they would race on a GPU
        assert len(set(map(id, tensors))) == len(tensors)
        lerp(tensors, *arguments)

    monkeypatch.setattr(torch, "_foreach_lerp_", each_once)
    kinds = [(torch.float32, 0.1), (torch.float32, 0.3), (torch.float32, 0.1), (torch.float64, 0.1)]  # of layers
    uses = [(0, 1), (0, 1), (1, 2), (1, 2), (2, 2), (2, 1), (3, 2)]  # layer, number of groups
    together, apart = (
        [(torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype), torch.tensor(0)) for dtype, _ in kinds] for _ in "12"
    )
    torch.manual_seed(0)
    moments = [torch.rand(2, groups, 4, dtype=kinds[layer][0]) for layer, groups in uses]
    move_together([Move(*together[n], part, kinds[n][1]) for (n, _), part in zip(uses, moments, strict=True)])
    for (n, _), part in zip(uses, moments, strict=True):
        for statistic, average in zip(apart[n][:2], part.mean(1), strict=True):
            statistic.lerp_(average, kinds[n][1])
        apart[n][2].add_(1)
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_forward_that_ends_in_another_mode_moves_them_too():
    model = convert_batch_norm(two_layers(), 2)
    model[5].register_forward_hook(lambda *_: model.eval() and None)
    model(images(4, 3, 5, 5))
    assert model[1].running_mean.any() and model._forward_pre_hooks
    model.train()
    before = model[1].running_mean.clone()
    model(images(4, 3, 5, 5))
    assert not torch.equal(model[1].running_mean, before)


def test_who_looks_when_the_forward_ends_sees_the_statistics_moved():
    model, seen = two_layers(), []
    model.register_forward_hook(lambda *_: seen.append(model[1].running_mean.clone()))
    convert_batch_norm(model, 2)
    model(images(4, 3, 5, 5))
    assert torch.equal(seen[0], model[1].running_mean) and seen[0].any()


def test_first_worker_alone_moves_the_statistics():
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N, passes=2, statistics="first_worker")
    x = images(64)
    train(layer, x, 32)
    mean, var = moved_once(x[:N])
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 1


def test_without_running_statistics_training_is_per_worker_and_evaluation_is_torch_s():
    layer = PerWorkerBatchNorm2d(5, track_running_stats=False, affine=False, per_worker_batch=N)
    x, ones, zeros = images(2 * N), torch.ones(5), torch.zeros(5)
    torch.testing.assert_close(layer(x).double(), batch_norm_in_float64(x, ones, zeros, N)[0], rtol=0, atol=5e-6)
    plain = nn.BatchNorm2d(5, track_running_stats=False, affine=False).eval()
    for num in (2 * N, N - 3):  # evaluation takes any number of images
        assert torch.equal(layer.eval()(x[:num]), plain(x[:num]))
    assert list(layer.state_dict()) == []


def test_state_dict_is_that_of_torch():
    ours, torchs = PerWorkerBatchNorm2d(5, per_worker_batch=N, passes=3), nn.BatchNorm2d(5)
    ours(images(N))  # in the middle of an iteration
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_half_passes_the_running_statistics_by(dtype):
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N)
    layer.running_mean.fill_(1 / 3)
    layer.running_var.fill_(1e5)  # more than float16 can hold
    layer.to(dtype).to("cpu")
    assert layer.weight.dtype is dtype and layer.running_var.dtype is torch.float32
    assert torch.equal(layer.running_mean, torch.full((5,), 1 / 3)) and layer.running_var.eq(1e5).all()
    assert PerWorkerBatchNorm2d(5, per_worker_batch=N, dtype=dtype).running_mean.dtype is torch.float32
    assert layer.double().running_var.dtype is torch.float64
    assert layer.to(dtype).running_var.dtype is torch.float32


def test_statistics_of_a_file_in_half_precision_are_widened_where_they_are_taken_as_they_are():
    layer, saved = PerWorkerBatchNorm2d(5, per_worker_batch=N), nn.BatchNorm2d(5).half().state_dict()
    layer.load_state_dict(saved, assign=True)  # as for a network that was made on the meta device
    assert layer.weight.dtype is torch.float16 and layer.running_var.dtype is torch.float32
    layer(images(N, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("workers", [1, 3])
def test_half_parameters_act_in_float32(dtype, workers):
    """DeepSpeed's fp16 and bf16 blocks halve γ and β but not the buffers. torch's batch norm raises at the mixture."""
    layer, plain = randomised(PerWorkerBatchNorm2d(5, per_worker_batch=N)), nn.BatchNorm2d(5)
    for module in (layer, plain):
        for p in module.parameters():
            p.data = p.data.to(dtype)
    x = images(workers * N, dtype=dtype).requires_grad_()
    with pytest.raises(RuntimeError):
        plain(x)
    y = layer(x)
    y.sum().backward()
    expected, means, variances = batch_norm_in_float64(x.detach(), layer.weight, layer.bias, N)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * means.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), 0.9 + 0.1 * variances.mean(0), rtol=1e-6, atol=1e-6)
    assert layer.weight.grad.dtype is dtype and x.grad.dtype is dtype and layer.eval()(x).dtype is dtype


def test_under_autocast_statistics_and_gradients_are_float32():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), PerWorkerBatchNorm2d(5, per_worker_batch=N))
    x = images(2 * N, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        convolved = model[0](x)
        y = model[1](convolved)
    y.float().square().sum().backward()
    _, means, _ = batch_norm_in_float64(convolved.detach(), torch.ones(5), torch.zeros(5), N)
    assert y.dtype is torch.bfloat16 and all(p.grad.dtype is torch.float32 for p in model.parameters())
    torch.testing.assert_close(model[1].running_mean.double(), 0.1 * means.mean(0), rtol=1e-6, atol=1e-6)


# --- conversion ------------------------------------------------------------------------------------------------------


def batch_norms(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def test_all_53_batch_norms_of_resnet50_are_converted_and_four_have_no_bn_in_their_name():
    from torchvision.models import resnet50

    model = resnet50()
    before, state = batch_norms(model), model.state_dict()
    assert convert_batch_norm(model, N, passes=4, statistics="first_worker") is model
    after = batch_norms(model)
    assert len(after) == 53 and list(after) == list(before)
    assert all(type(m) is PerWorkerBatchNorm2d and m.passes == 4 and m.per_worker_batch == N for m in after.values())
    assert [name for name in after if "bn" not in name] == [f"layer{stage}.0.downsample.1" for stage in (1, 2, 3, 4)]
    assert list(model.state_dict()) == list(state)
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "plain, kind, shape",
    [
        (nn.BatchNorm1d, PerWorkerBatchNorm1d, (5,)),
        (nn.BatchNorm2d, PerWorkerBatchNorm2d, (5, 4, 4)),
        (nn.BatchNorm3d, PerWorkerBatchNorm3d, (5, 2, 4, 4)),
        (nn.SyncBatchNorm, PerWorkerBatchNorm, (5, 4)),
    ],
)
def test_the_root_itself_is_converted_and_keeps_all_it_has(plain, kind, shape):
    root = plain(5, eps=1e-3, momentum=0.2).eval()
    root.weight.requires_grad_(False)
    kept = (root.weight, root.bias, root.running_mean, root.running_var, root.num_batches_tracked)
    x = images(3, *shape)
    expected = F.batch_norm(x, root.running_mean, root.running_var, root.weight, root.bias, eps=1e-3)
    layer = convert_batch_norm(root, N)
    assert type(layer) is kind and (layer.eps, layer.momentum, layer.training) == (1e-3, 0.2, False)
    now = (layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.num_batches_tracked)
    assert all(a is b for a, b in zip(now, kept, strict=True)) and not layer.weight.requires_grad
    assert torch.equal(layer(x), expected)


def test_converting_again_changes_n_and_passes():
    layer = convert_batch_norm(convert_batch_norm(nn.BatchNorm2d(5), 4), N, passes=2)
    assert (layer.per_worker_batch, layer.passes) == (N, 2)


def test_a_batch_norm_with_a_forward_of_its_own_is_refused_by_name():
    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(ValueError, match="0.1 is a BatchNormAct"):
        convert_batch_norm(nn.Sequential(nn.Sequential(nn.ReLU(), BatchNormAct(5))), N)


# --- recomputed statistics (Sec. 5.2, Fig. 4) ------------------------------------------------------------------------


def exact(x):
    return x.double().mean([0, 2, 3]), x.double().var([0, 2, 3], correction=1)


def test_recomputed_statistics_are_those_of_all_values_of_all_images():
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N, passes=4, statistics="recomputed")
    x = images(64)
    train(layer, x[:16], N)  # half an iteration, which must not change
    with torch.no_grad(), recomputing_statistics(layer.train()):
        for micro in (x[:8], x[8:32], x[32:]):
            layer(micro)
    mean, var = exact(x)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=0)
    assert layer.num_batches_tracked == 0
    train(layer, x[16:32], N)
    torch.testing.assert_close(layer.running_mean.double(), 0.9 * mean + moved_once(x[:32])[0], rtol=1e-6, atol=0)


def test_the_mean_of_the_workers_variances_is_not_the_variance_of_all():
    x = images(64)
    assert (moved_once(x, momentum=1.0)[1] / exact(x)[1]).max() < 0.6


def test_recomputing_without_a_training_forward_of_each_layer_in_training_is_refused():
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N).eval()
    with pytest.raises(ValueError, match="no forward in training mode"), recomputing_statistics(layer):
        layer(images(N))
    assert not layer.running_mean.any()
    used, unused = (PerWorkerBatchNorm2d(5, per_worker_batch=N) for _ in range(2))
    with pytest.raises(ValueError, match="made no forward"), recomputing_statistics(nn.Sequential(used, unused)):
        used(images(N))
    assert not used.running_mean.any()


# --- several processes -----------------------------------------------------------------------------------------------


def of_process(x, rank):
    return x.chunk(2)[rank]


def agreed(rank, statistics):
    """Train three iterations of 8 workers, 4 per process in 2 passes, and agree after the second and the third."""
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N, passes=2, statistics=statistics)
    for iteration in range(3):
        train(layer, of_process(images(64, seed=iteration), rank), 2 * N)
        if iteration:
            agree_statistics(nn.Sequential(layer, nn.BatchNorm2d(5)))
    return layer.state_dict()


def averaged(x_of_all, rank=None):
    """Train two iterations, and keep the moving average of the network as EMA does. Its statistics agree at the end."""
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N)
    average = swa_utils.AveragedModel(layer, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    for x in x_of_all:
        layer(x if rank is None else of_process(x, rank))
        average.update_parameters(layer)
    apart = average.module.running_mean.clone()
    agree_statistics(average)
    return {"apart": apart, "mean": average.module.running_mean, "var": average.module.running_var}


def complaints(model):
    """The warnings of agree_statistics about a model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agree_statistics(model)
    return [str(each.message) for each in caught]


def of_torchs_batch_norms():
    frozen = nn.Sequential(nn.BatchNorm2d(5)).requires_grad_(False).eval()
    ours = PerWorkerBatchNorm2d(5, per_worker_batch=N)
    return {
        "trained": complaints(nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.BatchNorm2d(5))),
        "evaluated": complaints(nn.Sequential(nn.BatchNorm2d(5)).eval()),
        "without statistics": complaints(nn.BatchNorm2d(5, track_running_stats=False)),
        "over all processes": complaints(nn.SyncBatchNorm(5)),
        "frozen beside ours": complaints(nn.Sequential(ours, frozen)),
        "none": complaints(nn.Conv2d(3, 5, 1)),
    }


def of_buffers(rank):
    """The warnings about the buffers of other layers, made different where the name says so."""
    kept = nn.Module()
    kept.register_buffer("mine", torch.tensor(rank), persistent=False)
    kept.register_buffer("all's", torch.tensor([[1 + 2j]]))
    tracking = nn.Sequential(nn.Conv2d(3, 5, 1), nn.InstanceNorm2d(5, track_running_stats=True))
    alike = complaints(nn.Sequential(tracking, kept))
    tracking(images(4, 3, 4, 4, seed=rank))
    counted = nn.Linear(2, 2)
    counted.register_buffer("seen", torch.zeros((), dtype=torch.bool) if rank else torch.ones((), dtype=torch.bool))
    return {"alike": alike, "statistics": complaints(tracking), "a bool": complaints(counted)}


def recomputed(rank, share):
    """Recompute over 32 images: process 0 has the first `share` of them, process 1 the rest."""
    layer = PerWorkerBatchNorm2d(5, per_worker_batch=N)
    mine = images(32)[:share] if rank == 0 else images(32)[share:]
    with torch.no_grad(), recomputing_statistics(layer):
        for start in range(0, len(mine), N):
            layer(mine[start : start + N])
    return layer.state_dict()


def normalised_together(rank):
    """Normalise all processes' images of one pass as one group. Return output, gradients and both statistics."""
    layer = randomised(PerWorkerBatchNorm2d(5, per_worker_batch=N, scope="all"))
    x, grad_y = (of_process(images(32, seed=seed), rank) for seed in (0, 1))
    y = layer(x.requires_grad_())
    y.backward(grad_y)
    moved = layer.running_mean.clone(), layer.running_var.clone()
    with torch.no_grad(), recomputing_statistics(layer):
        layer(x)
    return {
        "y": y.detach(),
        "x.grad": x.grad,
        "weight.grad": layer.weight.grad,
        "bias.grad": layer.bias.grad,
        "moved": moved,
        "recomputed": (layer.running_mean, layer.running_var),
    }


def normalised_together_without(rank, removed):
    return without(removed, PerWorkerBatchNorm2d, scope="all")(of_process(images(32, dtype=torch.float64), rank))


def variance_far_from_zero(rank):
    layer = PerWorkerBatchNorm2d(5, momentum=1.0, per_worker_batch=N, scope="all")
    layer(of_process(images(32) + 1000, rank))
    return layer.running_var


def one_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {
        **{statistics: agreed(rank, statistics) for statistics in get_args(Statistics)},
        "EMA": averaged([images(32, seed=seed) for seed in range(2)], rank),
        "torch's": of_torchs_batch_norms(),
        "buffers": of_buffers(rank),
        "shared": recomputed(rank, share=8),
        "all by one": recomputed(rank, share=0),
        "together": normalised_together(rank),
        "without": {name: normalised_together_without(rank, name).detach() for name in ("weight", "bias")},
        "far from zero": variance_far_from_zero(rank),
    }
    dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The results of each of two gloo processes, started once for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(one_process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("statistics", get_args(Statistics))  # recomputed ones agree until then, too
def test_agreed_statistics_are_those_of_one_process_with_all_workers(two_processes, statistics):
    alone = PerWorkerBatchNorm2d(5, per_worker_batch=N, statistics=statistics)
    for iteration in range(3):
        train(alone, images(64, seed=iteration), 64)
    for name, expected in alone.state_dict().items():
        states = [results[statistics][name] for results in two_processes]
        assert torch.equal(*states)
        torch.testing.assert_close(states[0], expected, rtol=1e-6, atol=0)


def test_the_statistics_of_a_moving_average_agree_as_those_of_the_network(two_processes):
    alone, (one, other) = averaged([images(32, seed=seed) for seed in range(2)]), (r["EMA"] for r in two_processes)
    assert (one["apart"] - other["apart"]).abs().max() > 1e-3
    for name in ("mean", "var"):
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], alone[name])


def test_a_trained_batch_norm_whose_statistics_stay_apart_is_named(two_processes):
    for results in two_processes:
        found = results["torch's"]
        [said], [evaluated] = found.pop("trained"), found.pop("evaluated")
        assert said.startswith("agree_statistics leaves 1, a BatchNorm2d, as each process has it") and "\n" not in said
        assert evaluated.startswith("agree_statistics leaves 0, a BatchNorm2d")
        assert not any(found.values()), found


def test_a_buffer_that_differs_between_processes_is_named(two_processes):
    for results in two_processes:
        found = results["buffers"]
        [statistics], [seen] = found["statistics"], found["a bool"]
        assert statistics.startswith("1.running_mean of the network differs between processes. agree_statistics makes")
        assert seen.startswith("seen of the network differs") and "\n" not in seen
        assert not found["alike"]


@pytest.mark.parametrize("shares", ["shared", "all by one"])
def test_recomputed_statistics_take_in_all_processes_images(two_processes, shares):
    mean, var = exact(images(32))
    for results in two_processes:
        torch.testing.assert_close(results[shares]["running_mean"].double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(results[shares]["running_var"].double(), var, rtol=1e-6, atol=0)


def test_scope_all_is_batch_norm_over_all_processes_images(two_processes):
    x = images(32, dtype=torch.float64).requires_grad_()
    layer = randomised(nn.BatchNorm2d(5, dtype=torch.float64))
    layer.weight.data, layer.bias.data = (p.detach().float().double() for p in layer.parameters())
    y = layer(x)
    y.backward(images(32, seed=1, dtype=torch.float64))
    together = [results["together"] for results in two_processes]
    for name, expected in (("y", y.detach()), ("x.grad", x.grad)):
        torch.testing.assert_close(torch.cat([t[name] for t in together]).double(), expected, rtol=1e-5, atol=1e-5)
    for (
        name,
        parameter,
    ) in layer.named_parameters():  # each process holds the share of its own images; the engine adds them
        total = sum(t[f"{name}.grad"] for t in together)
        torch.testing.assert_close(total.double(), parameter.grad, rtol=1e-5, atol=1e-4)
    for t in together:
        for moved, expected in zip(t["moved"], (layer.running_mean, layer.running_var), strict=True):
            torch.testing.assert_close(moved.double(), expected, rtol=1e-6, atol=1e-6)
        for pooled, expected in zip(t["recomputed"], exact(x.detach()), strict=True):
            torch.testing.assert_close(pooled.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("removed", ["weight", "bias"])
def test_scope_all_without_beta_or_gamma_applies_the_other_one(two_processes, removed):
    found = torch.cat([results["without"][removed] for results in two_processes])
    torch.testing.assert_close(found, without(removed, nn.BatchNorm2d)(images(32, dtype=torch.float64)))


def test_the_variance_over_processes_does_not_cancel_far_from_zero(two_processes):
    x = images(32) + 1000
    _, var = exact(x)
    for results in two_processes:
        torch.testing.assert_close(results["far from zero"].double(), var, rtol=1e-5, atol=0)
    cancelled = x.square().mean([0, 2, 3]) - x.mean([0, 2, 3]).square()  # E[x²] − E[x]² in float32
    assert ((cancelled - var) / var).abs().max() > 1e-3


def test_on_one_process_scope_all_is_plain_batch_norm_and_agreement_changes_nothing():
    layer, plain, x = PerWorkerBatchNorm2d(5, per_worker_batch=N, scope="all"), nn.BatchNorm2d(5), images(12)
    assert torch.equal(layer(x), plain(x))
    before = layer.running_mean.clone()
    agree_statistics(layer)
    assert torch.equal(layer.running_mean, before)


def test_a_recomputation_that_fails_leaves_the_statistics_and_the_layer_in_training():
    layer, twin = (PerWorkerBatchNorm2d(3, per_worker_batch=4) for _ in range(2))
    x = torch.randn(8, 3, 5, 5)
    with pytest.raises(ZeroDivisionError), recomputing_statistics(layer):
        layer(x)
        1 / 0  # noqa: B018
    assert torch.equal(layer.running_mean, torch.zeros(3)) and int(layer.num_batches_tracked) == 0
    layer(2 * x), twin(2 * x)
    assert torch.equal(layer.running_mean, twin.running_mean) and torch.equal(layer.running_var, twin.running_var)
    assert int(layer.num_batches_tracked) == 1
