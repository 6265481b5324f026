"""Between two reports the host never waits for the GPU by its own doing: what it reads in that time is counted."""

import warnings
from dataclasses import replace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from host_reads import HostReads
from oracle import K, N, network
from resnet50 import ResNet50
from small_engine import in_precision
from trainers import NobodyAsks, Records

import lbsgd
from lbsgd.data.fake import FakeImages
from lbsgd.data.folder import open_data
from lbsgd.data.loaders import TrainLoader
from lbsgd.data.share import Cut, Pixels
from lbsgd.train.images import Images
from lbsgd.train.reporter import Reporter
from lbsgd.train.saver import Saver
from lbsgd.train.session import pixel_form
from lbsgd.train.trainer import Trainer

BEFORE, COUNTED = 2, 4  # iterations; the first is reported, and DeepSpeed initialises itself in it
LAST = 1000
BY_DEEPSPEED = {("stage_1_and_2.has_overflow", "item"): COUNTED}  # at the end of each update, for any number of passes


def steady_trainer(folder, config):
    """Return a trainer between two reports, and its batches."""
    config["steps_per_print"], config["lbsgd"]["num_images"] = 100, 20 * K * N
    config["scheduler"]["params"]["warmup_num_steps"] = 100
    engine, plan = lbsgd.initialize(network(), config)
    pixels = replace(pixel_form(plan, engine.device), resolution=6)
    cut = Cut(seed=0, global_batch=K * N, micro_batch=plan.micro_batch)
    images = FakeImages(plan.num_images, 5, cut, pixels)
    saver = Saver(engine, folder, {}, {})
    reporter = Reporter(Records(), Records(), engine)
    ours = Trainer(engine, plan, ResNet50(), Images(images, []), saver, NobodyAsks(), reporter)
    engine.train()
    batches = images.epoch(0)
    train(ours, batches, BEFORE)
    return ours, batches


def train(ours, batches, iterations):
    for _ in range(iterations):
        ours.update(batches)
        ours.after_update(LAST)


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("micro_batch", [K * N, N])  # 1 and 8 passes
def test_in_bf16_nothing_is_read_between_two_reports(tmp_path, stage, micro_batch):
    ours, batches = steady_trainer(tmp_path, in_precision("bf16", stage, micro_batch))
    with HostReads() as reads:
        train(ours, batches, COUNTED)
    assert not reads.found
    with HostReads() as reads:
        ours.report_iteration(ours.iteration - 1)
    assert reads.by("lbsgd")  # the counter notices a report


@pytest.mark.parametrize("micro_batch", [K * N, N])
def test_in_fp16_deepspeed_reads_and_we_do_not(tmp_path, fp16_on_a_cpu, micro_batch):
    ours, batches = steady_trainer(tmp_path, in_precision("fp16", 1, micro_batch))
    with HostReads() as reads:
        train(ours, batches, COUNTED)
    assert not reads.by("lbsgd") and not reads.by("neither")
    assert reads.by("deepspeed") == BY_DEEPSPEED


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_in_bf16(tmp_path):
    ours, batches = steady_trainer(tmp_path, in_precision("bf16", 0, N))
    torch.cuda.set_sync_debug_mode("error")  # torch raises where it would wait
    try:
        train(ours, batches, COUNTED)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_the_loader_waits_for_nothing_but_its_own_copies(digits_data):
    pixels = Pixels(resolution=32, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
    cut = Cut(seed=0, global_batch=32, micro_batch=32)
    loader = TrainLoader(open_data(digits_data).train, cut, threads=2, pixels=pixels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels = [labels for _, labels in loader.epoch(0)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loader.close()
    assert len(labels) == 1437 // 32 and 0 <= int(torch.cat(labels).min()) < int(torch.cat(labels).max()) == 9


@pytest.mark.gpu
def test_on_a_gpu_only_deepspeed_waits_in_fp16(tmp_path):
    ours, batches = steady_trainer(tmp_path, in_precision("fp16", 1, N))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            train(ours, batches, COUNTED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [wait for wait in waits if "synchroniz" in str(wait.message)]
    assert waits and all("/deepspeed/" in wait.filename for wait in waits)
