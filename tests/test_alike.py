"""Networks and JSONs that differ between processes, with which one process, or all, would silently train wrongly."""

import pytest
import torch
import torch.distributed as dist
from aggregating import OURS, config
from oracle import N, network
from processes import in_processes

import lbsgd
from lbsgd.config.plan import Plan
from lbsgd.errors import ConfigError
from lbsgd.train.aggregation.alike import facts
from lbsgd.train.engine import start_processes


def refusal(model, values):
    try:
        lbsgd.initialize(model, values)
    except ConfigError as error:
        return str(error)
    return None


def network_without(frozen):
    model = network()
    model.get_parameter(frozen).requires_grad_(False)
    return model


def refusals():
    start_processes()
    first = dist.get_rank() == 0
    two_norms = [name for name, each in network().named_parameters() if each.shape == (8,)][:2]
    wider = torch.nn.Sequential(torch.nn.Linear(4, 4 if first else 5))
    longer = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(1 if first else 2)))
    return two_norms, {
        "frozen": refusal(network_without(two_norms[0 if first else 1]), config(2, block=OURS)),
        "wider": refusal(wider, config(2)),
        "longer": refusal(longer, config(2)),
        "buckets": refusal(network(), config(2, bucket=500 if first else 600, block=OURS)),
        "buckets at stage 2": refusal(network(), config(2, stage=2, bucket=500 if first else 600)),
        "stage 0's buckets": refusal(network(), config(2, bucket=500 if first else 600)),
        "who reduces": refusal(network(), config(2, block=OURS if first else None)),
        "alike": refusal(network(), config(2, block=OURS, overlap=first)),  # the time of its start changes no sum
    }


def test_networks_and_jsons_that_differ_between_processes_are_refused_on_all_of_them():
    (norms, said), (_, other) = in_processes(2, refusals)
    assert said == other and said.pop("alike") is None and said.pop("stage 0's buckets") is None
    assert said["buckets"] == said.pop("buckets at stage 2")
    trained, frozen = (f"{norms[0]} (8; torch.float32; {how})" for how in ("trained", "frozen"))
    for case, told in {
        "frozen": f"rank 1 has {trained}, where rank 0 has {frozen}; give lbsgd.initialize the same network and JSON",
        "wider": "rank 1 has 0.weight (5, 4; torch.float32; trained), where rank 0 has 0.weight (4, 4; ",
        "longer": "rank 1 has 1.weight (4, 4; torch.float32; trained), where rank 0 has nothing more",
        "buckets": "rank 1 has zero_optimization.reduce_bucket_size 600, where rank 0 has "
        "zero_optimization.reduce_bucket_size 500",
        "who reduces": "rank 1 has lbsgd.aggregation None, where rank 0 has lbsgd.aggregation hierarchy='auto' between",
    }.items():
        assert said[case].startswith(told), said[case]


@pytest.mark.parametrize(
    "name, other",
    [
        ("zero_optimization.stage", config(2, passes=2, stage=1)),
        ("precision", config(2, passes=2, precision="bf16")),
        ("train_micro_batch_size_per_gpu", config(2, passes=2) | {"train_micro_batch_size_per_gpu": 2 * N}),
        ("gradient_accumulation_steps", config(2)),
        ("gradient_predivide_factor", config(2, passes=2) | {"gradient_predivide_factor": 2.0}),
    ],
)
def test_what_decides_which_numbers_are_added_to_which_is_compared(name, other):
    plans = [Plan.read(values, 2) for values in (config(2, passes=2), other)]
    here, there = ({line.split()[0]: line for line in facts(network(), plan)} for plan in plans)
    assert here[name] != there[name]
