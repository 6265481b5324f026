"""Decoded batches -> normalised images on the device (Sec. 5.1), on a GPU while it trains on the batch before."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from lbsgd.data.native.kernels import library

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, where 1 is full brightness


class Prefetcher:
    """Turns uint8 arrays (batch, R, R, 3) into images (batch, 3, R, R) of dtype, (x/255 - mean) / std for each colour.

    An array's memory may be used again as soon as the next array is taken. For a GPU it should be pinned.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, channels_last: bool) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mean, self.std = (255 * torch.tensor(colours, device=device).view(1, 3, 1, 1) for colours in (MEAN, STD))

    def __call__(self, batches: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        return self._one_ahead(batches) if self.device.type == "cuda" else self._on_cpu(batches)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format)
        return images.sub_(self.mean).div_(self.std).to(self.dtype)

    def _on_cpu(self, batches: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        kernels, memory = library(), ReusedMemory()
        mean, std = (colours.flatten() for colours in (self.mean, self.std))
        for pixels in map(np.ascontiguousarray, batches):
            if kernels and self.memory_format == torch.contiguous_format:
                images = memory.take((len(pixels), 3, *pixels.shape[1:3]))
                kernels.lbsgd_normalise(
                    pixels.ctypes.data,
                    len(pixels),
                    pixels[0].size // 3,
                    mean.data_ptr(),
                    std.data_ptr(),
                    images.data_ptr(),
                )
                yield images.to(self.dtype)
            else:
                yield self._normalised(torch.from_numpy(pixels))

    def _one_ahead(self, batches: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        """Copies and normalises one batch ahead of the reader, on a stream of its own."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # where mean and std were made
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
            copied.synchronize()  # before the next batch is taken; since we are one ahead, this has long happened
        if ahead is not None:
            yield self._handed_over(*ahead)

    def _handed_over(self, images: torch.Tensor, finished: torch.cuda.Event) -> torch.Tensor:
        reader = torch.cuda.current_stream(self.device)
        reader.wait_event(finished)
        images.record_stream(reader)  # or their memory could go to the next batch while the reader still uses it
        return images


class ReusedMemory:
    """Tensors in memory that is used again once nothing refers to its last tensor: the kernel's zeros for new memory cost more
    than the normalisation."""

    def __init__(self) -> None:
        self.uses: list[tuple[np.ndarray, weakref.ref]] = []

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A float32 tensor of any content."""
        free = [array for array, used in self.uses if used() is None and array.shape == shape]
        array = free[0] if free else np.empty(shape, np.float32)
        used = array.view()  # which the tensor's storage keeps alive, and so every view of the tensor
        self.uses = [use for use in self.uses if use[1]() is not None] + [(array, weakref.ref(used))]
        return torch.from_numpy(used)
