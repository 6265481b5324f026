"""The README is the first test: its code runs, its tree is the repository's, its table has every key."""

import importlib
import re
from pathlib import Path

import pytest

from lbsgd.config.schema import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_for_other_projects_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"(?<!-->)\n```python\n(.*?)```", README, flags=re.DOTALL)  # test_reuse.py runs the others
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["engine"].global_steps == 2


def test_the_tree_names_every_module_and_tool_and_nothing_else():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    named = set(re.findall(r"[a-z0-9_]+\.(?:py|sh|md|c|h)\b", tree))
    present = {
        path.name
        for folder in ("lbsgd", "recipes", "tools")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".c", ".h")
    }
    assert present - {"__init__.py"} <= named
    assert named <= present | {path.name for folder in ("tests", "docs") for path in (ROOT / folder).iterdir()}


def test_the_map_of_the_paper_names_files_and_tests_that_exist():
    table = README.split("## From the paper to the code")[1].split("##")[0]
    for name in re.findall(r"test_[a-z_]+\.py", table):
        assert (ROOT / "tests" / name).is_file(), name
    for dotted in re.findall(r"`((?:algorithm|train|report)\.[\w.]+)`", table):
        module, *names = re.fullmatch(r"(\w+\.\w+)\.(\w+)(?:\.(\w+))?", dotted).groups()
        found = importlib.import_module(f"lbsgd.{module}")
        for name in filter(None, names):
            found = getattr(found, name)
    for path in re.findall(r"`(algorithm/\w+\.py)`", table):
        assert (ROOT / "lbsgd" / path).is_file(), path


def keys(model, prefix=""):
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from keys(field.annotation, f"{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("key", list(keys(Recipe)))
def test_the_table_has_every_key_of_the_lbsgd_block(key):
    table = README.split("## The JSON's keys")[1].split("##")[0]
    block, _, name = key.rpartition(".")
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert any(f"`{key}`" in cell or (f"`{block}." in cell and f"`{name}`" in cell) for cell in cells), key
