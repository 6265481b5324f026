"""--cuda_graphs: launch each residual block's forward, and its backward, as one CUDA graph.

With n = 32 images a GPU computes faster than its host launches kernels one by one (docs/gpu.md). Each block has its own
graphs, so gradients still arrive block by block, and aggregation and ZeRO take them as they come. The next replay
overwrites their memory: copy what has to outlast it. With another size, order or precision a block runs plainly, as
under gradient checkpointing. If weights, modes or hooks have changed when a forward begins, the blocks are recorded
again. Do not change anything else that a block computes with, such as ε or n. Evaluation runs plainly. The bits are
those of the plain run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from lbsgd.algorithm.fused_blocks import FusedBasicBlock, FusedBottleneck, is_bare, residual_blocks
from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm, PerWorkerBatchNorm2d
from lbsgd.algorithm.process_group import world_size
from lbsgd.errors import ConfigError
from lbsgd.train.device_rules import kind_in_rule
from lbsgd.train.graphed_blocks import GraphedBlock, Graphs
from lbsgd.train.recording import Recorder, has_bare_parts, parts_of
from lbsgd.train.run import Run

BLOCKS = BasicBlock, Bottleneck, FusedBasicBlock, FusedBottleneck
LAYERS = nn.Conv2d, PerWorkerBatchNorm2d, nn.ReLU, nn.Sequential, nn.Identity


def graph_blocks(model: nn.Module, passes: int, recorder: Recorder | None = None) -> int:
    """Replay each of a network's residual blocks in training. Return how many there are.

    passes: the number per update. recorder: by default CUDA's.
    Raises ConfigError without a GPU, and for a network whose blocks cannot be recorded.
    """
    blocks = residual_blocks(model)
    if not blocks:
        raise ConfigError(
            "--cuda_graphs: this network has no residual blocks of torchvision's kind, and nothing else is recorded; "
            "leave the flag out"
        )
    if any("forward" in vars(block) for block in blocks) or not all(map(has_bare_parts, blocks)):
        raise ConfigError(
            "--cuda_graphs: a residual block or a part of it has hooks or a forward of its own, which a graph would "
            "not run; leave the flag out"
        )
    if any(map(waits_inside, blocks)):
        raise ConfigError(
            '--cuda_graphs: batch norm of scope "all" waits for the other processes inside a block, which no graph '
            "records; leave the flag out"
        )
    if recorder is None and not all(parameter.is_cuda for parameter in model.parameters()):
        raise ConfigError("--cuda_graphs: no GPU computes here; leave the flag out")
    graphs = Graphs(passes, recorder)
    for block in blocks:
        block.forward = GraphedBlock(block, graphs)  # on the instance, so that no state_dict has it
    model.register_forward_pre_hook(graphs.begin)
    return len(blocks)


class GraphChoice(NamedTuple):
    """Whether training runs as CUDA graphs, and the reason in words, which is empty without a GPU."""

    are_on: bool
    words: str


def choose_graphs(run: Run, engine: Any) -> GraphChoice:
    """Return whether training runs as CUDA graphs: by the flag or, without it, by the rule."""
    graphed, reason = run.graphed, "the flag"
    if graphed is None:
        graphed, reason = by_rule(engine.module, run.plan.world_size, engine.device, run.compiled)
    words = f"{'each residual block' if graphed else 'none'}, by {reason}"
    return GraphChoice(graphed, words if engine.device.type == "cuda" else "")


def by_rule(model: nn.Module, num_processes: int, device: torch.device, compiled: bool) -> tuple[bool, str]:
    """Return whether training is graphed if no flag decides, and why.

    It is, on one GPU, if a recording keeps all that the blocks do: exactly torchvision's blocks, of torch's layers.
    """
    blocks = residual_blocks(model)
    if (kind := kind_in_rule(device)) != "cuda":
        return False, f"the rule for {kind}"
    if num_processes > 1:
        return False, "the rule for several processes: not measured"
    if compiled:
        return False, "the rule beside --compile"
    if not blocks or not all(type(block) in BLOCKS and is_bare(block) and of_bare_layers(block) for block in blocks):
        return False, "the rule for a network that is not of torchvision's residual blocks"
    return True, "the rule for one GPU"


def waits_inside(block: nn.Module) -> bool:
    """Whether a batch norm in the block waits for other processes, which no graph records."""
    norms = (part for part in parts_of(block) if isinstance(part, PerWorkerBatchNorm))
    return world_size() > 1 and any(norm.scope == "all" for norm in norms)


def of_bare_layers(block: nn.Module) -> bool:
    """Whether a block has only torch's layers and our batch norm, without hooks, so that a recording keeps all."""
    return has_bare_parts(block) and all(type(part) in LAYERS for part in parts_of(block))
