"""What people hold is found and read in place: folders, ImageNet's archives, Kaggle's; archives are data only."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lbsgd.archives
from lbsgd.archives import listing, members, read_members, uncompressed
from lbsgd.convert import convert
from lbsgd.devkit import synsets
from lbsgd.errors import DataError
from lbsgd.sources import Files, find_source

# In the order of their WordNet ids; the devkit numbers them 1, 2, 3, 4 in another one.
WNIDS = ["n01440764", "n01443537", "n02102040", "n15075141"]
DEVKIT_ORDER = ["n02102040", "n15075141", "n01440764", "n01443537"]
VAL_CLASSES = [2, 0, 3, 1, 2, 0]  # of validation images 1, 2, ...: positions in WNIDS


def jpeg(number, size=(24, 16)):
    """Another small JPEG for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (2, 3, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def train_files():
    return {f"{wnid}/{wnid}_{i}.JPEG": jpeg(10 * c + i) for c, wnid in enumerate(WNIDS) for i in (10, 2, 1)}


def val_files():
    return {f"ILSVRC2012_val_{i:08}.JPEG": jpeg(1000 + i) for i in range(1, len(VAL_CLASSES) + 1)}


def labelled(files):
    return {f"{WNIDS[label]}/{name}": data for label, (name, data) in zip(VAL_CLASSES, files.items())}


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
    """The devkit's two files: a real meta.mat as MATLAB would write it, also with synsets that are no leaves."""
    from scipy.io import savemat

    ids = {wnid: number for number, wnid in enumerate(order, 1)}
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"),
              ("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]
    table = np.zeros((len(order) + 1, 1), fields)
    for row, wnid in enumerate([*order, "n00001740"]):
        leaf = wnid in ids
        table[row, 0] = (float(ids.get(wnid, len(order) + 1)), wnid, "tench, Tinca tinca", "a fish, née “cyprinid”",
                         0.0 if leaf else 2.0, np.zeros((1, 0)) if leaf else np.array([[1.0, 2.0]]), 0.0, 1300.0)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table}, do_compression=True)
    truth = "".join(f"{ids[WNIDS[label]]}\n" for label in VAL_CLASSES)
    return {"data/meta.mat": buffer.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": truth.encode()}


def devkit(folder, order=DEVKIT_ORDER):
    files = {f"ILSVRC2012_devkit_t12/{name}": data for name, data in devkit_files(order).items()}
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(
        tar_bytes({"ILSVRC2012_devkit_t12/readme.txt": b"read me", **files}, "w:gz"))


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
    lines = [f"{name.removesuffix('.JPEG')},{WNIDS[label]} 10 20 30 40 {WNIDS[0]} 1 2 3 4"
             for label, name in zip(VAL_CLASSES, val_files())]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n")
    return folder


def make_unpacked(folder):
    """Training folders, but validation images and devkit as they come."""
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


LAYOUTS = {"folders": make_folders, "official": make_official, "kaggle": make_kaggle, "unpacked": make_unpacked,
           "tar": make_tar, "tar.gz": lambda folder: make_tar(folder, "w:gz", "imagenet.tar.gz"),
           "kaggle from within": lambda folder: make_kaggle(folder) / "ILSVRC/Data/CLS-LOC",
           "named": lambda folder: make_official(folder) / "ILSVRC2012_img_train.tar"}


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
        reader = Files(images.container)
        read = [reader.read(name, int(offset), int(size)) for name, offset, size in
                zip(images.names, images.offsets, images.sizes)]
        assert read == [files[name] for name in expected]


def test_a_tar_is_listed_once_as_long_as_it_stays_the_same(tmp_path, monkeypatch):
    path = make_official(tmp_path / "source") / "ILSVRC2012_img_train.tar"
    found = listing(path, tmp_path / "scratch")
    with monkeypatch.context() as patch:
        patch.setattr(lbsgd.archives, "members", None)
        assert listing(path, tmp_path / "scratch") == found == members(path)
    path.write_bytes(tar_bytes({"a.tar": tar_bytes({"1.JPEG": jpeg(1)})}))
    assert [member.name for member in listing(path, tmp_path / "scratch")] == ["a/1.JPEG"]


def test_every_layout_gives_the_same_files(tmp_path):
    """Torchvision's order of class folders is the order of all: the way the images are held leaves no trace."""
    results = set()
    for layout in ("folders", "official", "kaggle", "tar.gz"):
        convert(LAYOUTS[layout](tmp_path / layout), tmp_path / "data" / layout, max_side=500, num_workers=1)
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


def test_ground_truth_numbers_are_the_devkit_s_and_not_positions(tmp_path):
    """Read as positions in the sorted ids, the numbers would be valid labels, and wrong."""
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


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove, message", [
    (["train", "val"], "no train/ and no ILSVRC2012_img_train.tar, no val/ and no ILSVRC2012_img_val.tar found"),
    (["val"], "no images in .*: no val/ and no ILSVRC2012_img_val.tar found"),
    (["val/n01443537"], "val has other classes than .*train: n01443537 in one of them only"),
    ([f"train/n01443537/n01443537_{i}.JPEG" for i in (1, 2, 10)], "no images in .*train for class n01443537"),
    ([f"train/{wnid}" for wnid in WNIDS], "no images in .*train; expected one folder a class"),
])
def test_incomplete_folders_are_refused(tmp_path, remove, message):
    make_folders(tmp_path / "source")
    for number, name in enumerate(remove):
        (tmp_path / "source" / name).rename(tmp_path / str(number))
    with pytest.raises(DataError, match=message):
        find(tmp_path / "source", tmp_path)


def test_at_most_three_differing_classes_are_named(tmp_path):
    make_folders(tmp_path / "source")
    write_files(tmp_path / "source/val", {f"{name}/1.JPEG": jpeg(1) for name in "cdefg"})
    with pytest.raises(DataError, match="c, d, e and 2 more in one of them only"):
        find(tmp_path / "source", tmp_path)


def change_labels(folder, name, old, new):
    path = folder / name
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("change, message", [
    (lambda folder: (folder / "LOC_val_solution.csv").unlink(), "without labels: neither ILSVRC2012_devkit_t12.tar.gz"),
    (lambda folder: change_labels(folder, "LOC_val_solution.csv", "ILSVRC2012_val_00000003", "x"),
     "00000003.JPEG has no label in the devkit or in LOC_val_solution.csv"),
    (lambda folder: change_labels(folder, "LOC_val_solution.csv", "n15075141 10", "n99999999 10"),
     "00000003.JPEG has class n99999999, which has no training images"),
    (lambda folder: change_labels(folder, "LOC_val_solution.csv", "ImageId", "Image"),
     "is not Kaggle's LOC_val_solution.csv"),
])
def test_validation_images_without_good_labels_are_refused(tmp_path, change, message):
    folder = make_kaggle(tmp_path / "source")
    change(folder)
    with pytest.raises(DataError, match=message):
        find(folder, tmp_path)


@pytest.mark.parametrize("name, content", [
    ("data/meta.mat", b"MATLAB 5.0 MAT-file".ljust(126) + b"IM" + bytes(40)), ("data/meta.mat", b""),
    ("data/meta.mat", devkit_files()["data/meta.mat"][:300]),
    ("data/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n999\n"),
    ("data/ILSVRC2012_validation_ground_truth.txt", b"one\n"),
])
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
    "a path upwards": (dict(name="train/../../etc/passwd", data=b"x"), "train/../../etc/passwd' is a path that leads out"),
    "an absolute path": (dict(name="/etc/passwd", data=b"x"), "/etc/passwd' is a path that leads out of the archive"),
    "a symbolic link": (dict(name="train/a/1.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "1.JPEG' is a link"),
    "a hard link": (dict(name="train/a/1.JPEG", type=tarfile.LNKTYPE, linkname="other"), "1.JPEG' is a link"),
    "a device": (dict(name="train/a/null.JPEG", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
                 "not a plain file or folder"),
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


def test_members_beyond_the_stated_sizes_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"train/a/big.JPEG": bytes(2000)}))
    members(path)
    monkeypatch.setattr(lbsgd.archives, "MAX_IMAGE_BYTES", 1999)
    with pytest.raises(DataError, match="member 'train/a/big.JPEG' is larger than 1,999 bytes"):
        members(path)
    monkeypatch.setattr(lbsgd.archives, "MAX_CLASS_BYTES", 100)
    with pytest.raises(DataError, match="member 'train/a/big.JPEG' is larger than 100 bytes"):
        members(path)
    monkeypatch.setattr(lbsgd.archives, "MAX_DEVKIT_BYTES", 10)
    monkeypatch.setattr(lbsgd.archives, "MAX_CLASS_BYTES", 1 << 30)
    with pytest.raises(DataError, match="big.JPEG' is larger than 10 bytes"):
        read_members(path, ["big.JPEG"])


def test_a_size_that_reaches_beyond_the_archive_is_refused(tmp_path):
    content = tar_bytes({"train/a/1.JPEG": bytes(1000), "train/a/2.JPEG": bytes(1000)})
    for num_bytes in (700, 1800, 2500):  # in the first image, in the second's header, in the second
        path = tmp_path / f"{num_bytes}.tar"
        path.write_bytes(content[:num_bytes])
        with pytest.raises(DataError, match="truncated"):
            members(path)


def test_a_compressed_archive_that_would_fill_the_disk_is_refused(tmp_path):
    path = make_tar(tmp_path / "source", "w:gz", "zeros.tar.gz")
    path.write_bytes(tar_bytes({"train/a/1.JPEG": bytes(1 << 22)}, "w:gz"))
    with pytest.raises(DataError, match="holds more than 100 times its size"):
        uncompressed(path, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


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
    with pytest.raises(DataError, match="no images in .*a.tar: no val/ found; expected train/<class>/"):
        find(tmp_path / "a.tar", tmp_path)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    source = find(make_folders(tmp_path / "source"), tmp_path)
    (Path(source.train.container) / source.train.names[0]).write_bytes(b"shorter")
    with pytest.raises(DataError, match="n01440764_1.JPEG has changed while it was read: 7 bytes, not"):
        Files(source.train.container).read(source.train.names[0], 0, int(source.train.sizes[0]))
