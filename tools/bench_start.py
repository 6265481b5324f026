"""How long a start takes: from the command to the first forward of the digits run on two processes.

    python tools/bench_start.py data/digits_ffcv [--repeats 3]

In each repeat DeepSpeed's launcher starts recipes/resnet50.py with ds_configs/digits.json on the FFCV files that
`make demo` makes. The times mean little unless the machine is otherwise idle, so the load before each start is printed.
CPU seconds are those of rank 0, and of the launcher, until the first forward.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lbsgd.commands.flag_types import OneLineParser, path, positive

ROOT = Path(__file__).parent.parent
MARK = "first forward: "
sys.path.insert(0, str(ROOT / "recipes"))


def measured_run():
    """Run the recipe in a process that the launcher has started, and print the times of its first forward."""
    import psutil
    from resnet50 import ResNet50

    from lbsgd.commands.train import main as train
    from lbsgd.processes import stopwatch
    from lbsgd.processes.launcher import launchers

    launcher, spawned = launchers()[-1], psutil.Process().create_time()
    stopwatch.LONG_SECONDS = 0.0  # always print the line of a long start

    class Timed(ResNet50):
        loss_called = False

        def loss(self, network, batch):
            if not self.loss_called and os.environ["RANK"] == "0":
                self.loss_called, now, cpu = True, time.time(), launcher.cpu_times()
                found = {
                    "from the command": now - launcher.create_time(),
                    "from spawning": now - spawned,
                    "CPU of rank 0": time.process_time(),
                    "CPU of the launcher": cpu.user + cpu.system,
                }
                print(MARK + json.dumps(found), flush=True)
            return super().loss(network, batch)

    train(Timed(), __doc__)


def one_start(data_dir):
    """Return the seconds of one start by name, and the line that lists its parts."""
    from lbsgd.processes.ports import free_port

    launcher = [Path(sys.executable).with_name("deepspeed"), "--quiet", "--num_accelerators", 2]
    with tempfile.TemporaryDirectory() as folder:
        recipe = [Path(__file__), "run", "--deepspeed_config", ROOT / "ds_configs/digits.json", "--micro_batch", 64]
        flags = ["--data_dir", data_dir, "--output_dir", Path(folder, "run"), "--max_iterations", 1]
        command = [*launcher, "--master_port", free_port(), *recipe, *flags]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    lines = done.stdout.splitlines()
    parts = next((line for line in lines if line.startswith("start ")), "")
    return json.loads(next(line for line in lines if line.startswith(MARK)).removeprefix(MARK)), parts


def main():
    flags = OneLineParser(description=__doc__)
    flags.add_argument("data_dir", type=path, help="folder of FFCV files")
    flags.add_argument("--repeats", type=positive, default=3, help="starts of which the median counts (default: 3)")
    arguments = flags.parse_args()
    starts = []
    for _ in range(arguments.repeats):
        load = os.getloadavg()[0]
        seconds, parts = one_start(arguments.data_dir.resolve())
        starts.append(seconds)
        print(f"load {load:.2f}: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
        print(parts, flush=True)
    medians = {name: statistics.median(each[name] for each in starts) for name in starts[0]}
    print("median: " + ", ".join(f"{name} {value:.1f} s" for name, value in medians.items()))


if __name__ == "__main__":
    if "run" in sys.argv[1:3]:  # the launcher puts --local_rank before it
        sys.argv.remove("run")
        measured_run()
    else:
        main()
