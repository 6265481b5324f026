"""Copy decoded batches to the device and normalise them (Sec. 5.1); a GPU does so while it trains on the last batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from lbsgd.data.native.library import library
from lbsgd.data.share import Pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours; 1 is full brightness


class Prefetcher:
    """Turns uint8 arrays (batch, R, R, 3) into images (batch, 3, R, R) of the pixels' dtype.

        (x/255 − mean) / std    for each colour

    An array's memory may be reused as soon as the next array is taken. For a GPU it should be pinned.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.device, self.dtype, self.memory_format = torch.device(pixels.device), pixels.dtype, pixels.memory_format
        # Of one dtype whatever torch's default is, because the kernel reads them as float32.
        self.mean, self.std = (
            255 * torch.tensor(colours, dtype=torch.float32, device=self.device).view(1, 3, 1, 1)
            for colours in (MEAN, STD)
        )
        # One stream for all epochs: torch keeps freed memory for each stream, and has 32 of them.
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        return self._one_ahead(batches, self.stream) if self.stream else self._on_cpu(batches)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format)
        return images.sub_(self.mean).div_(self.std).to(self.dtype)

    def _on_cpu(self, batches: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        kernels, memory = library(), ReusedMemory()
        mean, std = (colours.flatten() for colours in (self.mean, self.std))
        for pixels in map(np.ascontiguousarray, batches):
            if kernels:
                images = memory.take(pixels.shape)
                colours = mean.data_ptr(), std.data_ptr()
                kernels.lbsgd_normalise_interleaved(pixels.ctypes.data, pixels.size // 3, *colours, images.data_ptr())
                # This costs nothing in channels_last and fp32, the most frequent choice on a CPU.
                yield images.permute(0, 3, 1, 2).to(self.dtype, memory_format=self.memory_format)
            else:
                yield self._normalised(torch.from_numpy(pixels))

    def _one_ahead(self, batches: Iterable[np.ndarray], stream: torch.cuda.Stream) -> Iterator[torch.Tensor]:
        """Copy and normalise one batch ahead of the reader, on a separate stream."""
        stream.wait_stream(torch.cuda.current_stream(self.device))  # it computes mean and std
        ahead = None
        for batch in batches:
            with torch.cuda.stream(stream):
                pixels = torch.from_numpy(batch).to(self.device, non_blocking=True)
                copied = stream.record_event()
                images = self._normalised(pixels)
                finished = stream.record_event()
            if ahead is not None:
                yield self._handed_over(*ahead)
            ahead = images, finished
            copied.synchronize()  # before the next batch is taken; one batch ahead, this is long done
        if ahead is not None:
            yield self._handed_over(*ahead)

    def _handed_over(self, images: torch.Tensor, finished: torch.cuda.Event) -> torch.Tensor:
        reader = torch.cuda.current_stream(self.device)
        reader.wait_event(finished)
        images.record_stream(reader)  # else the next batch could take their memory while the reader still uses it
        return images


def array_on_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copy an array to a device; for a GPU, pin its memory first, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class ReusedMemory:
    """Memory for tensors, reused once nothing refers to the last tensor in it.

    New memory costs more than the normalisation, because the operating system first fills it with zeros.
    """

    def __init__(self) -> None:
        self.uses: list[tuple[np.ndarray, weakref.ref]] = []

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a float32 tensor with arbitrary content."""
        free = [array for array, used in self.uses if used() is None and array.shape == shape]
        array = free[0] if free else np.empty(shape, np.float32)
        used = array.view()  # kept alive by the tensor's storage, and so by every view of the tensor
        self.uses = [use for use in self.uses if use[1]() is not None] + [(array, weakref.ref(used))]
        return torch.from_numpy(used)
