"""tools/bench_aggregation.py --mbit 500: aggregation between two emulated hosts, by all algorithms in turn (Sec. 4).

Hosts are network namespaces of this machine with a limited link (tests/cluster/network.py). The bench needs root and an
otherwise idle machine. Each block is a few iterations of one variant, and the variants follow each other in every
round, so that a disturbance affects all. Rounds in which other programs took more than a tenth of the CPU are left out.
It prints the ratio of DeepSpeed's and DDP's time to each variant's, with a 95 % interval over the rounds, the share of
the communication that is hidden, and the bytes that a host sends.

    --halving      instead: halving/doubling against gloo's ring over 2 to 16 processes, for small buffers
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/cluster"))

import network
import psutil
import torch
import torch.distributed as dist
from torch.nn import functional as F

import lbsgd
from lbsgd.bench.figure import Figure, ratio_figure
from lbsgd.commands.flag_types import OneLineParser, at_least_zero, positive, quantity
from lbsgd.config.aggregation import Choice, choose
from lbsgd.config.generate import generate
from lbsgd.config.keypath import put
from lbsgd.config.overrides import Overrides
from lbsgd.config.schema import Aggregation
from lbsgd.errors import ConfigError
from lbsgd.train.aggregation.phases import phases_of, runner
from lbsgd.train.aggregation.placement import Placement

Way = tuple[int | None, dict[str, Any] | None]  # the ZeRO stage, None for DDP, and the aggregation block
PHASES = {"hierarchy": "servers", "between": "backend"}
VARIANTS: dict[str, Way] = {
    "stage 0": (0, None),
    "ZeRO-1": (1, None),
    "DDP": (None, None),
    "flat": (0, {"hierarchy": "flat", "between": "backend"}),
    "three phases": (0, PHASES),
    "halving/doubling": (0, {"hierarchy": "servers", "between": "halving_doubling"}),
    "ZeRO-1, three phases": (1, PHASES),
}
BASES = ("stage 0", "DDP", "ZeRO-1")  # DeepSpeed's and torch's own variants
OTHERS = 0.1  # maximum share of the CPU's time that other programs may take in a round


def different(sizes: list[int]) -> dict[str, Way]:
    """Return the variants that these hosts can run, each algorithm once, under the simplest of its names."""
    found: dict[str, Way] = {}
    for name, (stage, block) in VARIANTS.items():
        try:
            how = block and choose(Aggregation(**block), sizes, "gloo").as_dict()
        except ConfigError:  # halving/doubling between three hosts
            continue
        if block == PHASES and how and how["hierarchy"] == "flat":  # with one process per host, or one host
            name = name.replace("three phases", "flat")
        found.setdefault(name, (stage, block))
    return found


def configuration(world_size: int, micro_batch: int, stage: int, block: dict | None) -> dict:
    overrides = Overrides(
        world_size * micro_batch,
        micro_batch,
        precision="fp32",
        zero_stage=stage,
        num_images=100 * world_size * micro_batch,
        settings=(f"lbsgd.batch_norm.per_worker_batch={micro_batch}", "lbsgd.augmentation.resolution=32"),
    )
    config = generate(overrides, gpus=world_size)
    put(config, "lbsgd.aggregation", block)
    put(config, "zero_allow_untested_optimizer", True)
    return config


class Variant:
    """One way to train ResNet-50 on noise; `iterations` returns the seconds per iteration."""

    def __init__(self, stage: int | None, block: dict | None, micro_batch: int):
        model = lbsgd.resnet("resnet50", 1000)
        self.images = torch.randn(micro_batch, 3, 32, 32)
        self.labels = torch.randint(0, 1000, (micro_batch,))
        self.engine: Any = None
        if stage is None:
            self.model = torch.nn.parallel.DistributedDataParallel(model)
            self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
        else:
            config = configuration(dist.get_world_size(), micro_batch, stage, block)
            self.engine, _ = lbsgd.initialize(model, config)
            self.model = self.engine
        self.gradient_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())

    def iteration(self) -> None:
        loss = F.cross_entropy(self.model(self.images), self.labels)
        if self.engine:
            self.engine.backward(loss)
            self.engine.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def iterations(self, count: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            self.iteration()
        dist.barrier()
        return (time.perf_counter() - began) / count


def busy_of_others(before: tuple[float, float]) -> tuple[float, tuple[float, float]]:
    """Return the share of the CPU's time that other programs took, and the new counts.

    Interrupts are left out, because they belong to no process, and nearly all carry the packets of this bench.
    """
    times = psutil.cpu_times()
    busy = times.user + times.system + times.nice
    here = sum(sum(process.cpu_times()[:2]) for process in psutil.Process().parent().children(recursive=True))
    spent, ours = busy - before[0], here - before[1]
    return max(0.0, spent - ours) / max(spent, 1e-9), (busy, here)


def measure(per_host: int, micro_batch: int, rounds: int, block: int) -> dict:
    """Return, by variant, the seconds of an iteration in each undisturbed round, and the bytes that a host sends."""
    from lbsgd.train.engine import start_processes  # late: importing DeepSpeed takes seconds, and --help needs none

    start_processes()
    sizes = [per_host] * (dist.get_world_size() // per_host)
    variants = {name: Variant(*how, micro_batch) for name, how in different(sizes).items()}
    found: dict[str, dict] = {name: {"seconds": []} for name in variants}
    for name, variant in variants.items():
        variant.iterations(2)
        before = network.sent_bytes()
        variant.iterations(1)
        sent = max(network.bytes_of_hosts(before, per_host))
        found[name]["bytes"] = sent / variant.gradient_bytes
    alone = variants["stage 0"].engine
    compute, others = [], 0.0
    _, counts = busy_of_others((0.0, 0.0))
    for _ in range(rounds):
        times = {name: variant.iterations(block) for name, variant in variants.items()}
        alone.enable_backward_allreduce = False  # the same computation without its aggregation
        compute_now = variants["stage 0"].iterations(block)
        alone.enable_backward_allreduce = True
        others, counts = busy_of_others(counts)
        if dist.get_rank() == 0:
            print(f"other programs: {others:.0%} of the CPU's time", file=sys.stderr, flush=True)
        verdict = [others < OTHERS]
        dist.broadcast_object_list(verdict, 0)
        if verdict[0]:
            compute.append(compute_now)
            for name, seconds in times.items():
                found[name]["seconds"].append(seconds)
    return {"variants": found, "compute": compute, "rounds": rounds}


def between(ratio: Figure) -> str:
    """Return a ratio's 95 % interval; one round has none."""
    return "" if ratio.low is None else f"[{ratio.low:.2f}, {ratio.high:.2f}]"


def show(found: dict) -> None:
    seconds = {name: variant["seconds"] for name, variant in found["variants"].items()}
    compute = found["compute"]
    print(f"{len(compute)} of {found['rounds']} rounds undisturbed")
    print(f"{'variant':22}{'s':>7}" + "".join(f"{f'{base} / it':>20}" for base in BASES) + f"{'hidden':>8}{'bytes':>7}")
    alone = [whole - only for whole, only in zip(seconds["stage 0"], compute, strict=True)]
    for name, taken in seconds.items():
        median = statistics.median(taken) if taken else math.nan
        ratios = [ratio_figure(base, seconds[base], taken) for base in BASES] if taken else []
        hidden = [1 - (s - c) / a for s, c, a in zip(taken, compute, alone, strict=True) if a > 0]
        share = statistics.median(hidden) if hidden else math.nan
        words = "".join(f"{f'{each.value:.2f} {between(each)}':>20}" for each in ratios)
        print(f"{name:22}{median:7.3f}{words}{share:8.0%}{found['variants'][name]['bytes']:7.2f}")


def halving(sizes: list[int]) -> dict:
    """Return the seconds of one all-reduce, the fastest of 5, by algorithm and bytes."""
    from lbsgd.train.engine import start_processes

    start_processes()
    placement, found = Placement.gather(), {}
    for name in ("backend", "halving_doubling"):
        run = runner(phases_of(Choice("flat", name, name), placement, torch.device("cpu"), 1.0), torch.device("cpu"))
        for size in sizes:
            buffer, times = torch.ones(size // 4), []
            for _ in range(6):
                dist.barrier()
                began = time.perf_counter()
                run.wait(run.start(buffer))
                times.append(time.perf_counter() - began)
            found[f"{name} {size}"] = min(times[1:])
    return found


def main() -> int:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--mbit", type=quantity, default=500.0, help="of each host's link (default: %(default)g)")
    add("--hosts", type=positive, default=2, help="(default: %(default)s)")
    add("--per_host", type=positive, default=2, help="processes on each host (default: %(default)s)")
    add("--micro_batch", type=positive, default=16, help="images of 32 pixels per process (default: %(default)s)")
    add("--rounds", type=positive, default=12, help="(default: %(default)s)")
    add("--block", type=positive, default=3, help="iterations of one variant in a round (default: %(default)s)")
    add("--latency_ms", type=at_least_zero, default=5.0, help="one way, with --halving (default: %(default)g)")
    add("--halving", action="store_true", help="compare halving/doubling with a ring instead")
    add("--json", help="write what was measured there")
    given = parser.parse_args()
    if given.json and not Path(given.json).absolute().parent.is_dir():
        parser.error(f"--json {given.json}: its folder does not exist")
    if reason := network.why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if given.halving:
        found = {}
        sizes = [4_096, 65_536, 524_288]
        for hosts in (2, 4, 8, 16):
            with network.Network(hosts, given.mbit, given.latency_ms) as emulated:
                found[hosts] = emulated.run(halving, sizes)[0]
            for size in sizes:
                ring, tree = (found[hosts][f"{name} {size}"] for name in ("backend", "halving_doubling"))
                print(
                    f"{hosts:3} processes {size:8,} bytes: ring {ring * 1e3:7.1f} ms, halving/doubling "
                    f"{tree * 1e3:7.1f} ms, {ring / tree:.2f} times as fast"
                )
    else:
        with network.Network(given.hosts, given.mbit) as emulated:
            arguments = (given.per_host, given.micro_batch, given.rounds, given.block)
            found = emulated.run(measure, *arguments, per_host=given.per_host)[0]
        show(found)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
