"""Thousands of processes at one store: they meet, give signs of life, and name the one that dies."""

import re
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from many_peers import measure, simulate
from torch.distributed import HashStore, TCPStore

from lbsgd.errors import ConfigError, DataError, LbsgdError, LostProcessError
from lbsgd.processes import connection, first_cause, meeting
from lbsgd.processes import peers as peers_module
from lbsgd.processes.environment import Processes
from lbsgd.processes.meeting import fresh_prefix, read
from lbsgd.processes.peers import OtherFailed, Peers, tell_before_joining
from lbsgd.processes.ports import free_port

CAUSE = r"rank {} on .* died or has not answered since iteration 7"


def test_sixty_four_processes_meet_and_all_hear_which_of_them_died(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(Peers, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(first_cause, "TOLD_SECONDS", 0.2)
    seen = simulate(64, range(64), victim=40, rounds=2)
    told = [one for one in seen if one["rank"] != 40]
    assert all(re.search(CAUSE.format(40), one["cause"]) for one in told)
    assert sum(one["first"] for one in told) == 1


@pytest.mark.parametrize("local_world_size, from_elsewhere", [(2, False), (1, True)])
def test_only_a_run_on_several_hosts_can_be_reached_from_others(monkeypatch, local_world_size, from_elsewhere):
    """Whoever reaches the store can end the run. 127.0.0.2 stands for the host's address in a network."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    rank_0 = Processes(rank=0, world_size=2, local_rank=0, local_world_size=local_world_size)
    store = connection.meeting_point(rank_0, 10)
    again = connection.meeting_point(rank_0, 10)  # as a process does that fails while it waits
    again.set("key", "value")
    assert store.get("key") == b"value"
    with socket.socket() as elsewhere:
        assert (elsewhere.connect_ex(("127.0.0.2", port)) == 0) == from_elsewhere
    with socket.socket() as here:
        assert here.connect_ex(("127.0.0.1", port)) == 0


BEYOND, OF_A_CABLE = (f"fe80{7:028x} 04 40 {scope} 80 eth0\n{1:032x} 01 80 10 80 lo\n" for scope in ("00", "20"))


@pytest.mark.parametrize(
    "address, addresses, family",
    [
        ("127.0.0.1", BEYOND, socket.AF_INET),
        ("localhost", BEYOND, None),  # others may know this host by IPv6
        ("localhost", OF_A_CABLE, socket.AF_INET),
        ("localhost", None, socket.AF_INET),
        ("::1", OF_A_CABLE, None),
    ],
)
def test_a_store_for_several_hosts_listens_by_ipv4_alone_if_nobody_can_come_by_ipv6(
    monkeypatch, tmp_path, address, addresses, family
):
    """Of an address of IPv4 in the form of IPv6, it would ask DNS for a name (cluster/test_reverse_dns.py)."""
    monkeypatch.setattr(connection, "ADDRESSES_IPV6", tmp_path / "if_inet6")
    if addresses:
        connection.ADDRESSES_IPV6.write_text(addresses)
    listener = connection.own_listener(address, 0, Processes(rank=0, world_size=2, local_rank=0, local_world_size=1))
    assert (listener and listener.family) == family
    if listener:
        listener.close()


class Counted:
    """A store that counts requests and the bytes of their answers."""

    def __init__(self, store):
        self.store, self.questions, self.num_bytes = store, 0, 0

    def __getattr__(self, name):
        def ask(*arguments):
            self.questions += 1
            answer = getattr(self.store, name)(*arguments)
            self.num_bytes += len(answer) if isinstance(answer, bytes) else 0
            return answer

        return ask


def test_one_that_waits_for_the_others_asks_little_and_rank_0_no_more_the_more_there_are():
    """The last of 500 processes comes late. Thousands that ask ten times a second would keep the store busy."""
    store, names = HashStore(), [f"{rank:032}" for rank in range(500)]
    leads, waits = Counted(store), Counted(store)
    assert meeting.join(waits, names[7], 7) is None and waits.questions == 1
    for rank in range(1, 499):
        store.append("arrived", f"{rank} {names[rank]}\n")
    assert not meeting.lead(leads, names[0], 500)
    for rank in range(1, 499):
        assert meeting.join(waits if rank == 7 else store, names[rank], rank) == names[0]
    assert waits.questions == 5 and waits.num_bytes == len(names[0])
    for _ in range(10):
        assert not meeting.lead(leads, names[0], 500)
    assert leads.questions < 6 * 11
    store.append("arrived", f"499 {names[499]}\n")
    assert not meeting.lead(leads, names[0], 500)
    assert meeting.join(store, names[499], 499) == names[0]
    assert meeting.lead(leads, names[0], 500) == names[0]
    # Each has given a first sign of life, or a search for a silent one would wait for it.
    assert store.check([f"{names[0]}/{kind}/{rank}" for kind in ("beat", "host") for rank in range(500)])
    assert [connection.pause(world_size) for world_size in (2, 200, 2000)] == [0.1, 0.1, 1]


def test_few_of_many_look_for_the_silent_one_and_each_with_one_question():
    store, world = HashStore(), range(100)
    peers = [Peers(Processes(rank, 100, 0, 1), Counted(store)) for rank in world]
    assert sum(one.may_look for one in peers) == sum(one.may_look for one in peers) == Peers.LOOKERS
    for one in peers:
        one.beat("iteration 7")
    before = peers[3].store.questions
    assert len(peers[3].all_beats()) == 100 and peers[3].store.questions == before + 1


def test_silent_processes_are_named_host_by_host_and_only_those_of_a_few_hosts():
    """In a cluster that is cut in two, each half misses hundreds."""
    store = HashStore()
    for rank in range(2048):
        store.set(f"host/{rank}", f"node{rank // 8}")
    peers = Peers(Processes(0, 2048, 0, 8), Counted(store))
    assert peers.by_host([3, *range(8, 16)]) == ["rank 3 on node0", "rank 8 to 15 on node1"]
    many = peers.by_host(range(1024, 2048))
    assert many[0] == "rank 1024 to 1031 on node128" and many[-1] == "those on 120 more hosts" and len(many) == 9
    assert peers.store.questions == 2


def test_rank_0_may_have_a_file_open_for_each_connection(monkeypatch):
    """It says so if its host forbids it. Otherwise the store would silently refuse connections."""
    limits = [(1024, 8192)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    connection.allow_connections(100)
    assert len(limits) == 1
    connection.allow_connections(2048)
    assert limits[1:] == [(6656, 8192)]
    with pytest.raises(ConfigError, match="rank 0 needs 12,800 open files .* of 4,096 processes, .* allows 8,192"):
        connection.allow_connections(4096)


@pytest.mark.parametrize("address, seconds, asked", [("a..b", 60, 1), ("no-host", 1.2, 4)])
def test_an_unknown_name_is_waited_for_and_told_once_and_an_impossible_one_is_not(
    monkeypatch, capsys, address, seconds, asked
):
    monkeypatch.setattr(connection, "TOLD_AFTER_SECONDS", 0)
    seen = []
    with pytest.raises(ConfigError, match=f"MASTER_ADDR is '{address}', and this host does not know it"):
        connection.wait_for_name(address, seconds, seen.append, tells=True)
    assert seen == [connection.MEETING] * asked
    assert capsys.readouterr().out.count("waiting for MASTER_ADDR 'no-host'") == (asked > 1)


def test_an_error_before_joining_is_told_to_this_run_and_to_no_other(monkeypatch):
    """The store may belong to another run, if this process was given its port."""
    for world_size, told in ((2, True), (4, False)):
        store = HashStore()
        meeting.is_of_same_run(store, Processes(0, world_size, 0, 1))
        monkeypatch.setattr(peers_module, "meeting_point", lambda *_, store=store: store)
        tell_before_joining(Processes(1, 2, 0, 1), DataError("no such file"))
        assert bool(read(store, "failure")) == told


def test_a_store_that_is_gone_has_nobody_to_tell(monkeypatch):
    """Its process may have just ended. torch's error would take the place of this process's own."""
    gone = Mock(spec=HashStore)
    for call in ("get", "set", "check", "wait", "add", "compare_set", "multi_get"):
        getattr(gone, call).side_effect = torch.distributed.DistNetworkError("Connection reset by peer")
    monkeypatch.setattr(peers_module, "meeting_point", lambda *_: gone)
    tell_before_joining(Processes(1, 2, 0, 1), DataError("no such file"))
    assert gone.mock_calls


@pytest.fixture
def kept(monkeypatch):
    """The seconds for which rank 0 keeps the store so that others can read it. Tests do not wait for that."""
    seconds = []

    def sleep(pause):
        seconds.append(pause) if pause >= 1 else time.sleep(pause)

    monkeypatch.setattr(meeting, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    return seconds


def come(store, rank, world_size, seconds, on_a_host=1):
    """Return the prefix on which a process agrees with the others, or the error that prevents that."""
    seen = []
    try:
        return fresh_prefix(store, Processes(rank, world_size, 0, on_a_host), seconds, seen.append)
    except LbsgdError as error:
        return error
    finally:
        assert seen and set(seen) == {connection.MEETING}  # or the guard would take the wait for a hang


@pytest.mark.parametrize("agent", ["False", "True"])
def test_those_that_came_hear_why_rank_0_gave_up_and_those_that_come_late(monkeypatch, kept, agent):
    """Rank 2 never comes. Otherwise the others would only find the store gone."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    store = HashStore()
    with ThreadPoolExecutor() as threads:
        rank_0, rank_1 = threads.map(lambda rank: come(store, rank, 4, 0.5), [0, 1])
    assert kept == ([] if agent == "True" else [1.1])
    missing = "of 4 processes some did not come within 0.5 s: rank 2, 3; look at their hosts"
    assert str(rank_0) == missing and isinstance(rank_0, LostProcessError)
    others = [rank_1] if agent == "True" else [rank_1, come(store, 3, 4, 0.5)]
    for told in others:
        assert isinstance(told, OtherFailed) and str(told) == f"by rank 0 on {socket.gethostname()}: {missing}"


def test_those_that_came_hear_of_an_error_on_a_third_host_which_never_comes(kept):
    store = HashStore()
    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(come, store, rank, 3, 30) for rank in (0, 1)]
        while not (names := names_of(store)).get("0") or not read(store, f"{names['0']}/joined"):
            time.sleep(0.02)
        Peers(Processes(2, 3, 0, 1), store).fail(DataError("no such file"))  # before it has joined
    for told in (future.result() for future in waiting):
        assert isinstance(told, OtherFailed) and (told.exit_code, str(told)) == (
            DataError.exit_code,
            f"by rank 2 on {socket.gethostname()}: no such file",
        )
    assert kept == [1.1]


@pytest.mark.parametrize("sizes", [(2, 4, 4, 4), (4, 2), (1, 2)])
def test_processes_that_disagree_on_their_number_are_told_so_at_once_and_end_nobody_else(sizes):
    """The store may belong to another run, if they were given its port."""
    store = HashStore()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(come, store, 0, sizes[0], 5 if sizes[0] > 1 else 0.2)
        began = time.monotonic()
        seen = [come(store, rank, size, 30) for rank, size in enumerate(sizes[1:], start=1)]
        assert time.monotonic() - began < 4
        if sizes[0] > 1:  # otherwise rank 0 waits for no other process
            rest = [threads.submit(come, store, rank, sizes[0], 30) for rank in range(1, sizes[0])]
            assert len({first.result(), *(each.result() for each in rest)}) == 1  # they still meet
            alone = str(come(store, 0, sizes[0] + 1, 0.2))
            assert alone.endswith(f"for rank {len(seen)} on {socket.gethostname()}, but {sizes[0]} for rank 0")
    told = f"WORLD_SIZE is {sizes[1]} for rank {{}} on {socket.gethostname()}, but {sizes[0]} for rank 0; start all"
    for rank, error in enumerate(seen, start=1):
        assert isinstance(error, ConfigError) and str(error).startswith(told.format(rank))


def test_a_restart_by_torchrun_on_fewer_hosts_belongs_to_the_same_run(monkeypatch):
    """The agent keeps the store, with what an earlier start wrote."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = HashStore()
    store.set("run", '{"WORLD_SIZE": "4"}')
    assert meeting.is_of_same_run(store, Processes(1, 2, 0, 1))


def test_an_alarm_of_nccl_in_an_earlier_start_is_none_in_a_later_one(monkeypatch):
    """torchrun's agent keeps it. Where it is set, torch aborts all processes some minutes later."""
    header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"
    assert f'kStoreDumpKey = "{meeting.NCCL_ALARM}"' in header.read_text()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    store.set(meeting.NCCL_ALARM, "rank")
    with ThreadPoolExecutor() as threads:
        prefixes = set(threads.map(lambda rank: come(store.clone(), rank, 2, 30), [0, 1]))
    assert len(prefixes) == 1 and isinstance(prefixes.pop(), str)
    assert not store.check([meeting.NCCL_ALARM])


def wait_for_rank_0(store):
    while not read(store, "run"):
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_HET_JOB_ID", "PMIX_NAMESPACE", "the launcher's process id"])
def test_a_process_of_another_run_of_the_same_size_does_not_take_the_place_of_one_that_is_still_to_come(
    monkeypatch, name
):
    """Two jobs of an array may run on the same hosts, and their scripts may use the same port."""

    def belongs_to(run):
        if name.isupper():
            return monkeypatch.setenv(name, run)
        monkeypatch.setattr(meeting, "launchers", lambda: [SimpleNamespace(pid=run)])

    store = HashStore()
    belongs_to("8")
    with ThreadPoolExecutor() as threads:
        first = threads.submit(come, store, 0, 2, 30, on_a_host=2)
        wait_for_rank_0(store)
        belongs_to("9")
        refused = come(store, 1, 2, 30, on_a_host=2)
        belongs_to("8")
        assert come(store, 1, 2, 30, on_a_host=2) == first.result()
    differ = f"{name} is 9 for rank 1 on {socket.gethostname()}, but 8 for rank 0; start all processes with the same"
    assert isinstance(refused, ConfigError) and str(refused).startswith(differ)


def test_a_process_that_ssh_has_started_has_no_job_and_meets_the_others(monkeypatch):
    store = HashStore()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with ThreadPoolExecutor() as threads:
        first = threads.submit(come, store, 0, 2, 30)
        wait_for_rank_0(store)
        monkeypatch.delenv("SLURM_JOB_ID")
        assert come(store, 1, 2, 30) == first.result()


def test_launchers_on_several_hosts_are_several_processes_and_no_part_of_a_run_s_identity(monkeypatch):
    monkeypatch.setattr(meeting, "launchers", lambda: [SimpleNamespace(pid=7)])
    assert "the launcher's process id" not in meeting.run_of(Processes(2, 4, 0, 2))


def test_the_parts_of_a_heterogeneous_job_have_its_first_number_in_common(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_HET_JOB_ID", "8")
    assert meeting.run_of(Processes(0, 4, 0, 2)) == {"SLURM_HET_JOB_ID": "8", "WORLD_SIZE": "4"}


def names_of(store):
    return dict(line.split() for line in read(store, "arrived").splitlines())


def test_missing_ranks_are_few_words():
    assert meeting.in_words([1, 2, 8, 9, 10, 11, 40]) == "1, 2, 8 to 11, 40"


@pytest.mark.slow
def test_two_thousand_processes_meet_and_name_the_one_that_dies_and_rank_0_works_little():
    """Only rank 0's CPU time counts, because the threads of all others share this machine's few cores."""
    found = measure(2048, num_processes=4)
    print(f"\n{found}")
    [cause] = {re.sub("by rank .*?: ", "", cause) for cause in found["causes"]}
    assert re.search(CAUSE.format(1024), cause) and found["first"] == 1
    assert found["met_cpu"] < 5 and found["told_cpu"] < 10 and found["beating_cpu_pct"] < 50
