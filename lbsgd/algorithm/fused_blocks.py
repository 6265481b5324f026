"""torchvision's residual blocks with ReLU and residual fused into their batch norms (`fused_norm`).

`fuse_blocks` changes the class of torchvision's BasicBlock and Bottleneck, but of no class derived from them. As in
`convert_batch_norm`, parameters, buffers, hooks and names stay the same objects. torchvision's own forward runs if the
fused one does not apply or could be noticed: in evaluation, on a CPU, under torch.fx, torch.compile or torch.func, with
hooks on a batch norm or a ReLU of the block, and with any batch norm but ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook
from torchvision.models.resnet import BasicBlock, Bottleneck

from lbsgd.algorithm.grouped_norm import triton_takes
from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm2d
from lbsgd.algorithm.process_group import world_size


class FusedBasicBlock(BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's BasicBlock; its two batch norms apply the ReLU, and the last one adds the residual."""

    def forward(self, x: Tensor) -> Tensor:
        if not can_fuse(self, x, self.bn1, self.bn2):
            y: Tensor = BasicBlock.forward(self, x)
            return y
        out = through_relu(self, self.bn1, self.conv1(x))
        out = self.conv2(out)
        return through_relu(self, self.bn2, out, x if self.downsample is None else self.downsample(x))


class FusedBottleneck(Bottleneck):  # type: ignore[misc]  # torchvision has no types
    """torchvision's Bottleneck; its three batch norms apply the ReLU, and the last one adds the residual."""

    def forward(self, x: Tensor) -> Tensor:
        if not can_fuse(self, x, self.bn1, self.bn2, self.bn3):
            y: Tensor = Bottleneck.forward(self, x)
            return y
        out = through_relu(self, self.bn1, self.conv1(x))
        out = through_relu(self, self.bn2, self.conv2(out))
        out = self.conv3(out)
        return through_relu(self, self.bn3, out, x if self.downsample is None else self.downsample(x))


_FUSED: dict[type[nn.Module], type[nn.Module]] = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """Return a network's blocks of torchvision's classes or of classes derived from them."""
    return [module for module in model.modules() if isinstance(module, (BasicBlock, Bottleneck))]


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Change the class of each of torchvision's residual blocks, at any depth; return the model."""
    for module in model.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
    return model


def can_fuse(block: nn.Module, x: Tensor, *norms: nn.Module) -> bool:
    """Whether the fused forward of a block differs from torchvision's in speed and rounding only."""
    if torch.compiler.is_compiling():  # first, because any later test would become a guard of the compiled block
        return False
    if isinstance(x, Proxy) or not block.training:
        return False
    relu: Any = block.relu
    parts_are_ours = type(relu) is nn.ReLU and is_bare(relu) and all(map(is_fusable, norms))
    return parts_are_ours and triton_takes(x)


def is_fusable(norm: nn.Module) -> bool:
    """Whether the kernels can do everything that a call of this batch norm does in training."""
    return (
        type(norm) is PerWorkerBatchNorm2d
        and norm.training
        and norm.implementation == "triton"
        and (norm.scope == "worker" or world_size() == 1)
        and is_bare(norm)
    )


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and not _has_any_global_hook() and "forward" not in module.__dict__


def through_relu(block: nn.Module, norm: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return relu(norm(x) + residual), fused if both have the same type: autocast may leave the residual in float32."""
    if triton_takes(x) and (residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)):
        y: Tensor = norm.forward_in_training(x, relu=True, residual=residual)
        return y
    y = norm(x)
    relu: Any = block.relu
    y = relu(y if residual is None else y + residual)
    return y
