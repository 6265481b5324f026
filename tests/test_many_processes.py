"""Jobs of very many processes, simulated on one host: how they meet, what rank 0 bears, and what one rank costs."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lbsgd.processes.environment import Processes, free_port
from lbsgd.processes.peers import Peers

CARRIERS, BEATS = 4, 3  # processes that carry the threads; rounds of signs of life


def processes(rank, world_size):
    return Processes(rank=rank, world_size=world_size, local_rank=rank % 8, local_world_size=8)


def carry(ranks, world_size, dead, beating, met):
    """Be some of the ranks, a thread each: meet the others, then give signs of life each second, but for the dead."""

    def live(rank):
        peers = Peers.meet(processes(rank, world_size), 300, lambda position: None)
        with met.get_lock():
            met.value += 1
        while not beating.is_set():
            if rank != dead:
                peers.beat("iteration 3, pass 0")
                peers.failure()
            beating.wait(peers.BEAT_SECONDS)

    threading.stack_size(1 << 20)
    threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def lead(world_size, met, pipe):
    """Be rank 0, which serves the store: send how long the meeting took, its load, and who is found silent."""
    began, cpu = time.monotonic(), cpu_seconds()
    peers = Peers.meet(processes(0, world_size), 300, lambda position: None)
    meeting, meeting_cpu = time.monotonic() - began, cpu_seconds() - cpu
    while met.value < world_size - 1:
        time.sleep(0.1)
    began, cpu = time.monotonic(), cpu_seconds()
    time.sleep(BEATS * peers.BEAT_SECONDS)
    load = (cpu_seconds() - cpu) / (time.monotonic() - began)
    began = time.monotonic()
    silent = peers.silent()
    pipe.send(
        {
            "meeting": meeting,
            "meeting_cpu": meeting_cpu,
            "load": load,
            "naming": time.monotonic() - began,
            "dead": silent,
        }
    )
    pipe.recv()  # the store ends with this process


@pytest.mark.slow
def test_2048_processes_meet_and_a_dead_one_is_named(monkeypatch):
    world_size, dead = 2048, 1234
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))  # rank 0 has a connection for each process
    context = multiprocessing.get_context("fork")
    beating, met, (ours, theirs) = context.Event(), context.Value("i", 0), context.Pipe()
    others = range(1, world_size)
    started = [context.Process(target=lead, args=(world_size, met, theirs))] + [
        context.Process(target=carry, args=(others[place::CARRIERS], world_size, dead, beating, met))
        for place in range(CARRIERS)
    ]
    try:
        for process in started:
            process.start()
        assert ours.poll(300)
        found = ours.recv()
    finally:
        beating.set()
        for process in started[1:]:
            process.join(20)
        for process in started:
            process.kill()
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    print(f"\n{found}")
    assert [name.split(" on ")[0] for name in found["dead"]] == [f"rank {dead}"]
    assert found["meeting"] < 120 and found["naming"] < 30


RANK = """
import json, os, sys, time
began = time.process_time()
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
import lbsgd
from lbsgd.train.engine import start_processes, step
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
