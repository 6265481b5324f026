"""The sizes of a bench: those that measure a GPU, and the smallest ones that run every line of the bench on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lbsgd.algorithm.choices import Implementation

Blocks = Literal["as they are", "compiled", "graphs"]


@dataclass(frozen=True)
class Sizes:
    """Images and rounds of the speed bench, and the length of the correctness bench.

    micro_batches      for comparing batch norms, each a multiple of n = per_worker_batch
    implementations    the implementations of batch norm that the device has (`algorithm/norm_rule.py`)
    precisions         each with its ZeRO stage, for comparing the trainer with the plain loop
    tuned_batches      micro batches at which the two are also compared with cudnn.benchmark
    half               the precision in which the device multiplies fastest
    layers             shapes (C, H, W) for timing batch norm alone
    rounds, calls      rounds of each comparison, and calls per round and contestant
    fed_updates        timed updates that the loader feeds
    blocks             how residual blocks run by default: by CUDA graphs on a GPU
    backend            the backend of torch.compile
    is_small           whether these are the sizes for a CPU, which only check that each line runs
    """

    resolution: int
    per_worker_batch: int
    micro_batches: tuple[int, ...]
    step_batch: int
    compile_batch: int
    implementations: tuple[Implementation, ...]
    precisions: tuple[tuple[str, int], ...]
    tuned_batches: tuple[int, ...]
    half: str
    layers: tuple[tuple[int, int, int], ...]
    rounds: int
    calls: int
    warm_up: int
    fed_updates: int
    images_to_feed: int
    blocks: Blocks
    backend: str
    is_small: bool


ON_A_GPU = Sizes(
    resolution=224,
    per_worker_batch=32,
    micro_batches=(32, 128, 256),
    step_batch=256,
    compile_batch=128,
    implementations=("loop", "triton"),
    precisions=(("fp16", 1), ("bf16", 0)),
    tuned_batches=(256, 128),
    half="fp16",
    layers=((64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)),
    rounds=10,
    calls=3,
    warm_up=3,
    fed_updates=60,  # and 33 that are not timed
    images_to_feed=25_600,  # 100 updates of step_batch: no new epoch, which begins with a wait, must be measured
    blocks="graphs",
    backend="inductor",
    is_small=False,
)
ON_A_CPU = Sizes(
    resolution=16,
    per_worker_batch=2,
    micro_batches=(2, 4),
    step_batch=4,
    compile_batch=4,
    implementations=("loop",),
    precisions=(("fp32", 1), ("bf16", 0)),  # DeepSpeed refuses fp16 on a CPU that is slow at it
    tuned_batches=(4,),
    half="bf16",
    layers=((8, 4, 4),),
    rounds=2,
    calls=1,
    warm_up=1,
    fed_updates=5,
    images_to_feed=24,
    blocks="as they are",
    backend="eager",
    is_small=True,
)


@dataclass(frozen=True)
class BenchSettings:
    """The settings that the parts of a bench get.

    root      the repository, with the tests, tools and recipes that the parts run
    folder    a folder for temporary files
    jpegs     a tar of JPEGs for the loader, if there is one
    task      the task of a recipe (`train/task.py`): its network and its loss; None in `correctness`
    deadline  the deadline of the part by time.monotonic(), which is the same in all processes
    """

    sizes: Sizes
    device: str
    root: Path
    folder: Path
    jpegs: Path | None
    task: Any
    deadline: float = 0.0
