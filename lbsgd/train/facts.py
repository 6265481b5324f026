"""Facts about a process and its host: what all hosts must have in common, and what the log says of a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbsgd.config.plan import Plan
from lbsgd.data.native.library import LIBRARY
from lbsgd.disk import exists, is_file
from lbsgd.units import installed

PACKAGES = ("lbsgd", "torch", "torchvision", "deepspeed", "ffcv", "triton")
# All hosts must have the same versions: NumPy draws the shared order of images, and batch norm's kernels are triton's.
ALIKE = ("torch", "torchvision", "deepspeed", "numpy", "triton")
KIND_OF_DEVICE, SCRIPT = "kind of device", "recipe script"
OLDEST_DRIVER = 580  # for CUDA 13


def fingerprints(plan: Plan, task: object, flags: Mapping[str, Any], data: str) -> dict[str, str]:
    """Return the facts that all processes on all hosts must have in common, by the names that an error gives them."""
    return {
        "configuration": digest(json.dumps([plan.config, plan.recipe.model_dump()]).encode()),
        **code_of(Path(__file__).parent.parent),
        SCRIPT: script_of(task),
        "flags": json.dumps(dict(flags)),
        **{f"version of {name}": installed(name) or "" for name in ALIKE},
        KIND_OF_DEVICE: accelerator_kind(),
        "data": data,
    }


def accelerator_kind() -> str:
    """Return what computes, `cuda` or `cpu`. With DS_ACCELERATOR=cpu DeepSpeed leaves a GPU alone.

    A host with a broken driver, or with this variable, would join the others with another backend, and hang.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "cpu"
    import torch  # late, so that a mere digest does not load PyTorch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


def unused_gpu(driver: Path = Path("/proc/driver/nvidia/version"), devices: Path = Path("/dev")) -> str:
    """Return why a host with an NVIDIA GPU trains on its CPU, and what to do, or "" if there is nothing to say.

    driver     the file with the version of NVIDIA's driver
    devices    the folder of the GPUs' device files
    """
    import torch

    hidden = not os.environ.get("CUDA_VISIBLE_DEVICES", "0")[:1].isalnum()  # on purpose, by "" or -1
    if hidden or torch.accelerator.is_available() or not any(devices.glob("nvidia[0-9]*")):
        return ""
    found = re.search(r"\s(\d+)(\.\d+)+\s", driver.read_text()) if exists(driver) else None
    version = f" with driver {found[0].strip()}" if found else ""
    host = f"this host has an NVIDIA GPU{version}, but torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{host} is built without CUDA, so the CPU computes; install another build"
    if found and int(found[1]) < OLDEST_DRIVER and torch.version.cuda.startswith("13."):
        return (
            f"{host} needs driver {OLDEST_DRIVER} or newer, so the CPU computes; `make setup CUDA=12` installs a build "
            "for older ones"
        )
    return f"{host} cannot use it, so the CPU computes; `python -c 'import torch; torch.cuda.init()'` may say why"


def code_of(package: Path) -> dict[str, str]:
    """Return the digest of the sources, and whether the C sources are compiled.

    The pixels of the compiled kernels and of their substitutes differ a little. Hidden files are no sources: an editor
    may have locked one, as Emacs does by a link `.#plan.py` to nowhere.
    """
    found = sorted(path for kind in ("py", "c", "h") for path in package.rglob(f"*.{kind}"))
    sources = [path for path in found if not path.name.startswith(".")]
    return {
        "code of lbsgd": digest(*(path.read_bytes() for path in sources)),
        "compiled kernels of lbsgd": str(any(package.rglob(LIBRARY))),
    }


def script_of(task: object) -> str:
    """Return the digest of the recipe's script, with the files that define the task's class and its bases.

    It does not depend on where the files are, or on how the command names them.
    """
    return digest(*sorted({path.read_bytes() for path in files_of(task)}))


def files_of(task: object) -> set[Path]:
    """Return the script and the files that define the task's class and its bases, except those of lbsgd and Python."""
    names = {each.__module__ for each in type(task).__mro__}
    others = {"lbsgd", *sys.stdlib_module_names}
    modules = [sys.modules.get(name) for name in names if name.split(".")[0] not in others]
    files = {getattr(module, "__file__", None) for module in modules} | {sys.argv[0]}
    return {path for path in map(Path, filter(None, files)) if is_file(path)}


def environment(data: str) -> dict[str, Any]:
    """Return where and how the process runs, for the log."""
    return {
        "command": sys.argv,
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "code": code_of(Path(__file__).parent.parent)["code of lbsgd"],  # rows of a table must agree in it
        "data": data,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()
