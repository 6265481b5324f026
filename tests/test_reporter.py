"""A reporter hands DeepSpeed's monitors what they can draw."""

from types import SimpleNamespace

from test_trainer import Records

from lbsgd.train.reporter import Reporter


def test_a_monitor_gets_numbers_alone():
    """TensorBoard raises at None, which an average precision is where there is nothing to find."""
    events = []
    monitor = SimpleNamespace(enabled=True, write_events=events.extend)
    engine = SimpleNamespace(device="cpu", monitor=monitor, global_samples=64)
    record = {"epoch": 1, "val_box_ap": 3.5, "val_box_ap_small": None, "weight_to_gradient": {"fc": 2.0}}
    Reporter(Records(), Records(), engine).report("epoch", record)
    assert events == [("lbsgd/val_box_ap", 3.5, 64)]
