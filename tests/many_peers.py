"""Thousands of simulated processes at one store. Each is a thread with its own connection.

    python tests/many_peers.py 2048 [PROCESSES]

prints a JSON with the figures of the slow test of test_many_peers.py. Rank 0, which serves the store, has its own
process, so that this process's load is rank 0's.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from lbsgd.processes.connection import pause
from lbsgd.processes.environment import Processes
from lbsgd.processes.first_cause import look_for_cause
from lbsgd.processes.meeting import read
from lbsgd.processes.peers import OtherFailed, Peers
from lbsgd.processes.ports import free_port

PATIENCE_SECONDS = 120


def sleep_until(moment):
    time.sleep(max(0.0, moment - time.monotonic()))


def simulate(world_size, ranks, victim, rounds, begins=0.0):
    """Return what some ranks of a world see. They are all threads of this process.

    They meet at `begins`. After some rounds of signs of life one falls silent. Then all others look for the cause at
    once, as after a collective call that fails everywhere.

    met: seconds since the begin. rounds: seconds that each round of signs of life took; rounds are BEAT_SECONDS apart.
    died: when the one fell silent. told: seconds until the others knew.
    """
    seen = {rank: {"rank": rank, "rounds": []} for rank in ranks}
    arguments = world_size, victim, rounds, begins
    threads = [threading.Thread(target=live, args=(seen[rank], *arguments), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(seen.values())


def live(seen, world_size, victim, rounds, begins):
    rank, ended = seen["rank"], threading.Event()
    sleep_until(begins)
    began = time.monotonic()
    peers = Peers.meet(Processes(rank, world_size, rank % 8, 8), PATIENCE_SECONDS, lambda position: None)
    seen["met"] = time.monotonic() - began
    follower = threading.Thread(target=follow, args=(peers, ended, seen["rounds"]), daemon=True)
    follower.start()
    while len(seen["rounds"]) < rounds:
        time.sleep(pause(world_size))
    seen["died"] = died = agreed_moment(peers)
    sleep_until(died)
    if rank != victim:
        error = look_for_cause(peers, "iteration 7")
        first = not isinstance(error, OtherFailed) and peers.fail(error)
        seen |= {"told": time.monotonic() - died, "cause": str(error), "first": first}
        peers.store.add("told", 1)
    if rank == 0:
        wait_for(peers, "told", world_size - 1)  # the store ends with it
    ended.set()
    follower.join()


def agreed_moment(peers):
    """Wait until all are ready. Return a moment far enough ahead that all know it in time."""
    peers.store.add("ready", 1)
    if peers.rank == 0:
        wait_for(peers, "ready", peers.world_size)
        peers.store.set("moment", str(time.monotonic() + 2 * pause(peers.world_size)))
    while not (moment := read(peers.store, "moment")):
        time.sleep(pause(peers.world_size))
    return float(moment)


def wait_for(peers, counter, count):
    while peers.store.add(counter, 0) < count:
        time.sleep(0.1)


def follow(peers, ended, rounds):
    """Do what the guard's thread does once per beat."""
    while not ended.wait(peers.BEAT_SECONDS):
        began = time.perf_counter()
        peers.beat("iteration 7")
        peers.failure(), peers.stop_requested()
        rounds.append(time.perf_counter() - began)


# --- in several processes --------------------------------------------------------------------------------------------


def measure(world_size, num_processes, rounds=6):
    """Simulate a world in some processes in addition to rank 0's, and return the figures."""
    plan = world_size, world_size // 2, rounds
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    cuts = [1 + (world_size - 1) * part // num_processes for part in range(num_processes + 1)]
    parts = [(0, 1), *pairwise(cuts)]
    pipe, command = subprocess.PIPE, [sys.executable, __file__, "part", *map(str, plan)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    started = [
        subprocess.Popen([*command, str(first), str(end)], stdin=pipe, stdout=pipe, text=True, env=environment)
        for first, end in parts
    ]
    for process in started:
        process.stdout.readline()  # it has finished its imports
    begins = time.monotonic() + 1
    for process in started:
        print(begins, file=process.stdin, flush=True)
    found = [json.loads(process.communicate()[0]) for process in started]
    return summary([one for part in found for one in part["seen"]], found[0]["load"], begins)


def summary(seen, load, begins):
    """Return the figures: load is a list of (moment, CPU seconds, MB, open files) of rank 0."""
    met, died = begins + max(one["met"] for one in seen), seen[0]["died"]
    told = [one["told"] for one in seen if "told" in one]
    rounds = [seconds for one in seen for seconds in one["rounds"][1:]]
    start, meeting, quiet, death, end = (
        next(row for row in load if row[0] >= moment) for moment in (begins, met, met + 1, died, died + max(told))
    )
    return {
        "met": met - begins,
        "met_cpu": meeting[1] - start[1],
        "round": median(rounds),
        "round_worst": max(rounds),
        "beating_cpu_pct": 100 * (death[1] - quiet[1]) / (death[0] - quiet[0]),
        "named": min(told),
        "all_told": max(told),
        "told_cpu": end[1] - death[1],
        "megabytes": death[2] - start[2],
        "files": death[3],
        "causes": sorted({one["cause"] for one in seen if "cause" in one}),
        "first": sum(one.get("first", False) for one in seen),
    }


def watch(load):
    while True:
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
        load.append((time.monotonic(), time.process_time(), memory, len(os.listdir("/proc/self/fd"))))
        time.sleep(0.05)


def part(world_size, victim, rounds, first, end):
    print("ready", flush=True)
    begins, load = float(sys.stdin.readline()), []
    if first == 0:
        threading.Thread(target=watch, args=(load,), daemon=True).start()
    seen = simulate(world_size, range(first, end), victim, rounds, begins)
    time.sleep(0.2)  # for the last measurement of the load
    print(json.dumps({"seen": seen, "load": load}))


if __name__ == "__main__":
    if sys.argv[1] == "part":
        part(*map(int, sys.argv[2:]))
    else:
        print(json.dumps(measure(int(sys.argv[1]), int((sys.argv + ["4"])[2])), indent=1))
