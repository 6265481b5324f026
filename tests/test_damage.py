"""Damaged, replaced or wrong files give one line each, never a traceback, a crash or wrong images."""

import json
import os
import shutil
from contextlib import closing

import numpy as np
import pytest
from converter import encoded
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lbsgd.convert.convert import convert
from lbsgd.data.beton import BetonFile
from lbsgd.data.beton_format import ALLOCATION, HEADER
from lbsgd.data.beton_layout import read_layout
from lbsgd.data.folder import Manifest, open_data
from lbsgd.data.loaders import TrainLoader
from lbsgd.data.share import Cut, Pixels
from lbsgd.errors import DataError

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data folder of the converter, with JPEGs and raw images."""
    folder = tmp_path_factory.mktemp("whole")
    for split, number in (("train", NUM_IMAGES), ("val", 3)):
        for i in range(number):
            path = folder / f"source/{split}/{i % 3}/{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(size=(20 + i, 40 - i), phase=i))
    convert(folder / "source", folder / "data", max_side=500, raw_fraction=0.4, num_processes=1)
    return folder / "data"


@pytest.fixture(scope="module")
def mutated(whole, tmp_path_factory):
    """A copy to overwrite, without its manifest."""
    folder = tmp_path_factory.mktemp("mutated")
    shutil.copy(whole / "val.beton", folder)
    return folder


def epoch(beton):
    cut = Cut(seed=0, global_batch=8, micro_batch=8)
    with closing(TrainLoader(beton, cut, threads=1, pixels=Pixels(resolution=8, device="cpu"))) as loader:
        return [labels for _, labels in loader.epoch(0)]


def table_bytes(path):
    """Return the places of all bytes that belong to no image."""
    layout = read_layout(path)
    return np.r_[0 : layout.images_at, layout.images_end : layout.identity.num_bytes].tolist()


@st.composite
def mutations(draw):
    """Draw a function of (content, places of the tables' bytes) that returns damaged content."""
    kind = draw(st.sampled_from(["bytes", "header", "number", "cut", "longer"]))
    place, value = (
        draw(st.floats(0, 1, exclude_max=True)),
        draw(st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64 - 1])),
    )
    flips = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))

    def mutate(content, places):
        content = bytearray(content)
        if kind == "cut":
            return bytes(content[: int(place * len(content))])
        if kind == "longer":
            return bytes(content) + bytes(1 + int(place * 100))
        if kind == "number":
            at = places[int(place * (len(places) - 8))]
            content[at : at + 8] = value.to_bytes(8, "little")
            return bytes(content)
        for where, flip in flips:
            content[places[int(where * (HEADER.itemsize if kind == "header" else len(places)))]] ^= flip
        return bytes(content)

    return mutate


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations())
@example(lambda content, places: content[:30])
def test_a_mutated_file_is_refused_with_one_line_or_read_and_with_its_manifest_always_refused(whole, mutated, mutate):
    source, path = whole / "train.beton", mutated / "train.beton"
    content = mutate(source.read_bytes(), table_bytes(source))
    if content == source.read_bytes():
        return
    path.write_bytes(content)
    (mutated / "manifest.json").unlink(missing_ok=True)
    try:
        epoch(open_data(mutated).train)
    except DataError as error:
        assert "\n" not in str(error) and "train.beton" in str(error)
    shutil.copy(whole / "manifest.json", mutated)
    with pytest.raises(DataError, match=r"train\.beton") as refused:
        open_data(mutated)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("data_at", 5, "image 3 lies outside the part of the file that holds the images"),
        ("data_at", 1 << 62, "image 3 lies outside"),
        ("num_bytes", 1 << 62, "image 3 lies outside"),
        ("num_bytes", 0, "image 3 has no bytes"),
        ("image", 4, "allocation table does not give each of its 24 images a place"),
    ],
)
def test_an_allocation_that_contradicts_the_rest_is_named(whole, tmp_path, column, value, message):
    content = bytearray((whole / "train.beton").read_bytes())
    table = np.frombuffer(content, ALLOCATION, NUM_IMAGES, read_layout(whole / "train.beton").allocations_at)
    table[column][3] = value
    (tmp_path / "train.beton").write_bytes(content)
    with pytest.raises(DataError, match=message):
        BetonFile.open(tmp_path / "train.beton")


def test_manifests_of_earlier_converters_have_no_digest_of_the_tables_and_still_fit(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    path = tmp_path / "data/manifest.json"
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if '"tables"' not in line)
        .replace('",\n  }', '"\n  }')
        .replace('",\n },', '"\n },')
    )
    assert Manifest.read(path).train.tables == ""
    open_data(tmp_path / "data")


@pytest.mark.parametrize("content", ['{"classes": 3', '"num_images": "many"', '"fingerprint": 7', '"train": [[1]]'])
def test_a_manifest_with_content_of_another_type_is_refused_with_one_line(whole, tmp_path, content):
    shutil.copytree(whole, tmp_path / "data")
    path, name = tmp_path / "data/manifest.json", content.split(":")[0]
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if name.lstrip("{") in line)
    lines[at] = content + ("," if lines[at].endswith(",") else "")
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="cannot be read as a manifest") as error:
        open_data(tmp_path / "data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {"settings": None},
        {"settings": [["max_side", 500]]},
        {"skipped": []},
        {"skipped": {"train": 3}},
        {"skipped": {"train": [3]}},
        {"skipped_numbers": {"train": ["a"]}},
        {"skipped_numbers": {"train": [-1]}},
        {"stored": None},
        {"left_out": 0},
        {"images_per_class": {"train": 4}},
    ],
)
def test_a_manifest_whose_parts_are_of_another_kind_is_refused_with_one_line(whole, tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads((whole / "manifest.json").read_text()), **content}))
    with pytest.raises(DataError, match="cannot be read as a manifest .*; make the folder again with: ") as error:
        Manifest.read(path)
    assert "\n" not in str(error.value)


def test_a_manifest_nested_without_end_is_refused_with_one_line(tmp_path):
    path = tmp_path / "manifest.json"
    for content in ("[" * 100_000, '{"settings": ' + "[" * 200 + "]" * 200 + "}"):
        path.write_text(content)
        with pytest.raises(DataError, match="cannot be read as a manifest .nested in more than 100 levels.; make the"):
            Manifest.read(path)


# --- replaced while a run reads it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "written over", "gone"])
def test_a_file_that_changes_while_a_run_reads_it_ends_the_next_epoch(whole, tmp_path, how):
    path = shutil.copy(whole / "train.beton", tmp_path / "train.beton")
    beton = BetonFile.open(path)
    epoch(beton)
    os.utime(path)
    assert epoch(beton)  # only touched
    if how == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[read_layout(path).metadata_at + 16] ^= 3  # a label
        (other := tmp_path / "other").write_bytes(content)
        os.replace(other, path) if how == "replaced" else path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.beton has .* while this run reads it") as error:
        epoch(beton)
    assert "\n" not in str(error.value)
