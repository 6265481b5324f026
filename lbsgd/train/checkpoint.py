"""Checkpoints that are complete or absent, independent of the world size, and loaded without unpickling.

    checkpoints/iteration_00001560/
        weights.safetensors     parameters (float32 masters) and batch norm's agreed statistics, by state_dict name
        momentum.safetensors    the optimizer's momentum, by parameter name
        random.safetensors      each process's random states
        state.json              counters, loss scale, the epoch's totals so far, the recipe's identity, the plan
        manifest.json           size and SHA-256 of each of these; written last

A checkpoint is written into a hidden folder, forced to the disk, and renamed. So a folder with the final name is
complete, unless it was damaged afterwards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise

from lbsgd.disk import replace_file, to_disk
from lbsgd.errors import CheckpointError, one_line
from lbsgd.train.checkpoint_names import named, named_at_start, place
from lbsgd.train.identity import require_same_run

KEEP = 3  # the newest; an older one is deleted only once a newer one is complete
AGAIN = "make room, and give the same command with --resume, which evaluates and writes it again"
VERSION = 1
TENSORS = ("weights", "momentum", "random")
FILES = {*(f"{name}.safetensors" for name in TENSORS), "state.json"}  # described by a checkpoint's manifest


class GoneOn(NamedTuple):
    """The checkpoint that a run resumed from, and the newer ones that it passed over because they were damaged."""

    path: Path
    passed_over: set[Path]


class Loaded(NamedTuple):
    """A checkpoint's tensors and state, as given to `save`."""

    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    gone_on: GoneOn


def save(
    folder: Path,
    iteration: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    gone_on: GoneOn | None = None,
) -> Path:
    """Write one checkpoint, delete those that are no longer needed (`unneeded`), and return its folder.

    tensors    weights, momentum and random, each by name
    state      plain data for state.json
    gone_on    None if the run did not resume

    Raises OSError if the disk fails. The folder then holds what it held before.
    """
    name = f"iteration_{iteration:08d}"
    final = unused(folder, name)
    building = folder / f".{name}.{os.getpid()}"
    for left_over in folder.glob(".iteration_*"):  # by a run that was killed while saving or deleting
        # NFS keeps a file that is open somewhere. The next save tries again.
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        manifest = {
            f"{name}.safetensors": write(building / f"{name}.safetensors", serialise(group))
            for name, group in tensors.items()
        }
        manifest["state.json"] = write(building / "state.json", json.dumps({"version": VERSION, **state}).encode())
        write(building / "manifest.json", json.dumps(manifest, indent=2).encode())
        to_disk(building)
        building.rename(final)
        to_disk(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if gone_on:
        gone_on.passed_over.discard(final)  # it was deleted and is now made again
    for old in unneeded(folder, final, gone_on):
        with suppress(OSError):  # it only takes up room
            delete(old)
    return final


def unneeded(folder: Path, final: Path, gone_on: GoneOn | None) -> list[Path]:
    """Return the checkpoints to delete once `final` is written: all except the newest three up to it.

    Checkpoints that are known to be damaged or are newer than `final` do not count among the three. Those that the run
    passed over stay until it has three of its own, in case somebody repairs them.
    """
    passed_over = gone_on.passed_over if gone_on else set()
    own = [path for path in named(folder) if path not in passed_over and place(path) <= place(final)]
    whole = [path for path in own if has_manifest(path)]
    kept = [*{path.stem: path for path in whole}.values()][-KEEP:]  # the last save of each iteration
    old = [path for path in whole if path not in kept]
    if len(kept) == KEEP:
        old += [path for path in own if place(path) < place(kept[0]) and path not in whole]
        if gone_on and place(kept[0]) > place(gone_on.path):
            old += passed_over
    return old


def write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file through to the disk and return its entry in the manifest."""
    path.write_bytes(data)
    to_disk(path)
    return manifest_entry(data)


def manifest_entry(data: bytes) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def unused(folder: Path, name: str) -> Path:
    """Return a free name for a checkpoint, numbered if this iteration was saved before.

    A run that resumed from an older checkpoint saves an iteration again. No portable call swaps two folders atomically,
    and the old checkpoint must exist until the new one does.
    """
    taken = [place(path)[1] for path in named(folder) if path.stem == name]
    return folder / (f"{name}.{max(taken) + 1}" if taken else name)


def delete(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that its remains never pass for a checkpoint."""
    hidden = path.with_name(f".{path.name}.deleted")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def has_manifest(path: Path) -> bool:
    return os.path.isfile(path / "manifest.json")


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, damaged or not, or None. Raises CheckpointError if the folder cannot be read."""
    return max(named_at_start(folder), key=place, default=None)


def load_newest(folder: Path, identity: dict[str, Any], say: Callable[[str], None]) -> Loaded:
    """Load the newest whole checkpoint.

    say: prints which one it is, and what is wrong with newer ones. Raises CheckpointError, naming the first difference,
    if the checkpoint's run has another identity. Also raises it if none is whole, or if this user may not read one: a
    run that silently resumed from an older one would delete what somebody may still repair.
    """
    damaged: dict[Path, DamagedError] = {}
    for path in reversed(named_at_start(folder)):
        try:
            tensors, state = load(path)
        except DamagedError as damage:
            damaged[path] = damage
            continue
        require_same_run(path, state, identity)
        for each in damaged.values():
            say(f"warning: {each}; going on from the one before it")
        say(f"resuming from {path}")
        return Loaded(tensors, state, GoneOn(path, set(damaged)))
    raise CheckpointError(
        "; ".join(map(str, damaged.values())) + f"; no whole checkpoint is left in {folder}: put one back, or start "
        "anew in another --output_dir"
    )


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing or not as written."""


def load(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Return tensors and state as given to `save`.

    Raises DamagedError if a file is missing or not as written, and CheckpointError if this user may not read it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if not isinstance(manifest, dict) or manifest.keys() != FILES:
            raise DamagedError(f"{path / 'manifest.json'} does not name the files of a checkpoint")
        content = {name: (path / name).read_bytes() for name in manifest}
        for name, data in content.items():
            if manifest_entry(data) != manifest[name]:
                raise DamagedError(f"{path / name} is not as it was written (its checksum differs)")
        state = json.loads(content["state.json"])
        tensors = {name: deserialise(content[f"{name}.safetensors"]) for name in TENSORS}
    except DamagedError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None
    except RecursionError:
        raise DamagedError(f"{path / 'manifest.json'} is nested too deeply for that of a checkpoint") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from None
    if state["version"] != VERSION:
        raise CheckpointError(
            f"{path} has format {state['version']}, this lbsgd reads {VERSION}; use the lbsgd that wrote it"
        )
    return tensors, state


def export_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a float32 state_dict for torch.load(path) and torchvision's load_state_dict, atomically.

    Raises CheckpointError if the disk fails.
    """
    whole = io.BytesIO()  # torch's own writer does not report a full disk
    torch.save(weights, whole)
    try:
        replace_file(path, whole.getvalue())
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({one_line(error)}); {AGAIN}") from None
