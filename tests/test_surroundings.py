"""Variables and folders that a library would refuse with a traceback are refused in one line that names them."""

import gc
import getpass
import os
import socket
import sys
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from commands import ROOT, command, recipe, refused

from lbsgd.commands.recipe_flags import parser
from lbsgd.commands.train import Request
from lbsgd.errors import ConfigError
from lbsgd.processes.surroundings import importing, require_compiling, require_devices, require_surroundings

JSON = ("--deepspeed_config", ROOT / "ds_configs/digits.json")


def test_an_accelerator_that_deepspeed_does_not_have_is_named(monkeypatch):
    for value in ("cpu", "cuda"):
        monkeypatch.setenv("DS_ACCELERATOR", value)
        require_surroundings()
    for value in ("junk", "xpu", "CPU", ""):
        monkeypatch.setenv("DS_ACCELERATOR", value)
        with pytest.raises(ConfigError, match=f"^DS_ACCELERATOR is '{value}', neither cuda nor cpu; unset or correct"):
            require_surroundings()


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 54321"), OSError("No username set")])
def test_a_user_without_a_name_gets_one_because_torch_asks_for_it(monkeypatch, error):
    """Python before 3.13 raises KeyError."""

    def unknown(uid):
        raise error

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):  # in the order of getpass
        monkeypatch.delenv(name, raising=False)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    monkeypatch.setenv("USER", "")  # so that the variable is removed after the test
    require_surroundings()
    assert getpass.getuser() == f"user{os.getuid()}"


@pytest.mark.parametrize(
    "name, wrong, right",
    [
        ("NUMBA_DISABLE_JIT", ["1", "-1"], ["0", "no number", ""]),  # Numba warns of an invalid value, and goes on
        ("NUMBA_NUM_THREADS", ["0", "-4"], ["1", "4", "no number", ""]),
    ],
)
def test_a_variable_without_which_numba_would_decode_is_named_where_there_are_images(monkeypatch, name, wrong, right):
    for value in right:
        monkeypatch.setenv(name, value)
        require_compiling()
    for value in wrong:
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"^{name} is {value}, with which .*; unset it$"):
            require_compiling()
    Request(parser("").parse_args([*map(str, JSON), "--fake_data"]))
    with pytest.raises(ConfigError, match=f"^{name} is "):
        Request(parser("").parse_args([*map(str, JSON), "--data_dir", "nowhere"]))


def test_a_network_interface_that_gloo_does_not_find_is_named(monkeypatch):
    there = {"lo": [SimpleNamespace(family=socket.AF_INET)], "bond1": [SimpleNamespace(family=socket.AF_PACKET)]}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: there)
    for value, missing in (("nope0", "nope0"), ("lo,nope0", "nope0"), ("bond1", "bond1")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
        require_devices("cuda")
        with pytest.raises(ConfigError, match=f"^GLOO_SOCKET_IFNAME is '{value}', .* no interface {missing} .*: lo"):
            require_devices("cpu")
    for value in ("lo", "lo,", ""):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
        require_devices("cpu")


def test_a_sandbox_whose_lo_is_down_is_told_how_to_bring_it_up(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"lo": [SimpleNamespace(family=socket.AF_PACKET)]})
    require_devices("cuda")
    with pytest.raises(
        ConfigError, match=r"^no network interface of this host has an address, not even lo, .*set lo up"
    ):
        require_devices("cpu")


def test_deepspeed_told_of_a_gpu_that_torch_does_not_find_is_one_line(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    require_devices("cuda")
    with pytest.raises(ConfigError, match="^DS_ACCELERATOR is cuda, but torch finds no GPU here; unset it"):
        require_devices("cpu")


@pytest.mark.parametrize(
    "path, more",
    [("recipes/digits.py", ()), ("recipes/asynchronous.py", ("--updates", "sync"))],
    ids=["training", "simulation"],
)
@pytest.mark.parametrize(
    "name, value, words",
    [
        ("DS_ACCELERATOR", "junk", "DS_ACCELERATOR is 'junk'"),
        ("TORCH_DISTRIBUTED_DEBUG", "JUNK", "The value of TORCH_DISTRIBUTED_DEBUG must be"),
        ("TORCH_LOGS", "junk", "refuses its environment (Invalid log settings: junk"),
    ],
)
def test_a_recipe_ends_with_one_line(name, value, words, path, more, tmp_path):
    flags = (*JSON, "--fake_data", "--output_dir", tmp_path / "run", *more)
    refused(command(sys.executable, path, *flags, **{name: value}), words)


def test_a_recipe_without_the_network_interface_that_it_shall_take_ends_with_one_line(tmp_path):
    told = recipe(JSON[1], "--fake_data", "--output_dir", tmp_path / "run", GLOO_SOCKET_IFNAME="nope0")
    refused(told, "GLOO_SOCKET_IFNAME is 'nope0'")


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("error", [None, ValueError("TORCH_LOGS"), ConfigError("ours")])
def test_what_is_imported_is_left_out_of_garbage_collection_which_goes_on_as_before(error, collects):
    before = gc.get_freeze_count()
    try:
        if not collects:
            gc.disable()
        with pytest.raises(ConfigError) if error else nullcontext(), importing():
            assert not gc.isenabled()
            imported = [[] for _ in range(1000)]
            if error:
                raise error
        assert gc.isenabled() == collects and gc.get_freeze_count() >= before + len(imported)
    finally:
        gc.enable()


def test_without_a_folder_for_temporary_files_a_recipe_is_refused(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    with pytest.raises(ConfigError, match="^no folder for temporary files .*: set TMPDIR to a folder that can be wri"):
        require_surroundings()


def test_where_matplotlib_may_write_nowhere_a_picture_is_one_line():
    code = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc']; import lbsgd.report.picture as p"
    code += "\nfrom lbsgd.errors import LbsgdError\ntry: p.empty_picture()\nexcept LbsgdError as error: print(error)"
    environment = dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), os.devnull)
    done = command(sys.executable, "-c", code, **environment)
    assert done.stdout.startswith("no picture can be drawn, because Matplotlib finds no folder")
    assert "Traceback" not in done.stderr
