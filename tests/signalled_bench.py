"""A bench of one part with children and a short time limit. SIGTERM comes right after a call of the given name.

    signalled_bench.py start|suspend|kill SECONDS FOLDER      SECONDS: how long the children sleep

`start` is the start of the part's process; `suspend` and `kill` are calls of psutil.Process.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

from lbsgd.bench import parts
from lbsgd.bench.results import Results


@dataclass(frozen=True)
class Given:
    deadline: float = 0.0


def starts_children(given, say):
    for _ in range(3):
        subprocess.Popen(["sleep", sys.argv[2]], start_new_session=True)
    time.sleep(1000)


def end(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def signal_behind(name):
    of = ForkServerProcess if name == "start" else psutil.Process
    call = getattr(of, name)

    def called(*arguments):
        call(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    setattr(of, name, called)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    signal_behind(sys.argv[1])
    parts.LEAST_SECONDS = 0.0
    part = parts.Part("part", "part", starts_children, 2.0)
    parts.run_parts([part], Given(), Results(Path(sys.argv[3]), "fake", {"device": "none"}), 2.0)
