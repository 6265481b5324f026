"""lbsgd's loader against stock FFCV, torchvision and DALI on the same JPEG bytes, and against the bare decoder.

    python tools/bench_loader.py DATA [--images N] [--threads N] [--rounds N]

DATA holds train.beton. All contenders crop at random, resize to 224 and flip, in batches of 64. Each is a process of
its own, and they take turns, so that the ratios count. torchvision and DALI read the same bytes from files. DALI's CPU
pipeline takes part if it is installed (pip install nvidia-dali-cuda120 nvidia-nvimgcodec-cu12). The bare decoder only
decodes whole images.
"""

import argparse
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lbsgd.data.beton import BetonFile
from lbsgd.errors import ConfigError, LbsgdError, print_error

RESOLUTION, BATCH = 224, 64
WIDE = 160  # columns, more than the table has


# --- the contenders: each opens the data and yields the number of images of each epoch ------------------------------


def lbsgd_pixels(data, threads, num_images):
    """lbsgd's pipeline up to uint8 pixels, as far as stock FFCV's goes."""
    from lbsgd.algorithm.shuffle import epoch_order
    from lbsgd.data.crops import crop_key
    from lbsgd.data.ffcv_loader import DecodingThread

    loader = lbsgd_loader(data, threads)
    for epoch in itertools.count():
        order = epoch_order(loader.num_images, 0, epoch)[:num_images]
        yield sum(len(batch) for batch in DecodingThread(loader.images.pipeline, order, crop_key(0, epoch)))


def lbsgd_loader(data, threads):
    from lbsgd.data.loaders import TrainLoader
    from lbsgd.data.share import Pixels, Share

    cut = dict(seed=0, global_batch=BATCH, micro_batch=BATCH, share=Share())
    pixels = Pixels(resolution=RESOLUTION, device="cpu")
    return TrainLoader(Path(data) / "train.beton", **cut, pixels=pixels, threads=threads)


def lbsgd_images(data, threads, num_images):
    """The whole loader: normalised float32 images and labels."""
    loader = lbsgd_loader(data, threads)
    for epoch in itertools.count():
        yield sum(len(labels) for _, labels in itertools.islice(loader.epoch(epoch), num_images // BATCH))


def stock_pixels(data, threads, num_images, normalised=False):
    """FFCV as in its documentation, up to uint8 pixels."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    from lbsgd.data.to_device import MEAN, STD

    image = [RandomResizedCropRGBImageDecoder((RESOLUTION, RESOLUTION)), RandomHorizontalFlip()]
    if normalised:
        image += [NormalizeImage(255 * np.array(MEAN), 255 * np.array(STD), np.float32)]
    loader = Loader(
        f"{data}/train.beton",
        BATCH,
        num_workers=threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=range(num_images),
        drop_last=False,
        pipelines={"image": [*image, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor()]},
    )
    while True:
        yield sum(len(labels) for _, labels in loader)


def stock_images(data, threads, num_images):
    """FFCV as in its documentation, normalised to float32 by its own operation."""
    return stock_pixels(data, threads, num_images, normalised=True)


def torchvision_images(data, threads, num_images):
    """Image files through a DataLoader and torchvision's usual transforms."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from lbsgd.data.to_device import MEAN, STD

    with tempfile.TemporaryDirectory() as folder:
        write_files(data, folder, num_images)
        images = ImageFolder(
            folder,
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(RESOLUTION),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(MEAN, STD),
                ]
            ),
        )
        loader = DataLoader(images, BATCH, shuffle=True, num_workers=threads)
        while True:
            yield sum(len(labels) for _, labels in loader)


def dali_images(data, threads, num_images):
    """NVIDIA DALI's CPU pipeline, which decodes only the crop as well."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    from lbsgd.data.to_device import MEAN, STD

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None)
    def pipeline(folder):
        jpegs, labels = fn.readers.file(file_root=folder, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(jpegs, device="cpu", output_type=types.RGB)
        images = fn.resize(images, resize_x=RESOLUTION, resize_y=RESOLUTION)
        return fn.crop_mirror_normalize(
            images, mean=[255 * m for m in MEAN], std=[255 * s for s in STD], mirror=fn.random.coin_flip()
        ), labels

    with tempfile.TemporaryDirectory() as folder:
        write_files(data, folder, num_images)
        built = pipeline(folder)
        built.build()
        loader = DALIClassificationIterator(built, reader_name="reader", auto_reset=True)
        while True:
            yield sum(len(batch[0]["label"]) for batch in loader)


def bare_decoder(data, threads, num_images):
    """libjpeg-turbo alone on whole images, on one core."""
    from ffcv.libffcv import imdecode

    images = list(jpegs(data, num_images))
    pixels = np.empty(max(height * width for _, height, width in images) * 3, np.uint8)
    while True:
        for encoded, height, width in images:
            imdecode(encoded, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
        yield len(images)


def jpegs(data, num_images):
    """Yield (bytes, height, width) of the first images."""
    beton = BetonFile.open(Path(data) / "train.beton")
    file = np.memmap(beton.path, np.uint8, "r")
    for record, size in zip(beton.images[:num_images], beton.sizes[:num_images], strict=True):
        start = int(record["data_at"])
        yield np.array(file[start : start + int(size)]), int(record["height"]), int(record["width"])


def write_files(data, folder, num_images):
    """Write the same bytes as files in 10 folders."""
    for number, (encoded, _, _) in enumerate(jpegs(data, num_images)):
        path = Path(folder) / str(number % 10) / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded)


CONTENDERS = {
    "FFCV, to pixels": stock_pixels,
    "lbsgd, to pixels": lbsgd_pixels,
    "FFCV, normalised": stock_images,
    "lbsgd, normalised": lbsgd_images,
    "torchvision": torchvision_images,
    "DALI, CPU": dali_images,
    "bare decoder, 1 core": bare_decoder,
}


# --- turns ------------------------------------------------------------------------------------------------------------


def contend(pipe, contender, arguments):
    """Run an epoch whenever asked, and send (images, seconds, CPU seconds, peak memory in bytes)."""
    epochs = contender(*arguments)
    next(epochs)  # compiles, starts, fills the page cache
    pipe.send("ready")
    while pipe.recv():
        began, cpu = time.perf_counter(), cpu_seconds()
        images = next(epochs)
        pipe.send((images, time.perf_counter() - began, cpu_seconds() - cpu, peak_memory()))
    epochs.close()


def cpu_seconds():
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def peak_memory():
    """Return the bytes of this process and of the largest of its children."""
    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def start(contender, arguments):
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=contend, args=(theirs, contender, arguments))
    process.start()
    theirs.close()
    pipe.recv()
    return pipe


def turn(pipe):
    pipe.send(True)
    return pipe.recv()


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("data", metavar="DATA", help="a data folder of the converter, with train.beton")
    flags.add_argument("--images", type=int, default=3000, help="images per epoch (default: 3000)")
    flags.add_argument("--threads", type=int, default=os.cpu_count(), help="threads or workers (default: all cores)")
    flags.add_argument("--rounds", type=int, default=5, help="epochs of each contender (default: 5)")
    arguments = flags.parse_args()
    try:
        num_images = whole_batches(arguments.data, arguments.images)
    except LbsgdError as error:
        print_error(error)
        return error.exit_code
    contenders = {
        name: contender for name, contender in CONTENDERS.items() if name != "DALI, CPU" or find_spec("nvidia.dali")
    }
    pipes = {
        name: start(contender, (arguments.data, arguments.threads, num_images))
        for name, contender in contenders.items()
    }
    rounds = {name: [] for name in pipes}
    for _ in range(arguments.rounds):
        for name, pipe in pipes.items():
            rounds[name].append(turn(pipe))
    for pipe in pipes.values():
        pipe.send(False)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # a file has no width, and Rich's guess of 80 would break the columns into words
    console.print(results(rounds, arguments.threads))
    return 0


def whole_batches(data, num_images):
    """Return num_images rounded down to whole batches. Raise LbsgdError if train.beton has not as many."""
    found = BetonFile.open(Path(data) / "train.beton").num_images
    if not BATCH <= num_images <= found:
        raise ConfigError(
            f"--images {num_images}: {data}/train.beton has {found:,} images; choose {BATCH} (a batch) to {found:,}"
        )
    return num_images // BATCH * BATCH


def results(rounds, threads):
    num_rounds = len(rounds["torchvision"])
    table = Table(title=f"random resized crop to {RESOLUTION}, flip; {threads} threads; median of {num_rounds} epochs")
    for column in ("", "images/s", "to FFCV", "images/CPU second", "to FFCV", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    speed, per_cpu_second = (
        {name: statistics.median(images / used[place] for images, *used in turns) for name, turns in rounds.items()}
        for place in (0, 1)
    )
    for name, turns in rounds.items():
        rival = "FFCV, to pixels" if name.endswith("to pixels") else "FFCV, normalised"
        table.add_row(
            name,
            f"{speed[name]:.0f}",
            f"{speed[name] / speed[rival]:.2f}",
            f"{per_cpu_second[name]:.0f}",
            f"{per_cpu_second[name] / per_cpu_second[rival]:.2f}",
            f"{turns[-1][3] / 1e6:.0f} MB",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
