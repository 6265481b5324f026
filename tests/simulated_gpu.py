"""A GPU's queue and its events in simulated time: the host queues work and goes on, and the device works in order."""

import torch


class SimulatedGpu:
    """now: the host's clock, in seconds; free_at: when the device will have done all queued work."""

    def __init__(self):
        self.now = self.free_at = 0.0

    def work(self, seconds):
        self.free_at = max(self.now, self.free_at) + seconds

    def synchronise(self):
        self.now = max(self.now, self.free_at)

    def event(self, enable_timing=True):
        return Event(self)

    def replace_cuda(self, monkeypatch, cycles_per_second):
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronise)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / cycles_per_second))


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.now, self.gpu.free_at)

    def query(self):
        return self.at <= self.gpu.now

    def synchronize(self):
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end):
        assert self.query() and end.query(), "CUDA raises: not ready"
        return 1e3 * (end.at - self.at)
