"""A loaded or restored engine goes on as a new one, even if a back-propagation had raised before."""

import warnings

import pytest
import torch
from aggregating import config, noise, one_iteration
from deepspeed.accelerator import get_accelerator
from oracle import Residual
from processes import in_processes
from torch.nn import functional as F

import lbsgd
from lbsgd.config.keypath import put
from lbsgd.train.engine import start_processes
from lbsgd.train.engine_state import gather_state, restore_state


class Raising(torch.autograd.Function):
    on = False

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        if Raising.on:
            raise RuntimeError("as when memory runs out")
        return gradient


class Fragile(Residual):
    """The oracle's network, whose back-propagation may raise when it has made half of the gradients."""

    def __init__(self):
        super().__init__()
        self.conv2.register_forward_pre_hook(lambda _, inputs: Raising.apply(*inputs))


def loss_of(engine, number):
    images, labels = noise(9, number)
    return F.cross_entropy(engine(images).float(), labels)


def broken_off(engine, passes):
    """Begin an iteration. Its last pass here raises."""
    unfinished(engine, passes - 1)
    if passes > 1:
        engine.step()
    Raising.on = True
    with pytest.raises(RuntimeError, match="memory"):
        engine.backward(loss_of(engine, passes))
    Raising.on = False


def unfinished(engine, passes):
    """Begin an iteration, without the last step."""
    for number in range(passes):
        if number:
            engine.step()
        engine.backward(loss_of(engine, number))


def loaded(engine, folder, state):
    assert engine.load_checkpoint(folder)[0]


def restored(engine, folder, state):
    restore_state(engine, state)


def in_torchs_way(engine, loss):
    loss.backward()


def in_deepspeeds_way(engine, loss):
    engine.backward(loss)


def after_an_unfinished_iteration(folder, values, load=loaded, begin=broken_off, passes=1, backward=in_deepspeeds_way):
    """Return what differs after two iterations in an engine that had an unfinished one and in a new engine."""
    engine, plan = lbsgd.initialize(Fragile(), values)
    one_iteration(engine, plan)
    lbsgd.agree_statistics(engine.module)
    engine.save_checkpoint(folder)
    state, ended = gather_state(engine), []
    begin(engine, passes)
    for each in (engine, lbsgd.initialize(Fragile(), values)[0]):
        load(each, folder, state)
        for _ in range(2):
            one_iteration(each, plan, backward)
        ended.append(gather_state(each))
    here, there = ended
    assert here.counters == there.counters
    pairs = [(name, here.weights[name], tensor) for name, tensor in there.weights.items()]
    pairs += [(f"momentum of {name}", here.momentum[name], tensor) for name, tensor in there.momentum.items()]
    return [name for name, one, other in pairs if not torch.equal(one, other)]


def values_of(stage, block=None, overlap=False, bucket=500, passes=2, precision="fp32", **keys):
    values = config(2, passes, stage, bucket, overlap, precision, block)
    for key, value in keys.items():
        put(values, key, value)
    return values


ZERO = "zero_optimization"
CASES = {
    **{
        f"{load.__name__} after {passes} passes, {begin.__name__}, at stage {stage} of {whose}, overlap {overlap}": (
            dict(stage=stage, block=block, overlap=overlap),
            dict(load=load, begin=begin, passes=passes),
        )
        for stage, whose, block in [(0, "DeepSpeed", None), (1, "DeepSpeed", None), (2, "DeepSpeed", None)]
        + [(0, "lbsgd", {}), (1, "lbsgd", {})]
        for load, begin, passes, overlap in [(loaded, broken_off, 1, False), (loaded, broken_off, 2, True)]
        + [(loaded, unfinished, 2, False), (restored, broken_off, 2, True)]
    },
    "one pass per iteration": (dict(stage=0, block={}, passes=1), dict(begin=unfinished)),
    "one bucket": (dict(stage=2, bucket=100_000, overlap=True), {}),
    "gradients in place": ({"stage": 2, "overlap": True, f"{ZERO}.contiguous_gradients": False}, dict(passes=2)),
    "sums in fp32": (dict(stage=2, precision="fp16") | {"data_types.grad_accum_dtype": "fp32"}, dict(passes=2)),
    "timers": ({"stage": 2, "wall_clock_breakdown": True}, {}),
    "torch's way": (dict(stage=2), dict(backward=in_torchs_way)),
}


def all_outcomes(folder):
    start_processes(20)  # a process that raises alone is not waited for any longer
    get_accelerator().is_fp16_supported = lambda: True
    return {case: outcome(f"{folder}/{number}", *CASES[case]) for number, case in enumerate(CASES)}


def outcome(folder, keys, options):
    """Return what differs, lbsgd's warnings, or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            differs = after_an_unfinished_iteration(folder, values_of(**keys), **options)
        except Exception as error:  # noqa: BLE001
            return repr(error)
    return differs + [str(each.message) for each in caught if "lbsgd" in str(each.message)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return in_processes(2, all_outcomes, str(tmp_path_factory.mktemp("checkpoints")))[0]


@pytest.mark.parametrize("case", CASES)
def test_after_an_unfinished_iteration_a_loaded_engine_has_the_bits_of_a_new_one(outcomes, case):
    assert outcomes[case] == []
