"""One rank of a job of very many processes, run for real on one host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import json, os, sys, time
began = time.process_time()
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
import deepspeed, lbsgd
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as start_processes does; else compiled for minutes
from lbsgd.train.engine import step
from lbsgd.data.fake import FakeImages
from lbsgd.data.share import Pixels, Share
from lbsgd.algorithm.resnet import resnet

def kilobytes():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))

imported, before = time.process_time() - began, kilobytes()
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
from lbsgd.config.overrides import Overrides
began = time.process_time()
engine, plan = lbsgd.initialize(
    resnet("resnet18", 10, True, 0), sys.argv[1], num_images=world_size * 32 * 10,
    overrides=Overrides(global_batch=32 * world_size, micro_batch=32, resolution=32),
)
built = time.process_time() - began
pixels, share = Pixels(resolution=32, device="cpu"), Share(rank, world_size)
cut = dict(seed=0, global_batch=plan.global_batch, micro_batch=32, share=share, pixels=pixels)
images = FakeImages(plan.num_images, 10, **cut)
times = []
for x, y in images.epoch(0):
    began = time.process_time()
    loss = torch.nn.functional.cross_entropy(engine(x), y)
    engine.backward(loss)
    step(engine)
    times.append(time.process_time() - began)
times = sorted(times[2:])
print(json.dumps(dict(imports=imported, engine=built, private=kilobytes() - before, update=times[len(times) // 2])))
"""


def one_rank(rank, world_size, config):
    environment = {
        **os.environ,
        **dict(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % 8), LOCAL_SIZE=str(min(8, world_size))
        ),
        **dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", PYTHONPATH=str(Path(__file__).parent.parent)),
    }
    code = [sys.executable, "-c", RANK, config]
    return json.loads(subprocess.check_output(code, text=True, env=environment).splitlines()[-1])


@pytest.mark.slow
def test_a_rank_of_256_costs_what_a_process_alone_costs():
    """Its collective calls do nothing (torch's fake process group), so all that is left is the rank's own work."""
    config = Path(__file__).parent.parent / "ds_configs/digits.json"
    [alone, one_of_many] = one_rank(0, 1, config), one_rank(137, 256, config)
    print(f"\nalone {alone}\none of 256 {one_of_many}")
    assert one_of_many["private"] < 1.2 * alone["private"]
    assert one_of_many["update"] < 1.2 * alone["update"] and one_of_many["engine"] < alone["engine"] + 3
