"""A port for a launcher's --master_port."""

from __future__ import annotations

import random
import socket

from lbsgd.errors import ConfigError


def free_port() -> int:
    """Return a free port of this host. A launcher's default, 29500, may be in use by another run.

    The port is below 32768, because Linux itself hands out ports from there on, perhaps before the run opens its own.
    """
    for port in random.SystemRandom().sample(range(10240, 32768), 100):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))  # every address of the host, as rank 0 does
            except OSError:
                continue
            return port
    raise ConfigError("no port is free among 100 between 10240 and 32767; give the launcher a --master_port")
