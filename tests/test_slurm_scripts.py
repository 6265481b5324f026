"""The scripts for Slurm in docs/clusters.md, run with stand-ins for Slurm's commands."""

import os
import re
import signal
import subprocess
import time

import pytest
from commands import ROOT

SECONDS = 60
JOB = "20007"
# Each stand-in writes its arguments into a file with its name.
STAND_INS = {
    "scontrol": 'if [ $1 = requeue ]; then echo $2 > requeue; else echo "$3" > nodelist; echo node1; echo node2; fi',
    "scancel": 'echo "$@" > scancel; kill -TERM $(cat started)',
    "srun": """echo "$@" > srun
        while [[ $1 == -* ]]; do shift; done
        SLURM_PROCID=9 SLURM_NTASKS=16 SLURM_LOCALID=1 exec "$@" """,
}
# The recipe, or torchrun with it, which saves for a moment when told to stop.
TRAINS = """echo "$@" > arguments; env > environment
trap 'sleep 0.3; touch saved; exit 75' TERM
echo $$ > started.new; mv started.new started
[ -z "$FAILS" ] || exit $FAILS
for i in {1..1200}; do sleep 0.05; done"""


def blocks():
    section = (ROOT / "docs/clusters.md").read_text().split("## With Slurm")[1].split("\n## ")[0]
    found = re.findall(r"(?:^    .*\n)+", section, flags=re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in found]


def with_torchrun():
    return blocks()[0]


def with_a_task_per_gpu():
    """Insert the page's second block at its place in the first."""
    script, tasks = blocks()
    return re.sub(r"^srun (.*\\\n)*.*&\n", lambda _: tasks, script, flags=re.MULTILINE)


class Job:
    """A script that Slurm has started in a folder."""

    def __init__(self, script, folder, **environment):
        self.folder = folder
        (folder / "run").mkdir()
        for name, text in {**STAND_INS, "torchrun": TRAINS, "python": TRAINS}.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        (folder / "job").write_text(script.replace("/shared/runs/8k", "run"))
        slurm = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        path = f"{folder}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", "job"], cwd=folder, env={**os.environ, **slurm, "PATH": path, **environment}
        )

    def is_told_to_stop(self):
        end = time.monotonic() + SECONDS
        while not (self.folder / "started").exists():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)
        self.process.send_signal(signal.SIGUSR1)

    def wait(self):
        return self.process.wait(SECONDS)

    def text(self, name):
        path = self.folder / name
        return path.read_text().strip() if path.exists() else None


both = pytest.mark.parametrize("script", [with_torchrun, with_a_task_per_gpu])


@both
def test_a_job_that_is_told_to_stop_waits_until_the_run_has_saved_and_is_put_back(script, tmp_path):
    job = Job(script(), tmp_path)
    job.is_told_to_stop()
    assert job.wait() == 75 and (tmp_path / "saved").exists()
    assert job.text("scancel") == f"--signal=TERM {JOB}" and job.text("requeue") == JOB


@both
def test_a_job_whose_run_has_ended_is_not_put_back(script, tmp_path):
    job = Job(script(), tmp_path)
    (tmp_path / "run/weights.pt").touch()
    job.is_told_to_stop()
    job.wait()
    assert job.text("requeue") is None


@both
@pytest.mark.parametrize("code", [2, 75])
def test_a_job_that_fails_ends_with_the_code_and_is_not_put_back(script, tmp_path, code):
    """srun ends all tasks after one with a wrong flag, and the others end with 75."""
    job = Job(script(), tmp_path, FAILS=str(code))
    assert job.wait() == code and job.text("requeue") is None


def test_the_tasks_get_the_variables_that_the_recipes_read_and_a_port_of_their_job(tmp_path):
    job = Job(with_a_task_per_gpu(), tmp_path, FAILS="2")
    job.wait()
    given = dict(line.split("=", 1) for line in job.text("environment").splitlines() if "=" in line)
    expected = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node1"}
    assert {name: given.get(name) for name in expected} == expected and given["MASTER_PORT"] == "10247"
    assert job.text("nodelist") == "node[1-2]" and job.text("arguments").startswith("recipes/resnet50.py --deepspeed_")


def test_torchrun_meets_at_the_first_host_under_the_job_s_name(tmp_path):
    job = Job(with_torchrun(), tmp_path, FAILS="2")
    job.wait()
    assert f"--nnodes 2 --nproc_per_node 8 --max-restarts 0 --rdzv-backend c10d --rdzv-id {JOB} " in job.text(
        "arguments"
    )
    assert " --rdzv-endpoint node1:10247 recipes/resnet50.py " in job.text("arguments")
