"""Free memory and usable cores are those of the host, or of the container or job that limits this process."""

from functools import partial
from math import inf
from types import SimpleNamespace

import pytest

from lbsgd.data.free_memory import free_memory
from lbsgd.processes.control_groups import quota_of_cores, usable_cores

GB = 10**9


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", partial(SimpleNamespace, available=900 * GB))


def files(root, contents):
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"
TREES = {
    "no groups": ({}, 900),
    "no limit": ({"proc/self/cgroup": "0::/user.slice\n", f"{V2}/user.slice/memory.max": "max\n"}, 900),
    "a job of Slurm, version 2": (
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0/task_0\n",
            f"{V2}/slurm/job_7/step_0/task_0/memory.max": "max\n",
            f"{V2}/slurm/job_7/step_0/task_0/memory.stat": "anon 1000000000\nfile 5\n",
            f"{V2}/slurm/job_7/memory.max": "64000000000\n",
            f"{V2}/slurm/job_7/memory.stat": "anon 3000000000\nfile 50000000000\nshmem 1000000000\nanon_thp 7\n",
        },
        60,
    ),
    "a container, version 2": (
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": "8000000000\n",
            f"{V2}/memory.stat": "anon 2000000000\nkernel 7\n",
        },
        6,
    ),
    "a container whose group is hidden, version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n",
            f"{V1}/memory.limit_in_bytes": "8000000000\n",
            f"{V1}/memory.stat": "rss 1\ntotal_rss 3000000000\ntotal_cache 4000000000\n",
        },
        5,
    ),
    "a group of version 1 without a limit": (
        {
            "proc/self/cgroup": "4:memory:/\n",
            f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{V1}/memory.stat": "total_rss 3000000000\n",
        },
        900,
    ),
    "more than its limit": (
        {
            "proc/self/cgroup": "0::/a\n",
            f"{V2}/a/memory.max": "1000000000\n",
            f"{V2}/a/memory.stat": "anon 1000000001\n",
        },
        0,
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_the_least_of_host_container_and_job_counts(tmp_path, tree):
    contents, expected = TREES[tree]
    assert free_memory(files(tmp_path, contents)) == expected * GB


CPU1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    "contents, quota",
    [
        ({}, inf),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, inf),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "1000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/pod/cri:ab\n",
                f"{V2}/pod/cri:ab/cpu.max": "max 100000\n",
                f"{V2}/pod/cpu.max": "400000 100000\n",
                f"{V2}/cpu.max": "800000 100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "6:cpuset:/other\n5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n",
                f"{CPU1}/cpu.cfs_quota_us": "150000\n",
                f"{CPU1}/cpu.cfs_period_us": "50000\n",
                f"{CPU1}/other/cpu.cfs_quota_us": "50000\n",
                f"{CPU1}/other/cpu.cfs_period_us": "50000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                f"{CPU1}/cpu.cfs_quota_us": "-1\n",
                f"{CPU1}/cpu.cfs_period_us": "100000\n",
            },
            inf,
        ),
    ],
)
def test_the_least_quota_of_all_groups_counts(tmp_path, monkeypatch, contents, quota):
    root = files(tmp_path, contents)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    assert (quota_of_cores(root), usable_cores(root)) == (quota, min(64, quota))
