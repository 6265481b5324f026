"""The package as editors and type checkers see it: names that load lazily, and types."""

import ast
import configparser
import importlib.resources
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import lbsgd

ROOT = Path(__file__).parent.parent


def names_for_type_checkers():
    """Read lbsgd's TYPE_CHECKING block: public name -> module."""
    tree = ast.parse((ROOT / "lbsgd/__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {name.asname: (node.module, name.name) for node in block.body for name in node.names}


def test_type_checkers_see_exactly_the_names_that_load_lazily():
    assert names_for_type_checkers() == {name: (f"lbsgd.{home}", name) for name, home in lbsgd._HOMES.items()}


def test_the_names_are_listed_and_no_others_exist():
    assert set(lbsgd.__all__) <= set(dir(lbsgd))
    with pytest.raises(AttributeError, match="no attribute 'inititalise'"):
        _ = lbsgd.inititalise


def test_nothing_private_is_listed():
    names = {name for name in dir(lbsgd) if not name.startswith("__")}
    submodules = {path.stem for path in (ROOT / "lbsgd").iterdir()}
    assert names <= set(lbsgd.__all__) | submodules


@pytest.mark.parametrize(
    "missing, names, words",
    [
        (("ffcv", "numba"), {"SharedShuffleOrder"}, r"FFCV cannot be imported .*; run .*"),
        (("deepspeed",), {"initialize", "LinearScalingWarmupLR"}, "No module named 'deepspeed'"),
    ],
)
def test_a_name_whose_library_is_missing_is_not_listed_and_says_what_to_install(missing, names, words):
    code = f"""
import importlib.abc, pydoc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import lbsgd
assert {names}.isdisjoint(dir(lbsgd))
from lbsgd import *
pydoc.render_doc(lbsgd)
for name in {names}:
    try:
        getattr(lbsgd, name)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(names) and all(re.fullmatch(words, line) for line in said)


def test_the_source_archive_holds_what_a_build_needs_and_no_tests(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if not name.startswith(("results/", "docs/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    build = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    [archive] = tmp_path.glob("dist/*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    package = {name for name in tracked.splitlines() if name.startswith("lbsgd/")}
    assert package <= held and {"LICENSE", "README.md", "setup.cfg", "setup.py", "pyproject.toml"} <= held
    assert not any(name.startswith(("tests", "tools", "recipes")) for name in held)


def test_the_version_is_that_of_the_installation():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert lbsgd.__version__ == settings["metadata"]["version"] and "__version__" in dir(lbsgd)


def test_a_clone_that_is_not_installed_says_so(tmp_path):
    (tmp_path / "lbsgd").symlink_to(ROOT / "lbsgd")  # without metadata next to it
    without_packages = [sys.executable, "-S", "-c", "import lbsgd; lbsgd.__version__"]
    said = subprocess.run(without_packages, cwd=tmp_path, env={}, capture_output=True, text=True).stderr
    assert said.splitlines()[-1] == (
        "AttributeError: lbsgd is not installed, so it has no version; run `pip install -e .`"
    )


def test_the_types_are_announced_and_installed():
    assert importlib.resources.files("lbsgd").joinpath("py.typed").is_file()
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options.package_data"]["lbsgd"] == "py.typed"


def test_the_words_of_a_configuration_need_no_torch():
    code = (
        "import sys; from lbsgd.algorithm import choices, schedule\nassert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
