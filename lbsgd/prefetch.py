"""Decoded batches -> normalised images on the device (Sec. 5.1), on a GPU while it trains on the batch before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numba import njit

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
        """One pass over the memory, in which each pixel's value is looked up among the 256 possible ones."""
        every_value = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 1, 3)
        table = self._normalised(every_value).float()[0, :, :, 0].contiguous().numpy()  # (3, 256)
        for pixels in batches:
            images = torch.empty(len(pixels), 3, *pixels.shape[1:3], memory_format=self.memory_format)
            look_up(pixels, table, images.numpy())
            yield images.to(self.dtype)

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


@njit(nogil=True)
def look_up(pixels, table, images):
    """images[i, c, y, x] = table[c, pixels[i, y, x, c]]"""
    for i in range(pixels.shape[0]):
        for y in range(pixels.shape[1]):
            for x in range(pixels.shape[2]):
                for c in range(3):
                    images[i, c, y, x] = table[c, pixels[i, y, x, c]]
