"""Measure what only a GPU can show, in two runs of at most 8 minutes, each on one GPU; no network is needed.

    python tools/bench_gpu.py correctness [--together] [--output_dir DIR]
    python tools/bench_gpu.py speed [--jpegs FILE] [--output_dir DIR]

    correctness    the tests that need a GPU, `make demo`'s command, and Table 1's row on digits in fp16
    speed          the training step against plain PyTorch, batch norm, the loader, torch.compile, a profile

Results are written as they are measured: NAME.json, NAME.md, NAME.png and NAME.log in DIR, by default
results/gpu_<device>. They list each part that failed, took too long or had no time left; the other parts go on. The
exit code is 1 unless every part that can run here is done; run the rest again with --parts and --seconds. On a CPU all
sizes are tiny, which only shows that each line runs. --jpegs is a tar of JPEGs for the converter, such as a sample of
ImageNet.
"""

import platform
import re
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lbsgd.commands.flag_types import OneLineParser, path, quantity
from lbsgd.data.host_files import keep_torchs_code
from lbsgd.errors import LbsgdError, print_error
from lbsgd.processes.control_groups import usable_cores
from lbsgd.processes.signals import STOP_SIGNALS, at_a_signal

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 480.0
# For parts of `speed` on a CPU; each part on a GPU imports them itself. Those of `correctness` only start commands.
# ZeRO's first engine imports Muon, with torch's inductor.
IMPORTED_ONCE = ("lbsgd.train.session", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")


def about(device: str) -> dict[str, str]:
    """Return the device and the software of the measurement."""
    import torch

    from lbsgd.train.facts import code_of, environment

    facts = environment("")
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.processor() or platform.machine()}"
    return {
        "device": name,
        "cuda": str(torch.version.cuda),
        "cores": str(usable_cores()),
        "python": facts["python"],
        "packages": ", ".join(f"{package} {version}" for package, version in facts["packages"].items() if version),
        "compiled kernels of the loader": code_of(ROOT / "lbsgd")["compiled kernels of lbsgd"],
        "code": facts["code"],
        "command": " ".join(sys.argv),
        "started": facts["started"],
    }


def folder_for(device: str) -> Path:
    return ROOT / "results" / f"gpu_{re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')}"


def task_for(device: str) -> Any:
    """Return the task whose steps `speed` measures. Its import takes seconds."""
    from cifar10 import SmallResNet
    from resnet50 import ResNet50

    return ResNet50() if device == "cuda" else SmallResNet()


def end_by(number: int) -> None:
    """End this process with its parts and their folder. A second signal does not disturb that."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    flags = OneLineParser(description=__doc__)
    flags.add_argument("bench", choices=("correctness", "speed"))
    flags.add_argument("--jpegs", type=path, metavar="FILE", help="a tar of JPEGs that the loader is fed with")
    flags.add_argument("--output_dir", type=path, metavar="DIR", help="default: results/gpu_<device>")
    flags.add_argument("--parts", nargs="+", metavar="PART", help="only these parts")
    flags.add_argument("--seconds", type=quantity, default=SECONDS, help="that all parts have together (default: 480)")
    together = "run all parts of correctness at once, where there are cores for them"
    flags.add_argument("--together", action="store_true", help=together)
    given = flags.parse_args()
    if given.together and given.bench == "speed":
        flags.error("--together is for correctness: parts that measure speed run alone")
    if given.jpegs and not given.jpegs.is_file():
        flags.error(f"--jpegs {given.jpegs}: no such file")
    keep_torchs_code(compiles=False)
    import torch

    from lbsgd.bench.parts import run_parts
    from lbsgd.bench.results import Results
    from lbsgd.bench.sizes import ON_A_CPU, ON_A_GPU, BenchSettings

    parts = import_module(f"lbsgd.bench.{given.bench}").PARTS
    names = [part.name for part in parts]
    if unknown := set(given.parts or ()) - set(names):
        flags.error(f"no part {', '.join(sorted(unknown))}; {given.bench} has {', '.join(names)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = about(device)
    at_a_signal(end_by)
    with tempfile.TemporaryDirectory(prefix="lbsgd_bench_") as folder:
        sizes, task = ON_A_GPU if device == "cuda" else ON_A_CPU, task_for(device) if given.bench == "speed" else None
        settings = BenchSettings(sizes, device, ROOT, Path(folder), given.jpegs and given.jpegs.resolve(), task)
        chosen = [part for part in parts if not given.parts or part.name in given.parts]
        preload = IMPORTED_ONCE if device == "cpu" and given.bench == "speed" else ()
        try:
            results = Results(given.output_dir or folder_for(facts["device"]), given.bench, facts)
            all_done = run_parts(chosen, settings, results, given.seconds, preload, given.together)
        except LbsgdError as error:
            print_error(error)
            return error.exit_code
    print(results.folder / f"{given.bench}.md")
    return 0 if all_done else 1


if __name__ == "__main__":
    sys.exit(main())
