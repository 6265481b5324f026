"""Refuse or mend environment variables and folders that would end a library in a traceback."""

from __future__ import annotations

import gc
import getpass
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from lbsgd.errors import ConfigError, LbsgdError, one_line

ACCELERATORS = ("cuda", "cpu")


def require_surroundings() -> None:
    """Raise ConfigError, before PyTorch is imported, for an environment in which no recipe can start."""
    require_temporary_folder()
    name_user()
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator not in (None, *ACCELERATORS):
        raise ConfigError(f"DS_ACCELERATOR is {accelerator!r}, neither cuda nor cpu; unset or correct it")


def name_user() -> None:
    """Give a user whom the system has no name for one, as in a container (`docker run --user 1000`).

    torch asks for the name when it compiles, and would end with a KeyError.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"


@contextmanager
def importing() -> Iterator[None]:
    """Leave what is imported out of garbage collection. Raise ConfigError if a library refuses a variable's value.

    Such a variable is TORCH_LOGS. Imports make half a million objects, which stay. Python would search them for garbage
    again and again, for 1 of 6 seconds of the imports and for 1.5 seconds when the process ends (measured on 2 cores).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    except LbsgdError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"a library refuses its environment ({one_line(error)}); correct or unset the variable that says so"
        ) from error
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def require_temporary_folder() -> None:
    """Raise ConfigError if no folder for temporary files is writable, because torchvision's import makes one."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise ConfigError(
            "no folder for temporary files can be written (TMPDIR, /tmp and the like): set TMPDIR to a folder that can "
            "be written"
        ) from None


def require_devices(kind: str) -> None:
    """Raise ConfigError if variables name missing devices. kind: the device that computes, `cuda` or `cpu`.

    GLOO_SOCKET_IFNAME is checked because the processes communicate through gloo if the CPU computes.
    """
    if kind != "cpu":
        return
    if os.environ.get("DS_ACCELERATOR") == "cuda":
        raise ConfigError("DS_ACCELERATOR is cuda, but torch finds no GPU here; unset it, and the CPU computes")
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    there = {
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(each.family in (socket.AF_INET, socket.AF_INET6) for each in addresses)
    }
    if not there:  # a sandbox without any network
        raise ConfigError(
            "no network interface of this host has an address, not even lo, and processes communicate through one; "
            "bring it up (ip link set lo up)"
        )
    for name in filter(None, wanted.split(",")):
        if name not in there:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME is {wanted!r}, but this host has no interface {name} with an address, only these: "
                f"{', '.join(sorted(there))}; correct it"
            )


def require_compiling() -> None:
    """Raise ConfigError for variables that keep Numba from compiling a loader. Numba itself warns of non-numbers."""
    for name, is_wrong, what in (
        ("NUMBA_DISABLE_JIT", lambda number: number != 0, "nothing decodes images"),
        ("NUMBA_NUM_THREADS", lambda number: number < 1, "no thread decodes images"),
    ):
        value = os.environ.get(name, "")
        if value.lstrip("-").isdecimal() and is_wrong(int(value)):
            raise ConfigError(f"{name} is {value}, with which {what}; unset it")
