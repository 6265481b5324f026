"""The contenders of tools/bench_loader.py: each opens the data and yields the number of images of each epoch.

All read the first num_images of the file, each in its own order. All except the bare decoder crop at random, resize to
RESOLUTION and flip, in batches of BATCH. Those that normalise give what training takes: float32 in LAYOUT.
"""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch

from lbsgd.data.beton import BetonFile
from lbsgd.train.device_rules import LAYOUT

RESOLUTION, BATCH = 224, 64


def counted(batches):
    """Return the number of images of an epoch. Raises ValueError for images that a run would have to convert."""
    found = 0
    for images, _ in batches:
        if images.dtype != torch.float32 or not images.is_contiguous(memory_format=LAYOUT):
            raise ValueError(f"images of {images.dtype} with strides {images.stride()} are not float32 in {LAYOUT}")
        found += len(images)
    return found


def lbsgd_pixels(data, threads, num_images):
    """lbsgd's pipeline up to uint8 pixels, as far as stock FFCV's goes."""
    from lbsgd.algorithm.shuffle import epoch_order
    from lbsgd.data.crops import crop_key
    from lbsgd.data.ffcv_loader import DecodingThread

    loader = lbsgd_loader(data, threads)
    for epoch in itertools.count():
        order = epoch_order(num_images, 0, epoch)
        yield sum(len(batch) for batch in DecodingThread(loader.images.pipeline, order, crop_key(0, epoch)))


def lbsgd_loader(data, threads):
    from lbsgd.data.loaders import TrainLoader
    from lbsgd.data.share import Cut, Pixels

    cut = Cut(seed=0, global_batch=BATCH, micro_batch=BATCH)
    pixels = Pixels(resolution=RESOLUTION, device="cpu", memory_format=LAYOUT)
    return TrainLoader(Path(data) / "train.beton", cut, pixels=pixels, threads=threads)


def lbsgd_images(data, threads, num_images):
    """The whole loader: normalised float32 images and labels."""
    from lbsgd.algorithm.shuffle import epoch_order

    loader = lbsgd_loader(data, threads)
    for epoch in itertools.count():
        yield counted(loader.batches(epoch_order(num_images, 0, epoch), epoch))


def stock_loader(data, threads, num_images, *normalise):
    """FFCV as in its documentation. Its images are in channels_last."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    image = [RandomResizedCropRGBImageDecoder((RESOLUTION, RESOLUTION)), RandomHorizontalFlip(), *normalise]
    return Loader(
        f"{data}/train.beton",
        BATCH,
        num_workers=threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=range(num_images),
        drop_last=False,
        pipelines={"image": [*image, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor()]},
    )


def stock_pixels(data, threads, num_images):
    """FFCV up to uint8 pixels."""
    loader = stock_loader(data, threads, num_images)
    while True:
        yield sum(len(labels) for _, labels in loader)


def stock_images(data, threads, num_images):
    """FFCV, normalised to float32 by its own operation."""
    from ffcv.transforms import NormalizeImage

    from lbsgd.data.to_device import MEAN, STD

    normalise = NormalizeImage(255 * np.array(MEAN), 255 * np.array(STD), np.float32)
    loader = stock_loader(data, threads, num_images, normalise)
    while True:
        yield counted(loader)


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
            yield counted((images.contiguous(memory_format=LAYOUT), labels) for images, labels in loader)


def dali_images(data, threads, num_images):
    """NVIDIA DALI's CPU pipeline, which also decodes only the crop."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    from lbsgd.data.to_device import MEAN, STD

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None)
    def pipeline(folder):
        jpegs, labels = fn.readers.file(file_root=folder, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(jpegs, device="cpu", output_type=types.RGB)
        images = fn.resize(images, resize_x=RESOLUTION, resize_y=RESOLUTION)
        colours = {"mean": [255 * m for m in MEAN], "std": [255 * s for s in STD]}
        return fn.crop_mirror_normalize(images, **colours, mirror=fn.random.coin_flip(), output_layout="HWC"), labels

    with tempfile.TemporaryDirectory() as folder:
        write_files(data, folder, num_images)
        built = pipeline(folder)
        built.build()
        loader = DALIClassificationIterator(built, reader_name="reader", auto_reset=True)
        while True:
            yield counted((batch["data"].permute(0, 3, 1, 2), batch["label"]) for [batch] in loader)


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
    for record, size in zip(beton.images[:num_images], beton.sizes[:num_images], strict=True):
        start = int(record["data_at"])
        yield np.array(beton.content[start : start + int(size)]), int(record["height"]), int(record["width"])


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
