"""The whole pipeline on real data in minutes: handwritten digits -> JPEG files -> FFCV files -> ResNet-50 -> curves.

    python tools/demo.py [--seed N] [--work_dir DIR] [FLAGS OF THE RECIPE]        (make demo)

It prints and runs each command. After an interruption the same command goes on; `make clean` deletes what it made. Any
other flag goes to the recipe, such as --epochs 2.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from lbsgd.commands.flag_types import OneLineParser, natural, path
from lbsgd.disk import nearest
from lbsgd.errors import ConfigError, LbsgdError, Stopped, print_error
from lbsgd.processes.launcher import command_line, is_launcher
from lbsgd.processes.ports import free_port

ROOT = Path(__file__).parent.parent
NUM_WORKERS, PER_WORKER_BATCH = 4, 32  # k and n of ds_configs/digits.json


def num_processes() -> int:
    """Return the largest number of GPUs that divides k; 2 on a CPU."""
    import torch  # not above, because this takes seconds, and refusals and `run` do not need it

    from lbsgd.train.facts import accelerator_kind

    gpus = torch.cuda.device_count() if accelerator_kind() == "cuda" else 0
    return max(size for size in range(1, gpus + 1) if NUM_WORKERS % size == 0) if gpus else 2


def where(processes: int) -> list[str]:
    """Return the launcher's flags that start this number of processes, on GPUs that CUDA_VISIBLE_DEVICES names.

    Raises ConfigError if the GPUs have names and not numbers.
    """
    from lbsgd.experiments.launch import on_gpus, visible_gpus  # not above, as torch in `num_processes`

    gpus = visible_gpus()[:processes] if "CUDA_VISIBLE_DEVICES" in os.environ else ()
    return on_gpus(gpus) if len(gpus) == processes else ["--num_accelerators", str(processes)]


def run_name(seed: int) -> str:
    return "demo" if seed == 0 else f"demo_seed{seed}"


def launcher() -> str:
    """Return the `deepspeed` next to this Python, else the first on PATH, where `pip install --target` puts it."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("deepspeed", path=os.pathsep.join((beside, os.environ.get("PATH", "")))) or "deepspeed"


def commands(seed: int, work_dir: Path, recipe_flags: Sequence[str] = ()) -> list[list[str]]:
    name, python = run_name(seed), sys.executable
    tree, ffcv = work_dir / "data/digits", work_dir / "data/digits_ffcv"
    processes = num_processes()
    micro_batch = NUM_WORKERS * PER_WORKER_BATCH // processes
    return [
        [python, "tools/render_digits.py", "--output_dir", str(tree)],
        [python, "tools/convert_imagenet_to_ffcv.py", "--source", str(tree), "--data_dir", str(ffcv)],
        [
            launcher(),
            "--quiet",
            *where(processes),
            "--master_port",
            str(free_port()),
            "recipes/resnet50.py",
            "--deepspeed_config",
            "ds_configs/digits.json",
            "--micro_batch",
            str(micro_batch),
            "--data_dir",
            str(ffcv),
            "--output_dir",
            str(work_dir / "runs" / name),
            "--seed",
            str(seed),
            *(["--resume"] if (work_dir / "runs" / name).exists() else []),
            *recipe_flags,
        ],
    ]


def run(command: Sequence[str]) -> int:
    """Run a command and return its exit code. After a stop signal, wait until the command has saved, and return 75."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for Ctrl-C
    child = subprocess.Popen(command, preexec_fn=ignore_ctrl_c)
    code, stopped = None, False
    while code is None:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            stopped = True
            stop(psutil.Process(child.pid))
    return Stopped.exit_code if stopped and code else code


def ignore_ctrl_c() -> None:
    """Ignore Ctrl-C: DeepSpeed's launcher would end at once, with a traceback, while the run's processes still save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop(process: psutil.Process) -> None:
    """Send SIGTERM to a command. If it is `deepspeed`, which does not pass it on, send it to its children instead."""
    try:
        passed_over = is_launcher(command_line(process))
        for each in process.children() if passed_over else [process]:
            each.terminate()
    except psutil.NoSuchProcess:  # it has just ended
        pass


def the_demos(_: str) -> NoReturn:
    raise ArgumentTypeError("the demo chooses it itself; --work_dir says where data/ and runs/ go")


def require_work_dir(work_dir: Path) -> None:
    """Raise ConfigError if data/ or runs/ cannot be made or written, as in another user's clone."""
    for folder in (work_dir / "data", work_dir / "runs"):
        place = nearest(folder)
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise ConfigError(f"{place} cannot be written; say with --work_dir where data/ and runs/ shall go")


def main() -> int:
    flags = OneLineParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--seed", type=natural, default=0, help="of weights, shuffle and augmentation (default: 0)")
    flags.add_argument("--work_dir", type=path, help="where data/ and runs/ go (default: the repository)")
    for flag in ("--deepspeed_config", "--data_dir", "--output_dir"):
        flags.add_argument(flag, type=the_demos, help=SUPPRESS)
    arguments, recipe_flags = flags.parse_known_args()
    work_dir = arguments.work_dir.resolve() if arguments.work_dir else Path()
    os.chdir(ROOT)
    require_work_dir(work_dir.absolute())
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it DeepSpeed's launcher warns
    for command in commands(arguments.seed, work_dir, recipe_flags):
        print(f"$ {shlex.join(command)}", flush=True)
        code = run(command)
        if code:
            return code
    page = (work_dir / "runs" / run_name(arguments.seed) / "index.html").resolve()
    print(f"open {page.as_uri()} in a browser: curves, configuration, environment", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LbsgdError as error:
        print_error(error)
        sys.exit(error.exit_code)
