"""Keep Numba's compiled code between starts on a host: loading it takes a tenth of the time of compiling.

Numba's own cache does not fit here. It tells functions apart by the identity of the compiled functions that they call,
which changes with every start. It does not notice a change in another module, and a damaged file crashes it. So code is
kept in `host_files` under a key of everything that it depends on, and machine code is checked before it is loaded.

Kept code must not contain addresses of this process. It reaches C functions by their symbols' names (`kernels.py`). Nor
may other code have the same names, so functions are numbered at random, as below.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.extending import is_jitted
from numba.typed import typeddict

from lbsgd.data.host_files import key_of, read, write

# Numba names machine code and its constants by a function's name, argument types and number, and counts from 1 in each
# process. So crops that different processes had compiled could share a name. A process that loaded both ran one instead
# of the other, or missed its constants: "'descr' is NULL" (numba/numba#10486).
FunctionIdentity._unique_ids = iter(lambda: uuid.uuid4().int, None)  # type: ignore[assignment]


class KeptCode(NullCache):
    """The cache of one compiled function, in the form that Numba's dispatchers ask for.

    stamp: everything that the code depends on in addition to sources, argument types, processor and Numba.
    """

    def __init__(self, stamp: object) -> None:
        self.stamp = stamp

    def load_overload(self, signature, context) -> CompileResult | None:
        """Return the code for these argument types; None if it must be compiled."""
        content = read("code", self._key(signature, context.codegen()))
        if content is None:
            return None
        context.refresh()
        return CompileResult._rebuild(context, *pickle.loads(content.data))

    def save_overload(self, signature, compiled: Any) -> None:
        if not compiled.library.has_dynamic_globals and not compiled.lifted:
            write("code", self._key(signature, compiled.codegen), dumps(compiled._reduce()))

    def _key(self, signature, codegen) -> str:
        versions = (sys.version, numba.__version__, llvmlite.__version__, sources())
        return key_of(self.stamp, str(signature), codegen.magic_tuple(), versions)


def sources() -> list[str]:
    """Return the digests of all modules in this folder, because their functions call each other."""
    return [digest_of(str(path)) for path in sorted(Path(__file__).parent.rglob("*.py"))]


@cache
def digest_of(path: str) -> str:
    """Return the digest of a source file, or its name if there is no such file, as for generated functions."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return path


def keep(function) -> None:
    """Let Numba keep the code of a function between starts."""
    function._cache = KeptCode(stamp_of(function))


def stamp_of(function) -> object:
    """Return what distinguishes a function: its source, Numba's options, and the constants that it encloses."""
    constants = []
    for cell in function.py_func.__closure__ or ():
        value = cell.cell_contents
        constants.append(stamp_of(value) if is_jitted(value) else repr(value))
    source = digest_of(function.py_func.__code__.co_filename)
    return source, function.py_func.__qualname__, repr(sorted(function.targetoptions.items())), constants


@contextlib.contextmanager
def kept_dictionaries() -> Iterator[None]:
    """Keep the code that Numba compiles inside for typed dictionaries.

    Importing FFCV puts two entries into such a dictionary, for which Numba compiles for four to five seconds.
    """
    functions: tuple[Any, ...] = (typeddict._make_dict, typeddict._setitem)
    before = [function._cache for function in functions]
    for function in functions:
        keep(function)
    try:
        yield
    finally:
        for function, own in zip(functions, before, strict=True):
            function._cache = own
