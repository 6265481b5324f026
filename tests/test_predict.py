"""Predictions of time and memory, worked out by hand and compared with the paper's own iteration on 256 GPUs."""

import argparse
import math
import runpy
from pathlib import Path

import pytest

from lbsgd.algorithm.published import IMAGES_PER_SECOND
from lbsgd.commands.plan import add_machines
from lbsgd.config.json_file import read_json
from lbsgd.config.memory import NETWORKS, memory, network
from lbsgd.config.overrides import Overrides
from lbsgd.config.plan import Plan
from lbsgd.config.prediction import (
    BACKWARD_SHARE,
    Reduction,
    bytes_per_iteration,
    gradient_seconds,
    overlap_in_words,
    predict,
    reduction_of,
    weight_seconds,
)
from lbsgd.config.traffic import PRESETS, Machines, running, share_over_a_link, steps
from lbsgd.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "ds_configs"
NO_LATENCY = Machines(latency_seconds=0.0)
# "we can train in 1 hour" on 256 GPUs (abstract; Sec. 5.2): 90 epochs of 1,281,167 images, 8,192 per iteration.
PAPER_SECONDS = 3600 / (90 * 1_281_167 / 8192)
PAPER_GRADIENTS = 100e6  # bytes, in the buffers of ResNet-50's 161 tensors


def plan(name, gpus, **overrides):
    return Plan.read(CONFIGS / f"{name}.json", gpus, overrides=Overrides(**overrides))


# --- the paper --------------------------------------------------------------------------------------------------------


def test_the_speed_of_a_p100_is_that_of_29_hours_on_eight():
    assert IMAGES_PER_SECOND == pytest.approx(138.05, abs=0.01)
    assert 32 / IMAGES_PER_SECOND == pytest.approx(0.2318, abs=1e-4)
    assert BACKWARD_SHARE * 32 / IMAGES_PER_SECOND == pytest.approx(0.120)


@pytest.mark.parametrize(
    "algorithm, latency_seconds",
    [
        ("ring", 0.0),
        ("halving/doubling", 0.0),  # only the paper's figures
        ("halving/doubling", 20e-6),  # its algorithm, at the latency that `lbsgd plan` assumes
    ],
)
def test_the_papers_iteration_on_256_gpus_lies_between_the_predictions(algorithm, latency_seconds, capsys):
    machines = Machines(latency_seconds=latency_seconds)
    it = predict(32, 1, 256, Reduction(PAPER_GRADIENTS, num_buckets=161), machines, algorithm)
    with capsys.disabled():
        print(
            f"\n{algorithm}, {latency_seconds * 1e6:g} us: with overlap {it.with_overlap * 1e3:.1f} ms < the paper "
            f"{PAPER_SECONDS * 1e3:.1f} ms < without overlap {it.without_overlap * 1e3:.1f} ms"
        )
    assert it.with_overlap < PAPER_SECONDS < it.without_overlap


def test_halving_doubling_is_several_times_as_fast_as_a_ring_among_32_servers():
    """Sec. 4 says 3 times. We compute only the aggregation, at an assumed latency."""
    reduction = Reduction(PAPER_GRADIENTS, num_buckets=161)
    ring, halving = (gradient_seconds(reduction, Machines(), 256, name) for name in ("ring", "halving/doubling"))
    assert 2 < ring / halving < 5


def test_a_link_of_another_speed_would_not_hold_the_papers_iteration():
    """The check can fail: at 100 Gbit/s the prediction without overlap is too low, at 5 with overlap too high."""
    reduction = Reduction(PAPER_GRADIENTS, num_buckets=161)
    fast = predict(32, 1, 256, reduction, Machines(link_gbit=100, latency_seconds=0), "ring")
    slow = predict(32, 1, 256, reduction, Machines(link_gbit=5, latency_seconds=0), "ring")
    assert fast.without_overlap < PAPER_SECONDS < slow.with_overlap


def test_the_papers_efficiency_of_about_90_percent_lies_between_the_predictions():
    it = predict(32, 1, 256, Reduction(PAPER_GRADIENTS, num_buckets=161), NO_LATENCY, "halving/doubling")
    assert it.efficiency(overlap=False) < 0.9 < it.efficiency(overlap=True)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_an_all_reduce_moves_twice_all_but_a_share_and_waits_for_every_step():
    machines = Machines(link_gbit=8.0, latency_seconds=0.001, gpus_per_server=1)  # 1 GB/s
    reduction = Reduction(1e9, num_buckets=3, weight_bytes=5e8)
    assert gradient_seconds(reduction, machines, 4, "ring") == pytest.approx(2 * 3 / 4 + 3 * 2 * 3 * 0.001)
    assert gradient_seconds(reduction, machines, 4, "halving/doubling") == pytest.approx(2 * 3 / 4 + 3 * 2 * 2 * 0.001)
    assert weight_seconds(reduction, machines, 4) == pytest.approx(0.5 * 3 / 4 + 3 * 0.001)
    counted = [steps("ring", 32, 256), steps("halving/doubling", 32, 256), steps("halving/doubling", 33, 264)]
    assert [count // 2 for count in counted] == [31, 5, 6] and steps("flat ring", 32, 256) == 2 * 255


def test_aggregation_hides_behind_the_back_propagation_but_for_its_last_bucket():
    machines = Machines(images_per_second=100, link_gbit=8.0, latency_seconds=0.0, gpus_per_server=1)
    quick = predict(100, 1, 2, Reduction(1e8, num_buckets=10), machines, "ring")  # 0.1 s behind 0.518 s
    assert quick.with_overlap == pytest.approx(1 + 0.01) and quick.without_overlap == pytest.approx(1.1)
    gathered = predict(100, 1, 2, Reduction(1e8, 10, weight_bytes=1e8), machines, "ring")  # 0.05 s, never hidden
    assert gathered.with_overlap == pytest.approx(1.06) and gathered.without_overlap == pytest.approx(1.15)
    slow = predict(100, 1, 2, Reduction(1e9, num_buckets=10), machines, "ring")  # 1 s behind 0.518 s
    assert slow.with_overlap == pytest.approx(2 - BACKWARD_SHARE)
    one_bucket = predict(100, 1, 2, Reduction(1e8), machines, "ring")
    assert one_bucket.with_overlap == one_bucket.without_overlap
    two_passes = predict(100, 2, 2, Reduction(1e9, num_buckets=10), machines, "ring")  # only the last pass hides it
    assert two_passes.with_overlap == pytest.approx(2 - BACKWARD_SHARE / 2)
    each_pass = Reduction(1e9, num_buckets=10, times=2)  # as ZeRO-2 does
    in_both = predict(100, 2, 2, each_pass, machines, "ring")  # each pass hides its own
    assert in_both.with_overlap == pytest.approx(3 - BACKWARD_SHARE) and in_both.without_overlap == pytest.approx(3)


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_inside_one_server_nothing_is_added(gpus):
    it = predict(1024, 4, gpus, Reduction(1e8, weight_bytes=1e8), Machines(), "ring")
    assert it.without_overlap == it.with_overlap == pytest.approx(1024 / IMAGES_PER_SECOND)
    assert it.efficiency(True) == 1


def test_a_server_that_is_not_full_counts_like_a_full_one():
    assert [Machines().servers(gpus) for gpus in (8, 9, 16)] == [1, 2, 2]


def test_stage_and_precision_decide_what_is_reduced():
    P = NETWORKS["resnet50"].num_parameters
    size = network("resnet50")
    assert reduction_of(plan("8k", 256), size) == Reduction(2 * P, 5, 2 * P, 1)
    assert reduction_of(plan("8k_fp32", 256), size) == Reduction(4 * P, 5, 0.0, 1)
    assert reduction_of(plan("8k", 8), size) == Reduction(2 * P, 5, 2 * P, 1)  # in the last of 32 passes
    assert reduction_of(plan("8k_zero2", 8), size) == Reduction(2 * P, 5, 2 * P, 32)  # in every pass
    assert bytes_per_iteration(Reduction(100, 1, 60, 3), 4) == 3 / 4 * (2 * 100 * 3 + 60)


def test_at_stage_0_deepspeeds_own_reduction_has_buckets_of_its_own_size():
    """Half a billion elements, whatever reduce_bucket_size says: the number is in DeepSpeed's code (engine.py)."""
    P, size, without = NETWORKS["resnet50"].num_parameters, network("resnet50"), "lbsgd.aggregation=null"
    assert reduction_of(plan("8k_fp32", 256, settings=(without,)), size) == Reduction(4 * P, 1, 0.0, 1)
    small = "zero_optimization.reduce_bucket_size=1000000"
    assert reduction_of(plan("8k_fp32", 256, settings=(without, small)), size).num_buckets == 1
    assert reduction_of(plan("8k_fp32", 256, settings=(small,)), size).num_buckets == 26  # lbsgd's
    assert reduction_of(plan("8k", 256, settings=(without, small)), size).num_buckets == 26  # ZeRO-1's


def test_plan_says_whether_deepspeed_can_overlap_and_why_not():
    size = network("resnet50")
    for settings, words in [
        ((), "yes: 5 buckets"),
        (("lbsgd.aggregation=null",), "yes: ZeRO-1"),
        (("zero_optimization.overlap_comm=false",), "overlap_comm is not true"),
        (("zero_optimization.reduce_bucket_size=13000000",), "yes: 2 buckets"),
        (("zero_optimization.reduce_bucket_size=500000000",), "one bucket"),
    ]:
        it = plan("8k", 8, settings=settings)
        assert words in overlap_in_words(it, reduction_of(it, size))
    it = plan("8k_bf16", 8, settings=("lbsgd.aggregation=null",))
    assert "stage 0" in overlap_in_words(it, reduction_of(it, size))
    it = plan("8k_bf16", 8)
    assert overlap_in_words(it, reduction_of(it, size)) == "yes: 5 buckets"


# --- which algorithm runs, on which machines --------------------------------------------------------------------------


def test_what_leaves_a_server_depends_on_the_phases():
    """At 2 servers of 8, phases move 1.875 times less over each link. At 32 they save only 3 % of the bytes."""
    flat, phases = (share_over_a_link(name, 2, 16) for name in ("flat ring", "ring"))
    assert (flat, phases) == (2 * 15 / 16, 1.0) and flat / phases == 1.875
    assert 1.02 < share_over_a_link("flat ring", 32, 256) / share_over_a_link("halving/doubling", 32, 256) < 1.03


@pytest.mark.parametrize(
    "settings, algorithm, words",
    [
        ((), "flat ring", "NCCL finds its own way"),
        (("lbsgd.aggregation.hierarchy=servers",), "ring", "three phases"),
        (("lbsgd.aggregation.between=halving_doubling",), "halving/doubling", "between all processes"),
        (("lbsgd.aggregation=null",), "flat ring", "DeepSpeed's own"),
    ],
)
def test_the_prediction_is_of_the_algorithm_that_runs(settings, algorithm, words):
    found, reason = running(plan("8k", 256, settings=settings), gpus_per_server=8)
    assert found == algorithm and words in reason


def test_phases_on_a_server_that_is_not_full_are_refused():
    it = plan("8k", 8, settings=("lbsgd.aggregation.hierarchy=servers",))
    with pytest.raises(ConfigError, match="and these have 6, 2"):
        running(it, gpus_per_server=6)


def test_every_preset_names_its_sources():
    assert PRESETS["p100-2017"].images_per_second == IMAGES_PER_SECOND
    for preset in PRESETS.values():
        assert "speed:" in preset.source and "link:" in preset.source


def test_plan_offers_every_preset():
    flags = argparse.ArgumentParser()
    add_machines(flags.add_argument_group())
    [machine] = [flag for flag in flags._actions if flag.dest == "machine"]
    assert sorted(machine.choices) == sorted(PRESETS)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_the_networks_sizes_are_torchvisions(name):
    import torch
    import torchvision

    with torch.device("meta"):
        parameters = torchvision.models.get_model(name).parameters()
    assert sum(p.numel() for p in parameters) == NETWORKS[name].num_parameters


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_activations_are_what_autograd_keeps(name):
    """Counted at 64 pixels, where a forward pass is fast. The scaling to 224 pixels is exact for multiples of 32."""
    import torch
    import torchvision

    from lbsgd.algorithm.batch_norm import convert_batch_norm

    model = convert_batch_norm(torchvision.models.get_model(name), 2)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def kept_bytes(images):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(images, 3, 64, 64)).sum()
        return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)

    of_one_image = (kept_bytes(4) - kept_bytes(2)) / 2 / 4
    assert of_one_image == pytest.approx(NETWORKS[name].kept_values * (64 / 224) ** 2, rel=0.01)


def test_memory_by_stage_in_half_precision():
    P, it = NETWORKS["resnet50"].num_parameters, plan("8k", 256)
    share = math.ceil(P / 256)
    of = {stage: memory(it, network("resnet50"), stage) for stage in (0, 1, 2)}
    assert [of[stage].weights for stage in of] == [2 * P] * 3
    assert [of[stage].gradients for stage in of] == [2 * P, 2 * P, 2 * share]
    assert [of[stage].optimizer for stage in of] == [8 * P, 8 * share, 8 * share]
    assert of[1].buckets == of[0].buckets == 2 * P  # lbsgd's buckets hold all gradients
    assert of[2].buckets == 2 * 2 * 6_000_000
    config = read_json(CONFIGS / "8k.json")
    del config["lbsgd"]["aggregation"]
    own = Plan.read(config, 256)
    assert memory(own, network("resnet50"), 1).buckets == 2 * 2 * 6_000_000  # DeepSpeed's own
    assert memory(own, network("resnet50"), 0).buckets == 2 * P  # its one buffer of all gradients at stage 0
    assert of[1].activations == 2 * 32 * 21_477_376
    assert of[1].total == sum((of[1].weights, of[1].gradients, of[1].optimizer, of[1].buckets, of[1].activations))


def test_each_stages_row_is_of_the_reduction_that_runs_at_that_stage():
    """ZeRO-1 under autocast uses DeepSpeed's own reduction, and ZeRO-2 always does. Elsewhere lbsgd aggregates."""
    P, size, bucket = NETWORKS["resnet50"].num_parameters, network("resnet50"), 6_000_000
    bf16 = plan("8k_bf16", 256)  # at stage 0, where lbsgd aggregates
    assert memory(bf16, size, 1).buckets == 4 * 2 * bucket
    assert memory(bf16, size, 0).buckets == 4 * P
    config = read_json(CONFIGS / "8k_zero2.json")
    config["lbsgd"]["aggregation"] = {"hierarchy": "auto"}
    zero2 = Plan.read(config, 256)
    assert memory(zero2, size, 2).buckets == 2 * 2 * bucket
    assert memory(zero2, size, 1).buckets == 2 * P
    assert zero2.config["zero_optimization"]["stage"] == 2  # a row changes nothing


def test_deepspeed_allocates_a_bucket_as_large_as_the_json_says():
    """Its default of 500 million elements takes 1 GB in fp16, and twice that with overlap, also for a small network."""
    P, size = NETWORKS["resnet18"].num_parameters, network("resnet18")
    large = ("zero_optimization.reduce_bucket_size=500000000",)
    assert memory(plan("8k", 8, settings=large), size, 1).buckets == 2 * P  # lbsgd's own
    default = ("zero_optimization.reduce_bucket_size=null",)
    for settings in (large, default):
        assert memory(plan("8k", 8, settings=settings), size, 2).buckets == 2 * 2 * 500_000_000
    alone = plan("8k", 1, settings=large)
    assert memory(alone, size, 1).buckets == 0  # lbsgd takes the gradients where they lie
    assert memory(alone, size, 2).buckets == 2 * 2 * 500_000_000


def test_memory_follows_micro_batch_resolution_and_precision():
    whole = memory(plan("8k_fp32", 8), network("resnet50"), 0)
    assert memory(plan("8k_bf16", 8), network("resnet50"), 0).activations == whole.activations / 2
    assert memory(plan("8k_fp32", 8, micro_batch=64), network("resnet50"), 0).activations == 2 * whole.activations
    assert memory(plan("8k_fp32", 8, resolution=112), network("resnet50"), 0).activations == whole.activations / 4
    assert whole.weights == whole.gradients == whole.optimizer == 4 * NETWORKS["resnet50"].num_parameters
    assert memory(Plan.read(CONFIGS / "8k_fp32.json", 1), network("resnet50"), 0).buckets == 0  # nothing to aggregate


def test_an_unknown_network_names_the_known_ones():
    with pytest.raises(ConfigError, match="resnet18, .* resnet152"):
        network("vit")


# --- docs/scaling.md --------------------------------------------------------------------------------------------------


def test_the_tables_of_the_scaling_page_are_what_the_tool_predicts():
    page = CONFIGS.parent / "docs/scaling.md"
    tool = runpy.run_path(str(CONFIGS.parent / "tools/scaling.py"))
    assert tool["page"](page.read_text()) == page.read_text()
    assert page.read_text().count("| 2,048 |") == 3
