"""The code that a grid runs: a git worktree of the commit at its start, so that work in the repository can go on."""

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
from shlex import quote

from lbsgd.disk import exists, locked, read_note, replace_file
from lbsgd.errors import ConfigError
from lbsgd.report.lines import say_fact, warn
from lbsgd.report.run_log import LOG_NAME

ROOT = Path(__file__).parent.parent.parent
CODE_FOLDER = "code"  # in a grid's folder
NOTE = "grid.json"  # holds the commit, in a grid's folder and next to the published logs
CODE = ("lbsgd", "recipes", "ds_configs", "tools")  # what a run's numbers depend on
KERNELS = "lbsgd/data/native/_kernels*.so"


@dataclass(frozen=True)
class Checkout:
    """A folder with the code of one commit and its compiled kernels."""

    folder: Path
    commit: str

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment in which Python imports only this code."""
        return {**os.environ, "PYTHONPATH": str(self.folder), **more}

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in this folder and return its exit code and output."""
        return subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, text=True)


@contextmanager
def one_at_a_time(grid_folder: Path) -> Iterator[None]:
    """Make another start of the same grid wait. It would delete the checkout while this one makes it."""
    grid_folder.mkdir(parents=True, exist_ok=True)
    with open(grid_folder / "checkout.lock", "w") as lock:
        if not locked(lock, wait=False):
            say_fact("waiting", f"for another start of {grid_folder}, which makes its code and data")
            locked(lock, wait=True)
        yield


def open_checkout(grid_folder: Path, published: Path | None = None, root: Path = ROOT) -> Checkout:
    """Return the checkout of a grid. It is made at HEAD when the grid begins, and kept from then on.

    published: where the grid's finished runs are published. A grid that continues them, such as on another machine,
    runs their commit. Call this within `one_at_a_time`. Raises ConfigError if there is no git repository, if it lacks
    that commit, or if the checkout's files differ from its commit.
    """
    folder, note = grid_folder / CODE_FOLDER, grid_folder / NOTE
    commits = [commit for place in (grid_folder, published) if place and (commit := noted_commit(place))]
    if len(set(commits)) > 1:
        here, there = (commit[:10] for commit in commits)
        raise ConfigError(
            f"{grid_folder} runs commit {here}, but the runs in {published} are of commit {there}; "
            "the rows of a table must not differ in code; give one of them another place with --work_dir or --results"
        )
    head = git(root, "rev-parse", "HEAD")  # first, because it tells why git refuses a repository
    checkout = Checkout(folder, commits[0] if commits else head)
    # The results come first: if they cannot be written, the grid must not note a commit that they lack.
    places = [place for place in (published, grid_folder) if place]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    if exists(folder) and exists(note) and is_linked_again(folder, root):
        require_untouched(checkout)
    else:
        add_worktree(checkout, root)
    for place in places:
        replace_file(place / NOTE, json.dumps({"commit": checkout.commit}).encode() + b"\n")
    return checkout


def noted_commit(place: Path) -> str | None:
    """Return the commit of the runs in a folder; None if it holds neither a note nor published runs.

    Raises ConfigError for a broken note, and for published runs without a note, because their commit may not be HEAD.
    """
    note = place / NOTE
    try:
        said = read_note(note)["commit"]
    except FileNotFoundError:
        if not any(place.glob(f"runs/*/*/{LOG_NAME}")):
            return None
        said = None
    except (ValueError, TypeError, KeyError):  # such as the markers of a merge conflict
        said = None
    if not isinstance(said, str) or not said:
        raise ConfigError(
            f"{note} does not say the commit of the runs beside it; restore it, or begin another grid with --work_dir "
            "and --results"
        )
    return said


def is_linked_again(folder: Path, root: Path) -> bool:
    """Return whether git knows a checkout. Link it to its repository again if either was moved."""
    if not is_linked(folder):
        with suppress(ConfigError):  # git has forgotten it, so the caller makes a new one
            git(root, "worktree", "repair", str(folder))
    return is_linked(folder)


def is_linked(folder: Path) -> bool:
    """Return whether the folder that a checkout's .git file points to exists."""
    try:
        link = (folder / ".git").read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return False
    return exists(Path(folder, link.strip().removeprefix("gitdir: ")))


def add_worktree(checkout: Checkout, root: Path) -> None:
    """Check out the commit and compile its kernels. Remove what a killed start has left behind."""
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
    """Raise ConfigError if the checkout is at another commit or has changed files: runs would differ in code."""
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
            f"table must not differ in code; restore it with `git -C {quote(str(checkout.folder))} checkout -f "
            f"{checkout.commit[:10]}`, or begin another grid with --work_dir"
        )


def build_kernels(checkout: Checkout) -> None:
    """Compile the loader's kernels in the checkout. Warn if that fails, because the pixels differ without them."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = checkout.run(command)
    if not list(checkout.folder.glob(KERNELS)):  # kernels are optional for setup.py, so it exits with 0
        warn(f"no kernels were compiled in {checkout.folder}, so FFCV decodes the images ({last_line(done)})")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a command's stderr, or of its stdout if stderr is empty."""
    return (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return git's reason for a failure, which hints may follow, such as that another user's clone is not trusted."""
    return next((line for line in done.stderr.splitlines() if line.startswith("fatal: ")), last_line(done))


def unsaved_changes() -> str:
    """Return the code files that differ from HEAD. A new checkout does not have these changes."""
    return git(ROOT, "status", "--porcelain", "--", *CODE)


def git(folder: Path, *arguments: str) -> str:
    """Return the output of a git command. Raises ConfigError with git's own words if it fails."""
    command, english = ["git", "-C", str(folder), *arguments], {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, env=english, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("reproduce: git is not installed; a grid runs from a git worktree of its commit") from None
    if done.returncode:
        raise ConfigError(
            f"reproduce: git {arguments[0]} failed in {folder} ({reason(done)}); run it from a git clone of your own"
        )
    return done.stdout.strip()
