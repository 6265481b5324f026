"""Run the literal commands, as new processes or forked from one that has done the imports, which take seven seconds."""

import gc
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processes import forking, free_port

ROOT = Path(__file__).parent.parent
RECIPE = "recipes/resnet50.py"
LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))
DIGITS = str(ROOT / "ds_configs/digits.json")
LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
NOT_KEPT = ("IMAGENET_DIR", "IMAGENET_FFCV_DIR", "CUDA_VISIBLE_DEVICES", *LAUNCHERS)
PATIENCE_SECONDS = 400


def environment_with(variables):
    return {**{name: value for name, value in os.environ.items() if name not in NOT_KEPT}, **variables}


def command(*arguments, **environment):
    """Run a command in the repository's folder, on the CPU."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=environment_with(environment),
    )


def recipe(*arguments, **environment):
    """Run the recipe as one process, without the launcher."""
    return script(RECIPE, "--deepspeed_config", *arguments, **environment)


def script(path, *arguments, **environment):
    """Do what `python path arguments` does in the repository's folder, in a process with most imports already done."""
    [done] = scripts([environment], path, *arguments)
    return done


def joined(world_size, path, *arguments):
    """Run a script's processes as a launcher starts them. Return them in rank order."""
    job = {"WORLD_SIZE": world_size, "LOCAL_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return scripts([{**job, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)], path, *arguments)


def scripts(environments, path, *arguments):
    """Run a script in one process per environment, all at the same time. Return them when all have ended."""
    arguments = [str(path), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, environment in enumerate(environments):
            outputs = [f"{folder}/out{number}", f"{folder}/err{number}"]
            variables = environment_with({name: str(value) for name, value in environment.items()})
            process = forking.Process(target=_script, args=(arguments, variables, outputs))
            process.start()
            started.append((process, outputs))
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process, _ in started:
            process.join(max(0, deadline - time.monotonic()))
        hanging = [process for process, _ in started if process.exitcode is None]
        for process in hanging:
            process.kill()
        said = [[Path(output).read_text() for output in outputs] for _, outputs in started]
        assert not hanging, f"{arguments} still runs after {PATIENCE_SECONDS} s: {said}"
    codes = [process.exitcode for process, _ in started]
    return [subprocess.CompletedProcess(arguments, code, *each) for code, each in zip(codes, said, strict=True)]


def _script(arguments, environment, outputs):
    run_script(arguments, environment, [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in outputs])


def run_script(arguments, environment, outputs):
    """Be a new process that runs a script. outputs: the files that become standard output and standard error."""
    gc.freeze()  # no garbage collection looks through the imported modules
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def refused(done, *words, code=2):
    """Assert one line on stderr that holds the words; no traceback."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code, done.stdout + done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(str(word) in errors[0] for word in words), errors[0]
