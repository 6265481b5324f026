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
