"""Batch normalisation of groups of images, as functions of tensors (Sec. 2.3).

        y = γ · (x − mean(x)) / √(var(x) + ε) + β

Each group is normalised on its own. `normalise_groups` and `normalise_over_processes` take x (N, C, ...) in any layout,
and γ and β, each (C) or None. They return y, the G groups' means and unbiased variances as one tensor (2, G, C), and
the number of values per channel in each group.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from lbsgd.algorithm.choices import Implementation
from lbsgd.algorithm.process_group import world_size

HALF = torch.float16, torch.bfloat16


def normalise_groups(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    eps: float,
    implementation: Implementation = "loop",
    *,
    relu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Normalise each group of n images.

    Triton's kernels compute it if implementation is "triton" and they can take x (`triton_takes`). Only they can apply
    a ReLU, before which a residual may be added. γ and β may be in half precision and act in float32.

    Raises ValueError if N is no multiple of n, or if n images hold a single value per channel.
    """
    num_images = x.size(0)
    if num_images == 0 or num_images % n:
        raise ValueError(
            f"a micro batch of {num_images} images is no multiple of the {n} that one worker normalises; give"
            " DataLoader a SharedShuffleSampler as batch_sampler, or drop_last=True; outside of training call"
            " model.eval()"
        )
    count = n * x.shape[2:].numel()
    if count < 2:
        raise ValueError(f"{n} images of shape {tuple(x.shape[1:])} have one value per channel and so no variance")
    if relu or (implementation == "triton" and triton_takes(x)):  # the caller of a ReLU has asked triton_takes
        from lbsgd.algorithm.fused_norm import normalise_fused  # imported late, because triton may not be installed

        return *normalise_fused(x, weight, bias, n, eps, relu=relu, residual=residual), count
    assert residual is None
    weight, bias = at_least_float32(weight), at_least_float32(bias)
    by_formula = num_images != n if torch.compiler.is_compiling() else torch._C._are_functorch_transforms_active()
    if by_formula:
        return _normalise_by_formula(x, weight, bias, n, eps)
    # With momentum 1, batch norm writes the batch's own moments into the tensors given as its running statistics.
    dtype = torch.float32 if x.dtype in HALF else x.dtype
    moments = torch.zeros(2, num_images // n, x.size(1), dtype=dtype, device=x.device)
    if num_images == n:
        mean, var = moments.squeeze(1).unbind()
        return F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps), moments, count
    x = densely(x)
    y = _GroupedBatchNorm.apply(x, weight, bias, moments, n, eps)  # type: ignore[no-untyped-call]  # torch's has no types
    return y, moments, count


def densely(x: Tensor) -> Tensor:
    """Return x if it is contiguous or in channels_last, else a contiguous copy.

    In any other layout aten's batch norm on a CPU reads the mean from the memory that it should write it to.
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return x
    return x.contiguous()


def triton_takes(x: Tensor) -> bool:
    """Whether the kernels of `fused_norm` can normalise x here: not under torch.compile or torch.func."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    try:
        from lbsgd.algorithm.fused_norm import can_take
    except ImportError:  # PyTorch for CPUs comes without triton, and a network from a GPU's host must still train
        return False
    return can_take(x)


class _GroupedBatchNorm(torch.autograd.Function):
    """Batch norm of each group of n images, all written into one output: a loop and a cat would write it twice.

    These are aten's native kernels; on the CPU they are those of F.batch_norm, bit for bit. They exist on CUDA as well,
    but the kernels of `fused_norm` are faster there (docs/gpu.md).
    The backward consists of differentiable operators, so gradients of gradients are right too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, n: int, eps: float
    ) -> Tensor:
        y, saved = torch.empty_like(x), torch.empty_like(moments)
        for g, (x_g, y_g) in enumerate(zip(x.split(n), y.split(n), strict=True)):
            mean, var = moments[:, g]
            torch.native_batch_norm(x_g, weight, bias, mean, var, True, 1.0, eps, out=(y_g, *saved[:, g]))
        ctx.save_for_backward(x, weight, saved)
        ctx.n, ctx.eps = n, eps
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if needed[0] else None
        grads_affine = []
        for g, (x_g, grad_y_g) in enumerate(zip(x.split(ctx.n), grad_y.split(ctx.n), strict=True)):
            # Not the overload with out=: it copies too, and it cannot leave out a gradient.
            grad_x_g, *grad_affine = torch.ops.aten.native_batch_norm_backward(
                grad_y_g, x_g, weight, None, None, *saved[:, g], True, ctx.eps, needed
            )
            grads_affine.append(grad_affine)
            if grad_x is not None:
                grad_x[g * ctx.n : (g + 1) * ctx.n] = grad_x_g
        grad_weight, grad_bias = (
            torch.stack(grads).sum(0) if wanted else None
            for grads, wanted in zip(zip(*grads_affine, strict=True), needed[1:], strict=True)
        )
        return grad_x, grad_weight, grad_bias, None, None, None


def _normalise_by_formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, eps: float
) -> tuple[Tensor, Tensor, int]:
    """Normalise the groups in plain operators, which torch.compile can fuse and torch.func can transform.

    All groups are normalised at once, so that a graph is as small for many workers as for one.
    """
    groups = at_least_float32(x).unflatten(0, (len(x) // n, n))  # (G, n, C, ...)
    dims = [dim for dim in range(groups.dim()) if dim not in (0, 2)]
    count = x[:n, 0].numel()
    var, mean = torch.var_mean(groups, dims, correction=0, keepdim=True)
    y = ((groups - mean) * (var + eps).rsqrt()).flatten(0, 1)
    moments = torch.stack([mean, var * count / (count - 1)]).detach().view(2, len(x) // n, x.size(1))
    return _scale_and_shift(y, weight, bias).to(x.dtype), moments, count


def _scale_and_shift(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    per_channel = [-1 if dim == 1 else 1 for dim in range(y.dim())]
    y = y if weight is None else y * weight.view(per_channel)
    return y if bias is None else y + bias.view(per_channel)


def normalise_over_processes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, int]:
    """Normalise the images of all processes as one group; differentiable; a collective call.

    Every process must hold equally many images. The mean comes first, then the squared deviations from it, which avoids
    the cancellation of E[x²] − E[x]². Unlike torch.nn.SyncBatchNorm it also runs on the CPU.
    """
    dims = [dim for dim in range(x.dim()) if dim != 1]
    count = x[:, 0].numel() * world_size()
    wide = at_least_float32(x)
    mean = all_reduce(wide.sum(dims, keepdim=True)) / count
    var = all_reduce((wide - mean).square().sum(dims, keepdim=True)) / count
    y = _scale_and_shift((wide - mean) * (var + eps).rsqrt(), weight, bias)
    moments = torch.stack([mean, var * count / (count - 1)]).detach().view(2, 1, -1)
    return y.to(x.dtype), moments, count


@overload
def at_least_float32(tensor: Tensor) -> Tensor: ...
@overload
def at_least_float32(tensor: Tensor | None) -> Tensor | None: ...
def at_least_float32(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, in float32 if it was in half precision; None stays None."""
    return tensor.float() if tensor is not None and tensor.dtype in HALF else tensor
