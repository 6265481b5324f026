"""Validation images of only some classes, as in the paper's ImageNet-5k: errors are among these classes."""

import json
import shutil
from contextlib import closing

import pytest
import torch
import torchvision
from commands import DIGITS, recipe
from converter import SETTINGS, make_tree
from test_convert_shards import KINDS
from test_sources import WNIDS, devkit, find, make_folders, make_official

from lbsgd.convert.convert import convert, look
from lbsgd.convert.preflight import unvalidated_line
from lbsgd.convert.verify import verify
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import Manifest, open_data, open_val
from lbsgd.data.loaders import EvalLoader
from lbsgd.data.share import Pixels, Share
from lbsgd.errors import DataError
from lbsgd.train.evaluation import answering_among

MORE = ["n00000001", "n02000000", "n99999999"]  # before, between and after ImageNet's own


def folders_of_more_classes(folder):
    """Training images of seven classes, and validation images of four."""
    make_folders(folder)
    for name in MORE:
        shutil.copytree(folder / "train" / WNIDS[0], folder / "train" / name)
    return folder


def official_validation(folder):
    """The same, with ImageNet's own archive of validation images and its devkit instead of folders."""
    folders_of_more_classes(folder)
    shutil.rmtree(folder / "val")
    shutil.copy(make_official(folder.with_name("official")) / "ILSVRC2012_img_val.tar", folder)
    devkit(folder)
    return folder


@pytest.mark.parametrize("make", [folders_of_more_classes, official_validation])
def test_validation_images_have_the_numbers_of_the_training_classes(tmp_path, make):
    source, whole = find(make(tmp_path / "source"), tmp_path), find(make_folders(tmp_path / "whole"), tmp_path)
    assert source.val.classes == source.train.classes == sorted([*WNIDS, *MORE])
    names = [[images.classes[label] for label in images.labels] for images in (source.val, whole.val)]
    assert names[0] == names[1]
    assert "no validation images of 3 of 7 classes: n00000001, n02000000, n99999999; " in unvalidated_line(source)
    assert unvalidated_line(whole) is None


def test_it_is_refused_unless_it_is_asked_for(tmp_path):
    source, data = folders_of_more_classes(tmp_path / "source"), tmp_path / "data"
    refused = "no validation images of 3 of 7 classes: .*; complete it, or give --val_subset"
    with pytest.raises(DataError, match=refused):
        convert(source, data, **SETTINGS)
    assert not (data / "manifest.json").exists()
    assert "refused: " in look(source, data, 1, max_side=500)
    assert "refused: " not in look(source, data, 1, max_side=500, val_subset=True)
    convert(source, data, val_subset=True, **SETTINGS)
    verify(data, 1, source)
    for opened in (open_data(data), open_val(data)):
        assert [opened.classes[number] for number in opened.val_classes] == WNIDS


def test_shards_too_may_lack_validation_images_of_a_class(tmp_path):
    make, _ = KINDS["webdataset"]
    source = make(tmp_path / "source")
    for shard in source.glob("*val*.tar"):
        shard.unlink()
    [name] = {path.name for path in source.glob("*train-000000.tar")}
    shutil.copy(source / name, source / name.replace("train", "val"))  # one shard of the images, with some classes
    found = find(source, tmp_path)
    assert found.val.classes == found.train.classes
    assert 0 < len(set(found.val.labels.tolist())) <= 3


def emptied(folder, split):
    """Return a source whose class `bee` has only undecodable images in one split."""
    tree = make_tree(folder)
    for path in (tree / split / "bee").iterdir():
        path.write_text("no image")
    return tree


@pytest.mark.parametrize("split, what", [("train", "training"), ("val", "validation")])
def test_a_class_that_loses_all_its_images_of_a_split_is_refused(tmp_path, split, what):
    tree = emptied(tmp_path / "source", split)
    refused = f"{split} has no {what} images that can be decoded of 1 of 2 classes: bee; replace them, or "
    with pytest.raises(DataError, match=refused):
        convert(tree, tmp_path / "data", on_error="skip", **SETTINGS)
    assert not (tmp_path / "data/manifest.json").exists()


def test_a_class_may_lose_its_validation_images_where_classes_may_lack_them(tmp_path, capsys):
    tree, data = emptied(tmp_path / "source", "val"), tmp_path / "data"
    with pytest.raises(DataError, match="or give --val_subset if that is meant"):
        convert(tree, data, on_error="skip", **SETTINGS)
    capsys.readouterr()
    convert(tree, data, on_error="skip", val_subset=True, **SETTINGS)
    assert "images in" not in capsys.readouterr().out  # nothing is converted again
    assert open_data(data).val_classes == [0]
    verify(data, 1, tree)
    with pytest.raises(DataError, match="no training images that can be decoded"):
        convert(emptied(tmp_path / "other", "train"), tmp_path / "else", on_error="skip", val_subset=True, **SETTINGS)


def test_an_empty_folder_of_a_class_is_refused_also_where_classes_may_lack(tmp_path):
    source = folders_of_more_classes(tmp_path / "source")
    (source / "val" / MORE[0]).mkdir()
    with pytest.raises(DataError, match=f"no images in .*val for class {MORE[0]}"):
        find(source, tmp_path)


def test_a_manifest_whose_classes_all_have_images_restricts_nothing(tmp_path):
    convert(make_tree(tmp_path / "tree"), tmp_path / "data", **SETTINGS)
    assert open_data(tmp_path / "data").val_classes is None
    manifest = tmp_path / "data/manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in content.items() if key != "images_per_class"}))
    assert Manifest.read(manifest).val_classes is None  # from an older converter, which could not restrict them


def test_a_network_answers_among_the_classes_that_it_may_answer_with():
    network, images = torch.nn.Linear(6, 5), torch.randn(40, 6)
    logits = network(images)
    with answering_among([1, 3, 4], network):
        among = network(images)
    assert torch.equal(among[:, [1, 3, 4]], logits[:, [1, 3, 4]]) and among[:, [0, 2]].isneginf().all()
    assert not torch.equal(among.argmax(1), logits.argmax(1))  # or the restriction could not show
    assert torch.equal(network(images), logits)  # afterwards it answers with all classes
    with answering_among(None, network):
        assert torch.equal(network(images), logits)


def test_a_run_counts_errors_among_the_classes_of_the_validation_images(digits_tree, tmp_path):
    """A network of ten classes on images of three: 3-way errors, as computed by hand with torchvision's network."""
    classes, source = [1, 4, 7], tmp_path / "source"
    source.mkdir()
    (source / "train").symlink_to(digits_tree / "train")
    for number in classes:
        (source / "val").mkdir(exist_ok=True)
        (source / f"val/{number}").symlink_to(digits_tree / f"val/{number}")
    convert(source, tmp_path / "data", val_subset=True, **SETTINGS)
    torch.manual_seed(0)
    network = torchvision.models.resnet50(num_classes=10).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    loader = EvalLoader(
        BetonFile.open(tmp_path / "data/val.beton"),
        batch=60,
        share=Share(),
        pixels=Pixels(resolution=32, device="cpu"),
        threads=1,
    )
    with torch.no_grad(), closing(loader):
        answers = [(network(images), labels) for images, labels in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
    restricted = torch.tensor(classes)[logits[:, classes].argmax(1)]
    error = 100 * (restricted != labels).double().mean().item()
    assert error < 100 * (logits.argmax(1) != labels).double().mean().item()  # ten-way errors are different
    weights = ("--evaluate_only", "--weights", tmp_path / "weights.pt")
    done = recipe(DIGITS, "--data_dir", tmp_path / "data", *weights, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"top-1 error {error:.2f} %" in done.stdout
    assert "among the 3 of 10 classes that have validation images" in done.stdout.replace("\n", " ")
