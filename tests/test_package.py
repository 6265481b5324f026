"""What editors and type checkers see of the package: names that load lazily, and types."""

import ast
import configparser
import importlib.resources
import subprocess
import sys
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


def test_the_version_is_that_of_the_installation():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert lbsgd.__version__ == settings["metadata"]["version"] and "__version__" in dir(lbsgd)


def test_a_clone_that_is_not_installed_says_so(tmp_path):
    (tmp_path / "lbsgd").symlink_to(ROOT / "lbsgd")  # and no metadata beside it
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
