"""Decoded batches become normalised images, on the CPU and on a GPU."""

import numpy as np
import pytest
import torch

from lbsgd.data.share import Pixels
from lbsgd.data.to_device import Prefetcher

BATCHES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 6, 3), np.uint8)


def prefetcher(device, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return Prefetcher(Pixels(resolution=6, device=device, dtype=dtype, memory_format=layout))


def by_definition(pixels):
    colours = [
        (pixels[..., c] / 255 - mean) / std
        for c, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225)))
    ]
    return np.stack(colours, axis=1)


def in_one_memory(batches):
    """Put each batch where the one before was, as soon as that is taken, as FFCV does."""
    memory = torch.empty(batches.shape[1:], dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    for batch in batches:
        memory[:] = batch
        yield memory
        memory[:] = 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_each_colour_is_normalised_by_imagenet_s_mean_and_std(device, channels_last, dtype, tolerance):
    received = list(prefetcher(device, dtype, channels_last)(in_one_memory(BATCHES)))
    assert len(received) == len(BATCHES)
    for images, pixels in zip(received, BATCHES, strict=True):
        assert images.shape == (4, 3, 6, 6) and images.dtype is dtype and images.device.type == device
        assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert np.abs(images.double().cpu().numpy() - by_definition(pixels)).max() < tolerance


@pytest.mark.gpu
def test_batches_survive_a_reader_that_is_busy_on_its_own_stream():
    batches = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 64, 3), np.uint8)
    weights, sums = torch.randn(4096, 4096, device="cuda"), []
    for images in prefetcher("cuda", torch.float32, channels_last=True)(in_one_memory(batches)):
        for _ in range(10):  # the reader's stream lags behind, while batches come and their memory is reused
            weights = torch.tanh(weights @ weights)
        sums.append(images.double().sum())
        del images
    expected = [by_definition(batch).sum() for batch in batches]
    assert np.allclose(torch.stack(sums).cpu(), expected, rtol=1e-4, atol=1)
