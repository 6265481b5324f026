"""TFRecords, WebDataset's tars and parquet as sources give the same files as the same images in folders."""

import gzip
import io
import json
import os
import re
import shutil
import tarfile
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from converter import encoded
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.summary.writer.record_writer import RecordWriter

import lbsgd.convert.parquet
from lbsgd.convert import convert_split
from lbsgd.convert.convert import convert, look
from lbsgd.convert.files import Files
from lbsgd.convert.origin import kept_numbers
from lbsgd.convert.parquet import copy_images
from lbsgd.convert.preflight import left_out_lines
from lbsgd.convert.shards import find_shards
from lbsgd.convert.sources import find_source
from lbsgd.convert.verify import verify
from lbsgd.data.folder import Manifest
from lbsgd.errors import DataError

WNIDS = ["n01440764", "n01443537", "n02102040"]
RNG = np.random.default_rng(0)


def images_of(split):
    """(file name, class, JPEG) of some images, in random order, as in shards."""
    images = [
        (f"{WNIDS[label]}_{number}.JPEG" if split == "train" else f"ILSVRC2012_val_{3 * number + label:08}.JPEG", label)
        for label in range(len(WNIDS))
        for number in ((0, 18, 188, 2) if split == "train" else (0, 1))
    ]
    order = RNG.permutation(len(images))
    return [
        (*images[place], encoded(size=(16, 24), phase=float(crc32(images[place][0].encode()) % 97))) for place in order
    ]


IMAGES = {split: images_of(split) for split in ("train", "val")}


def folders(folder):
    for split, images in IMAGES.items():
        for name, label, data in images:
            path = folder / split / WNIDS[label] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def cut(images, num_shards):
    return [images[shard::num_shards] for shard in range(num_shards)]


# --- writers: Google's protobuf, TensorBoard's records, tarfile, PyArrow ----------------------------------------------


def example_class():
    """tf.train.Example as its .proto declares it."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")

    def message(name, *fields):
        made = file.message_type.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            scalar = isinstance(kind, int)
            made.field.add(
                name=field,
                number=number,
                label=label,
                type=kind if scalar else types.TYPE_MESSAGE,
                type_name=None if scalar else f".tf.{kind}",
            )
        return made

    message("BytesList", ("value", types.TYPE_BYTES, True))
    message("FloatList", ("value", types.TYPE_FLOAT, True))
    message("Int64List", ("value", types.TYPE_INT64, True))
    lists = [(f"{name}_list", f"{name.capitalize()}List", False) for name in ("bytes", "float", "int64")]
    message("Feature", *lists)
    features = message("Features", ("feature", "Features.FeatureEntry", True))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=types.LABEL_OPTIONAL, type=types.TYPE_STRING)
    entry.field.add(
        name="value", number=2, label=types.LABEL_OPTIONAL, type=types.TYPE_MESSAGE, type_name=".tf.Feature"
    )
    message("Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


EXAMPLE = example_class()


def example(**features):
    """An Example. The keys of build_imagenet_data.py have / where these have __."""
    made = EXAMPLE()
    for name, value in features.items():
        feature = made.features.feature[name.replace("__", "/")]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            values = value if isinstance(value, list) else [value]
            getattr(feature, "float_list" if isinstance(values[0], float) else "int64_list").value.extend(values)
    return made.SerializeToString(deterministic=True)


def imagenet_example(name, label, data):
    """What build_imagenet_data.py writes: labels begin with 1, and there may be many boxes or none."""
    return example(
        image__height=16,
        image__width=24,
        image__colorspace=b"RGB",
        image__channels=3,
        image__class__label=label + 1,
        image__class__synset=WNIDS[label].encode(),
        image__class__text=b"tench, Tinca tinca",
        image__object__bbox__xmin=[0.25, 0.5],
        image__object__bbox__label=[label + 1] * 2,
        image__format=b"JPEG",
        image__filename=name.encode(),
        image__encoded=data,
    )


def records(path, examples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for each in examples:
            writer.write(each)
        writer.flush()


def tfrecords(folder, within="", make=imagenet_example):
    for split, prefix, num_shards in (("train", "train", 3), ("val", "validation", 2)):
        place = folder / prefix if within else folder
        for number, images in enumerate(cut(IMAGES[split], num_shards)):
            path = place / f"{prefix}-{number:05}-of-{num_shards:05}"
            records(path, [make(*image) for image in images])
    return folder


def tfds(folder):
    """TensorFlow Datasets' own keys and names. Labels begin with 0 and have no names."""
    for split in ("train", "validation"):
        images = IMAGES["val" if split == "validation" else split]
        examples = [example(image=data, label=label, file_name=name.encode()) for name, label, data in images]
        records(folder / f"imagenet2012-{split}.tfrecord-00000-of-00001", examples)
    return folder


def webdataset(folder, extra=(), within=False):
    """Shards named as WebDataset's own script names them."""
    for split in ("train", "val"):
        for number, images in enumerate(cut(IMAGES[split], 2)):
            place = folder / split if within else folder
            place.mkdir(parents=True, exist_ok=True)
            with tarfile.open(place / f"imagenet-{split}-{number:06}.tar", "w") as tar:
                for name, label, data in images:
                    key = name.removesuffix(".JPEG")
                    for suffix, content in ((".cls", str(label).encode()), (".jpg", data), (".json", b"{}"), *extra):
                        info = tarfile.TarInfo(key + suffix)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return folder


def parquet(folder, named=True):
    """Hugging Face's folder data/, with its names of images and classes, one class name twice, as in imagenet-1k."""
    (folder / "data").mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"names": ["tench", "crane", "crane"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if named else {}
    for split, prefix in (("train", "train"), ("val", "validation")):
        for number, images in enumerate(cut(IMAGES[split], 2)):
            table = pyarrow.table(
                {
                    "image": [
                        {"bytes": data, "path": name.replace(".JPEG", f"_{WNIDS[label]}.JPEG")}
                        for name, label, data in images
                    ],
                    "label": pyarrow.array([label for _, label, _ in images], pyarrow.int64()),
                }
            ).replace_schema_metadata(metadata)
            path = folder / "data" / f"{prefix}-{number:05}-of-00002.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=3)
    return folder


KINDS = {
    "tfrecords": (tfrecords, WNIDS),
    "tfrecords in folders": (lambda folder: tfrecords(folder, within="folders"), WNIDS),
    "tfds": (tfds, ["0", "1", "2"]),
    "webdataset": (webdataset, ["0", "1", "2"]),
    "webdataset in folders": (lambda folder: webdataset(folder, within=True), ["0", "1", "2"]),
    "parquet": (parquet, ["tench", "crane", "crane"]),
    "parquet without names": (lambda folder: parquet(folder, named=False), ["0", "1", "2"]),
}


def find(path, tmp_path):
    return find_source(path, tmp_path / "scratch", tmp_path / "data")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files made from folders."""
    folder = tmp_path_factory.mktemp("folders")
    convert(folders(folder / "source"), folder / "data", max_side=500, num_processes=1)
    return [(folder / f"data/{split}.beton").read_bytes() for split in ("train", "val")]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_the_files_of_the_folders(tmp_path, expected, kind):
    """The files do not depend on the form of the source, to the byte."""
    make, classes = KINDS[kind]
    source, data = make(tmp_path / "source"), tmp_path / "data"
    convert(source, data, max_side=500, num_processes=1)
    assert [(data / f"{split}.beton").read_bytes() for split in ("train", "val")] == expected
    assert json.loads((data / "manifest.json").read_text())["classes"] == classes
    assert sorted(path.name for path in data.iterdir()) == ["manifest.json", "train.beton", "val.beton"]


def test_shards_are_verified_and_looked_at_and_found_complete(tmp_path, capsys):
    source = webdataset(tmp_path / "source")
    lines = look(source, tmp_path / "data", 1, max_side=500).splitlines()
    assert "12 training images" in lines[0] and "6 validation images" in lines[1]
    assert re.match(r"left out of train: 12 non-image files \(such as n01440764_0.json\)", lines[2])
    convert(source, tmp_path / "data", max_side=500, num_processes=1)
    verify(tmp_path / "data", 1, source)
    convert(source, tmp_path / "data", max_side=500, num_processes=1)
    assert "is complete: 12 training and 6 validation images" in capsys.readouterr().out
    assert json.loads((tmp_path / "data/manifest.json").read_text())["left_out"]["train"] == {"non-image file": 12}


def test_a_listing_of_shards_is_made_once(tmp_path, monkeypatch):
    for kind in ("tfrecords", "webdataset", "parquet"):
        source = KINDS[kind][0](tmp_path / kind)
        first = find(source, tmp_path)
        with monkeypatch.context() as patch:
            for name in ("list_tfrecords", "list_webdataset", "copy_images"):
                patch.setattr(f"lbsgd.convert.shards.{name}", None)
            again = find(source, tmp_path)
        assert again.digest() == first.digest() and again.train.classes == first.train.classes
        assert again.train.left_out.counts == first.train.left_out.counts
    for path in (tmp_path / "scratch").glob("*.images"):
        path.unlink()
    again = find(source, tmp_path)  # parquet's copy is gone, and made again
    assert again.train.reader().read(again.train.member(0)) == first_of_class_0()


def first_of_class_0():
    return min(image for image in IMAGES["train"] if image[1] == 0)[2]


def test_an_undecodable_image_is_named_with_its_shard_and_skipped(tmp_path):
    source = tfrecords(tmp_path / "source", make=lambda name, label, data: imagenet_example(name, label, data))
    bad = [
        imagenet_example(name, label, data if name != "n01443537_2.JPEG" else b"x")
        for name, label, data in IMAGES["train"]
    ]
    for number in range(3):
        records(source / f"train-{number:05}-of-00003", bad[number::3])
    with pytest.raises(DataError, match=r"train-0000\d-of-00003/n01443537_2.JPEG"):
        convert(source, tmp_path / "data", max_side=500, num_processes=1)
    convert(source, tmp_path / "data", max_side=500, num_processes=1, on_error="skip")
    verify(tmp_path / "data", 1, source)


def test_a_lack_of_memory_is_told_with_the_shard(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError

    source = webdataset(tmp_path / "source")
    monkeypatch.setattr(convert_split, "stored_image", no_memory)
    with pytest.raises(
        DataError, match=rf"^{source}/.*train.*\.tar/n01440764_\d+\.jpg: not enough memory to decode it"
    ):
        convert(source, tmp_path / "data", max_side=500, num_processes=1)


def pushed_folders(folder):
    """What Hugging Face keeps of images in folders: the last part of each path. A shard and class hold a name twice."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        for shard in range(2):
            rows = [
                (
                    b"x" if (split, shard, number) == ("train", 1, 2) else encoded(size=(16, 16), phase=shard + number),
                    at,
                )
                for number, at in enumerate([0, 0, 1, 1])
            ]
            images = [{"bytes": data, "path": f"{number % 2:04}.jpg"} for number, (data, _) in enumerate(rows)]
            table = pyarrow.table({"image": images, "label": [label for _, label in rows]})
            pyarrow.parquet.write_table(table, folder / f"data/{split}-{shard:05}-of-00002.parquet")
    return folder


def test_names_that_repeat_are_told_apart_by_shard_and_row(tmp_path, capsys):
    source, data = pushed_folders(tmp_path / "source"), tmp_path / "data"
    name = f"{source}/data/train-00001-of-00002.parquet/0000.jpg (row 2)"
    with pytest.raises(DataError, match=re.escape(name)):
        convert(source, data, max_side=500, num_processes=1)
    convert(source, data, max_side=500, num_processes=1, on_error="skip")
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["skipped"] == {"train": [name], "val": []}
    assert manifest["skipped_numbers"] == {"train": [5], "val": []}
    verify(data, 1, source)
    for change in ({"skipped_numbers": {}}, {"skipped": {"train": ["elsewhere/" + name], "val": []}}):
        (data / "manifest.json").write_text(json.dumps({**manifest, **change}))
        verify(data, 1, source)


def test_a_skipped_image_of_a_shard_is_known_by_the_name_that_earlier_converters_gave_it(tmp_path):
    for kind, name in (("tfrecords", "train-0000{shard}-of-00003/{name}"), ("parquet", "{name}")):
        source, data = KINDS[kind][0](tmp_path / kind), tmp_path / f"{kind}_data"
        convert(source, data, max_side=500, num_processes=1)
        manifest = json.loads((data / "manifest.json").read_text())
        images = find(source, tmp_path).train
        was = name.format(shard=images.member(3).shard, name=images.names[3])
        earlier = Manifest(**{**manifest, "skipped": {"train": [f"{source}/{was}"]}, "skipped_numbers": {}})
        kept = kept_numbers(find_source(source, tmp_path / "scratch", data), images, earlier, "train")
        assert kept.tolist() == [number for number in range(12) if number != 3]


def test_images_of_one_name_in_one_shard_and_class_are_all_there_in_its_order(tmp_path):
    """As in TFRecords whose names had folders, of which only the last part is kept."""
    source = tfrecords(tmp_path / "source")
    for number in range(3):
        names = [f"1/{folder}/0001.jpg" for folder in (1, 0)]
        made = [imagenet_example(name, label, name.encode()) for label in range(3) for name in names]
        records(source / f"train-{number:05}-of-00003", made)
    train = find(source, tmp_path).train
    read = [train.reader().read(train.member(number)).decode() for number in range(18)]
    assert read == ["1/1/0001.jpg", "1/0/0001.jpg"] * 9
    assert train.where(3) == f"{source}/train-00001-of-00003/0001.jpg (record 1)"


def test_names_of_shards_may_be_no_utf_8(tmp_path, expected):
    source = tfrecords(tmp_path / "source")
    for path in source.iterdir():
        path.rename(source / (os.fsdecode(b"\xff-") + path.name))
    convert(source, tmp_path / "data", max_side=500, num_processes=1)
    assert [(tmp_path / f"data/{split}.beton").read_bytes() for split in ("train", "val")] == expected


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(path, tmp_path):
    with pytest.raises(DataError) as error:
        find(path, tmp_path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_shard_is_refused_and_named(tmp_path):
    for kind, name in (("tfrecords", "train-00001-of-00003"), ("parquet", "data/validation-00000-of-00002.parquet")):
        source = KINDS[kind][0](tmp_path / kind)
        (source / name).unlink()
        counted = re.search(r"\d+-of-\d+", name)[0]
        assert f"lacks the shards {counted} beside" in refused(source, tmp_path)


@pytest.mark.parametrize(
    "names, missing",
    [
        (["x-train-000000.tar", "x-train-000002.tar"], "x-train-000001.tar"),
        (["train/000000.tar", "train/000003.tar"], "000001.tar, 000002.tar"),
        (["x-train-000003.tar"], "x-train-000001.tar, x-train-000002.tar"),
        (["train1.tar", "train2.tar", "train4.tar"], "train3.tar"),
        (["train-0.tar", "val1.tar", "val3.tar"], "val2.tar"),
        (["train-0.parquet", "train-2.parquet"], "train-1.parquet"),
        (["train-0.tar", "train-6.tar"], "train-1.tar, train-2.tar, train-3.tar and 2 more"),
        (
            ["train-0000000000.tar", "train-9000000002.tar"],
            "train-0000000001.tar, .*02.tar, .*03.tar and 8,999,999,998 more",
        ),
        (["train.tfrecord-00000-of-00002", "b-train.tfrecord-00001-of-00002"], "00000-of-00002"),
    ],
)
def test_a_missing_shard_among_numbered_ones_is_refused_and_named(tmp_path, names, missing):
    for name in [*names, re.sub("[23]", "1", names[0].replace("train", "val").replace("3", "0"))]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert re.search(f"lacks the shards {missing} beside", refused(tmp_path, tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ["x-train-000001.tar", "x-train-000002.tar"],
        ["train2017.tar"],
        ["train-20260131.tar", "train-20260201.tar"],
        ["a-train-0.tar", "b-train-0.tar", "b-train-1.tar"],
        ["train.parquet"],
        ["train-00000-of-00002-7ab1.parquet", "train-00001-of-00002-07c9.parquet"],
    ],
)
def test_shards_that_leave_no_number_out_are_found(tmp_path, names):
    for name in [*names, *(name.replace("train", "val") for name in names)]:
        (tmp_path / name).write_bytes(b"")
    assert find_shards(tmp_path).names["train"] == sorted(names)


@pytest.mark.parametrize(
    "names, told",
    [
        (["train-00000-of-00001", "train/train-00000-of-00001"], "train-00000-of-00001 and train/train-00000-of-00001"),
        (["train-0.tar", "train-1.tar", "train/train-1.tar"], "train-1.tar and train/train-1.tar"),
        (["data/train.parquet", "train/train.parquet"], "data/train.parquet and train/train.parquet"),
        (["train-0-of-2", "train-1-of-2", "train-0-of-1"], "train-0-of-1 and train-0-of-2"),
        (["train-0-of-1-7ab1.parquet", "train-0-of-1-07c9.parquet"], "train-0-of-1-07c9.* and train-0-of-1-7ab1"),
    ],
)
def test_shards_that_are_there_twice_are_refused(tmp_path, names, told):
    """In two folders, cut into other numbers of shards, or in another version: all images would be there twice."""
    for name in [*names, names[0].rpartition("/")[2].replace("train", "val")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert re.search(f"holds the shards {told}.*, and only one can be meant", refused(tmp_path, tmp_path))


def test_a_shard_of_several_names_is_taken_once(tmp_path):
    source = tfrecords(tmp_path / "source", within="folders")
    (source / "val").symlink_to("validation")
    os.link(source / "train/train-00001-of-00003", source / "train-00001-of-00003")
    found = find(source, tmp_path)
    assert len(found.train) == 12 and len(found.val) == 6


def test_what_only_has_the_name_of_a_shard_is_none(tmp_path):
    """macOS puts a file of attributes beside each one, and people unpack a tar into a folder of its name."""
    for name in ("train-0.tar", "val-0.tar", "._train-0.tar", "._train-1.tar"):
        (tmp_path / name).touch()
    (tmp_path / "train-1.tar").mkdir()
    assert find_shards(tmp_path).names == {"train": ["train-0.tar"], "val": ["val-0.tar"]}


def test_one_file_may_be_a_shard_of_both_splits(tmp_path):
    """As in a data set for a trial, whose validation images are a link to the training images."""
    (tmp_path / "train-0.tar").touch()
    (tmp_path / "val-0.tar").symlink_to("train-0.tar")
    assert find_shards(tmp_path).names == {"train": ["train-0.tar"], "val": ["val-0.tar"]}


def test_tars_of_classes_are_not_taken_for_shards(tmp_path):
    for name in ("train/n01440764.tar", "train/n01443537.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    said = refused(tmp_path, tmp_path)
    assert "train/n01440764.tar holds the images of one class; unpack each" in said and "&& tar xf $tar -C" in said


def test_a_shard_that_is_a_link_to_nothing_is_refused(tmp_path):
    """It is the last shard, so no number shows that it is missing."""
    source = webdataset(tmp_path / "source")
    (source / "imagenet-train-000002.tar").symlink_to("/nowhere/2.tar")
    assert "imagenet-train-000002.tar is a link to /nowhere/2.tar, which cannot be read" in refused(source, tmp_path)


@pytest.mark.parametrize("place", [0, 9, 12, 200, -20, -1])
def test_a_flipped_byte_of_a_record_is_found_before_the_work_begins(tmp_path, place):
    source = tfrecords(tmp_path / "source")
    path = source / "train-00001-of-00003"
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    said = refused(source, tmp_path)
    assert str(path) in said and ("is damaged: " in said or "is no TFRecord file" in said)


@pytest.mark.parametrize("num_bytes", [0, 5, 12, 100, -1, -4])
def test_a_truncated_shard_of_records_is_refused(tmp_path, num_bytes):
    source = tfrecords(tmp_path / "source")
    path = source / "validation-00001-of-00002"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert str(path) in refused(source, tmp_path)


@pytest.mark.parametrize(
    "record, message",
    [
        (b"no protobuf", "record 0 is no tf.train.Example"),
        (b"\n\xff\xff\xff\xff\x0f", "reaches beyond its message"),
        (b"\x0b", "wire type 3"),
        (b"\xff" * 12, "more than 64 bits"),
        (b"\n", "record 0 is no tf.train.Example"),
        (b"", "it has no image/encoded, but nothing"),
        (example(image__encoded=b"x"), "it has no image/class/label, but image/encoded"),
        (example(image__encoded=b"x", image__class__label=-1), "not one number from 0 on"),
        (example(image__encoded=b"x", image__class__label=[1, 2]), r"is \[1, 2\], not one number"),
        (example(image__encoded=b"x", image__class__label=1.5), r"is \[\], not one number"),
        (example(image__encoded=3, image__class__label=1), "image/encoded has 0 values"),
        (example(image__encoded=b"x", image__class__label=1, image__class__synset=b"\xff"), "can't decode"),
    ],
)
def test_what_is_no_example_of_an_image_is_refused(tmp_path, record, message):
    source = tfrecords(tmp_path / "source")
    records(source / "train-00000-of-00003", [record])
    assert re.search(message, refused(source, tmp_path))


def test_a_label_with_two_synsets_is_refused(tmp_path):
    source = tfrecords(tmp_path / "source")
    records(source / "train-00000-of-00003", [imagenet_example("a.JPEG", 0, b"x"), imagenet_example("b.JPEG", 1, b"x")])
    records(source / "train-00001-of-00003", [example(image__encoded=b"x", image__class__label=1)])
    assert "label 1 is , and n01440764 in another record" in refused(source, tmp_path)


def test_splits_of_two_tables_of_labels_are_refused(tmp_path):
    """All labels of the validation images would be wrong."""
    source = tfrecords(tmp_path / "source")
    for number, images in enumerate(cut(IMAGES["val"], 2)):
        turned = [(name, (label + 1) % 3, data) for name, label, data in images]
        records(source / f"validation-{number:05}-of-00002", [imagenet_example(*image) for image in turned])
    assert find(source, tmp_path)  # with other labels, but the same table
    for number in range(2):
        examples = [
            example(image__encoded=b"x", image__class__label=label + 1, image__class__synset=WNIDS[-label].encode())
            for label in range(3)
        ]
        records(source / f"validation-{number:05}-of-00002", examples)
    said = "label 2 is n01443537 in the training shards and n02102040 in the validation shards"
    assert said in refused(source, tmp_path)


def test_parquet_shards_of_two_tables_of_labels_are_refused(tmp_path):
    source = parquet(tmp_path / "source")
    path = source / "data/train-00001-of-00002.parquet"
    table = pyarrow.parquet.read_table(path)
    metadata = {name: value.replace(b"tench", b"crane") for name, value in table.schema.metadata.items()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    assert f"{path}: label 0 is crane here and tench in another shard" in refused(source, tmp_path)


def test_packed_and_unpacked_labels_are_read(tmp_path):
    """proto3 packs numbers; proto2's writers do not."""
    from lbsgd.convert.tfrecords import _first_number

    assert _first_number(b"\x1a\x04\x0a\x02\xac\x02", (0, 6)) == 300
    assert _first_number(b"\x1a\x03\x08\xac\x02", (0, 5)) == 300


@pytest.mark.parametrize(
    "extra, message",
    [
        ([(".png", b"x")], r"are two images of one sample, '(n0|ILSVRC)"),
        ([(".cls", b"tench")], r"holds b'tench', and no number of a class"),
        ([(".cls", b"-1")], r"holds b'-1', and no number of a class"),
        ([(".cls", b"1234567890")], r"holds b'1234567890', and no number of a class"),
    ],
)
def test_samples_that_are_not_one_image_and_one_class_are_refused(tmp_path, extra, message):
    assert re.search(message, refused(webdataset(tmp_path / "source", extra), tmp_path))


def test_a_sample_without_a_class_is_refused(tmp_path):
    source = webdataset(tmp_path / "source")
    path = source / "imagenet-train-000000.tar"
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("alone.jpg"))
    assert "alone.jpg has no alone.cls" in refused(source, tmp_path)


def test_a_class_without_its_image_is_counted(tmp_path):
    source = webdataset(tmp_path / "source")
    with tarfile.open(source / "imagenet-train-000000.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("lost.cls"))
        for name in ("photo.heic", "photo.cls", ".hidden/a.jpg", ".hidden/a.cls"):  # left out for another reason
            tar.addfile(tarfile.TarInfo(name))
    train, _ = left_out_lines(find(source, tmp_path))  # of both splits the .json files
    assert train.startswith("left out of train: ") and "1 missing image (lost in imagenet-train-000000.tar)" in train


def test_images_of_one_name_in_different_folders_or_shards_are_all_there(tmp_path):
    source = webdataset(tmp_path / "webdataset")
    with tarfile.open(source / "imagenet-train-000000.tar", "a") as tar:
        for key in ("b/1", "a/1", "z/0"):
            for name, content in ((f"{key}.cls", b"2\n"), (f"{key}.small.jpg", key.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert [name for name in find(source, tmp_path).train.names if "/" in name] == [
        "z/0.small.jpg",
        "a/1.small.jpg",
        "b/1.small.jpg",
    ]
    source = parquet(tmp_path / "parquet")
    for shard in range(2):
        images = [{"bytes": b"%d of %d" % (label, shard), "path": "1.JPEG"} for label in range(3)]
        table = pyarrow.table({"image": images, "label": [0, 1, 2]})
        pyarrow.parquet.write_table(table, source / f"data/train-{shard:05}-of-00002.parquet")
    train = find(source, tmp_path).train
    read = [train.reader().read(train.member(row)) for row in range(6)]
    assert read == [b"%d of %d" % (label, shard) for label in range(3) for shard in range(2)]


def test_more_shards_and_labels_than_16_bits_number_are_kept():
    files = Files("shards", "labels")
    files.add("a", sizes=1, shards=1 << 16, labels=(1 << 31) - 1)
    assert files.member(0).shard == 1 << 16


def test_a_shard_of_parquet_is_not_held_in_memory(tmp_path, monkeypatch):
    """Except one group of its rows, which PyArrow's writer puts into one page."""
    (tmp_path / "scratch").mkdir()
    images = [{"bytes": RNG.bytes(100_000), "path": f"{number}.JPEG"} for number in range(400)]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": [0] * 400}), path, row_group_size=20)
    assert path.stat().st_size > 40_000_000
    before, held, rows = pyarrow.total_allocated_bytes(), [], lbsgd.convert.parquet._rows

    def watched(file):
        for row in rows(file):
            held.append(pyarrow.total_allocated_bytes() - before)
            yield row

    monkeypatch.setattr(lbsgd.convert.parquet, "_rows", watched)
    copy_images(tmp_path, [path.name], tmp_path / "scratch/train.images")
    assert len(held) == 400 and max(held) < 20_000_000


def test_one_shard_that_was_written_again_makes_the_images_others(tmp_path):
    """This is how a finished conversion knows that it is out of date."""
    source = webdataset(tmp_path / "source")
    before = find(source, tmp_path).stamps_digest()
    os.utime(source / "imagenet-train-000001.tar", (1 << 32, 1 << 32))
    assert find(source, tmp_path).stamps_digest() != before


def test_classes_without_names_come_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "source" / "data").mkdir(parents=True)
    table = pyarrow.table({"image": [b"of 10", b"of 2", b"of 0"], "label": [10, 2, 0]})
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(table, tmp_path / "source" / "data" / f"{split}-00000-of-00001.parquet")
    train = find(tmp_path / "source", tmp_path).train
    assert train.classes == ["0", "2", "10"] and train.labels.tolist() == [0, 1, 2]
    assert [train.reader().read(train.member(row)) for row in range(3)] == [b"of 0", b"of 2", b"of 10"]


def test_a_validation_class_without_training_images_is_refused(tmp_path):
    source = webdataset(tmp_path / "source")
    with tarfile.open(source / "imagenet-val-000000.tar", "a") as tar:
        for name, content in (("z.cls", b"123456789"), ("z.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert "z.jpg has class 123456789, which has no training images" in refused(source, tmp_path)


def test_parquet_of_something_else_is_refused(tmp_path):
    source = parquet(tmp_path / "source")
    path = source / "data/train-00000-of-00002.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), path)
    assert "has no column image, but text, label" in refused(source, tmp_path)
    for label in (-1, 1 << 31, None):
        pyarrow.parquet.write_table(pyarrow.table({"image": [{"bytes": b"x", "path": "a"}], "label": [label]}), path)
        assert f"row 0 has label {label}, which is no number of a class" in refused(source, tmp_path)
    pyarrow.parquet.write_table(
        pyarrow.table({"image": pyarrow.array([{"bytes": None, "path": "a"}]), "label": [1]}), path
    )
    assert "row 0 holds no image" in refused(source, tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    assert f"{path} cannot be read as parquet" in refused(source, tmp_path)


def test_what_a_killed_process_had_copied_of_parquet_takes_no_room(tmp_path, monkeypatch):
    source, left = parquet(tmp_path / "source"), tmp_path / "scratch/train.0123456789abcdef.partial"
    left.parent.mkdir()
    left.touch()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0 if left.exists() else 1 << 40))
    assert len(find_source(source, tmp_path / "scratch", tmp_path / "data").train) > 0


def test_a_full_disk_is_no_damage_of_a_parquet_shard(tmp_path, monkeypatch):
    source = parquet(tmp_path / "source")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lbsgd.convert.parquet, "_copy_shard", full)
    assert "has no room (No space left on device)" in refused(source, tmp_path)


def test_an_image_of_parquet_beyond_the_stated_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lbsgd.convert.parquet, "MAX_IMAGE_BYTES", 1)
    assert "row 0 holds no image of at most 1 bytes" in refused(parquet(tmp_path / "source"), tmp_path)


def test_a_damaged_parquet_shard_is_one_line_with_its_name(tmp_path):
    """For most damage PyArrow raises an OSError without a number, and UnicodeDecodeError for a byte of a name."""
    source = parquet(tmp_path / "source")
    path = source / "data/train-00001-of-00002.parquet"
    content, told = path.read_bytes(), set()
    for place in [*range(4, len(content), 61), content.index(b"n01440764_")]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 128]) + content[place + 1 :])
        try:
            find(source, tmp_path)
        except DataError as error:
            # Damage that keeps the file readable may name a class that no other split has.
            assert str(error).startswith(str(path)) or error.__cause__ is None and str(source) in str(error)
            assert "\n" not in str(error)
            told.add(type(error.__cause__))
        shutil.rmtree(tmp_path / "scratch")
    assert {OSError, UnicodeDecodeError} <= told


@pytest.mark.parametrize("package, kind", [("crc32c", "tfrecords"), ("pyarrow", "parquet")])
def test_without_its_package_a_kind_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch, package, kind):
    source = KINDS[kind][0](tmp_path / "source")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert "run: pip install" in refused(source, tmp_path)


def test_shards_of_one_split_alone_are_refused(tmp_path):
    source = tfrecords(tmp_path / "source")
    for path in source.glob("validation-*"):
        path.unlink()
    assert "holds tfrecord shards such as train-00000-of-00003, and none of val" in refused(source, tmp_path)


def renamed(source, before, after):
    """Rename a source's shards, and the folders that hold some."""
    for path in sorted(source.rglob("*"), reverse=True):
        path.rename(path.with_name(path.name.replace(before, after)))
    return source


@pytest.mark.parametrize("within", [False, True])
def test_shards_named_valid_are_validation_shards(tmp_path, within):
    as_val = find(webdataset(tmp_path / "val", within=within), tmp_path)
    source = renamed(webdataset(tmp_path / "source", within=within), "val", "valid")
    assert find(source, tmp_path).digest() == as_val.digest()


def test_validation_shards_of_two_names_are_refused_because_one_may_be_a_copy(tmp_path):
    source = webdataset(tmp_path / "source")
    for path in source.glob("*-val-*"):
        shutil.copy(path, path.with_name(path.name.replace("val", "valid")))
    first, second = "imagenet-val-000000.tar", "imagenet-valid-000000.tar"
    assert f"holds shards such as {first} and {second}; keep those of one name" in refused(source, tmp_path)


@pytest.mark.parametrize(
    "make, before, such_as",
    [(webdataset, "val", "imagenet-test-000000.tar"), (parquet, "validation", "data/test-00000-of-00002.parquet")],
)
def test_test_shards_are_used_only_once_they_are_renamed(tmp_path, make, before, such_as):
    source = renamed(make(tmp_path / "source"), before, "test")
    assert f"none of val; fetch them, or rename those of test, such as {such_as}, to val" in refused(source, tmp_path)
    find(renamed(source, "test", "val"), tmp_path)


def test_one_webdataset_shard_is_refused_with_the_command_that_reads_all(tmp_path):
    source = webdataset(tmp_path / "source")
    [shard] = source.glob("*train-000000.tar")
    told = f"{shard} is a WebDataset shard; name its folder: lbsgd convert --source {source} --data_dir "
    assert told in refused(shard, tmp_path)


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz"])
@pytest.mark.parametrize("within", [False, True])
def test_compressed_shards_are_refused_with_the_advice_to_uncompress_them(tmp_path, suffix, within):
    source = webdataset(tmp_path / "source", within=within)
    for shard in sorted(source.rglob("*.tar")):
        packed = shard.with_suffix(f".{suffix}")
        packed.write_bytes(gzip.compress(shard.read_bytes()))
        shard.unlink()
    first = min(source.rglob("*-train-*")).relative_to(source)
    told = (
        "holds compressed shards such as {}; uncompress all of them" if within else "uncompress all shards such as {}"
    )
    assert told.format(first) in refused(source, tmp_path)
    assert f"{packed} is a WebDataset shard; uncompress all of them and name its folder: " in refused(packed, tmp_path)


def test_shards_of_two_kinds_are_refused(tmp_path):
    webdataset(tfrecords(tmp_path / "source"))
    assert "holds shards of tfrecord and of webdataset" in refused(tmp_path / "source", tmp_path)


def test_class_folders_come_before_shards(tmp_path):
    assert find(webdataset(folders(tmp_path / "source")), tmp_path).train.classes == WNIDS
