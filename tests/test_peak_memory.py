"""The peak of a GPU's memory is in the log and on the page, next to the estimate of `lbsgd plan`."""

from types import SimpleNamespace

import pytest
import torch
from grid_logs import write_log
from trainers import Records, trainer

from lbsgd.config.memory import NETWORKS, memory
from lbsgd.config.plan import Plan
from lbsgd.experiments.checkout import ROOT
from lbsgd.experiments.grid import BASELINE
from lbsgd.report.run_log import read_run
from lbsgd.report.run_page import run_page
from lbsgd.train.header import estimated_memory
from lbsgd.train.peak_memory import peak_bytes
from lbsgd.train.reporter import Reporter

EPOCH = {"epoch": 1, "train_loss": 1.0, "seconds": 1.0}


@pytest.fixture
def of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 11_000_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 12_000_000_000)
    return {"peak_memory_bytes": 11_000_000_000, "peak_reserved_bytes": 12_000_000_000}


def test_an_epoch_s_record_has_the_peak_on_a_gpu_and_none_on_a_cpu(of_a_gpu):
    for device, peak in (("cuda", of_a_gpu), ("cpu", {})):
        engine = SimpleNamespace(device=torch.device(device), monitor=SimpleNamespace(enabled=False))
        reporter = Reporter(Records(), Records(), engine)
        reporter.report("epoch", EPOCH), reporter.report("iteration", {"iteration": 0, "data_wait_pct": 0.0})
        assert reporter.log.epochs == [EPOCH | peak]
        assert "peak_memory_bytes" not in reporter.log.iterations[0]


def test_the_log_s_first_line_has_the_estimate_of_a_known_network():
    plan = Plan.read(ROOT / "ds_configs/256.json", 1)
    known = SimpleNamespace(plan=plan, task=SimpleNamespace(name="resnet50"))
    gpu, unknown = torch.device("cuda"), SimpleNamespace(plan=plan, task=SimpleNamespace(name="resnet8"))
    estimate = memory(plan, NETWORKS["resnet50"], plan.zero_stage).total
    assert estimated_memory(known, gpu) == {"memory_estimate_bytes": estimate} and estimate > 1e9
    assert estimated_memory(unknown, gpu) == estimated_memory(known, torch.device("cpu")) == {}


def test_the_page_shows_both(tmp_path, of_a_gpu):
    run = read_run(write_log(tmp_path, BASELINE, 0, [50.0, 40.0]))
    assert "Memory of a GPU" not in run_page(run).html()
    run.epochs[-1].update(of_a_gpu)
    run.header["memory_estimate_bytes"] = 10_000_000_000
    (section,) = [found for found in run_page(run).sections if found.title == "Memory of a GPU"]
    assert [fact.value for fact in section.facts] == ["11.0 GB", "12.0 GB", "10.0 GB; the peak is 110% of it"]
    assert "110% of it" in run_page(run).html()


@pytest.mark.gpu
def test_on_a_gpu_an_epoch_s_peak_is_more_than_its_weights(tmp_path):
    ours = trainer(tmp_path)
    ours.train(last_iteration=2)
    weights = sum(parameter.nbytes for parameter in ours.engine.module.parameters())
    [record] = ours.reporter.log.epochs
    assert weights < record["peak_memory_bytes"] <= record["peak_reserved_bytes"]
    assert record["peak_memory_bytes"] == peak_bytes("cuda")["peak_memory_bytes"]
