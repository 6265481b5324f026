"""Ask DeepSpeed itself whether it trains with a JSON: one process, one CPU, Linear(4, 2), 50 updates.

    python tools/deepspeed_oracle.py < JSONS > VERDICTS     one per line; a verdict is "" or why DeepSpeed refuses

The generator of the schema (tools/deepspeed_schema.py) and the differential test use it. To ask another version of
DeepSpeed, begin PYTHONPATH with its unpacked source. Nothing is compiled: the kernels of the fused optimizers, which a
CPU does not have, are replaced by functions that take the same types of arguments.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import types
import warnings
from typing import Any

NUM_UPDATES = 50  # the first ones may overflow fp16
LONGEST_SECONDS = 60
ENOUGH, MOST = 12, 1e6  # training ends after ENOUGH updates if the weights have moved and are below MOST


class Kernel:
    """Replaces one compiled function: takes tensors and numbers, refuses other types, and moves the weights."""

    def __init__(self, weights_at: int | None, numbers_from: int):
        self.weights_at, self.numbers_from = weights_at, numbers_from

    def __call__(self, *arguments: Any) -> Any:
        import torch

        for argument in arguments[self.numbers_from :]:
            if not isinstance(argument, (int, float, torch.Tensor)):
                raise TypeError(f"incompatible function arguments: {argument!r} is no number")
        lists = arguments[1] if self.weights_at is None else None
        lr = float(next(a for a in arguments[self.numbers_from :] if isinstance(a, (int, float))))
        pairs = zip(lists[0], lists[1], strict=True) if lists else [(arguments[4], arguments[0])]
        with torch.no_grad():  # a compiled kernel bypasses autograd
            for gradient, weight in pairs:
                weight.sub_(gradient.to(weight.dtype).sign(), alpha=lr)
        return torch.tensor(1.0)


def start() -> None:
    """Import DeepSpeed quietly, join a group of one process, and replace the kernels that a CPU does not have."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Muon would compile its update
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ.update(CROSS_RANK="0", CROSS_SIZE="1")  # of hosts, as DeepSpeed's launcher sets them
    os.environ["MASTER_PORT"] = str(port)
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.adam import fused_adam
    from deepspeed.ops.lamb import fused_lamb
    from deepspeed.ops.lion import fused_lion

    torch.set_num_threads(1)
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False  # it compiles for a minute
    get_accelerator().is_fp16_supported = lambda: True
    for module, builder, kernels in (
        (fused_adam, "FusedAdamBuilder", {"multi_tensor_adam": Kernel(None, 2)}),
        (fused_lion, "FusedLionBuilder", {"multi_tensor_lion": Kernel(None, 2)}),
        (fused_lamb, "FusedLambBuilder", {"lamb": Kernel(0, 5)}),
    ):
        built = types.SimpleNamespace(load=lambda kernels=kernels: types.SimpleNamespace(**kernels))
        setattr(module, builder, lambda built=built: built)
    for module in (fused_adam, fused_lion):
        if hasattr(module, "multi_tensor_applier"):
            module.multi_tensor_applier = lambda function, overflow, lists, *rest: function(overflow, lists, *rest)
    deepspeed.ops.op_builder.builder.OpBuilder.jit_load = refuse_to_compile
    gc.collect = lambda *_: 0  # memory_breakdown calls it in every pass, and it takes a second on a heap like torch's
    sys.path[0] = os.path.abspath(sys.path[0])
    os.chdir(tempfile.mkdtemp())  # the autotuner and the monitors write files
    deepspeed.init_distributed()


def refuse_to_compile(builder: Any, verbose: bool = True) -> None:
    """Raise instead of compiling for minutes."""
    raise RuntimeError(f"{builder.name} would be compiled")


def on_one_process(config: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON for one process: train_batch_size is reduced if all three batch sizes are given."""
    config = copy.deepcopy(config)
    micro, passes = config.get("train_micro_batch_size_per_gpu"), config.get("gradient_accumulation_steps")
    if type(config.get("train_batch_size")) is type(micro) is type(passes) is int:
        config["train_batch_size"] = micro * passes
    return config


def refusal(config: dict[str, Any], updates: int = NUM_UPDATES) -> str:
    """Return why DeepSpeed does not train with a JSON; "" if it does, with finite weights that moved."""
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            signal.signal(signal.SIGALRM, give_up)
            signal.alarm(LONGEST_SECONDS)
            return train(on_one_process(config), updates)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # noqa: BLE001  DeepSpeed has no base class for its refusals, and some exit
            return f"{type(error).__name__}: {error}"[:300]
        finally:
            signal.alarm(0)


def give_up(*_: Any) -> None:
    """Stop a JSON that DeepSpeed neither refuses nor trains."""
    raise TimeoutError(f"does not train within {LONGEST_SECONDS} seconds")


def train(config: dict[str, Any], updates: int = NUM_UPDATES) -> str:
    """Train Linear(4, 2) and return what is wrong with its weights. A refusal is raised as an exception."""
    import deepspeed
    import torch

    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    model = torch.nn.Linear(4, 2)
    optimizer = config.get("optimizer")
    given = isinstance(optimizer, dict) and optimizer.get("type") is not None
    passed = (
        {}
        if given or optimizer is not None and not isinstance(optimizer, dict)
        else {"optimizer": torch.optim.Adam(model.parameters(), lr=1e-3)}
    )
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config, **passed)[0]
    try:
        return after_updates(engine, model, updates)
    finally:
        engine.destroy()


def after_updates(engine: Any, model: Any, updates: int) -> str:
    """Make the updates, with a loss whose gradients are constant, and return what is wrong with the weights."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    divided = engine.zero_optimization_stage() >= 3

    def weights() -> list[Any]:
        return [(safe_get_full_fp32_param(p) if divided else p.detach()).float().clone() for p in model.parameters()]

    before, images = weights(), torch.ones(1, 4)
    for update in range(updates):
        if update >= ENOUGH and not is_torchs(engine.lr_scheduler) and verdict(before, weights(), MOST) == "":
            break
        for _ in range(int(engine.gradient_accumulation_steps())):
            output = engine(images.to(dtype_of(engine)))
            engine.backward(output.float().sum())
            engine.step()
    return verdict(before, weights())


def verdict(before: list[Any], after: list[Any], most: float = math.inf) -> str:
    """Return what is wrong with the weights."""
    import torch

    if not all((weight.abs() < most).all() for weight in after):
        return "the weights are not finite"
    if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
        return "the weights do not move"
    return ""


def is_torchs(scheduler: Any) -> bool:
    """Whether a scheduler is one of torch's, some of which end after a number of steps."""
    return type(scheduler).__module__.startswith("torch.")


def basic_optimizer(config: dict[str, Any]) -> Any:
    """Return the optimizer that DeepSpeed builds from a JSON."""
    import deepspeed
    import torch

    with contextlib.redirect_stdout(io.StringIO()):
        model = torch.nn.Linear(4, 2)
        engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    return engine.basic_optimizer


def train_noting(config: dict[str, Any]) -> None:
    """Train two updates with a dict that notes which keys are looked up."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        train(config, 2)


def dtype_of(engine: Any) -> Any:
    """Return the type of the weights, which the images must have."""
    import torch

    return torch.float16 if engine.fp16_enabled() else torch.bfloat16 if engine.bfloat16_enabled() else torch.float32


def main() -> None:
    """Answer each line of standard input with one line."""
    questions = os.fdopen(os.dup(0))  # DeepSpeed's autotuner calls exit(), which closes standard input
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DeepSpeed prints
    start()
    for line in questions:
        print(json.dumps(refusal(json.loads(line))), file=answers, flush=True)
    answers.flush()
    os._exit(0)  # does not wait for DeepSpeed's threads


if __name__ == "__main__":
    main()
