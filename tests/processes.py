"""Run a function in several processes joined by gloo, as DeepSpeed's launcher would start them."""

import gc
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing

from lbsgd.processes.ports import free_port

# Processes are forked from one that has done the slow imports. None of them starts threads or touches a GPU.
LATE_IN_ZERO = "deepspeed.runtime.zero.muon.muon_optimizer"  # imported by ZeRO's first engine, with torch's inductor
multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "lbsgd.train.engine", LATE_IN_ZERO])


def in_processes(world_size, function, *arguments):
    """Return the results of function(*arguments) in rank order. An exception in a process is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run, (world_size, free_port(), function, arguments, folder), world_size, start_method="forkserver"
        )
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world_size)]


def _run(rank, world_size, port, function, arguments, folder):
    gc.freeze()  # no garbage collection looks through the imported modules, as DeepSpeed's engines ask for many
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    # Pickled, because a queue would pass tensors as shared memory, which ends with this process.
    Path(folder, str(rank)).write_bytes(pickle.dumps(function(*arguments)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
