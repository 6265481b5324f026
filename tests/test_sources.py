"""Sources are found and read in place: folders, ImageNet's archives, Kaggle's folders. Archives are data only."""

import io
import math
import os
import resource
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from converter import ROOT
from PIL import Image

import lbsgd.convert.archives
import lbsgd.convert.compressed
from lbsgd.convert.archives import cached_members, members, read_members
from lbsgd.convert.compressed import uncompressed
from lbsgd.convert.convert import convert, look
from lbsgd.convert.imagenet_labels import synsets
from lbsgd.convert.preflight import left_out_lines
from lbsgd.convert.sources import find_source
from lbsgd.errors import DataError

# In the order of their WordNet ids. The devkit numbers them 1, 2, 3, 4 in another order.
WNIDS = ["n01440764", "n01443537", "n02102040", "n15075141"]
DEVKIT_ORDER = ["n02102040", "n15075141", "n01440764", "n01443537"]
VAL_CLASSES = [2, 0, 3, 1, 2, 0]  # of validation images 1, 2, ...: positions in WNIDS


def jpeg(number, size=(24, 16)):
    """Return a small JPEG, a different one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (2, 3, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def train_files():
    return {f"{wnid}/{wnid}_{i}.JPEG": jpeg(10 * c + i) for c, wnid in enumerate(WNIDS) for i in (10, 2, 1)}


def val_files():
    return {f"ILSVRC2012_val_{i:08}.JPEG": jpeg(1000 + i) for i in range(1, len(VAL_CLASSES) + 1)}


def labelled(files):
    return {f"{WNIDS[label]}/{name}": data for label, (name, data) in zip(VAL_CLASSES, files.items(), strict=True)}


def write_files(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def tar_bytes(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


def add(tar, name, data=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def devkit_files(order=DEVKIT_ORDER):
    """Return the devkit's two files: meta.mat as MATLAB would write it, including synsets that are not leaves."""
    from scipy.io import savemat

    ids = {wnid: number for number, wnid in enumerate(order, 1)}
    fields = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
        ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]
    table = np.zeros((len(order) + 1, 1), fields)
    for row, wnid in enumerate([*order, "n00001740"]):
        leaf = wnid in ids
        table[row, 0] = (
            float(ids.get(wnid, len(order) + 1)),
            wnid,
            "tench, Tinca tinca",
            "a fish, née “cyprinid”",
            0.0 if leaf else 2.0,
            np.zeros((1, 0)) if leaf else np.array([[1.0, 2.0]]),
            0.0,
            1300.0,
        )
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table}, do_compression=True)
    truth = "".join(f"{ids[WNIDS[label]]}\n" for label in VAL_CLASSES)
    return {"data/meta.mat": buffer.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def devkit(folder, order=DEVKIT_ORDER):
    files = {f"ILSVRC2012_devkit_t12/{name}": data for name, data in devkit_files(order).items()}
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(
        tar_bytes({"ILSVRC2012_devkit_t12/readme.txt": b"read me", **files}, "w:gz")
    )


def make_folders(folder):
    write_files(folder / "train", train_files())
    write_files(folder / "val", labelled(val_files()))
    return folder


def make_official(folder):
    folder.mkdir(parents=True)
    train = {}
    for name, data in train_files().items():
        train.setdefault(name.split("/")[0], {})[name.split("/")[1]] = data
    classes = {f"{wnid}.tar": tar_bytes(files) for wnid, files in reversed(train.items())}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(classes))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(dict(reversed(val_files().items()))))
    devkit(folder)
    return folder


def make_kaggle(folder):
    base = folder / "ILSVRC/Data/CLS-LOC"
    write_files(base / "train", train_files())
    write_files(base / "val", val_files())
    write_files(base / "test", {"ILSVRC2012_test_00000001.JPEG": jpeg(0)})
    lines = [
        f"{name.removesuffix('.JPEG')},{WNIDS[label]} 10 20 30 40 {WNIDS[0]} 1 2 3 4"
        for label, name in zip(VAL_CLASSES, val_files(), strict=True)
    ]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n")
    return folder


def make_unpacked(folder):
    """Unpack the training folders, but leave validation images and devkit as downloaded."""
    write_files(folder / "train", train_files())
    write_files(folder / "val", val_files())
    write_files(folder / "ILSVRC2012_devkit_t12", devkit_files())
    return folder


def make_tar(folder, mode="w", name="imagenet.tar"):
    folder.mkdir(parents=True)
    files = {f"imagenet/train/{key}": data for key, data in train_files().items()}
    files |= {f"imagenet/val/{key}": data for key, data in labelled(val_files()).items()}
    (folder / name).write_bytes(tar_bytes(dict(reversed(files.items())), mode))
    return folder / name


LAYOUTS = {
    "folders": make_folders,
    "official": make_official,
    "kaggle": make_kaggle,
    "unpacked": make_unpacked,
    "tar": make_tar,
    "tar.gz": lambda folder: make_tar(folder, "w:gz", "imagenet.tar.gz"),
    "kaggle from within": lambda folder: make_kaggle(folder) / "ILSVRC/Data/CLS-LOC",
    "named": lambda folder: make_official(folder) / "ILSVRC2012_img_train.tar",
}


def find(path, tmp_path):
    return find_source(path, tmp_path / "scratch", tmp_path / "data")


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_with_the_same_labels(tmp_path, layout):
    source = find(LAYOUTS[layout](tmp_path / "source"), tmp_path)
    assert source.train.classes == source.val.classes == WNIDS
    for images, files in ((source.train, train_files()), (source.val, labelled(val_files()))):
        expected = sorted(files, key=lambda name: tuple(name.split("/")))
        assert [WNIDS[label] for label in images.labels] == [name.split("/")[0] for name in expected]
        reader = images.reader()
        read = [reader.read(images.member(index)) for index in range(len(images))]
        assert read == [files[name] for name in expected]


def test_a_tar_is_listed_once_as_long_as_it_stays_the_same(tmp_path, monkeypatch):
    path = make_official(tmp_path / "source") / "ILSVRC2012_img_train.tar"
    found = cached_members(path, tmp_path / "scratch")
    with monkeypatch.context() as patch:
        patch.setattr(lbsgd.convert.archives, "members", None)
        assert list(cached_members(path, tmp_path / "scratch")) == list(found) == list(members(path))
    path.write_bytes(tar_bytes({"a.tar": tar_bytes({"1.JPEG": jpeg(1)})}))
    assert [member.name for member in cached_members(path, tmp_path / "scratch")] == ["a/1.JPEG"]


PEAKS = """
import sys, tracemalloc
from pathlib import Path
from lbsgd.convert.sources import find_source

tracemalloc.start()
for _ in range(2):  # from the archive, and from the listing kept of it
    source = find_source(*map(Path, sys.argv[1:]))
    print(tracemalloc.get_traced_memory()[1] / len(source.train))
    tracemalloc.reset_peak()
"""


def test_a_million_images_take_less_than_a_gigabyte_to_find(tmp_path):
    """At most 600 bytes each. ImageNet's 1.28 million took 0.53 GB, including Python itself.

    Measured in a separate process: pathlib interns names, and the table of interned names may grow.
    """
    folder = make_official(tmp_path / "source")
    images = [header(f"n02102040_{number}.JPEG", 512) + bytes(512) for number in range(4_000)]
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
        for wnid in WNIDS:
            add(tar, f"{wnid}.tar", b"".join(images[:: 4 if wnid != WNIDS[0] else 1]) + bytes(1024))
    command = [sys.executable, "-c", PEAKS, *map(str, (folder, tmp_path / "scratch", tmp_path / "data"))]
    peaks = [float(peak) for peak in subprocess.check_output(command, cwd=ROOT).split()]
    assert len(peaks) == 2 and max(peaks) < 600


def test_every_layout_gives_the_same_files(tmp_path):
    """The order of torchvision's class folders is used for all, so the form of the source leaves no trace."""
    results = set()
    for layout in ("folders", "official", "kaggle", "tar.gz"):
        convert(LAYOUTS[layout](tmp_path / layout), tmp_path / "data" / layout, max_side=500, num_processes=1)
        results.add(tuple((tmp_path / "data" / layout / f"{name}.beton").read_bytes() for name in ("train", "val")))
    assert len(results) == 1


def test_images_come_in_torchvision_s_order(tmp_path):
    from torchvision.datasets import ImageFolder

    make_folders(tmp_path / "source")
    names = ("Zebra/b.JPEG", "Zebra/a/z.JPEG", "Zebra/a.b/c.JPEG")
    write_files(tmp_path / "source/train", {name: jpeg(number) for number, name in enumerate(names)})
    write_files(tmp_path / "source/val", {"Zebra/nested/deeper/1.png": jpeg(4)})
    source = find(tmp_path / "source", tmp_path)
    for images, name in ((source.train, "train"), (source.val, "val")):
        theirs = ImageFolder(tmp_path / "source" / name)
        assert images.classes == theirs.classes
        assert [(images.where(i), label) for i, label in enumerate(images.labels)] == theirs.samples


@pytest.mark.parametrize("val", ["val", "val/.hidden"])
def test_folders_without_images_beside_the_archives_hide_nothing(tmp_path, val):
    """Such as `mkdir train val` makes, or a tar per class unpacked there."""
    folder = make_official(tmp_path / "source")
    (folder / val).mkdir(parents=True)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar") as tar:
        tar.extractall(folder / "train")
    (folder / "train/stray.txt").touch()
    source = find(folder, tmp_path)
    assert source.train.container.name == "ILSVRC2012_img_train.tar" and len(source.train) == 12
    assert source.val.container.name == "ILSVRC2012_img_val.tar" and len(source.val) == 6


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_archive_beside_its_unpacked_images_is_told(tmp_path, split):
    """The folder is read, though it may hold a part of the archive, or other images."""
    folder = make_official(tmp_path / "source")
    files = {"train": train_files(), "val": labelled(val_files())}[split]
    write_files(folder / split, files)
    source = find(folder, tmp_path)
    assert source.splits[split].container == folder / split
    archive = folder / f"ILSVRC2012_img_{split}.tar"
    assert left_out_lines(source) == [f"left out of {split}: 1 other source ({archive})"]


def test_a_folder_between_the_split_and_its_classes_is_warned_of(tmp_path, capsys):
    """All images would be of one class, of that folder's name, and every error 0 %."""
    for split in ("train", "val"):
        write_files(tmp_path / f"source/{split}/images", {"n01440764/1.JPEG": jpeg(1), "n01443537/2.JPEG": jpeg(2)})
    told = f"warning: {tmp_path}/source/train has one class, images, with which nothing can be learned; a folder"
    assert told in look(tmp_path / "source", tmp_path / "data", max_side=500)
    convert(tmp_path / "source", tmp_path / "data", num_processes=1, max_side=500)
    assert told in capsys.readouterr().out
    for split in ("train", "val"):
        write_files(tmp_path / f"right/{split}", {"n01440764/1.JPEG": jpeg(1), "n01443537/2.JPEG": jpeg(2)})
    assert "warning" not in look(tmp_path / "right", tmp_path / "data2", max_side=500)


def test_what_lies_above_kaggle_s_folders_is_told(tmp_path):
    folder = make_kaggle(tmp_path / "source")
    write_files(folder / "train", train_files())
    (folder / "ILSVRC2012_img_val.tar").write_bytes(b"")
    (folder / "train-00000-of-00001.parquet").write_bytes(b"")
    assert left_out_lines(find(folder, tmp_path)) == [
        f"left out of train: 2 other sources (such as {folder}/train)",
        f"left out of val: 1 other source ({folder}/ILSVRC2012_img_val.tar)",
    ]


@pytest.mark.parametrize(
    "named, beside",
    [
        ("ILSVRC2012_img_train.tar", "train/n01440764"),
        ("ILSVRC2012_img_val.tar", "val/n01440764"),
        ("ILSVRC2012_img_train.tar", "ILSVRC/Data/CLS-LOC"),
        ("train-00000-of-00001.parquet", "train/n01440764"),
    ],
)
def test_an_archive_that_is_named_is_read_or_refused(tmp_path, named, beside):
    path = tmp_path / named
    path.write_bytes(b"")
    (tmp_path / beside).mkdir(parents=True)
    with pytest.raises(DataError, match=f"would be read instead of {path}; move it away, or name {tmp_path} to"):
        find(path, tmp_path)


def test_ground_truth_numbers_are_the_devkit_s_and_not_positions(tmp_path):
    """Taken as positions in the sorted ids, the numbers would be valid labels, but wrong."""
    right = find(make_official(tmp_path / "a"), tmp_path).val
    make_official(tmp_path / "b")
    devkit(tmp_path / "b", order=WNIDS)  # with the truth's numbers renumbered as well
    assert right.labels.tolist() == find(tmp_path / "b", tmp_path).val.labels.tolist() == sorted(VAL_CLASSES)
    truth = devkit_files()["data/ILSVRC2012_validation_ground_truth.txt"].split()
    assert sorted(int(number) - 1 for number in truth[:3]) != sorted(VAL_CLASSES[:3])


def test_the_devkit_s_table_is_read_as_scipy_reads_it(tmp_path):
    from scipy.io import loadmat

    data = devkit_files()["data/meta.mat"]
    theirs = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    assert synsets(data) == {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in theirs}
    assert synsets(data)[1] == "n02102040"


@pytest.mark.parametrize("compressed", [True, False])
def test_the_devkit_s_table_is_found_among_others_and_small_numbers_are_read(compressed):
    """MATLAB puts whole numbers and words of up to 4 bytes beside their tag."""
    from scipy.io import savemat

    table = np.zeros((2, 1), [("WNID", "O"), ("ILSVRC2012_ID", "O")])
    table[:, 0] = [("n02102040", np.uint16(300)), ("n1", np.uint8(2))]
    buffer = io.BytesIO()
    savemat(buffer, {"version": 12.0, "of": "the year", "synsets": table}, do_compression=compressed)
    assert synsets(buffer.getvalue()) == {300: "n02102040", 2: "n1"}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "remove, message",
    [
        (["train", "val"], "no train/ and no ILSVRC2012_img_train.tar, no val/ and no ILSVRC2012_img_val.tar found"),
        (
            ["val"],
            "no validation images in .*: no val/ and no ILSVRC2012_img_val.tar found; .* move some images of each "
            "class from train/ to val/, or name the source with",
        ),
        ([f"train/n01443537/n01443537_{i}.JPEG" for i in (1, 2, 10)], "no images in .*train for class n01443537"),
        ([f"train/{wnid}" for wnid in WNIDS], "no images in .*train; expected one folder per class"),
    ],
)
def test_incomplete_folders_are_refused(tmp_path, remove, message):
    make_folders(tmp_path / "source")
    for number, name in enumerate(remove):
        (tmp_path / "source" / name).rename(tmp_path / str(number))
    with pytest.raises(DataError, match=message):
        find(tmp_path / "source", tmp_path)


@pytest.mark.parametrize("split, name", [("val", "validation"), ("train", "training"), ("val", "Val")])
def test_a_folder_of_a_similar_name_is_to_be_renamed(tmp_path, split, name):
    make_folders(tmp_path / "source")
    (tmp_path / "source" / split).rename(tmp_path / "source" / name)
    with pytest.raises(DataError, match=f"; rename {tmp_path}/source/{name} to {split}, or "):
        find(tmp_path / "source", tmp_path)


def test_at_most_three_untrained_classes_are_named(tmp_path):
    make_folders(tmp_path / "source")
    write_files(tmp_path / "source/val", {f"{name}/1.JPEG": jpeg(1) for name in "cdefg"})
    with pytest.raises(DataError, match="val has other classes than .*train, which has no c, d, e and 2 more; both"):
        find(tmp_path / "source", tmp_path)


def change_labels(folder, name, old, new):
    path = folder / name
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda folder: (folder / "LOC_val_solution.csv").unlink(),
            "without labels: neither ILSVRC2012_devkit_t12.tar.gz",
        ),
        (
            lambda folder: change_labels(folder, "LOC_val_solution.csv", "ILSVRC2012_val_00000003", "x"),
            "00000003.JPEG has no label in the devkit or in LOC_val_solution.csv",
        ),
        (
            lambda folder: change_labels(folder, "LOC_val_solution.csv", "n15075141 10", "n99999999 10"),
            "00000003.JPEG has class n99999999, which has no training images",
        ),
        (
            lambda folder: change_labels(folder, "LOC_val_solution.csv", "ImageId", "Image"),
            "is not Kaggle's LOC_val_solution.csv",
        ),
        *(
            (
                lambda folder, row=row: (folder / "LOC_val_solution.csv").write_bytes(
                    b"ImageId,PredictionString\n" + row
                ),
                "is not Kaggle's LOC_val_solution.csv",
            )
            for row in (b"a", b"a,", b"\xff,b", b"a," + 200_000 * b"b")
        ),
    ],
)
def test_validation_images_without_good_labels_are_refused(tmp_path, change, message):
    folder = make_kaggle(tmp_path / "source")
    change(folder)
    with pytest.raises(DataError, match=message):
        find(folder, tmp_path)


def meta_of(kind, content):
    """A meta.mat with a single element."""
    return bytes(126) + b"IM" + element(kind, content)


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def table_with(value):
    """Return a struct array whose one record has this element as its ILSVRC2012_ID."""
    head = element(6, b"\2") + element(5, struct.pack("<ii", 1, 1)) + element(1, b"")
    return head + element(5, struct.pack("<i", 16)) + element(1, b"ILSVRC2012_ID".ljust(16, b"\0")) + value


def number(value):
    return (
        element(6, b"\6")
        + element(5, struct.pack("<ii", 1, 1))
        + element(1, b"")
        + element(9, struct.pack("<d", value))
    )


def nested(depth):
    content = b""
    for _ in range(depth):
        content = table_with(element(14, content))
    return content


@pytest.mark.parametrize(
    "name, content",
    [
        ("data/meta.mat", meta_of(14, table_with(element(14, b"")))),
        ("data/meta.mat", meta_of(14, element(6, b""))),
        ("data/meta.mat", meta_of(14, table_with(element(14, number(math.inf))))),
        ("data/meta.mat", meta_of(14, nested(1100))),
        ("data/meta.mat", meta_of(15, b"not zlib's")),
        ("data/meta.mat", b"MATLAB 5.0 MAT-file".ljust(126) + b"IM" + bytes(40)),
        ("data/meta.mat", b""),
        ("data/meta.mat", devkit_files()["data/meta.mat"][:300]),
        ("data/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n999\n"),
        ("data/ILSVRC2012_validation_ground_truth.txt", b"one\n"),
    ],
)
def test_a_damaged_devkit_is_refused(tmp_path, name, content):
    folder = make_unpacked(tmp_path / "source")
    (folder / "ILSVRC2012_devkit_t12" / name).write_bytes(content)
    with pytest.raises(DataError, match="ILSVRC2012_devkit_t12: data/meta.mat and .* do not give the classes"):
        find(folder, tmp_path)


def test_a_devkit_without_its_files_is_refused(tmp_path):
    folder = make_official(tmp_path / "source")
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes({"a": b""}, "w:gz"))
    with pytest.raises(DataError, match="devkit_t12.tar.gz holds no data/meta.mat and no data/ILSVRC2012_validation"):
        find(folder, tmp_path)


HOSTILE = {
    "a path upwards": (
        dict(name="train/../../etc/passwd", data=b"x"),
        "train/../../etc/passwd' is a path that leads out",
    ),
    "an absolute path": (dict(name="/etc/passwd", data=b"x"), "/etc/passwd' is a path that leads out of the archive"),
    "a symbolic link": (
        dict(name="train/a/1.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "1.JPEG' is a symbolic link",
    ),
    "a hard link to nothing": (
        dict(name="train/a/1.JPEG", type=tarfile.LNKTYPE, linkname="other"),
        "1.JPEG' is a link to '",
    ),
    "a hard link out of the archive": (
        dict(name="train/a/1.JPEG", type=tarfile.LNKTYPE, linkname="../etc/passwd"),
        "1.JPEG' is a link to '",
    ),
    "a device": (
        dict(name="train/a/null.JPEG", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        "not a plain file or folder",
    ),
    "a pipe": (dict(name="train/a/1.JPEG", type=tarfile.FIFOTYPE), "1.JPEG' is not a plain file or folder"),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("member, message", HOSTILE.values(), ids=HOSTILE)
def test_an_archive_with_a_member_that_no_data_set_has_is_refused_by_its_name(tmp_path, member, message, nested):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add(tar, "train/a/0.JPEG", jpeg(0))
        add(tar, **member)
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"n01440764.tar": buffer.getvalue()}) if nested else buffer.getvalue())
    with pytest.raises(DataError, match=message.replace("(", r"\(")) as error:
        members(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["cf", "czf"])
def test_a_file_with_several_names_is_read_from_a_tar_as_from_its_folder(tmp_path, mode):
    """For the second name tar writes a hard link."""
    folder = make_folders(tmp_path / "source")
    for name in ("n01440764_1.JPEG", "n01440764_2.JPEG"):
        os.link(folder / "train/n01440764" / name, folder / "train/n15075141" / name)
    subprocess.run(["tar", mode, tmp_path / "a.tar", "-C", folder, "train", "val"], check=True)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert sum(info.islnk() for info in tar) == 2
    convert(folder, tmp_path / "of_the_folder", max_side=500, num_processes=1)
    convert(tmp_path / "a.tar", tmp_path / "of_the_tar", max_side=500, num_processes=1)
    for name in ("train.beton", "val.beton"):
        assert (tmp_path / "of_the_folder" / name).read_bytes() == (tmp_path / "of_the_tar" / name).read_bytes()


def test_a_hard_link_to_a_hard_link_is_the_same_file_also_in_a_tar_within(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add(tar, "a/0.JPEG", jpeg(0))
        add(tar, "a/1.JPEG", type=tarfile.LNKTYPE, linkname="./a/0.JPEG")
        add(tar, "a/2.JPEG", type=tarfile.LNKTYPE, linkname="a/1.JPEG")
    (tmp_path / "a.tar").write_bytes(tar_bytes({"n01440764.tar": buffer.getvalue()}))
    found = list(members(tmp_path / "a.tar"))
    assert [member.name for member in found] == [f"n01440764/a/{number}.JPEG" for number in range(3)]
    assert {member[1:] for member in found} == {found[0][1:]}


def spoil(layout, folder, change):
    """Make a source with a real layout and change(tar) one of its archives. Return the paths of both."""
    place, _, layout = layout.rpartition(" of ")
    path = LAYOUTS[layout](folder)
    archive = {
        "": path,
        "training": folder / "ILSVRC2012_img_train.tar",
        "a class": folder / "ILSVRC2012_img_train.tar",
        "validation": folder / "ILSVRC2012_img_val.tar",
        "devkit": folder / "ILSVRC2012_devkit_t12.tar.gz",
    }[place]
    compression = ":gz" if archive.name.endswith(".gz") else ""
    with tarfile.open(archive) as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}
    buffer = io.BytesIO()
    if place == "a class":
        with (
            tarfile.open(fileobj=io.BytesIO(files["n02102040.tar"])) as inner,
            tarfile.open(fileobj=buffer, mode="w") as tar,
        ):
            for info in inner:
                add(tar, info.name, inner.extractfile(info).read())
            change(tar)
        archive.write_bytes(tar_bytes(files | {"n02102040.tar": buffer.getvalue()}))
        return path, archive
    with tarfile.open(fileobj=buffer, mode="w" + compression) as tar:
        for name, data in files.items():
            add(tar, name, data)
        change(tar)
    archive.write_bytes(buffer.getvalue())
    return path, archive


ARCHIVES = [
    "training of official",
    "a class of official",
    "validation of official",
    "devkit of official",
    "tar",
    "tar.gz",
]


def refusal(path, tmp_path):
    """Return the error for a source. Nothing is written where results go, or where a member's name points to."""
    with pytest.raises(DataError) as error:
        convert(path, tmp_path / "data", max_side=500, num_processes=1)
    assert "\n" not in str(error.value) and list((tmp_path / "data").glob("*")) in ([], [tmp_path / "data/.converting"])
    return str(error.value)


@pytest.mark.parametrize("layout", ARCHIVES)
@pytest.mark.parametrize("member, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_members_are_refused_wherever_they_are_in_imagenet_s_archives(tmp_path, layout, member, message):
    path, archive = spoil(layout, tmp_path / "source", lambda tar: add(tar, **member))
    said = refusal(path, tmp_path)
    assert message in said and said.startswith(f"{archive}: member '")  # not a copy of the archive's content


@pytest.mark.parametrize("layout", ARCHIVES)
def test_members_beyond_the_stated_sizes_are_refused_in_imagenet_s_archives(tmp_path, layout, monkeypatch):
    name = {"devkit of official": "late/data/meta.mat"}.get(layout, "n02102040/large.JPEG")
    path, _ = spoil(layout, tmp_path / "source", lambda tar: add(tar, name, bytes(50_000)))
    for limit in ("MAX_IMAGE_BYTES", "MAX_DEVKIT_BYTES"):
        monkeypatch.setattr(lbsgd.convert.archives, limit, 40_000)
    assert f"{name}' is larger than 40,000 bytes" in refusal(path, tmp_path)


@pytest.mark.parametrize("layout", ["training of official", "a class of official", "tar", "tar.gz"])
def test_an_image_that_is_there_twice_is_refused_by_its_name(tmp_path, layout):
    name = {"training of official": "n02102040/n02102040_1.JPEG", "a class of official": "n02102040_1.JPEG"}.get(
        layout, "imagenet/train/n02102040/n02102040_1.JPEG"
    )
    path, _ = spoil(layout, tmp_path / "source", lambda tar: add(tar, name, jpeg(77)))
    told = name if "/" in name else f"n02102040/{name}"
    assert f"member '{told}' is there twice" in refusal(path, tmp_path)


def test_a_validation_image_that_is_there_twice_is_refused_by_its_name(tmp_path):
    for name in ("ILSVRC2012_val_00000003.JPEG", "more/ILSVRC2012_val_00000003.JPEG"):
        path, _ = spoil("validation of official", tmp_path / name[0], lambda tar, name=name: add(tar, name, jpeg(77)))
        assert f"{name}' is there twice" in refusal(path, tmp_path)


@pytest.mark.parametrize(
    "archive", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"]
)
@pytest.mark.parametrize("fraction", [0.3, 0.7, 0.9])  # some within an image, some within a header
def test_imagenet_s_archives_are_refused_where_they_are_truncated(tmp_path, archive, fraction):
    path = make_official(tmp_path / "source") / archive
    end = len(path.read_bytes().rstrip(b"\0"))  # without padding
    path.write_bytes(path.read_bytes()[: int(end * fraction)])
    said = refusal(tmp_path / "source", tmp_path)
    assert archive in said and "truncated" in said
    assert archive.endswith(".gz") or " member '" in said


@pytest.mark.parametrize("spelling", ["train//{}", "train/./{}", "./train/{}", ".//train///{}", "train/.//./{}"])
def test_classes_of_a_tar_do_not_depend_on_how_its_paths_are_spelled(tmp_path, spelling):
    files = {spelling.format(name): data for name, data in train_files().items()}
    path = tmp_path / "imagenet.tar"
    path.write_bytes(tar_bytes(files | {f"val/{name}": data for name, data in labelled(val_files()).items()}))
    source = find(path, tmp_path)
    assert source.train.classes == WNIDS and source.train.left_out.counts == {}
    assert list(source.train.names)[0] == f"train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG"


@pytest.mark.parametrize("archive", ["tar", "inner", "devkit"])
def test_a_tar_that_is_cut_between_two_members_is_refused(tmp_path, archive):
    """It has no block of zeros at its end."""
    name, files = {"tar": ("imagenet", {f"train/{name}": data for name, data in train_files().items()})}.get(
        archive, ("ILSVRC2012_img_train", dict(zip(("a.JPEG", "b.JPEG"), (jpeg(0), jpeg(1)), strict=True)))
    )
    content = tar_bytes(files)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        cut = content[: tar.getmembers()[-1].offset]
    path = tmp_path / f"{name}.tar"
    path.write_bytes(tar_bytes({"n01440764.tar": cut}) if archive == "inner" else cut)
    with pytest.raises(DataError, match=r"cannot be read as a tar \(it ends without .* is truncated or damaged: fetch"):
        read_members(path, ["a.JPEG"]) if archive == "devkit" else members(path)


def test_tars_that_cat_has_joined_are_refused_and_padding_is_not(tmp_path):
    """tar itself ignores what follows the first, and 12 of 14 images would be lost."""
    first, second = (tar_bytes({f"{split}/a/1.jpg": jpeg(1)}) for split in ("train", "val"))
    (tmp_path / "joined.tar").write_bytes(first + second)
    with pytest.raises(DataError, match="joined.tar goes on with another archive after its end .*name the folder"):
        find(tmp_path / "joined.tar", tmp_path)
    inner = {f"{split}/a/{name}.jpg": jpeg(1) for split in ("train", "val") for name in "12"}
    for padding in (b"", bytes(1 << 20), b"some words", bytes(512) + b"\1" * 600):
        (tmp_path / "padded.tar").write_bytes(tar_bytes(inner) + padding)
        assert [len(images) for images in find(tmp_path / "padded.tar", tmp_path).splits.values()] == [2, 2]


def test_a_second_train_folder_of_a_tar_is_told(tmp_path):
    files = {f"{split}/a/{name}.jpg": jpeg(1) for split in ("train", "val") for name in "12"}
    (tmp_path / "two.tar").write_bytes(tar_bytes(files | {"extra/train/a/9.jpg": jpeg(9)}))
    source = find(tmp_path / "two.tar", tmp_path)
    assert left_out_lines(source) == [f"left out of train: 1 other source ({tmp_path}/two.tar, extra/train)"]


def test_a_file_that_is_no_tar_is_not_called_damaged(tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n" * 100)
    with pytest.raises(DataError, match=r"notes.md cannot be read as a tar \(.*\); name a folder or a tar, or"):
        find(tmp_path / "notes.md", tmp_path)


def test_tars_in_tars_in_tars_are_refused(tmp_path):
    data = tar_bytes({"1.JPEG": jpeg(1)})
    for depth in range(2000):
        if depth in (2, 1999):
            (tmp_path / "a.tar").write_bytes(data)
            with pytest.raises(DataError, match=r"member 'a/a.tar' is a tar in a tar in a tar"):
                members(tmp_path / "a.tar")
        data = tar_bytes({"a.tar": data}) if depth < 3 else header("a.tar", len(data)) + data
    found = members(make_official(tmp_path / "b") / "ILSVRC2012_img_train.tar")
    assert found.names[0] == "n15075141/n15075141_10.JPEG"


def header(name, num_bytes, kind=tarfile.REGTYPE):
    """A header of 512 bytes, which may hold what tarfile would not write."""
    info = tarfile.TarInfo(name)
    info.size, info.type = max(0, num_bytes), kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if num_bytes < 0:
        data[124:136] = b"\xff" + num_bytes.to_bytes(11, "big", signed=True)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def sparse(**attributes):
    info = tarfile.TarInfo("train/a/x.JPEG")
    info.pax_headers = {f"GNU.sparse.{name}": value for name, value in attributes.items()}
    return info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "attributes",
    [
        dict(map="0,a"),
        dict(map="0,1", size="x"),
        dict(size="x"),
        dict(major="1", minor="0", realsize="x"),
        dict(map=""),
    ],
)
def test_a_damaged_header_of_a_sparse_member_is_refused(tmp_path, attributes, nested):
    content = sparse(**attributes) + bytes(20_480)
    (tmp_path / "a.tar").write_bytes(tar_bytes({"n02102040.tar": content}) if nested else content)
    for read in (members, lambda path: find(path, tmp_path)):
        with pytest.raises(DataError) as error:
            read(tmp_path / "a.tar")
        assert str(tmp_path / "a.tar") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "hostile, message",
    [
        (header("train/a/back.JPEG", -512), "member 'n02102040/train/a/back.JPEG' has a size below zero"),
        (header("train/a/back.JPEG", -5120), "back.JPEG' has a size below zero"),
        (header("train/a/x", -1024, tarfile.XHDTYPE), "a header of -"),
        (header("train/a/x", -1024, tarfile.GNUTYPE_LONGNAME), "a header of -"),
        (header("x", 60 << 30, tarfile.XHDTYPE), "a header of 64,424,509,440 bytes"),
        (header("x", 60 << 30, tarfile.GNUTYPE_LONGNAME), "a header of 64,424,509,440 bytes"),
        (header("x", 60 << 30, tarfile.GNUTYPE_SPARSE), "x' is not a plain file or folder"),
        (header("train/a/1.JPEG", 60 << 30), "1.JPEG' is larger than 268,435,456 bytes"),
    ],
    ids=["back", "far back", "attributes back", "name back", "attributes", "name", "sparse", "image"],
)
def test_a_header_that_would_go_in_circles_or_fill_the_memory_is_refused(tmp_path, hostile, message, nested):
    """Python 3.11's tarfile reads such headers forever, or all of them at once.

    A tarfile with the fix of CVE-2025-8194, such as Debian's, takes a size below zero as the end of the archive.
    """
    content = header("train/a/0.JPEG", 512) + bytes(512) + hostile + bytes(20_480)
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"n02102040.tar": content}) if nested else content)
    if "larger than" in message:  # larger than the file, too: fill it with holes to that size
        path.write_bytes(content)
        os.truncate(path, 61 << 30)
    with pytest.raises(DataError) as error:
        members(path)
    said = [message.replace("n02102040/", "n02102040/" if nested else "")]
    if "-" in message or "below" in message:
        said.append("a header is damaged after member")
    if "64,424" in message:
        said.append("empty header after member")  # Python 3.14 itself reads no header that ends after its file
    assert any(words in str(error.value) for words in said) and "a.tar" in str(error.value)


def test_a_devkit_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lbsgd.convert.archives, "MAX_DEVKIT_TAR_BYTES", 1 << 20)
    path, _ = spoil("devkit of official", tmp_path / "source", lambda tar: add(tar, "zeros", bytes(1 << 22)))
    assert "devkit_t12.tar.gz holds more than 1,048,576 bytes" in refusal(path, tmp_path)


def test_what_is_no_plain_file_of_a_bounded_size_is_refused_in_folders_too(tmp_path):
    folder = make_folders(tmp_path / "source") / "train" / WNIDS[0]
    os.mkfifo(folder / "pipe.JPEG")
    assert f"{folder}/pipe.JPEG is not a plain file; remove it" in refusal(tmp_path / "source", tmp_path)
    (folder / "pipe.JPEG").unlink()
    (folder / "large.JPEG").touch()
    os.truncate(folder / "large.JPEG", (1 << 28) + 1)
    assert f"{folder}/large.JPEG is larger than 268,435,456 bytes" in refusal(tmp_path / "source", tmp_path)


def test_kaggle_s_table_is_found_from_within_its_folder_by_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(make_kaggle(tmp_path / "source") / "ILSVRC/Data/CLS-LOC")
    assert len(find(Path("."), tmp_path).val) == 6


def test_what_a_killed_process_had_uncompressed_is_not_left(tmp_path):
    path, scratch = make_tar(tmp_path / "source", "w:gz", "a.tar.gz"), tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "123456789.partial").write_bytes(bytes(100))
    uncompressed(path, scratch)
    assert [path.suffix for path in scratch.iterdir()] == [".tar"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_tells_what_was_found_in_every_layout_and_writes_nothing(tmp_path, layout, monkeypatch, capsys):
    monkeypatch.setattr(lbsgd.convert.compressed, "LONG_BYTES", 0)
    path = LAYOUTS[layout](tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    lines = look(path, tmp_path / "data", 2, max_side=500).splitlines()
    assert ": 12 training images, 0.0 MB" in lines[0] and ": 6 validation images, 0.0 MB" in lines[1]
    assert str(tmp_path / "source") in lines[0] and str(tmp_path / "source") in lines[1]
    assert lines[2] == "classes 4, from n01440764 to n15075141"
    assert (
        lines[3].startswith(f"result  about 0.0 MB in {tmp_path}/data (") and "100% of the images untouched" in lines[3]
    )
    assert lines[4].startswith("time    about 0 s with 2 processes") and len(lines) == 5
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out  # for archives that take long to read
    assert ("listing what " in said) == (layout in ("official", "named", "tar", "tar.gz"))
    assert ("uncompressing " in said) == (layout == "tar.gz")


def test_members_beyond_the_stated_sizes_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"train/a/big.JPEG": bytes(2000)}))
    members(path)
    monkeypatch.setattr(lbsgd.convert.archives, "MAX_IMAGE_BYTES", 1999)
    with pytest.raises(DataError, match="member 'train/a/big.JPEG' is larger than 1,999 bytes"):
        members(path)
    monkeypatch.setattr(lbsgd.convert.archives, "MAX_CLASS_BYTES", 100)
    with pytest.raises(DataError, match="member 'train/a/big.JPEG' is larger than 100 bytes"):
        members(path)
    monkeypatch.setattr(lbsgd.convert.archives, "MAX_DEVKIT_BYTES", 10)
    monkeypatch.setattr(lbsgd.convert.archives, "MAX_CLASS_BYTES", 1 << 30)
    with pytest.raises(DataError, match="big.JPEG' is larger than 10 bytes"):
        read_members(path, ["big.JPEG"])


def test_a_size_that_reaches_beyond_the_archive_is_refused(tmp_path):
    content = tar_bytes({"train/a/1.JPEG": bytes(1000), "train/a/2.JPEG": bytes(1000)})
    for num_bytes, said in (
        (700, "member 'train/a/1.JPEG' reaches beyond the end of the archive, which is truncated"),
        (1800, "ends within a header after member 'train/a/1.JPEG'.; it is truncated"),
        (2500, "member 'train/a/2.JPEG' reaches beyond the end of the archive, which is truncated"),
    ):
        path = tmp_path / f"{num_bytes}.tar"
        path.write_bytes(content[:num_bytes])
        with pytest.raises(DataError, match=said):
            members(path)


def test_a_compressed_archive_that_would_fill_the_disk_is_refused(tmp_path):
    path = make_tar(tmp_path / "source", "w:gz", "zeros.tar.gz")
    path.write_bytes(tar_bytes({"train/a/1.JPEG": bytes(1 << 22)}, "w:gz"))
    with pytest.raises(DataError, match="holds more than 1,048,576 bytes"):
        uncompressed(path, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def large_tar_gz(folder):
    """A compressed tar of some megabytes of incompressible data."""
    noise = np.random.default_rng(0).bytes(3 << 20)
    path = folder / "noise.tar.gz"
    path.write_bytes(tar_bytes({"train/a/1.JPEG": noise, "val/a/1.JPEG": noise[:100]}, "w:gz"))
    return path


def test_content_may_take_more_than_half_of_the_free_disk(tmp_path, monkeypatch):
    path, scratch = large_tar_gz(tmp_path), tmp_path / "scratch"

    def free_of_four_megabytes(_):
        written = sum(path.stat().st_size for path in scratch.iterdir())
        return SimpleNamespace(free=(4 << 20) - written)

    monkeypatch.setattr("shutil.disk_usage", free_of_four_megabytes)
    assert uncompressed(path, scratch).stat().st_size > 3 << 20


def test_a_disk_without_room_for_the_content_is_told_apart_from_a_hostile_archive(tmp_path, monkeypatch):
    path, scratch = large_tar_gz(tmp_path), tmp_path / "scratch"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
        with pytest.raises(DataError, match="scratch has 1.0 MB free, and the content of .* about 3.1 MB .* make room"):
            find(path, tmp_path)
    assert list(scratch.iterdir()) == []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, limits[1]))
    try:
        with pytest.raises(DataError, match="scratch has no room .* for the content of .*noise.tar.gz .*; make room"):
            find(path, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b" + bytes(30)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="a.tar"):
        find(tmp_path / "a.tar", tmp_path)


def test_a_truncated_compressed_archive_is_refused(tmp_path):
    path = make_tar(tmp_path / "source", "w:gz", "a.tar.gz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="a.tar.gz cannot be read .* truncated or damaged"):
        find(path, tmp_path)


def test_a_tar_without_train_and_val_says_what_was_looked_for(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes({"set/train/a/1.JPEG": jpeg(1)}))
    with pytest.raises(DataError, match="no validation images in .*a.tar: no val/ found; expected train/<class>/"):
        find(tmp_path / "a.tar", tmp_path)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    source = find(make_folders(tmp_path / "source"), tmp_path)
    (Path(source.train.container) / source.train.names[0]).write_bytes(b"shorter")
    with pytest.raises(DataError, match="n01440764_1.JPEG has changed while it was read: 7 bytes, not"):
        source.train.reader().read(source.train.member(0))


# --- what is kept of a source -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar.gz", "parquet", "cifar10"])
def test_what_is_kept_of_a_source_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, kind):
    """Otherwise a power failure could leave a complete name with part of the content, which would then be used."""
    import test_cifar10
    import test_convert_shards

    source = {
        "tar.gz": lambda: make_tar(tmp_path / "source", "w:gz", "a.tar.gz"),
        "parquet": lambda: test_convert_shards.parquet(tmp_path / "source"),
        "cifar10": lambda: test_cifar10.archive(tmp_path / "cifar-10-python.tar.gz", test_cifar10.small_batches()),
    }[kind]()
    synced, named, fsync = set(), [], os.fsync

    def noted_fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted(rename):
        def to(path, target):
            named.append((Path(target).suffix, str(path) in synced))
            synced.discard(str(path))
            return rename(path, target)

        return to

    monkeypatch.setattr(os, "fsync", noted_fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, noted(getattr(Path, name)))
    find(source, tmp_path)
    assert {suffix for suffix, _ in named} == {".listing", ".images" if kind == "parquet" else ".tar"}
    assert all(is_on_disk for _, is_on_disk in named)
