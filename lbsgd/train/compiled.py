"""torch.compile, one residual block at a time, so that gradients still arrive block by block and aggregation overlaps.

A network compiled as a whole has one backward, and all its gradients arrive at the end. Evaluation runs uncompiled
(`as_it_is`), because another mode and a smaller last batch would compile every block again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lbsgd.algorithm.fused_blocks import residual_blocks
from lbsgd.errors import ConfigError


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compile each of a network's residual blocks for training. Return how many there are.

    Sizes are fixed: other sizes need another graph. A block that cannot be one graph raises when it first runs, rather
    than run slowly. Raises ConfigError for a network without blocks of torchvision's kind.
    """
    blocks = residual_blocks(model)
    if not blocks:
        raise ConfigError(
            "--compile: this network has no residual blocks of torchvision's kind, and nothing else is compiled; "
            "leave the flag out"
        )
    import torch._dynamo  # late: it takes seconds, which only this flag's users should wait for

    # All blocks run the code of one class, and torch stops compiling the same code after recompile_limit graphs.
    limit = torch._dynamo.config.recompile_limit  # type: ignore[attr-defined]
    torch._dynamo.config.recompile_limit = max(limit, 2 * len(blocks))  # type: ignore[attr-defined]
    for block in blocks:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    return len(blocks)


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """Run a network's blocks uncompiled inside. If none is compiled, import nothing and do nothing."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
