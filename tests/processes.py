"""Run a function in several processes joined by gloo, as DeepSpeed's launcher would start them."""

import gc
import importlib
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing

from lbsgd.processes.ports import free_port

# Processes are forked from one that has done the imports of a run, also those that torch, DeepSpeed and lbsgd do late.
# None of these starts threads or touches a GPU.
PRELOADED = (
    "lbsgd.train.session",
    "lbsgd.commands.train",
    "lbsgd.commands.plan_lines",
    "lbsgd.commands.recipe_flags",
    "lbsgd.commands.trained_on",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.serialization.config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported by ZeRO's first engine, with torch's inductor
    "encodings.idna",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "numba",
    "numpy.ctypeslib",
    "pydantic.type_adapter",
    "pytest",
    "rich._emoji_codes",
)
forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload(list(PRELOADED))


def in_processes(world_size, function, *arguments, imports=None):
    """Return the results of function(*arguments) in rank order. An exception in a process is raised here.

    imports: a module that takes seconds to import. It is imported once, by a process from which all others are forked.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = _run, (world_size, free_port(), function, arguments, folder), world_size
        if imports:
            start = _import_and_start, (imports, *start), 1
        torch.multiprocessing.start_processes(*start, start_method="forkserver")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world_size)]


def _import_and_start(_, module, *start):
    importlib.import_module(module)
    torch.multiprocessing.start_processes(*start, start_method="fork")


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
