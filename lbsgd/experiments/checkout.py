"""The code that a grid runs: a git worktree of the commit it started from, so that work can go on beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lbsgd.disk import replace_file
from lbsgd.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
CODE_FOLDER = "code"  # in a grid's folder
CODE = ("lbsgd", "recipes", "ds_configs", "tools")  # what a run's numbers depend on


@dataclass(frozen=True)
class Checkout:
    """A folder with the code of one commit, its kernels compiled."""

    folder: Path
    commit: str

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment in which Python imports this code and no other."""
        return {**os.environ, "PYTHONPATH": str(self.folder), **more}


def open_checkout(grid_folder: Path, root: Path = ROOT) -> Checkout:
    """Return the checkout of a grid, made at HEAD when the grid begins and the same one ever after.

    Raises ConfigError where there is no git repository, or the checkout's files are not those of its commit.
    """
    folder, note = grid_folder / CODE_FOLDER, grid_folder / "grid.json"
    grid_folder.mkdir(parents=True, exist_ok=True)
    if note.exists():
        checkout = Checkout(folder, json.loads(note.read_text())["commit"])
        if folder.exists():
            require_untouched(checkout)
            return checkout
    else:
        checkout = Checkout(folder, git(root, "rev-parse", "HEAD"))
    git(root, "worktree", "prune")
    git(root, "worktree", "add", "--force", "--detach", str(folder), checkout.commit)
    build_kernels(checkout)
    replace_file(note, json.dumps({"commit": checkout.commit}).encode() + b"\n")
    return checkout


def require_untouched(checkout: Checkout) -> None:
    """Raise ConfigError if two runs of the grid would differ in code."""
    head = git(checkout.folder, "rev-parse", "HEAD")
    changed = git(checkout.folder, "status", "--porcelain", "--", *CODE)
    if head != checkout.commit or changed:
        what = (
            f"is at {head[:10]}"
            if head != checkout.commit
            else f"has changed files ({changed.splitlines()[0].strip()})"
        )
        raise ConfigError(
            f"{checkout.folder}: {what}, but the grid's runs are of commit {checkout.commit[:10]}, and the rows of a "
            f"table must not differ in code; restore it with `git -C {checkout.folder} checkout -f "
            f"{checkout.commit[:10]}`, or begin another grid with --work_dir"
        )


def build_kernels(checkout: Checkout) -> None:
    """Compile the loader's kernels there; without a compiler they are left out, as in an installation."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=checkout.folder, capture_output=True, check=False)


def unsaved_changes(root: Path = ROOT) -> str:
    """Return the files of the code that differ from HEAD, and so are not in a new checkout."""
    return git(root, "status", "--porcelain", "--", *CODE)


def git(folder: Path, *arguments: str) -> str:
    """Return what git prints. Raises ConfigError with git's own words where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("reproduce: git is not installed; a grid runs from a git worktree of its commit") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise ConfigError(
            f"reproduce: git {arguments[0]} failed in {folder} ({said[-1]}); run it from a git clone of the repository"
        )
    return done.stdout.strip()
