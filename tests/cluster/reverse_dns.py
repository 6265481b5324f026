"""Count the names that a store asks DNS for while others connect to it. Needs `nameserver 127.0.0.1` in resolv.conf.

    python reverse_dns.py ADDRESS

prints two numbers: of a store whose port torch opens, and of lbsgd's at this address.
"""

import socket
import sys
import threading
import time

from torch.distributed import TCPStore

from lbsgd.processes.connection import own_listener
from lbsgd.processes.environment import Processes

CONNECTIONS = 3
NO_SUCH_NAME = b"\x81\x83"  # the flags of an answer


def answer(server: socket.socket, asked: list[bytes]) -> None:
    while True:
        question, client = server.recvfrom(4096)
        asked.append(question)
        server.sendto(question[:2] + NO_SUCH_NAME + question[4:6] + bytes(6) + question[12:], client)


def questions(address: str, listener: socket.socket | None, asked: list[bytes]) -> int:
    """Return how often DNS is asked while others connect."""
    port = listener.getsockname()[1] if listener else 0
    descriptor = listener.detach() if listener else None
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
    store.set("key", "value")  # after its own connection, for which its process asks as well
    before = len(asked)
    for _ in range(CONNECTIONS):
        socket.create_connection((address, store.port)).close()
    store.get("key")  # it has accepted them before it answers
    time.sleep(0.2)
    return len(asked) - before


if __name__ == "__main__":
    dns, asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), []
    dns.bind(("127.0.0.1", 53))
    threading.Thread(target=answer, args=(dns, asked), daemon=True).start()
    rank_0 = Processes(rank=0, world_size=2, local_rank=0, local_world_size=1)
    print(questions(sys.argv[1], None, asked), questions(sys.argv[1], own_listener(sys.argv[1], 0, rank_0), asked))
