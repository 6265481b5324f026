"""The network of many hosts without the hosts: namespaces on one switch, each behind a link of limited speed.

    with Network(hosts=4, mbit=100) as network:
        results = network.run(function, 1, 2, per_host=2)     # by rank; hosts take the ranks in blocks

Functions run in processes of this machine that each see one host's network, and meet through it as under any launcher.
There is no ssh and no other root directory: what depends only on networks (bytes, time) can be measured on more hosts
than `hosts.py` could start. `tbf` limits links in both directions. Everything ends with this process.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed

sys.path.insert(0, str(Path(__file__).parents[1]))

import processes

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INTERFACE, SUBNET = "eth0", "10.84.0"
HEADER_BYTES = 66  # of a packet: Ethernet 14, IP 20, TCP 32 with its timestamps; an acknowledgement has nothing else
HEADERS = 1.045  # bytes on the wire per byte of data: 1,514 for 1,448 in a full packet
SLOW_MBIT, SMALL_WINDOW = 100, 32_768  # bytes; acknowledgements wait behind what a window puts into a queue
CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Return why this machine cannot simulate networks, or None."""
    if os.geteuid():
        return "networks are played by namespaces, which need root"
    script = (
        "ip link add e0 type veth peer name e1 && ip link add sw type bridge && ip link set e0 up && "
        "tc qdisc add dev e0 root tbf rate 100mbit burst 64kb latency 400ms"
    )
    tried = sh(f"unshare --net sh -ec '{script}'", check=False)
    return f"no network may be made here ({tried.stderr.strip()})" if tried.returncode else None


def sh(command: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["sh", "-ec", command], check=check, capture_output=True, text=True, env={"PATH": PATH})


class Network:
    """Hosts 0, 1, ... with `mbit` each way between them and a switch.

    With latency_ms, packets take that long from host to host instead, at unlimited speed (delay_line.py).
    """

    def __init__(self, hosts: int, mbit: float, latency_ms: float = 0.0):
        self.hosts, self.mbit, self.latency_ms = hosts, mbit, latency_ms
        self.namespaces: list[subprocess.Popen] = []

    def __enter__(self) -> "Network":
        try:
            switch, *hosts = [self.namespace() for _ in range(self.hosts + 1)]
            if self.latency_ms:
                self.connect_late(hosts)
                return self
            within(switch, "ip link add sw type bridge && ip link set sw up")
            for number, host in enumerate(hosts):
                self.connect(switch, host, number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in self.namespaces:
            process.kill()
            process.wait()

    def namespace(self) -> subprocess.Popen:
        """Start a process with its own network, which lasts as long as the process and dies with us."""
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo up; exec sleep infinity"]
        process = subprocess.Popen(words, env={"PATH": PATH}, stdout=subprocess.PIPE)
        self.namespaces.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    def connect(self, switch: subprocess.Popen, host: subprocess.Popen, number: int) -> None:
        port = f"port{number}"
        sh(f"ip link add {INTERFACE} netns {host.pid} type veth peer name {port} netns {switch.pid}")
        limit = f"root tbf rate {self.mbit}mbit burst 64kb latency 400ms"
        within(switch, f"ip link set {port} master sw up && tc qdisc add dev {port} {limit}")
        # Ten packets go through the kernel at once, as if the network card cut them. Singly they would cost two cores a
        # third of their time. `tbf` counts a header for each; larger bundles would not fit its burst.
        within(host, f"ip link set {INTERFACE} gso_max_size 16384")
        if self.mbit <= SLOW_MBIT:  # a fast network's windows would fill this one's queues for tens of milliseconds
            for kind in ("rmem", "wmem"):
                within(host, f"echo 4096 {SMALL_WINDOW} {SMALL_WINDOW} > /proc/sys/net/ipv4/tcp_{kind}")
        address = f"ip address add {SUBNET}.{number + 1}/24 dev {INTERFACE}"
        within(host, f"{address}; ip link set lo up; ip link set {INTERFACE} up; tc qdisc add dev {INTERFACE} {limit}")

    def connect_late(self, hosts: list[subprocess.Popen]) -> None:
        words = [
            sys.executable,
            Path(__file__).with_name("delay_line.py"),
            self.latency_ms,
            *(host.pid for host in hosts),
        ]
        line = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *map(str, words)], env={"PATH": PATH}, stdout=subprocess.PIPE
        )
        self.namespaces.append(line)
        assert line.stdout.readline() == b"up\n"

    def run(self, function, *arguments, per_host: int = 1) -> list:
        """Return the results of function(*arguments) in each process, as `processes.in_processes` does."""
        pids = [process.pid for process in self.namespaces[1 : self.hosts + 1]]
        return processes.in_processes(self.hosts * per_host, _on_host, pids, per_host, function, arguments)


def within(process: subprocess.Popen, command: str) -> None:
    subprocess.run(
        ["nsenter", "--target", str(process.pid), "--net", "sh", "-ec", command], check=True, env={"PATH": PATH}
    )


def _on_host(pids: list[int], per_host: int, function, arguments):
    from lbsgd.train.aggregation import placement

    rank = int(os.environ["RANK"])
    number = rank // per_host
    with open(f"/proc/{pids[number]}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ.update(
        MASTER_ADDR=f"{SUBNET}.1",
        MASTER_PORT="29500",
        GLOO_SOCKET_IFNAME=INTERFACE,
        LOCAL_RANK=str(rank % per_host),
        LOCAL_SIZE=str(per_host),
    )
    placement.host_name = lambda: f"host{number}"
    return function(*arguments)


def sent_bytes() -> int:
    """Return the bytes of data that this process's host has sent: those on the wire without the packets' headers."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if INTERFACE in line)
    on_the_wire, packets = map(int, line.split(":")[1].split()[8:10])
    return on_the_wire - HEADER_BYTES * packets


def bytes_of_hosts(before: int, per_host: int) -> list[int]:
    """Return the bytes that each host has sent since `before`. All processes must call this."""
    torch.distributed.barrier()
    mine = sent_bytes() - before
    found = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found[::per_host]
