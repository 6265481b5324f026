"""One rank of a job of any size, run for real: torch's fake process group takes its collective calls and does nothing.

    python tests/one_rank.py RANK WORLD_SIZE

trains some updates of ds_configs/8k_fp32.json, 32 images per update and rank, with 32 x 32 pixels, and prints a JSON of
the cost of this process: CPU seconds of imports, engine and data, the median update, private memory.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUM_IMAGES, SERVER, WARM_UP, UPDATES = 1_281_167, 8, 2, 7


def cost(rank, world_size):
    """Return the cost of a rank, measured in a new process."""
    command = [sys.executable, __file__, str(rank), str(world_size)]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def environment(rank, world_size):
    """Return the environment that a launcher gives a rank of that job. Threads and DeepSpeed read it on import."""
    local = {"LOCAL_RANK": rank % SERVER, "LOCAL_SIZE": min(SERVER, world_size), "MASTER_PORT": 1}
    job = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    return os.environ | {name: str(value) for name, value in (job | local).items()}


def megabytes():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1e3


def main(rank, world_size):
    marks = [time.process_time()]
    import deepspeed
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import lbsgd
    from lbsgd.config.overrides import Overrides
    from lbsgd.data.share import Pixels
    from lbsgd.processes.environment import Processes
    from lbsgd.processes.guard import Guard
    from lbsgd.train import engine as lbsgd_engine
    from lbsgd.train.aggregation import phases
    from lbsgd.train.aggregation.placement import Placement
    from lbsgd.train.images import Images, fake_images
    from lbsgd.train.saver import Saver
    from lbsgd.train.trainer import Trainer

    sys.path.insert(0, str(ROOT / "recipes"))
    from resnet50 import ResNet50

    marks.append(time.process_time())
    before = megabytes()
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # as in start_processes; or it compiles for minutes
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    servers = tuple(tuple(range(first, first + SERVER)) for first in range(0, world_size, SERVER))
    Placement.gather = classmethod(lambda cls: cls(servers))  # no other process answers
    phases.timeout_of = lambda device: timedelta(minutes=10)  # the fake group has none, and takes none
    lbsgd_engine.share_timeout = lambda copy, device: None
    lbsgd_engine.require_alike = lambda model, plan: None  # no other process answers
    task, overrides = ResNet50(), Overrides(global_batch=32 * world_size, micro_batch=32, resolution=32)
    plan = lbsgd.Plan.read(ROOT / "ds_configs/8k_fp32.json", world_size, NUM_IMAGES, overrides)
    engine, _ = lbsgd.initialize(task.network(1000, plan), plan)
    marks.append(time.process_time())
    processes = Processes.from_environment()
    images = fake_images().open(plan, processes, Pixels(resolution=32, device="cpu"), None)
    trainer = Trainer(engine, plan, task, images, Saver(engine, Path("unused"), {}, {}), Guard(processes, 600))
    batches = Images(*images).train.epoch(0)
    engine.train()
    trainer.update(batches)
    marks.append(time.process_time())
    updates = []
    for _ in range(WARM_UP + UPDATES):
        began = time.process_time()
        trainer.update(batches)
        updates.append(time.process_time() - began)
    imports, built, first = (after - before for before, after in zip(marks, marks[1:], strict=False))
    update = statistics.median(updates[WARM_UP:])
    return {"imports": imports, "engine": built, "first": first, "update": update, "private": megabytes() - before}


if __name__ == "__main__":
    place = tuple(map(int, sys.argv[1:]))
    if "LOCAL_RANK" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], environment(*place))
    print(json.dumps(main(*place)))
