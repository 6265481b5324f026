"""Gradients in flat buffers: which ones lie together, in which order, and how they get in and out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.nn import Parameter


class Bucket:
    """The gradients of some parameters in one flat buffer, which is kept for the whole run.

    multiple: the buffer is padded with zeros to a multiple of this length, so that all processes have equal shares.
    """

    def __init__(self, parameters: list[Parameter], multiple: int):
        self.parameters = parameters
        length = sum(parameter.numel() for parameter in parameters)
        first = parameters[0]
        self.buffer = torch.zeros(length + -length % multiple, dtype=first.dtype, device=first.device)
        self.views: list[torch.Tensor] = []
        offset = 0
        for parameter in parameters:
            self.views.append(self.buffer.as_strided(parameter.shape, strides(parameter), offset))
            offset += parameter.numel()
        self.missing = set(parameters)
        self.streams: set[torch.cuda.Stream] = set()  # that write the gradients

    def note(self, parameter: Parameter) -> None:
        """Note that a gradient has come. autograd calls hooks on the stream that writes the gradient."""
        self.missing.discard(parameter)
        if self.buffer.is_cuda:
            self.streams.add(torch.cuda.current_stream())

    def take(self) -> None:
        """Copy all gradients into the buffer, and make each parameter's .grad a view there.

        One call copies them all, because a launch each would take the host longer than the GPU. Where this process has
        no gradient, the buffer gets zeros. A parameter that was frozen later gets no gradient, because with one an
        optimizer would move it by its momentum. Each .grad is a new view, because whoever sets its .data moves it
        elsewhere.
        """
        views, grads, missing = [], [], []
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is None:
                missing.append(view)
            else:
                views.append(view)
                grads.append(parameter.grad)
        self.wait_for_streams(grads)
        if views:
            torch._foreach_copy_(views, grads)
        if missing:
            torch._foreach_zero_(missing)
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view.detach() if parameter.requires_grad else None

    def wait_for_streams(self, grads: list[torch.Tensor]) -> None:
        """Make the current stream wait for those that write the gradients, whose memory must last until it reads."""
        if others := self.streams and self.streams - {here := torch.cuda.current_stream()}:
            for stream in others:
                here.wait_stream(stream)
            for grad in grads:
                grad.record_stream(here)

    def empty(self) -> None:
        """Expect all gradients again."""
        self.missing = set(self.parameters)
        self.streams.clear()


def strides(parameter: Parameter) -> tuple[int, ...]:
    """Return the parameter's own strides, including channels_last, or plain ones for a layout with holes."""
    dense = parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)
    return parameter.stride() if dense else torch.empty(parameter.shape, device="meta").stride()


def fill(parameters: Iterable[Parameter], bucket_elements: int, multiple: int) -> list[Bucket]:
    """Return buckets of at most bucket_elements. A larger parameter gets its own bucket.

    They take the parameters in reverse order of registration. Back-propagation makes gradients in about this order. It
    is the same on every process and after every resume, unlike an order observed at run time.
    """
    return [Bucket(together, multiple) for together in cut([*parameters][::-1], bucket_elements)]


def cut(parameters: list[Parameter], bucket_elements: int) -> Iterator[list[Parameter]]:
    """Yield lists of neighbouring parameters of one precision and device, with at most bucket_elements together."""
    together: list[Parameter] = []
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        length = sum(other.numel() for other in together)
        if together and (
            (together[0].dtype, together[0].device) != kind or length + parameter.numel() > bucket_elements
        ):
            yield together
            together = []
        together.append(parameter)
    if together:
        yield together
