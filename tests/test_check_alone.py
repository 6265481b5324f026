"""`lbsgd check` needs only rich and pydantic: no torch, no DeepSpeed, no numpy."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALONE = '''
import sys

class OnlyTheFew:
    ALLOWED = set("""lbsgd rich pydantic pydantic_core annotated_types typing_extensions typing_inspection markdown_it
                  mdurl pygments""".split())
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.ALLOWED | sys.stdlib_module_names and "_sysconfig" not in name:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, OnlyTheFew())
from lbsgd.commands.main import main
sys.exit(main(sys.argv[1:]))
'''
WRONG = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": "0.1"}}}


def check_alone(tmp_path, root, *flags):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(WRONG))
    command = [sys.executable, "-c", ALONE, "check", str(path), *flags]
    return subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, text=True, capture_output=True)


@pytest.mark.parametrize("flags", [(), ("--deepspeed", "0.16"), ("--deepspeed", "0.16..0.19"), ("--fix",)])
def test_check_imports_neither_torch_nor_deepspeed(tmp_path, flags):
    done = check_alone(tmp_path, ROOT, *flags)
    assert done.returncode == (0 if "--fix" in flags else 1), done.stderr
    assert (
        "D70" in done.stdout
        or "1 finding the same in all" in done.stdout
        or 'optimizer.params.lr: "0.1" -> 0.1' in done.stdout
        or "1 error" in done.stdout
    )


@pytest.mark.slow
def test_a_wheel_without_dependencies_is_enough(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    done = check_alone(tmp_path, tmp_path / "installed")
    assert done.returncode == 1 and "D70" in done.stdout, done.stderr
