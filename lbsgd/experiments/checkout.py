"""The code that a grid runs: a git worktree of the commit it started from, so that work can go on beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lbsgd.disk import locked, read_note, replace_file
from lbsgd.errors import ConfigError
from lbsgd.report.lines import say_fact, warn
from lbsgd.report.run_log import LOG_NAME

ROOT = Path(__file__).parent.parent.parent
CODE_FOLDER = "code"  # in a grid's folder
NOTE = "grid.json"  # there, and beside the published logs: the commit
CODE = ("lbsgd", "recipes", "ds_configs", "tools")  # what a run's numbers depend on
KERNELS = "lbsgd/data/native/_kernels*.so"


@dataclass(frozen=True)
class Checkout:
    """A folder with the code of one commit, its kernels compiled."""

    folder: Path
    commit: str

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment in which Python imports this code and no other."""
        return {**os.environ, "PYTHONPATH": str(self.folder), **more}

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in this code and return how it ended, with what it printed."""
        return subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, text=True)


@contextmanager
def one_at_a_time(grid_folder: Path) -> Iterator[None]:
    """Keep another start of the same grid waiting, which would delete a checkout that is half made."""
    grid_folder.mkdir(parents=True, exist_ok=True)
    with open(grid_folder / "checkout.lock", "w") as lock:
        if not locked(lock, wait=False):
            say_fact("waiting", f"for another start of {grid_folder}, which makes its code and data")
            locked(lock, wait=True)
        yield


def open_checkout(grid_folder: Path, published: Path | None = None, root: Path = ROOT) -> Checkout:
    """Return the checkout of a grid, made at HEAD when the grid begins and the same one ever after.

    published: where the grid's finished runs are published; a grid that goes on from them, on another machine say, has
    their commit. Call it within `one_at_a_time`. Raises ConfigError where there is no git repository, it lacks that
    commit, or the checkout's files are not those of its commit.
    """
    folder, note = grid_folder / CODE_FOLDER, grid_folder / NOTE
    commits = [commit for place in (grid_folder, published) if place and (commit := noted_commit(place))]
    if len(set(commits)) > 1:
        here, there = (commit[:10] for commit in commits)
        raise ConfigError(
            f"{grid_folder} runs commit {here}, but the runs in {published} are of commit {there}; "
            "the rows of a table must not differ in code; give one of them another place with --work_dir or --results"
        )
    checkout = Checkout(folder, commits[0] if commits else git(root, "rev-parse", "HEAD"))
    # The results first: where they cannot be written, the grid is not bound to a commit that they do not have.
    places = [place for place in (published, grid_folder) if place]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    if folder.exists() and note.exists() and is_linked_again(folder, root):
        require_untouched(checkout)
    else:
        add_worktree(checkout, root)
    for place in places:
        replace_file(place / NOTE, json.dumps({"commit": checkout.commit}).encode() + b"\n")
    return checkout


def noted_commit(place: Path) -> str | None:
    """Return the commit of the runs in a folder; None where it holds no note of it, and no published runs either.

    Raises ConfigError for a broken note, and for published runs without one: HEAD need not be their commit.
    """
    note = place / NOTE
    try:
        said = read_note(note)["commit"]
    except FileNotFoundError:
        if not any(place.glob(f"runs/*/*/{LOG_NAME}")):
            return None
        said = None
    except (ValueError, TypeError, KeyError):  # the marks of a merge, say
        said = None
    if not isinstance(said, str) or not said:
        raise ConfigError(
            f"{note} does not say the commit of the runs beside it; restore it, or begin another grid with --work_dir "
            "and --results"
        )
    return said


def is_linked_again(folder: Path, root: Path) -> bool:
    """Return whether git knows a checkout, which is linked to its repository again where either was moved."""
    if not is_linked(folder):
        with suppress(ConfigError):  # git has forgotten it, and it is made anew
            git(root, "worktree", "repair", str(folder))
    return is_linked(folder)


def is_linked(folder: Path) -> bool:
    """Return whether what a checkout's .git leads to is there."""
    try:
        link = (folder / ".git").read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return False
    return Path(folder, link.strip().removeprefix("gitdir: ")).exists()


def add_worktree(checkout: Checkout, root: Path) -> None:
    """Check the commit out, and compile its kernels. What a start that was killed has left is removed."""
    try:
        git(root, "cat-file", "-e", checkout.commit + "^{commit}")
    except ConfigError:
        raise ConfigError(
            f"this clone lacks commit {checkout.commit[:10]}, which the grid's runs are of; fetch it (`git fetch "
            "--unshallow` in a shallow clone), or begin another grid with --work_dir and --results"
        ) from None
    shutil.rmtree(checkout.folder, ignore_errors=True)
    git(root, "worktree", "prune")
    git(root, "worktree", "add", "--force", "--detach", str(checkout.folder), checkout.commit)
    build_kernels(checkout)


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
    """Compile the loader's kernels there, and say so where that fails: the pixels are others without them."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = checkout.run(command)
    if not list(checkout.folder.glob(KERNELS)):  # setup.py takes them as optional, and ends with 0
        warn(f"no kernels were compiled in {checkout.folder}, so FFCV decodes the images ({last_line(done)})")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a command has printed, of its errors if there are any."""
    return (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]


def unsaved_changes() -> str:
    """Return the files of the code that differ from HEAD, and so are not in a new checkout."""
    return git(ROOT, "status", "--porcelain", "--", *CODE)


def git(folder: Path, *arguments: str) -> str:
    """Return what git prints. Raises ConfigError with git's own words where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("reproduce: git is not installed; a grid runs from a git worktree of its commit") from None
    if done.returncode:
        raise ConfigError(
            f"reproduce: git {arguments[0]} failed in {folder} ({last_line(done)}); run it from a git clone of "
            "the repository"
        )
    return done.stdout.strip()
