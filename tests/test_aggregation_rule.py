"""What `auto` chooses, by one fixed rule, and which of DeepSpeed's keys are honoured or refused."""

import copy
from types import SimpleNamespace

import pytest
from aggregating import RING, TREE
from small_engine import recipe

from lbsgd.config.aggregation import Choice, choose
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.config.schema import Aggregation
from lbsgd.errors import ConfigError
from lbsgd.train.aggregation.aggregation import AggregationSettings
from lbsgd.train.aggregation.placement import Placement


@pytest.mark.parametrize(
    "sizes, backend, hierarchy, between, inside",
    [
        ([2, 2], "gloo", "servers", TREE, TREE),
        ([4], "gloo", "flat", TREE, TREE),
        ([1, 1, 1, 1], "gloo", "flat", TREE, TREE),
        ([3], "gloo", "flat", RING, RING),
        ([3, 3], "gloo", "servers", RING, RING),  # halving inside is not possible, so the order is no tree in any case
        ([2, 2, 2], "gloo", "servers", RING, RING),
        ([2, 1], "gloo", "flat", RING, RING),
        ([3, 1], "gloo", "flat", RING, RING),  # four processes, but not on equal servers
        ([8, 8], "nccl", "flat", RING, RING),
    ],
)
def test_auto_follows_a_fixed_rule(sizes, backend, hierarchy, between, inside):
    choice = choose(Aggregation(), sizes, backend)
    assert (choice.hierarchy, choice.between, choice.inside) == (hierarchy, between, inside)
    assert choice.is_tree == (between == TREE)
    assert ("bits depend on placement" in choice.reason) == (backend == "gloo" and between == RING)


@pytest.mark.parametrize(
    "names, servers, in_blocks, of_rank_1",
    [
        ("bbaa", ((0, 1), (2, 3)), True, ((0, 1), (1, 3))),
        ("abab", ((0, 2), (1, 3)), False, ((1, 3), (0, 1))),
        ("baab", ((0, 3), (1, 2)), False, ((1, 2), (0, 1))),
    ],
)
def test_servers_come_by_their_lowest_rank_whatever_their_names(monkeypatch, names, servers, in_blocks, of_rank_1):
    def gather(found, _):
        found[:] = names

    monkeypatch.setattr("torch.distributed.get_world_size", lambda: len(names))
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    placement = Placement.gather()
    assert (placement.servers, placement.in_blocks, placement.of(1)) == (servers, in_blocks, of_rank_1)


def test_what_is_asked_for_comes_first():
    asked = Aggregation(hierarchy="servers", between="halving_doubling")
    assert choose(asked, [8, 8], "nccl") == Choice("servers", TREE, TREE, "2 servers x 8 processes")
    assert choose(asked, [3, 3], "gloo").inside == RING and not choose(asked, [3, 3], "gloo").is_tree
    assert choose(Aggregation(hierarchy="flat"), [2, 2], "gloo").hierarchy == "flat"
    assert choose(Aggregation(between="backend"), [2, 2], "gloo").between == RING
    asked = choose(Aggregation(between="halving_doubling"), [2, 2], "nccl")
    assert str(asked) == "halving/doubling between all processes (2 servers x 2 processes; as the JSON says)"


@pytest.mark.parametrize("sizes, words", [([3], "3 processes"), ([2, 2, 2], "3 servers"), ([2, 1], "3 processes")])
def test_what_cannot_be_is_refused_in_one_line(sizes, words):
    with pytest.raises(ConfigError, match=words) as refused:
        choose(Aggregation(between="halving_doubling"), sizes, "gloo")
    assert "\n" not in str(refused.value) and "use backend or auto" in str(refused.value)


def test_phases_on_servers_of_unequal_size_are_refused_where_they_are_demanded():
    with pytest.raises(
        ConfigError, match="hierarchy: servers needs equally many processes on each, and these have 3, 1;"
    ):
        choose(Aggregation(hierarchy="servers"), [3, 1], "gloo")


# --- keys that reroute DeepSpeed's reduction --------------------------------------------------------------------------


def with_keys(stage=0, block=None, **keys):
    config = copy.deepcopy(recipe(stage))
    config["lbsgd"]["aggregation"] = {} if block is None else block
    return config, Overrides(settings=tuple(f"{key.replace('__', '.')}={value}" for key, value in keys.items()))


def refusal(stage=0, **keys):
    with pytest.raises(ConfigError) as refused:
        Plan.read(with_keys(stage)[0], 2, overrides=with_keys(stage, **keys)[1])
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "stage, key, value, code",
    [
        (1, "data_types.grad_accum_dtype", "bf16", "D35"),  # it would round
        (0, "data_types.grad_accum_dtype", "bf16", "D35"),  # DeepSpeed itself refuses it
        (0, "communication_data_type", "fp16", "D22"),
        (1, "zero_optimization.contiguous_gradients", "0", "D27"),  # false to DeepSpeed
        (1, "zero_optimization.overlap_comm", "1", "D27"),
        (0, "gradient_predivide_factor", "0", "D63"),
        (0, "sequence_parallel_size", "2", "D64"),
        (0, "gradient_allreduce_op", "sum", "D05"),
        (0, "managed_gradient_accumulation", "false", "D23"),
    ],
)
def test_a_key_that_reroutes_the_reduction_is_refused_by_name(stage, key, value, code):
    error = refusal(stage, **{key.replace(".", "__"): value})
    assert key in error and code in error


def test_another_type_on_the_wire_is_refused_in_fp16_too():
    config, overrides = with_keys(1, communication_data_type="fp32")
    config |= {"fp16": {"enabled": True, "auto_cast": True}}
    with pytest.raises(ConfigError, match="communication_data_type.*D61"):
        Plan.read(config, 2, overrides=overrides)
    Plan.read(config, 2, overrides=Overrides(settings=("communication_data_type=fp16",)))
    same = ("communication_data_type=fp16", "data_types.grad_accum_dtype=half")
    Plan.read(config, 2, overrides=Overrides(settings=same))


def test_without_the_block_these_keys_are_deepspeeds_business():
    config, overrides = with_keys(1, communication_data_type="fp32", lbsgd__aggregation="null")
    config |= {"fp16": {"enabled": True, "auto_cast": True}}
    assert Plan.read(config, 2, overrides=overrides).recipe.aggregation is None


def test_the_divisors_of_deepspeed_are_honoured():
    def of(precision="fp32", **config):
        plan = SimpleNamespace(config=config, world_size=4, precision=precision, bucket_elements=1, overlaps=True)
        return AggregationSettings.of(plan)

    assert (of().before, of().after) == (1.0, 4.0)
    assert (of("fp16").before, of("fp16").after) == (4, 1.0)  # before the sum
    prescaled, predivided = of(prescale_gradients=True), of(gradient_predivide_factor=2.0)
    asked = of("fp16", gradient_predivide_factor=2.0)
    assert (asked.before, asked.after) == (2.0, 2.0)  # in fp16 too, as in DeepSpeed
    assert (prescaled.before, prescaled.after, predivided.before, predivided.after) == (4, 1.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "stage, extra, words",
    [
        (2, {}, "ZeRO-2 reduces in every pass"),
        (1, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "autocast's precision"),
    ],
)
def test_where_deepspeed_must_reduce_auto_lets_it_and_a_demand_is_refused(stage, extra, words):
    config = with_keys(stage)[0] | extra
    plan = Plan.read(config, 2)
    assert words in plan.own_reduction
    config["lbsgd"]["aggregation"] = {"between": "halving_doubling"}
    with pytest.raises(ConfigError, match=f"lbsgd.aggregation.between is halving_doubling, but .*{words}.*D65"):
        Plan.read(config, 2)


def test_a_file_without_the_block_keeps_deepspeeds_own_reduction():
    plan = Plan.read(recipe(), 2)
    assert "no lbsgd.aggregation" in plan.own_reduction


@pytest.mark.parametrize("sizes, words", [([3, 1], "3, 1"), ([6, 6, 4], "2 x 6, 4"), ([8] * 124 + [4], "124 x 8, 4")])
def test_many_servers_of_unequal_size_are_told_in_a_few_words(sizes, words):
    choice = choose(Aggregation(), sizes, "nccl")
    assert choice.reason == f"servers of unequal size: {words} processes"
