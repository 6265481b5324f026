"""Batch norm's Triton kernels against float64, case by case; prints the errors as JSON.

    TRITON_INTERPRET=1 python tests/norm_cases.py      in NumPy, on the CPU
    python tests/norm_cases.py cuda                    on a GPU

This is a separate process, because Triton decides on import whether it interprets.
"""

import copy
import json
import sys

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from lbsgd.algorithm import fused_norm, norm_tiling
from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.algorithm.fused_blocks import fuse_blocks
from lbsgd.algorithm.fused_norm import normalise_fused
from lbsgd.algorithm.norm_kernels import INTERPRETED

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# name: shape (N, C, ...), n, dtype, layout, what follows. Tiles have 64 values, so that programs take several steps.
CASES = {
    "plain NCHW fp32": ((6, 3, 5, 5), 3, "fp32", "nchw", ""),
    "plain NHWC fp32, 8 workers": ((16, 5, 3, 3), 2, "fp32", "nhwc", ""),
    "ReLU NHWC fp16": ((4, 5, 5, 7), 4, "fp16", "nhwc", "relu"),
    "ReLU NCHW bf16": ((6, 2, 5, 7), 3, "bf16", "nchw", "relu"),
    "residual NHWC bf16": ((4, 6, 5, 5), 2, "bf16", "nhwc", "residual"),
    "residual NCHW fp16": ((4, 2, 5, 5), 2, "fp16", "nchw", "residual"),
    "residual NHWC fp32": ((4, 7, 3, 5), 2, "fp32", "nhwc", "residual"),
    "not affine, ReLU NHWC fp32": ((4, 3, 5, 5), 2, "fp32", "nhwc", "relu, not affine"),
    "γ alone NHWC fp32": ((4, 3, 5, 5), 2, "fp32", "nhwc", "relu, no β"),
    "β alone NCHW fp32": ((4, 3, 5, 5), 2, "fp32", "nchw", "relu, no γ"),
    "holes NCHW fp32": ((4, 3, 5, 5), 2, "fp32", "nchw", "residual, holes"),
    "half γ and β NHWC fp16": ((4, 5, 5, 3), 2, "fp16", "nhwc", "relu, half"),
    "two dimensions fp32": ((40, 6), 20, "fp32", "nchw", "relu"),
    "odd addresses NHWC fp16": ((4, 6, 5, 5), 2, "fp16", "nhwc", "residual, odd"),
    "mean 1000 NHWC fp32": ((4, 3, 7, 7), 2, "fp32", "nhwc", "far"),
}
LARGE = {"large NHWC fp16": ((4, 130, 20, 21), 2, "fp16", "nhwc", "residual")}  # with the tiles of a GPU


def expected(x, residual, weight, bias, n, passed, grad_y):
    """Compute in float64 by the definition: y, the gradients, means and unbiased variances.

    passed: where the ReLU under test let values pass, if there was one. Rounding can move a value near 0 across it, so
    the gradients follow `passed`; y does not need it.
    """
    leaves = [t.detach().double().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    given = iter(leaves)
    x, residual, weight, bias = (None if t is None else next(given) for t in (x, residual, weight, bias))
    dims, per_channel = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    groups, moments = [], []
    for group in x.split(n):
        mean, var = group.mean(dims, keepdim=True), group.var(dims, correction=0, keepdim=True)
        groups.append((group - mean) / (var + 1e-5).sqrt())
        moments.append(torch.stack([mean.flatten(), group.var(dims, correction=1)]))
    y = torch.cat(groups)
    y = y if weight is None else y * weight.view(per_channel)
    y = y if bias is None else y + bias.view(per_channel)
    y = y if residual is None else y + residual
    grads = torch.autograd.grad(y, leaves, grad_y.double() * (1 if passed is None else passed))
    return [y if passed is None else y.relu(), *grads, torch.stack(moments, 1)]


def tensors_of(shape, dtype, layout, follows, device):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    def images():
        values = draw(*shape).to(device, DTYPES[dtype])
        return values.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else values

    drift = torch.linspace(1, 3, shape[0]).view(-1, *[1] * (len(shape) - 1)).to(device)
    x = (images() * drift + (1000 if "far" in follows else drift)).to(DTYPES[dtype])
    half = DTYPES[dtype] if "half" in follows else torch.float32
    affine = [(1 + 0.3 * draw(shape[1])).to(device, half), draw(shape[1]).to(device, half)]
    residual = images() if "residual" in follows else None
    affine = [
        None if f"no {name}" in follows or "not affine" in follows else t for name, t in zip("γβ", affine, strict=True)
    ]
    if "odd" in follows:  # parts of larger tensors
        x, residual = (torch.cat([t, t])[1:][: len(t)].copy_(t) for t in (x, residual))
    if "holes" in follows:  # every other value of a larger tensor
        x, residual, *affine = (torch.stack([t, -t], -1)[..., 0] for t in (x, residual, *affine))
    for tensor in (x, residual, *affine):
        if tensor is not None:
            tensor.requires_grad_()
    return x, residual, *affine, images()


def errors_of(shape, n, dtype, layout, follows, device):
    """Return each result's error relative to the largest value, and whether a worker's bits are its own."""
    x, residual, weight, bias, grad_y = tensors_of(shape, dtype, layout, follows, device)
    relu = "re" in follows
    leaves = [t for t in (x, residual, weight, bias) if t is not None]

    def run():
        y, moments = normalise_fused(x, weight, bias, n, 1e-5, relu=relu, residual=residual)
        return [y, *torch.autograd.grad(y, leaves, grad_y), moments]

    results = run()
    y = results[0]
    # On a GPU the second time runs the kernels that the first one found.
    repeats = INTERPRETED or all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))
    exact = expected(x, residual, weight, bias, n, y > 0 if relu else None, grad_y)
    wrong = [
        float((found.double() - right).detach().abs().max() / right.detach().abs().max())
        for found, right in zip(results, exact, strict=True)
    ]
    kept = results[0].stride() == results[1].stride() == torch.empty_like(x).stride() and results[1].dtype == x.dtype
    first = y[:n], results[1][:n]
    return {"images": max(wrong[:-1]), "moments": wrong[-1], "form kept": kept, "repeats": repeats, "first": first}


def one_worker_alone(case, device):
    """Return y and dx of the first worker of a case, computed without the others."""
    (_, *rest), n, dtype, layout, follows = case
    x, residual, weight, bias, grad_y = tensors_of(case[0], dtype, layout, follows, device)
    alone = x[:n].detach().requires_grad_()
    y, _ = normalise_fused(alone, weight, bias, n, 1e-5, relu="re" in follows, residual=residual)
    return y, torch.autograd.grad(y, alone, grad_y[:n])[0]


def fused_block(kind, device):
    """Compare a fused block with the same one in float64. Return the largest error, and whether the block was fused."""
    torch.manual_seed(0)
    planes = 1 if kind is Bottleneck else 3
    shortcut = nn.Sequential(nn.Conv2d(3, planes * kind.expansion, 1), nn.BatchNorm2d(planes * kind.expansion))
    block = kind(3, planes, downsample=shortcut)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.5)
    exact = convert_batch_norm(copy.deepcopy(block).double(), 2).to(device)
    fused = fuse_blocks(convert_batch_norm(block, 2, implementation="triton")).to(device)
    x = torch.randn(4, 3, 5, 5, device=device).to(memory_format=torch.channels_last)
    outputs = [fused(x), exact(x.double())]
    was_fused = outputs[0].grad_fn.name() == "_FusedNormBackward"
    for y in outputs:
        y.square().mean().backward()
    pairs = [outputs, *((a.grad, b.grad) for a, b in zip(fused.parameters(), exact.parameters(), strict=True))]
    pairs += zip(fused.buffers(), exact.buffers(), strict=True)
    largest = max(float(right.detach().abs().max()) for _, right in pairs)
    wrong = max(float((found.double() - right).detach().abs().max()) for found, right in pairs)
    return {"error": wrong / largest, "fused": was_fused and type(fused) is not kind}


def lets_nan_pass(device):
    x = torch.ones(2, 1, 2, 2, device=device)
    x[0] = float("nan")
    return bool(normalise_fused(x, None, None, 2, 1e-5, relu=True)[0].isnan().all())


def repair_the_interpreter():
    """Work around NumPy 2.4, which refuses int() of an array with one element, as Triton 3.6 needs; cache slow work."""
    from triton.runtime import interpreter

    patch, call = interpreter._patch_lang_tensor, interpreter.InterpretedFunction.__call__

    def patch_and_repair(tensor, *scope):  # Triton before 3.6 gives no scope
        patch(tensor, *scope)
        change = scope[0].set_attr if scope else setattr
        change(tensor, "__index__", lambda self: self.handle.data.item())

    def call_ours_as_they_are(self, *args, **kwargs):  # the kernel that calls them has patched triton.language already
        is_ours = self.fn.__module__.startswith("lbsgd")
        return self.rewrite()(*args, **kwargs) if is_ours else call(self, *args, **kwargs)

    interpreter._patch_lang_tensor = patch_and_repair
    interpreter.InterpretedFunction.__call__ = call_ours_as_they_are
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def main(device):
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # the blocks' convolutions, whose TF32 has an error of 1e-3
    if INTERPRETED:
        repair_the_interpreter()
    tiles, programs = dict(norm_tiling.TILES), norm_tiling.PROGRAMS
    norm_tiling.TILES.update({name: norm_tiling.Tile(64, warps) for name, (_, warps) in tiles.items()})
    norm_tiling.PROGRAMS = norm_tiling.VALUE_PROGRAMS = norm_tiling.FEWEST_STEPS = 2
    results = {name: errors_of(*case, device) for name, case in CASES.items()}
    eight = "plain NHWC fp32, 8 workers"
    alone = one_worker_alone(CASES[eight], device)
    same = all(torch.equal(a, b) for a, b in zip(alone, results[eight]["first"], strict=True))
    norm_tiling.TILES.update(tiles)
    norm_tiling.PROGRAMS = norm_tiling.VALUE_PROGRAMS = programs // 128  # few, because the interpreter is slow
    fused_norm.launches.cache_clear()
    results |= {name: errors_of(*case, device) for name, case in LARGE.items()}
    for result in results.values():
        del result["first"]
    blocks = {kind.__name__: fused_block(kind, device) for kind in (BasicBlock, Bottleneck)}
    answers = {"same bits alone": same, "nan passes": lets_nan_pass(device), "blocks": blocks}
    print(json.dumps({"cases": results, **answers}))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cpu"])
