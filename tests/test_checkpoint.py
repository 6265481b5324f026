"""A checkpoint is complete or absent, tells whether a file has changed, and names what does not match."""

import json
import random
import resource
import signal
import warnings
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from oracle import N
from processes import in_processes
from safetensors.torch import save_file
from small_engine import recipe

from lbsgd.config.plan import Plan
from lbsgd.errors import CheckpointError, DataError
from lbsgd.train import checkpoint
from lbsgd.train.engine import start_processes
from lbsgd.train.identity import require_same
from lbsgd.train.random_states import gather_random_states, random_states, restore_random_states, seed_random_numbers
from lbsgd.train.saver import Saver
from lbsgd.train.weights import put_weights, unwrapped, weights_in

ONE_WEIGHT = {name: {"w": torch.zeros(1)} for name in ("weights", "momentum", "random")}


def complete(folder):
    """The checkpoints with a manifest, oldest first."""
    return [path for path in checkpoint.named(folder) if checkpoint.has_manifest(path)]


def saved(folder, iteration, value=1.0):
    tensors = {
        "weights": {"w": torch.full((3, 2), value), "count": torch.tensor(4)},
        "momentum": {"w": torch.ones(3, 2)},
        "random": random_states(rank=0),
    }
    return checkpoint.save(folder, iteration, tensors, {"counters": {"iteration": iteration}, "identity": {"seed": 0}})


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    path = saved(tmp_path, 12, value=1 / 3)
    tensors, state = checkpoint.load(path)
    assert torch.equal(tensors["weights"]["w"], torch.full((3, 2), 1 / 3))
    assert tensors["weights"]["count"].dtype is torch.int64
    assert state["counters"] == {"iteration": 12}


def test_the_newest_three_are_kept_and_the_newest_is_found(tmp_path):
    for iteration in (1, 2, 30, 4, 100):
        saved(tmp_path, iteration)
    assert [path.name for path in complete(tmp_path)] == [
        "iteration_00000004",
        "iteration_00000030",
        "iteration_00000100",
    ]
    assert checkpoint.newest(tmp_path).name == "iteration_00000100"
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_saving_the_same_iteration_again_replaces_it(tmp_path):
    saved(tmp_path, 5, value=1.0)
    path = saved(tmp_path, 5, value=2.0)
    assert checkpoint.load(path)[0]["weights"]["w"][0, 0] == 2.0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fails", ["write_bytes", "rename"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, fails):
    saved(tmp_path, 1)

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"pathlib.Path.{fails}", disk_full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["iteration_00000001"]
    checkpoint.load(checkpoint.newest(tmp_path))


def test_a_folder_without_manifest_was_damaged_and_the_one_before_it_serves(tmp_path):
    saved(tmp_path, 1)
    damaged, said = saved(tmp_path, 2), []
    (damaged / "manifest.json").unlink()
    _, state, _ = checkpoint.load_newest(tmp_path, {"seed": 0}, said.append)
    assert state["counters"] == {"iteration": 1}
    assert (
        said[0].startswith("warning: ")
        and str(damaged / "manifest.json") in said[0]
        and "going on from the one" in said[0]
    )


def test_folders_that_all_lack_their_manifest_are_named_rather_than_taken_for_none(tmp_path):
    damaged = [saved(tmp_path, iteration) for iteration in (1, 2)]
    for path in damaged:
        (path / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path) == damaged[1]  # so a resumed run does not start from scratch
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_newest(tmp_path, {"seed": 0}, print)
    assert all(str(path / "manifest.json") in str(caught.value) for path in damaged) and "\n" not in str(caught.value)
    assert f"no whole checkpoint is left in {tmp_path}" in str(caught.value)


def test_whole_checkpoints_do_not_make_room_for_folders_without_manifest(tmp_path):
    """A save keeps the newest three that may be whole, including its own, however many newer folders there are."""
    for iteration in (6, 7, 8):
        (saved(tmp_path, iteration) / "manifest.json").unlink()
    for iteration in (1, 2, 3, 4):
        saved(tmp_path, iteration)
    assert [int(path.stem[-1]) for path in complete(tmp_path)] == [2, 3, 4]
    assert [int(path.stem[-1]) for path in checkpoint.named(tmp_path)] == [2, 3, 4, 6, 7, 8]


def test_a_copy_under_another_name_is_no_checkpoint(tmp_path):
    path = saved(tmp_path, 1)
    path.rename(path.with_name(path.name + ".bak"))
    assert checkpoint.newest(tmp_path) is None
    assert saved(tmp_path, 1) == checkpoint.newest(tmp_path) == path


@pytest.mark.parametrize("name", ["weights.safetensors", "momentum.safetensors", "random.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip a bit", "cut the end", "delete"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = saved(tmp_path, 1)
    data = bytearray((path / name).read_bytes())
    if damage == "delete":
        (path / name).unlink()
    else:
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data if damage == "flip a bit" else data[:-1])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("manifest", ["null", "[]", "5", '"x"', "{}", '{"state.json": {}}'])
def test_a_manifest_that_names_no_files_is_damage_and_the_one_before_is_taken(tmp_path, manifest):
    saved(tmp_path, 1)
    (saved(tmp_path, 2) / "manifest.json").write_text(manifest)
    said = []
    _, state, _ = checkpoint.load_newest(tmp_path, {"seed": 0}, said.append)
    assert state["counters"]["iteration"] == 1 and "2/manifest.json does not name the files of a checkpoint" in said[0]


def test_a_manifest_that_is_nested_without_end_is_damage_and_the_one_before_is_taken(tmp_path):
    saved(tmp_path, 1)
    (saved(tmp_path, 2) / "manifest.json").write_text("[" * 100_000)
    said = []
    _, state, _ = checkpoint.load_newest(tmp_path, {"seed": 0}, said.append)
    assert state["counters"]["iteration"] == 1 and f"{tmp_path}/iteration_00000002/manifest.json is nested" in said[0]


def test_another_format_is_refused(tmp_path):
    path = saved(tmp_path, 1)
    state = {**json.loads((path / "state.json").read_text()), "version": 99}
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = checkpoint.manifest_entry((path / "state.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(path)


def test_the_first_difference_between_two_runs_is_named(tmp_path):
    here = {"recipe": {"seed": 0}, "network": {"fc.weight": [10, 512]}}
    require_same(tmp_path, here, json.loads(json.dumps(here)), "")
    for there, words in [
        ({"recipe": {"seed": 1}, "network": here["network"]}, "lbsgd.seed is 1 there and 0 here"),
        (
            {"recipe": {"seed": 0}, "network": {"fc.weight": [1000, 512]}},
            r"network.fc.weight is \[1000, 512\] there and \[10, 512\] here",
        ),
        ({"recipe": {"seed": 0}, "network": {}}, "network.fc.weight is none there"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            require_same(tmp_path, there, here, "")


PLAN = {"plan": {"precision": "fp32"}}


@pytest.mark.parametrize(
    "saved, here, words",
    [
        ({"precision": "fp32", "decoder": "ours"}, {"precision": "fp32", "decoder": "ours"}, ""),
        ({}, {"precision": "fp32", "decoder": "ours"}, ""),  # from an older lbsgd, which kept the precision elsewhere
        ({}, {"precision": "bf16", "decoder": "ours"}, 'precision is "fp32" there and "bf16" here'),
        ({"decoder": "ours"}, {"decoder": "FFCV's"}, 'decoder is "ours" there and "FFCV\'s" here'),
        ({"precision": "fp32", "decoder": "ours", "data": "a"}, {}, ""),  # --evaluate_only
        (
            {"model": "resnet8", "network": {"0.weight": [24, 3, 3, 3]}},
            {"model": "resnet50", "network": {}},
            r"run \(resnet8 there, resnet50 here\): network.0.weight is \[24, 3, 3, 3\] there and none here",
        ),
        ({"model": "mine", "network": {}}, {"model": "renamed", "network": {}}, ""),  # the name is no weight
        ({"network": {}}, {"model": "resnet50", "network": {}}, ""),  # from an older lbsgd
        ({"network": {"w": [3]}}, {"model": "resnet50", "network": {}}, r"another run: network.w is \[3\] there"),
    ],
)
def test_a_run_goes_on_in_its_precision_and_with_its_decoder(tmp_path, saved, here, words):
    checkpoint.save(tmp_path, 1, dict.fromkeys(("weights", "momentum", "random"), {}), {"identity": saved, **PLAN})
    if not words:
        checkpoint.load_newest(tmp_path, here, lambda line: None)
        return
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_newest(tmp_path, here, lambda line: None)


@pytest.mark.parametrize(
    "device, saved, own, given, after, said",
    [
        ("cpu", 2, 2, False, 2, []),
        ("cpu", 1, 2, False, 1, ["threads        1 as in the checkpoint, for the same bits, of 2 cores"]),
        ("cpu", 1, 2, True, 2, ["threads        2; the checkpoint has 1, so the last bits of sums may differ"]),
        ("cpu", 8, 2, False, 2, ["threads        2; the checkpoint has 8, so the last bits of sums may differ"]),
        ("cuda", 1, 2, False, 2, []),  # a GPU's sums do not depend on them
    ],
)
def test_the_checkpoint_s_threads_are_taken_where_they_are_there_and_none_are_asked_for(
    monkeypatch, device, saved, own, given, after, said
):
    threads, lines = [own], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", str(own))
    engine = SimpleNamespace(global_steps=0, device=torch.device(device))
    Saver(engine, None, {}, {}, say=lines.append).restore_threads(saved)
    assert (threads[-1], lines) == (after, said)


def test_on_another_number_of_processes_each_one_draws_from_seed_rank_and_iteration(monkeypatch):
    config, seeded = recipe(), []
    config["lbsgd"]["seed"] = 5
    monkeypatch.setattr("lbsgd.train.saver.seed_random_numbers", lambda *numbers: seeded.append(numbers))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    saver = Saver(SimpleNamespace(global_steps=7), None, {}, {"plan": Plan.read(config, 1).as_dict()})
    saver.restore_bits({}, {"world_size": 4})
    assert seeded == [(5, 1, 7)]


def test_only_rank_0_says_what_a_resumed_run_changes(monkeypatch):
    for rank, expected in ((0, ["a line"]), (1, [])):
        said = []
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        Saver(SimpleNamespace(global_steps=0), None, {}, {}, say=said.append).say_on_rank_0("a line")
        assert said == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weight": torch.zeros(2, 4)}, r"weight is \[2, 4\] there and \[2, 3\] here; give weights of this recipe"),
        ({"bias": None}, "bias is missing there"),
        ({"fc.bias": torch.zeros(1)}, r"fc.bias is \[1\] there and missing here"),
        ({"bias": 3}, "bias is no tensor there"),
        ({"weight": torch.ones(2, 3) > 0}, r"weight is of bool there and of float32 here"),
        ({"weight": torch.ones(2, 3).int()}, r"weight is of int32 there and of float32 here"),
        ({"weight": torch.ones(2, 3) + 1j}, r"weight is of complex64 there and of float32 here"),
    ],
)
def test_weights_of_another_network_are_refused_by_their_first_difference(tmp_path, change, words):
    weights = {
        name: value for name, value in {**torch.nn.Linear(3, 2).state_dict(), **change}.items() if value is not None
    }
    with pytest.raises(DataError, match=f"w.pt is of another network: {words}"):
        put_weights(torch.nn.Linear(3, 2), weights, tmp_path / "w.pt")


def test_weights_of_other_floats_and_complex_ones_of_a_complex_network_are_taken(tmp_path):
    for dtype in (torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        network = torch.nn.Linear(3, 2)
        put_weights(network, {"weight": torch.ones(2, 3).to(dtype), "bias": torch.ones(2)}, tmp_path / "w.pt")
        assert torch.equal(network.weight, torch.ones(2, 3))
    network = torch.nn.Linear(3, 2, dtype=torch.complex64)
    put_weights(network, {name: value * 1j for name, value in network.state_dict().items()}, tmp_path / "w.pt")


def test_weights_of_another_number_of_classes_say_so(tmp_path):
    weights = {"0.weight": torch.ones(3, 3), "1.weight": torch.ones(5, 3), "1.bias": torch.ones(5)}
    network = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 2))
    words = r"w.pt is for another number of classes than the data have: 1.weight is \[5, 3\] there and \[2, 3\] here; "
    with pytest.raises(DataError, match=words + "evaluate on data with the classes of the weights, or fine-tune"):
        put_weights(network, weights, tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_a_wrapped_network_are_taken(prefix, tmp_path):
    network = torch.nn.Linear(3, 2)
    wrapped = {f"{prefix}weight": torch.ones(2, 3), f"{prefix}bias": torch.ones(2)}
    put_weights(network, wrapped, tmp_path / "w.pt")
    assert torch.equal(network.weight, torch.ones(2, 3))
    assert unwrapped({**wrapped, "bias": 0}) == {**wrapped, "bias": 0}  # a name that others do not share


def test_names_of_the_network_are_no_prefix_of_a_wrapper(tmp_path):
    network = torch.nn.Sequential()
    network.module = torch.nn.Linear(3, 2)
    put_weights(network, {"module.weight": torch.ones(2, 3), "module.bias": torch.ones(2)}, tmp_path / "w.pt")
    assert torch.equal(network.module.weight, torch.ones(2, 3))


@pytest.mark.parametrize("length", [0x80, 0x90])  # of the header; 0x80 is how a pickle begins
def test_weights_in_safetensors_are_taken(length, tmp_path):
    """As timm's are, and those in a checkpoint."""
    weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2, dtype=torch.bfloat16)}
    for blank in range(0, 300, 8):
        save_file(weights, tmp_path / "w", {"blank": " " * blank})
        if (tmp_path / "w").read_bytes()[0] == length:
            break
    assert (tmp_path / "w").read_bytes()[0] == length
    found = weights_in(tmp_path / "w")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_weights_without_counters_of_batches_are_taken(tmp_path):
    """As torchvision's old files are."""
    network = torch.nn.BatchNorm2d(3)
    weights = {name: value + 1 for name, value in network.state_dict().items() if name != "num_batches_tracked"}
    put_weights(network, weights, tmp_path / "w.pt")
    assert torch.equal(network.running_mean, torch.ones(3)) and network.num_batches_tracked == 0
    put_weights(network, {**weights, "num_batches_tracked": torch.tensor(7.0)}, tmp_path / "w.pt")  # all made floats


def test_weights_of_a_gpu_and_of_torch_before_1_6_are_taken(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
    for zipped in (True, False):
        torch.save({"weight": torch.ones(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        weight = weights_in(tmp_path / "w.pt")["weight"]
        assert weight.device.type == "cpu" and torch.equal(weight, torch.ones(2))


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype"
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:Sparse invariant")
@pytest.mark.parametrize(
    "content, words",
    [
        (torch.nn.Linear(2, 2), "holds more than tensors; save the network's state_dict"),
        ({"state_dict": {}, "epoch": 3}, "holds a state_dict among other things"),
        ({"model": {"weight": torch.ones(2)}, "epoch": 3}, "holds a state_dict among other things"),
        ([torch.ones(2)], "holds no state_dict"),
        (torch.ones(2), "holds no state_dict"),
        (
            b"<!DOCTYPE html>",
            "was not written by torch.save or safetensors, as it begins with b'<!DOCTYP'",
        ),  # a failed download
        (b"", "was not written by torch.save or safetensors, as it begins with b''"),
        (b"\x10\0\0\0\0\0\0\0{ no safetensors", "cannot be read as weights"),
        (b"PK\x03\x04 no zip", "cannot be read as weights"),
        *(
            ({"bias": torch.ones(2), "weight": tensor}, f"weight is no dense tensor there, but {words}; save")
            for tensor, words in (
                (torch.eye(2).to_sparse(), "sparse_coo"),
                (torch.empty(2, 2, device="meta"), "without values"),
                (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
            )
        ),
        # torch 2.15 does not load this one.
        ({"weight": nested()}, "weight is no dense tensor there, but nested; save|holds more than tensors; save"),
    ],
)
def test_what_is_no_state_dict_is_one_line(tmp_path, content, words):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(DataError, match=words) as refused:
        weights_in(path)
    assert "\n" not in str(refused.value)


def test_torch_numpy_and_python_are_seeded_from_all_numbers_in_their_order():
    def drawn(*numbers):
        seed_random_numbers(*numbers)
        return torch.rand(1).item(), np.random.rand(), random.random()

    first = drawn(0, 1, 2)
    assert drawn(0, 1, 2) == first
    for other in ((3, 1, 2), (0, 3, 2), (0, 1, 3), (0, 2, 1)):
        assert not set(first) & set(drawn(*other))


def gathered_states():
    start_processes()
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    with patch("torch.distributed.all_gather_object", None):
        return random_states(rank), gather_random_states(random_states(rank), torch.device("cpu"))


def test_rank_0_gets_all_random_states_as_bytes_and_the_others_do_nothing_with_them():
    """To unpickle those of thousands of processes would take each process most of a second at each save."""
    (first, found), (second, nothing) = in_processes(2, gathered_states)
    assert nothing == {} and found.keys() == first.keys() | second.keys()
    for name, state in (first | second).items():
        assert found[name].dtype == state.dtype and torch.equal(found[name], state)


def test_random_states_come_back():
    states = random_states(rank=3)
    drawn = [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]
    assert [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()] != drawn
    restore_random_states(states, rank=3)
    assert [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()] == drawn


def test_a_gpu_s_random_state_comes_back_where_there_is_a_gpu(monkeypatch):
    restored = []
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state: restored.append(state.item()))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "cuda.1" not in random_states(rank=1)  # with DS_ACCELERATOR=cpu: other hosts may have no GPU
    monkeypatch.setattr("lbsgd.train.random_states.accelerator_kind", lambda: "cuda")
    states = random_states(rank=1)
    restore_random_states(states, rank=1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    restore_random_states(states, rank=1)
    assert restored == [7]


def test_the_second_of_a_pair_of_normal_numbers_comes_back(monkeypatch):
    np.random.normal(), random.gauss(0, 1)
    states = random_states(rank=0)
    drawn = [np.random.normal(), random.gauss(0, 1), np.random.rand()]
    restore_random_states(states, rank=0)
    assert [np.random.normal(), random.gauss(0, 1), np.random.rand()] == drawn
    del states["normal.0"]  # as in a checkpoint of an older version
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # here, but not where it was saved
    restore_random_states(states, rank=0)


def test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match="cannot write .*weights.pt .*File too large.*; make room, and give the same"
        ):
            checkpoint.export_weights(tmp_path / "weights.pt", {"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_the_export_loads_without_unpickling_objects(tmp_path):
    checkpoint.export_weights(tmp_path / "weights.pt", {"w": torch.ones(2)})
    assert torch.equal(torch.load(tmp_path / "weights.pt", weights_only=True)["w"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize("key, value", [("momentum", 0.8), ("nesterov", False), ("weight_decay", 0.02)])
def test_a_checkpoint_of_another_optimizer_is_refused_by_its_key(tmp_path, key, value):
    now, other = recipe(), recipe()
    other["optimizer"]["params"][key] = value
    state = {"counters": {}, "identity": Plan.read(other, 1).identity()}
    checkpoint.save(tmp_path, 1, ONE_WEIGHT, state)
    with pytest.raises(CheckpointError, match=f"is of another run: optimizer.{key} is "):
        checkpoint.load_newest(tmp_path, Plan.read(now, 1).identity(), print)


def test_a_checkpoint_of_another_global_batch_is_refused_though_its_lr_is_the_same(tmp_path):
    """For example by the rule "fixed" of Table 2a, where recipe and learning rates are the same."""
    now = recipe()
    identity = Plan.read(now, 1).identity()
    assert identity["global_batch"] == now["train_batch_size"]
    checkpoint.save(tmp_path, 1, ONE_WEIGHT, {"counters": {}, "identity": {**identity, "global_batch": 128}})
    with pytest.raises(CheckpointError, match="is of another run: global_batch is 128 there and 64 here"):
        checkpoint.load_newest(tmp_path, identity, print)


def test_a_checkpoint_from_before_keys_existed_is_of_a_run_with_their_defaults(tmp_path):
    identity = Plan.read(recipe(), 1).identity()
    old = {**identity, "recipe": {**identity["recipe"], "batch_norm": {"per_worker_batch": N}}}
    del old["recipe"]["augmentation"]
    checkpoint.save(tmp_path, 1, ONE_WEIGHT, {"counters": {}, "identity": old})
    checkpoint.load_newest(tmp_path, identity, print)
    del old["recipe"]["num_images"]  # which has no default
    checkpoint.save(tmp_path, 2, ONE_WEIGHT, {"counters": {}, "identity": old})
    with pytest.raises(CheckpointError, match="is of another run: lbsgd.num_images is none there and 128 here"):
        checkpoint.load_newest(tmp_path, identity, print)
