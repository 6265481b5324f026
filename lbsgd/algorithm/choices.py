"""The words that choose a form of momentum or of batch norm.

They are kept apart from `sgd` and `batch_norm`, because a configuration is read without torch.
"""

from __future__ import annotations

from typing import Literal

# Equations (9) and (10) of Sec. 3.
MomentumForm = Literal["lr_outside", "lr_inside"]

# Sec. 2.3 and 5.2. average: the mean over all k workers. first_worker: process 0's first worker alone.
# recomputed: exact over a set of training images (Fig. 4).
Statistics = Literal["average", "first_worker", "recomputed"]

# What computes it. loop: aten's kernels, a worker at a time. triton: one pair of kernels for all workers.
# rule: one of these two by the device, as algorithm/norm_rule.py says.
Implementation = Literal["loop", "triton"]
ImplementationOrRule = Literal["rule", "loop", "triton"]

# worker: n images are normalised together (Sec. 2.3). all: the images of all processes are, for comparison.
Scope = Literal["worker", "all"]
