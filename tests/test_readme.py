"""The README is the first test: its code runs, its folders are the repository's. docs/ has every key and every link."""

import pkgutil
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lbsgd.commands.main import main
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


def test_the_commands_that_take_a_json_run_as_they_stand(monkeypatch, tmp_path, capsys):
    section = README.split("### 2. Take the JSONs")[1].split("###")[0]
    lines = [line.split("#")[0].strip() for line in section.splitlines() if line.startswith("    lbsgd ")]
    assert [line.split()[1] for line in lines] == ["plan", *4 * ["check"], "config", "report", "reproduce"]
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "my_deepspeed.json").write_text((ROOT / "ds_configs/8k.json").read_text())
    for run in ("8k", "256"):
        shutil.copytree(ROOT / "tests/fixtures/earlier_run", tmp_path / "runs" / run)
    monkeypatch.chdir(tmp_path)
    lines[-1] += " --list"  # without --list it would train for an hour
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr()
    assert (tmp_path / "schedule.png").is_file()


def test_the_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 150


def test_the_folders_are_those_of_the_repository():
    named = set(re.findall(r"^\| `([a-z_/]+)/` \|", README.split("## Folders")[1], flags=re.MULTILINE))
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("lbsgd/*/__init__.py")}
    assert named == folders | {"recipes", "ds_configs", "tools", "tests", "docs", "results"}


LINKING = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ds_configs/README.md"]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading_there(page):
    broken = []
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / link if link else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(f"{link}#{anchor}")
    assert not broken


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_of_the_paper_names_files_and_tests_that_exist():
    table = (ROOT / "docs/paper_to_code.md").read_text()
    for name in re.findall(r"((?:cluster/)?test_[a-z_]+\.py)", table):
        assert (ROOT / "tests" / name).is_file(), name
    for dotted in re.findall(r"`((?:algorithm|train|report)\.[\w.]+)`", table):
        assert pkgutil.resolve_name(f"lbsgd.{dotted}"), dotted
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
    table = (ROOT / "docs/json.md").read_text()
    block, _, name = key.rpartition(".")
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert any(f"`{key}`" in cell or (f"`{block}." in cell and f"`{name}`" in cell) for cell in cells), key
