"""The house: which folder may import which, read from the code itself; no import points upwards or goes in a circle."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from shutil import which

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "lbsgd").rglob("*.py")}
ANYWHERE = {"errors", "disk", "output", "units"}
MAY_IMPORT = {
    "algorithm": set(),
    "config": {"algorithm"},
    "data": {"algorithm", "processes.control_groups", "processes.signals"},
    "convert": {"data", "processes.control_groups", "processes.signals"},
    "processes": set(),
    "train": {"algorithm", "config", "data", "processes", "report"},
    "report": {"config", "algorithm.schedule", "algorithm.published"},
    "experiments": {"config", "processes", "report", "algorithm"},
    "bench": {"algorithm", "config", "data", "convert", "processes", "train", "report", "experiments.data_sets"},
    "commands": {"algorithm", "config", "data", "convert", "processes", "train", "report", "experiments", "bench"},
    # the files next to the folders
    "errors": {"units"},
    "disk": {"errors"},
    "output": {"errors", "units"},
    "units": set(),
    "loader": {"data"},
    "__main__": {"commands"},
}
ONE_DOOR = {
    "deepspeed": "lbsgd.train.engine",
    "ffcv": "lbsgd.data.ffcv_loader",
    "triton": "lbsgd.algorithm.norm_kernels",  # not installed with every torch
    "timm": "lbsgd.algorithm.timm_batch_norm",  # imported only if a network of timm's is converted
}


def imported(source, package=""):
    """Yield full names of what a source imports, at the top or inside functions, and of modules named in strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative import"
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in ROOMS else node.module
        elif isinstance(node, ast.Constant) and node.value in ROOMS:
            yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (each.value for each in node.args if isinstance(each, ast.Constant))


@cache
def arrows():
    """Return what each of our modules imports. It takes seconds, so not while tests are collected."""
    return {name: set(imported(path.read_text(), name)) for name, path in ROOMS.items()}


def folder_of(module):
    return module.split(".")[1]


def allowed(importer, target):
    """Whether one module of ours may import another."""
    if target == "lbsgd":  # its names load lazily, and come from every folder
        return False
    folder, inside = folder_of(importer), target.removeprefix("lbsgd.")
    if folder == folder_of(target) or folder_of(target) in ANYWHERE & {inside}:
        return folder not in ANYWHERE or inside in MAY_IMPORT[folder]
    return any(inside == place or inside.startswith(f"{place}.") for place in MAY_IMPORT[folder])


def of_ours(names):
    return {name for name in names if name.split(".")[0] == "lbsgd"}


def test_every_folder_imports_only_what_the_plan_of_the_house_allows():
    assert {folder_of(name) for name in ROOMS if name != "lbsgd.__init__"} == set(MAY_IMPORT)
    wrong = [
        f"{importer} -> {target}"
        for importer, targets in arrows().items()
        if importer != "lbsgd.__init__"  # it offers names of every folder, each loaded when first used
        for target in of_ours(targets)
        if not allowed(importer, target)
    ]
    assert not wrong


@pytest.mark.parametrize(
    "importer, target, verdict",
    [
        ("lbsgd.algorithm.sgd", "lbsgd.train.engine", False),
        ("lbsgd.algorithm.sgd", "lbsgd.algorithm.schedule", True),
        ("lbsgd.report.curves", "lbsgd.algorithm.schedule", True),
        ("lbsgd.report.curves", "lbsgd.algorithm.sgd", False),
        ("lbsgd.data.beton", "lbsgd.disk", True),
        ("lbsgd.errors", "lbsgd.disk", False),
        ("lbsgd.disk", "lbsgd.errors", True),
        ("lbsgd.processes.peers", "lbsgd.config.plan", False),
        ("lbsgd.algorithm.sgd", "lbsgd", False),
    ],
)
def test_an_arrow_that_points_upwards_is_noticed(importer, target, verdict):
    assert allowed(importer, target) is verdict


def test_imports_inside_functions_and_names_in_strings_are_seen():
    source = 'def f():\n    from lbsgd.train import engine\n    load("lbsgd.config.plan")\n    import_module("ffcv")\n'
    assert set(imported(source)) == {"lbsgd.train.engine", "lbsgd.config.plan", "ffcv"}


def circle(imports):
    """Return the modules that import one another in a circle; none if there is no circle."""
    left = {name: of_ours(targets) & set(imports) for name, targets in imports.items()}
    while free := [name for name, targets in left.items() if not targets]:
        left = {name: targets - set(free) for name, targets in left.items() if name not in free}
    return sorted(left)


def test_no_module_imports_itself_through_others():
    assert circle({name: targets for name, targets in arrows().items() if name != "lbsgd.__init__"}) == []
    assert circle({"lbsgd.a": {"lbsgd.b"}, "lbsgd.b": {"lbsgd.a"}, "lbsgd.c": {"lbsgd.a"}}) != []


def test_rules_ask_what_libraries_need_and_libraries_know_no_rule():
    targets = {target for name in ROOMS if ".config.libraries." in name for target in arrows()[name]}
    assert not {target for target in targets if target.startswith("lbsgd.config.checks")}


def libraries_of(folder):
    """Return the third-party libraries that the modules of a folder import."""
    names = {target.split(".")[0] for name in ROOMS if f"lbsgd.{folder}." in name for target in arrows()[name]}
    return names - set(sys.stdlib_module_names) - {"lbsgd"}


def test_the_mathematics_needs_torch_and_numpy_and_reports_need_no_torch():
    assert libraries_of("algorithm") - {"timm", "triton"} <= {"torch", "torchvision", "numpy"}
    assert not {"torch", "deepspeed", "ffcv"} & (libraries_of("report") | libraries_of("config"))


@pytest.mark.parametrize("library, door", ONE_DOOR.items())
def test_one_module_imports_each_library_that_has_a_door(library, door):
    doors = {name for name, targets in arrows().items() if any(t.split(".")[0] == library for t in targets)}
    assert doors == {door}


def test_no_module_imports_the_libraries_that_it_serves():
    served = {"transformers", "accelerate", "lightning", "pytorch_lightning"}
    assert not [name for name, targets in arrows().items() if served & {target.split(".")[0] for target in targets}]


def test_no_module_asks_pathlib_what_is_there():
    """It says no where it may not look, since Python 3.14; `disk` has functions that raise."""
    asks = {"exists", "is_dir", "is_file"}
    wrong = [
        f"{name}:{node.lineno}"
        for name, path in ROOMS.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in asks and ast.unparse(node.value) not in ("os.path", "entry")
        if not (isinstance(node.ctx, ast.Store) or ast.unparse(node.value) == "self")
    ]
    assert not wrong


def test_at_most_seven_files_lie_beside_the_folders_and_no_room_is_over_250_lines():
    assert len([name for name in ROOMS if name.count(".") == 1]) <= 7
    long = {name: lines for name, path in ROOMS.items() if (lines := len(path.read_text().splitlines())) > 250}
    assert not long


@pytest.mark.skipif(not (ROOT / ".git").exists() or not which("git"), reason="nobody knows what is tracked")
def test_no_tracked_file_is_a_symbolic_link():
    """A link may point to something that only one machine has."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed and [line for line in listed.splitlines() if line.startswith("120000")] == []
