"""Counts how much memory CUDA graphs of the residual blocks add to a training step, whose tensors have no values."""

import pytest
import torch
import torchvision
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lbsgd.algorithm.batch_norm import convert_batch_norm
from lbsgd.config.memory import NETWORKS
from lbsgd.train.graphs import graph_blocks

PLAIN = 2  # steps before the blocks are recorded


class LiveBytes(TorchDispatchMode):
    """The peak bytes of a step's tensors, without the network's: in all, in recordings, elsewhere.

    Recordings allocate in a separate pool. Other tensors cannot use it, nor can recordings use other memory.
    """

    def __init__(self, model):
        super().__init__()
        self.of_the_network = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
        self.live, self.in_recording = {}, False
        self.peak = self.pool = self.elsewhere = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.live = {key: each for key, each in self.live.items() if not each[0].expired()}
        for storage in [each.untyped_storage() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]:
            if storage._cdata not in self.of_the_network:
                of_it = StorageWeakRef(storage), storage.nbytes(), self.in_recording
                self.live.setdefault(storage._cdata, of_it)
        pool, elsewhere = (
            sum(size for _, size, lies in self.live.values() if lies is which) for which in (True, False)
        )
        self.peak, self.pool = max(self.peak, pool + elsewhere), max(self.pool, pool)
        self.elsewhere = max(self.elsewhere, elsewhere)
        return made


class CallsOnce:
    """Records, but replays nothing: a replay makes no tensors."""

    def record(self, function):
        self.live.in_recording = True
        try:
            return function(), lambda: None
        finally:
            self.live.in_recording = False


@pytest.mark.parametrize(
    "name, images, pixels, live, apart", [("resnet18", 32, 64, 1.04, 1.17), ("resnet50", 4, 224, 0.95, 1.10)]
)
def test_what_recording_adds_to_the_memory_of_a_step(name, images, pixels, live, apart):
    """Relative to a plain step's peak: the live bytes, and the peaks of the recordings' pool plus that of the rest."""
    with torch.device("meta"):
        model, recorder = convert_batch_norm(getattr(torchvision.models, name)(), images), CallsOnce()
    graph_blocks(model, 1, recorder)

    def live_bytes():
        model.zero_grad()
        with LiveBytes(model) as recorder.live:
            model(torch.empty(images, 3, pixels, pixels, device="meta")).sum().backward()
        return recorder.live

    plain, *_, recorded = [live_bytes() for _ in range(PLAIN + 1)]  # all blocks once the last forward begins
    assert plain.pool == 0 < recorded.pool
    assert recorded.peak / plain.peak == pytest.approx(live, abs=0.02)
    both = recorded.pool + recorded.elsewhere
    assert both / plain.peak == pytest.approx(apart, abs=0.02)
    if pixels == 224:  # in float32, with the weights and the momentum
        size = NETWORKS[name]
        estimate = 4 * (3 * size.num_parameters + size.kept_values * images)
        assert (both + 8 * size.num_parameters) / estimate == pytest.approx(1.0, abs=0.03)
