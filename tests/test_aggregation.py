"""Aggregation inside DeepSpeed: the bits of its own reduction, the same on any placement and after a restart."""

import time

import oracle
import pytest
import torch
import torch.distributed as dist
from aggregating import (
    ONE_BUCKET,
    OURS,
    config,
    one_iteration,
    parameters,
    play_cyclic_hosts,
    play_hosts,
    run,
    same_bits,
)
from oracle import BOUND, ITERATIONS, N, distance, network
from processes import in_processes
from small_engine import recipe, trained
from torch import nn

import lbsgd
from lbsgd.train import engine as lbsgd_engine
from lbsgd.train.aggregation.collectives import Backend
from lbsgd.train.aggregation.halving_doubling import HalvingDoubling
from lbsgd.train.aggregation.phases import groups, timeout_of
from lbsgd.train.aggregation.resume import saved_choice, tell_of_another_order
from lbsgd.train.engine_state import gather_state, restore_state

TREE = {"between": "halving_doubling"}
RING = {"between": "backend"}


# --- two processes: the bits of DeepSpeed's own reduction -------------------------------------------------------------


class Branched(nn.Module):
    """A network with a layer that only rank 0 uses, and one that no process uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.extra, self.idle = network(), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, images):
        logits = self.body(images)
        return self.extra(logits) if dist.get_rank() == 0 else logits


def overflow(engine, loss):
    """Iterations 1 and 3 overflow, on rank 0 only."""
    broken = engine.global_steps in (1, 3) and dist.get_rank() == 0
    engine.backward(loss * float("inf") if broken else loss)


def in_plain_layout(values, **settings):
    """Train with weights in NCHW, as users' own engines may keep them."""
    original = lbsgd_engine.lay_out
    lbsgd_engine.lay_out = lambda model, layout=None: None
    try:
        engine = run(values, **settings)
        assert all(parameter.is_contiguous() for parameter in engine.module.parameters())
        return engine
    finally:
        lbsgd_engine.lay_out = original


def pair(do, **settings):
    """Weights and skipped updates with DeepSpeed's own reduction, and with ours with overlap and without."""
    own = settings | ({"overlap": False} if settings.get("stage") else {})
    engines = [do(config(2, **own)), *(do(config(2, block=OURS, **settings, overlap=on)) for on in (True, False))]
    assert engines[0].aggregation is None and len(engines[1].aggregation.buckets) > 4
    return [(parameters(engine), engine.skipped_steps) for engine in engines]


def two():
    lbsgd_engine.deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    play_hosts(1, 1)
    pairs = {
        f"stage {stage}, {passes} passes": pair(run, stage=stage, passes=passes)
        for stage in (0, 1)
        for passes in (1, 3)
    }
    pairs["NCHW"] = pair(in_plain_layout)
    pairs["fp16"] = pair(lambda values: run(values, backward=overflow, iterations=6), stage=1, precision="fp16")
    pairs["unused"] = pair(lambda values: run(values, model=Branched()))
    # ZeRO keeps weights in NCHW, in which a convolution has other bits.
    pairs["unused, NCHW"] = parameters(in_plain_layout(config(2, block=OURS), model=Branched()))
    pairs["unused, stage 1"] = parameters(run(config(2, stage=1, block=OURS), model=Branched()))
    return pairs | {"events": events(), "started in": passes_that_start(), "wait": waited(), "zero": zeros_part()}


def events():
    """The events of one back-propagation in order: starts of buckets, and the first layer's gradient."""
    engine, plan = lbsgd.initialize(network(), config(2, block=OURS))
    seen, start = [], engine.aggregation.runner.start
    engine.aggregation.runner.start = lambda buffer: (seen.append("start"), start(buffer))[1]
    engine.module.conv.weight.register_post_accumulate_grad_hook(lambda _: seen.append("first layer"))
    one_iteration(engine, plan)
    return seen


def passes_that_start():
    """The passes in which buckets start, with 2 iterations of 3 passes each."""
    engine, plan = lbsgd.initialize(network(), config(2, passes=3, block=OURS))
    seen, start = set(), engine.aggregation.runner.start
    engine.aggregation.runner.start = lambda buffer: (seen.add(engine.micro_steps), start(buffer))[1]
    for _ in range(2):
        one_iteration(engine, plan)
    return seen


def zeros_part():
    """Return ZeRO 1's hooks and buffers, and the shapes of the gradients that it takes from outside our buckets."""
    engine, _ = lbsgd.initialize(network(), config(2, stage=1, block=OURS))
    engine.backward(engine(torch.randn(N, 3, 6, 6)).sum())
    engine(torch.randn(N, 3, 6, 6))  # as an evaluation before engine.step
    zero, buckets = engine.optimizer, engine.aggregation.buckets
    places = {bucket.buffer.untyped_storage().data_ptr() for bucket in buckets}
    gradients = [each for group in zero.averaged_gradients.values() for each in group]
    outside = [each.shape for each in gradients if each.untyped_storage().data_ptr() not in places]
    return zero._grad_acc_hooks, [bucket.buffer for bucket in zero.ipg_buckets.values()], outside


def waited():
    """Seconds that back-propagation waits for aggregation if the other process is half a second late."""

    def late(engine, loss):
        if dist.get_rank() == 1:
            time.sleep(0.5)
        engine.backward(loss)

    found = []
    for block in (OURS, None):
        engine = run(config(2, block=block), iterations=1, backward=late)
        found.append(engine.waiting.of_window)
    return found


@pytest.fixture(scope="module")
def of_two():
    return in_processes(2, two)


CASES = [f"stage {stage}, {passes} passes" for stage in (0, 1) for passes in (1, 3)]


@pytest.mark.parametrize("case", [*CASES, "NCHW", "fp16"])
def test_two_processes_have_the_bits_of_deepspeeds_own_reduction(of_two, case):
    (own, skips), *ours = of_two[0][case]
    assert [same_bits(own, weights) for weights, _ in ours] == [True, True]
    assert [skipped for _, skipped in ours] == [skips, skips]
    assert skips == (2 if case == "fp16" else 0)
    assert same_bits(ours[0][0], of_two[1][case][1][0])


def test_zero_1_takes_its_share_from_the_buckets_where_the_gradients_lie(of_two):
    """Its own hooks copy each gradient twice, which takes the host longer than a GPU computes."""
    assert of_two[0]["zero"] == ([], [[]], [])


def test_a_parameter_that_one_process_does_not_use_is_the_mean_with_zero(of_two):
    """At stage 1, where DeepSpeed's own reduction is wrong or aborts (test_upstream.py), and at stage 0."""
    (expected, _), *ours = of_two[0]["unused"]
    assert all(same_bits(expected, weights) for weights, _ in ours)
    assert same_bits(of_two[0]["unused, NCHW"], of_two[0]["unused, stage 1"])


def test_the_first_bucket_starts_before_the_first_layers_gradient_exists(of_two):
    for seen in (process["events"] for process in of_two):
        assert seen.index("start") < seen.index("first layer") and seen.count("start") > 4


def test_nothing_starts_before_the_last_pass(of_two):
    assert [process["started in"] for process in of_two] == [{2, 5}] * 2


def test_what_back_propagation_waits_for_aggregation_is_counted(of_two):
    first, second = (process["wait"] for process in of_two)
    assert all(ours > 0.4 for ours in first), first  # ours, and DeepSpeed's own reduction
    assert all(late < mine for late, mine in zip(second, first, strict=True))


# --- four processes: one and the same bits on 4 hosts, 2 and 1 --------------------------------------------------------


HOSTS = {"4x1": (1, 1, 1, 1), "2x2": (2, 2), "1x4": (4,)}
HALF = ITERATIONS // 2
OF_THE_ORACLE = [(stage, micro_batch) for stage in (0, 1, 2) for micro_batch in (8, 16)]  # 2 passes and 1


def four():
    found = {"sums": sums()}
    for name, sizes in HOSTS.items():
        play_hosts(*sizes)
        for bucket, overlap in [(500, True), (ONE_BUCKET, False)]:
            found[name, bucket, overlap] = parameters(run(config(4, bucket=bucket, overlap=overlap, block=OURS)))
        found[name, "ring"] = parameters(run(config(4, block=RING)))
    play_hosts(1, 1, 1, 1)  # where a ring has other bits than the tree
    found["NCHW"] = first_gradients(in_plain_layout, config(4, block=OURS))  # ZeRO's layout
    found["stage 1"] = first_gradients(run, config(4, stage=1, block=OURS))
    found["own"] = parameters(run(config(4)))
    play_hosts(3, 1)
    engine = run(config(4, block=OURS))
    found["unequal"] = parameters(engine), str(engine.aggregation.choice)
    play_cyclic_hosts(2)
    engine = run(config(4, block=OURS))
    found["cyclic"] = parameters(engine), str(engine.aggregation.choice), engine.aggregation.placement
    play_hosts(2, 2)
    return found | {"resumed": resumed()} | {case: of_oracle(*case) for case in OF_THE_ORACLE}


def first_gradients(train, values):
    """The gradients of the first update. Its weights may differ in their last bits, because ZeRO cuts tensors up."""
    found = {}

    def backward(engine, loss):
        engine.backward(loss)
        for name, parameter in engine.module.named_parameters():
            found[name] = lbsgd_engine.full_gradient(engine, parameter).clone()

    train(values, iterations=1, backward=backward)
    return found


def sums():
    """Whether all sums between subsets of the processes are right, by algorithm and groups."""
    lbsgd_engine.start_processes()
    rank, timeout, found = dist.get_rank(), timeout_of(torch.device("cpu")), {}
    for lists in ([(0, 2), (1, 3)], [(0, 1, 2, 3)]):
        [ranks] = [ranks for ranks in lists if rank in ranks]
        group, back = (groups(lists, rank, timeout) for _ in range(2))
        for collective in (Backend(ranks, group, rank), HalvingDoubling(ranks, group, rank, back)):
            for dtype, length in ((torch.float32, 4), (torch.float64, 8), (torch.float32, 12)):  # memory is reused
                numbers = torch.arange(length, dtype=dtype)
                whole, parts = numbers + 100 * rank, numbers + 100 * rank
                time.sleep(0.02 * rank)  # make some wait for others
                collective.all_reduce(whole)
                collective.reduce_scatter(parts)
                collective.all_gather(parts)
                expected = len(ranks) * numbers + 100 * sum(ranks)
                right = torch.equal(whole, expected) and torch.equal(parts, expected)
                found.setdefault((type(collective).__name__, len(lists)), []).append(right)
    return found


def of_oracle(stage, micro_batch):
    """The state after half of the oracle's run. At stage 2 DeepSpeed itself reduces."""
    values = recipe(stage, micro_batch=micro_batch)
    values["lbsgd"]["aggregation"] = OURS
    values["zero_optimization"] |= {"reduce_bucket_size": 500, "overlap_comm": True}
    return trained(values, HALF)[0]


def resumed():
    """A run by the ring, stopped after 2 of 4 iterations and resumed with three JSONs, the first one its own."""
    whole = run(config(4, block=RING))
    half = run(config(4, block=RING), iterations=2)
    state, saved = gather_state(half), saved_choice(half)
    found = {}
    for name, block in [("same", RING), ("other", OURS), ("none", None)]:
        engine, plan = lbsgd.initialize(network(seed=1), config(4, block=block))
        restore_state(engine, state)
        said = []
        tell_of_another_order(engine, saved, (4, 4), said.append)
        while engine.global_steps < 4:
            one_iteration(engine, plan)
        found[name] = same_bits(parameters(engine), parameters(whole)), said
    return found


@pytest.fixture(scope="module")
def of_four():
    return in_processes(4, four)[0]


def test_sums_between_some_of_the_processes_are_right_in_each_type_and_length(of_four):
    algorithms = [(algorithm, number) for number in (2, 1) for algorithm in ("Backend", "HalvingDoubling")]
    assert of_four["sums"] == {each: [True] * 3 for each in algorithms}


def test_bits_are_the_same_on_any_hosts_with_any_buckets_with_overlap_and_without(of_four):
    trees = {key: weights for key, weights in of_four.items() if key[0] in HOSTS and key[1] != "ring"}
    assert len(trees) == 6
    first = trees.pop(("4x1", 500, True))
    assert [key for key, weights in trees.items() if not same_bits(first, weights)] == []
    assert same_bits(of_four["NCHW"], of_four["stage 1"])


def test_a_rings_bits_depend_on_placement(of_four):
    """The check can fail: if the backend sums, placements differ in their bits, from each other or from the tree's."""
    rings = [of_four[name, "ring"] for name in HOSTS]
    assert not all(same_bits(of_four["4x1", 500, True], ring) for ring in rings)
    assert all(distance(ring, of_four["own"]) < BOUND for ring in rings)


def test_four_processes_hold_the_oracles_weights_statistics_and_momentum(of_four):
    weights, momentum = oracle.train(network(), HALF)
    for case in OF_THE_ORACLE:
        state = of_four[case]
        assert distance(state.weights, weights) < BOUND and distance(state.momentum, momentum) < BOUND, case


def test_unequal_hosts_go_flat(of_four):
    weights, said = of_four["unequal"]
    assert "servers of unequal size: 3, 1" in said and "between all processes" in said
    assert distance(weights, of_four["own"]) < BOUND


def test_ranks_that_go_round_the_hosts_are_grouped_by_host(of_four):
    weights, said, placement = of_four["cyclic"]
    assert placement.servers == ((0, 2), (1, 3)) and not placement.in_blocks and said.startswith("three phases")
    assert distance(weights, of_four["own"]) < BOUND


def test_a_resumed_run_aggregates_as_before_or_says_that_it_does_not(of_four):
    (same, said), other, none = (of_four["resumed"][name] for name in ("same", "other", "none"))
    assert same and said == []
    for _, lines in (other, none):
        assert len(lines) == 1 and "last bits may differ" in lines[0]
