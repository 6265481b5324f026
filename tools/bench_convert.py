"""python tools/bench_convert.py --images IMAGENET_SAMPLE.tar [--num_images 6000] [--rounds 3] [--work_dir DIR]

Compares the converter's speed with FFCV's own DatasetWriter, on the same images with the same settings, in turn in one
run, each in its own process. Also compares it with its limit: the same decoding, shrinking and encoding by
libjpeg-turbo and OpenCV alone, from memory to memory, one process per core. --images is a tar or a folder with JPEGs
(*.JPEG) anywhere in it; they are repeated to --num_images files of one class.
"""

import io
import multiprocessing
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lbsgd.bench.cpu_time import cpu_seconds
from lbsgd.commands.flag_types import OneLineParser, path, positive
from lbsgd.disk import is_there
from lbsgd.errors import DataError, LbsgdError, print_error
from lbsgd.processes.control_groups import usable_cores

CASES: dict[str, dict[str, Any]] = {
    "again": dict(max_side=500, reencode=True),
    "short": dict(short_side=256),
    "copy": dict(max_side=65535),
    "default": dict(max_side=500),
}
IN_PROCESS: dict[str, Any] = {}  # what each process of `limit` works on
FFCV_SIDE = {"again": 500, "copy": 65535, "default": 500}  # FFCV can only limit the longer side


def lay_out(images: Path, folder: Path, num_images: int) -> Path:
    """Write train/all/*.JPEG, num_images files, and val/all/*.JPEG, one file."""
    jpegs = jpegs_of(images)
    for split, count in (("train", num_images), ("val", 1)):
        (folder / split / "all").mkdir(parents=True)
        for number in range(count):
            (folder / split / "all" / f"{number:06}.JPEG").write_bytes(jpegs[number % len(jpegs)])
    return folder


def is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg")


def jpegs_of(images: Path) -> list[bytes]:
    """Return the JPEGs in a tar or a folder. Raises DataError if there are none."""
    if not is_there(images):
        raise DataError(f"--images {images}: no such file")
    if images.is_dir():
        jpegs = [path.read_bytes() for path in sorted(images.rglob("*")) if is_jpeg(path)]
    else:
        try:
            with tarfile.open(images) as tar:
                files = [tar.extractfile(info) for info in tar if info.isfile() and is_jpeg(Path(info.name))]
                jpegs = [file.read() for file in files if file]
        except (OSError, tarfile.TarError):
            raise DataError(f"--images {images} cannot be read as a tar; give a tar or a folder of JPEGs") from None
    if not jpegs:
        raise DataError(f"--images {images} holds no .jpg and no .jpeg; give a tar or a folder with such names")
    return jpegs


class Pictures:
    """The images as torchvision's ImageFolder loads them by default, for DatasetWriter to index."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.JPEG"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return image.convert("RGB"), 0


def by_ffcv(case: str, source: Path, folder: Path, cores: int) -> None:
    from ffcv import writer
    from ffcv.fields import IntField, RGBImageField

    folder.mkdir()
    for name in ("train", "val"):
        fields = {"image": RGBImageField("jpg", max_resolution=FFCV_SIDE[case], jpeg_quality=90), "label": IntField()}
        dataset = writer.DatasetWriter(str(folder / f"{name}.beton"), fields, num_workers=cores)
        dataset.from_indexed_dataset(Pictures(source / name))


def by_us(case: str, source: Path, folder: Path, cores: int) -> None:
    from lbsgd.convert.convert import convert

    convert(source, folder, num_processes=cores, quality=90, **CASES[case])


def timed(who: str, case: str, source: Path, folder: Path, cores: int) -> tuple[float, float]:
    """Return (images per second, share of all cores used), without imports and start. Our time includes the disk's."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, __file__, "--run", who, case, str(source), str(folder), str(cores)]
    seconds, used = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:])
    return len(list((source / "train").rglob("*.JPEG"))) / seconds, used / seconds / cores


def run_one(who: str, case: str, source: str, folder: str, cores: str) -> None:
    if who == "ffcv":
        import ffcv.writer  # noqa: F401
    else:
        import cv2  # noqa: F401

        import lbsgd.convert.convert  # noqa: F401
    start, before = time.monotonic(), cpu_seconds()
    {"ffcv": by_ffcv, "us": by_us}[who](case, Path(source), Path(folder), int(cores))
    print(time.monotonic() - start, cpu_seconds() - before)


def limit(case: str, source: Path, cores: int) -> float:
    """Return the images per second of decoding, shrinking and encoding alone, on all cores."""
    paths = sorted((source / "train").rglob("*.JPEG"))[:300]
    with multiprocessing.get_context("fork").Pool(cores, _limit_start, (case, paths)) as pool:
        pool.map(_limit_pass, range(cores), chunksize=1)
        start = time.monotonic()
        pool.map(_limit_pass, range(4 * cores), chunksize=1)
        return 4 * cores * len(paths) / (time.monotonic() - start)


def _limit_start(case: str, paths: list[Path]) -> None:
    import cv2

    from lbsgd.convert.settings import Settings

    cv2.setNumThreads(1)
    IN_PROCESS.update(settings=Settings(**CASES[case]), images=[path.read_bytes() for path in paths])


def _limit_pass(_number: int) -> None:
    from lbsgd.convert.image import stored_image

    for data in IN_PROCESS["images"]:
        stored_image(data, 0, IN_PROCESS["settings"], 1 << 23)


def fidelity(ours: Path, theirs: Path) -> str:
    """Compare our file with FFCV's, for which PIL decoded the images: PIL's pixels of both, and sizes in bytes."""
    from PIL import Image

    from lbsgd.data.beton import BetonFile

    files, distances = [BetonFile.open(folder / "train.beton") for folder in (ours, theirs)], []
    with open(files[0].path, "rb") as first, open(files[1].path, "rb") as second:
        for index in range(min(300, files[0].num_images)):
            pixels = []
            for file, beton in zip((first, second), files, strict=True):
                file.seek(int(beton.images["data_at"][index]))
                data = file.read(int(beton.sizes[index]))
                pixels.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int))
            distances.append(np.abs(pixels[0] - pixels[1]).mean())
    ratio = files[0].sizes.sum() / files[1].sizes.sum()
    return (
        f"pixels differ by {np.mean(distances):.3f}/255 on average (at most {max(distances):.2f}), size x {ratio:.3f}"
    )


def bench(case: str, source: Path, work: Path, cores: int, rounds: int) -> None:
    """Print the best round of each, because other programs can only slow a round, and the ratio of every round."""
    ours, theirs = [], []
    for _ in range(rounds):
        if case in FFCV_SIDE:
            theirs.append(timed("ffcv", case, source, work / "ffcv", cores))
        ours.append(timed("us", case, source, work / "us", cores))
    print(f"{case:8} {CASES[case]}\n         lbsgd {_said(ours, cores)}", flush=True)
    if theirs:
        ratios = " ".join(f"{a[0] / b[0]:.2f}" for a, b in zip(ours, theirs, strict=True))
        print(
            f"         DatasetWriter {_said(theirs, cores)}: lbsgd is {max(ours)[0] / max(theirs)[0]:.2f}x as fast "
            f"(rounds: {ratios})"
        )
    if case == "again":
        print(f"         {fidelity(work / 'us', work / 'ffcv')}")
    if case in ("again", "short"):
        most = max(limit(case, source, cores) for _ in range(rounds))
        print(
            f"         decoding, shrinking and encoding alone: {most:,.0f} images/s; lbsgd reaches "
            f"{max(ours)[0] / most:.0%} of it"
        )


def _said(rounds: list[tuple[float, float]], cores: int) -> str:
    speed, used = max(rounds)
    milliseconds = used * cores / speed * 1000
    return f"{speed:,.0f} images/s, {used:.0%} of {cores} cores used, {milliseconds:.2f} ms of CPU time per image"


def main() -> int:
    flags = OneLineParser(description=__doc__)
    flags.add_argument("--images", type=path, required=True, help="a tar or a folder of JPEGs")
    flags.add_argument("--num_images", type=positive, default=6000)
    flags.add_argument("--rounds", type=positive, default=3)
    flags.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    flags.add_argument("--work_dir", type=path, help="folder for the files (default: a temporary one)")
    arguments = flags.parse_args()
    try:
        temporary = tempfile.TemporaryDirectory(dir=arguments.work_dir)
    except OSError as error:
        flags.error(f"--work_dir {arguments.work_dir}: {error.strerror}")
    with temporary as work:
        try:
            source = lay_out(arguments.images, Path(work) / "source", arguments.num_images)
        except LbsgdError as error:
            print_error(error)
            return error.exit_code
        for case in arguments.cases:
            bench(case, source, Path(work), usable_cores(), arguments.rounds)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:  # one of the processes that `timed` starts
        run_one(*sys.argv[2:])
    else:
        sys.exit(main())
