"""Time PerWorkerBatchNorm2d, n = 32, against torch's BatchNorm2d over the whole micro batch, forward and backward.

The two take turns in one run, and the median of each counts. A CPU is timed by process time, because other work on the
machine affects that less than wall-clock time. With one group (micro batch 32) both do the same, so that row shows the
noise.
"""

import itertools
import platform
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lbsgd.algorithm.choices import Implementation
from lbsgd.algorithm.norm_rule import implementation_for
from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm2d
from lbsgd.bench.rounds import in_turn
from lbsgd.bench.speed import pass_through
from lbsgd.commands.flag_types import OneLineParser, positive
from lbsgd.errors import one_line

PER_WORKER_BATCH = 32
MICRO_BATCHES = (32, 128, 256)
MEMORY_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP = 3


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"


def medians(layers: Mapping[str, nn.Module], x: torch.Tensor, repeats: int) -> list[float]:
    """Return each layer's median milliseconds for a forward and backward."""
    steps = {name: pass_through(layer, x) for name, layer in layers.items()}
    found = in_turn(steps, x.device.type, rounds=repeats, calls=1, warm_up=WARM_UP)
    return [1000 * statistics.median(seconds) for seconds in found.values()]


def measured(layers: Mapping[str, nn.Module], shape: tuple[int, int, int], device: torch.device, repeats: int) -> Table:
    """Time torch's layer and ours, in this order, for every precision, layout and micro batch."""
    table = Table("precision", "layout", "micro batch", "torch, ms", "per worker, ms", "ratio")
    table.title = f"{' x '.join(map(str, shape))}, n = {PER_WORKER_BATCH}\n{hardware(device)}"
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type == "cuda")
    for dtype, layout, micro_batch in itertools.product(dtypes, MEMORY_FORMATS, MICRO_BATCHES):
        x = torch.randn(micro_batch, *shape, device=device)
        x = x.to(dtype, memory_format=MEMORY_FORMATS[layout]).requires_grad_()
        plain, ours = medians(layers, x, repeats)
        precision = str(dtype).removeprefix("torch.")
        table.add_row(precision, layout, str(micro_batch), f"{plain:.2f}", f"{ours:.2f}", f"{ours / plain:.2f}")
    return table


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--channels", type=positive, default=64)
    parser.add_argument("--size", type=positive, default=28, help="height and width of the feature maps")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--implementation", choices=get_args(Implementation), default="loop", help="of our layer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        device = torch.zeros(1, device=args.device).device
    except (AssertionError, RuntimeError) as error:  # torch raises them for a device that this build or machine lacks
        parser.error(f"--device {args.device}: {one_line(error)}")
    try:
        how, _ = implementation_for(args.implementation, device.type, torch.contiguous_format)
    except ValueError as error:
        parser.error(str(error))
    ours = PerWorkerBatchNorm2d(args.channels, per_worker_batch=PER_WORKER_BATCH, implementation=how)
    layers = {"torch": nn.BatchNorm2d(args.channels).to(device), "ours": ours.to(device)}
    # Without a terminal, rich would take 80 columns, or COLUMNS, and wrap words.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(measured(layers, (args.channels, args.size, args.size), device, args.repeats))


if __name__ == "__main__":
    main()
