"""A switch that delays packets: what `tc netem` does, for kernels without it.

    python tests/cluster/delay_line.py MILLISECONDS PID [PID ...]

Gives the network of each process an interface eth0 (a tap device, 10.84.0.1, .2, ...) and carries frames between them,
each MILLISECONDS after it came. Frames of 60 kB keep Python's share of the time small. Prints "up" when all are
connected.
"""

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
MTU = 60_000


def tap(pid: int, number: int) -> int:
    """Make eth0 in the network of a process, and return its end that we read and write."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH14s", b"eth0", IFF_TAP | IFF_NO_PI, b""))
    words = f"link set eth0 address 02:00:00:00:00:{number:02x} mtu {MTU} up"
    for command in (words, f"address add 10.84.0.{number}/24 dev eth0", "link set lo up"):
        subprocess.run(["ip", *command.split()], check=True)
    return device


def carry(devices: list[int], delay: float) -> None:
    """Carry frames forever: to the host in the destination's last byte, or to all others (ARP)."""
    late: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        wait = max(0.0, late[0][0] - time.monotonic()) if late else None
        for device in select.select(devices, [], [], wait)[0]:
            frame = os.read(device, MTU + 100)
            to = (
                [devices[frame[5] - 1]]
                if frame[:5] == b"\x02\0\0\0\0"
                else [each for each in devices if each != device]
            )
            for other in to:
                count += 1
                heapq.heappush(late, (time.monotonic() + delay, count, other, frame))
        while late and late[0][0] <= time.monotonic():
            _, _, other, frame = heapq.heappop(late)
            try:
                os.write(other, frame)
            except OSError:  # a full queue drops frames, as a switch does; TCP sends again
                pass


if __name__ == "__main__":
    milliseconds, *pids = map(float, sys.argv[1:])
    ends = [tap(int(pid), number) for number, pid in enumerate(pids, start=1)]
    print("up", flush=True)
    carry(ends, milliseconds / 1e3)
