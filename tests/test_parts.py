"""`parts_for` in the wrong place: parameters that come after it are reported at the first step, not left untrained."""

import pytest
import timm
import torch
from processes import in_processes
from small_engine import recipe
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import prune

import lbsgd
from lbsgd.errors import ConfigError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def step_after(change, model=None):
    """Take one step after a change of the model. Return the error, or how far each weight has moved on this process."""
    model = network() if model is None else model
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    sgd, *_ = lbsgd.parts_for(model, lbsgd.Plan.read(recipe(), world_size))
    changed = change(model) or model
    changed.eval()  # SyncBatchNorm trains only on a GPU once an earlier test has joined a group of processes
    changed(torch.randn(8, 4, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # a second try does not get around it
        try:
            sgd.step()
        except ConfigError as error:
            said = str(error)
        else:
            return [float((p.detach() - b).norm()) for p, b in zip(model.parameters(), before, strict=True)]
    return said


def new_head(model):
    model[2] = nn.Linear(8, 3)


def test_a_head_that_is_replaced_after_parts_for_is_told_at_the_first_step():
    assert step_after(new_head).startswith("2.weight of the network was added, replaced or unfrozen after parts_for")


def test_a_layer_that_is_unfrozen_after_parts_for_is_told_and_a_frozen_one_is_none():
    model = network()
    model[0].requires_grad_(False)
    assert "0.weight" in step_after(lambda model: model.requires_grad_(True), model)
    model[0].requires_grad_(False)
    moved = step_after(lambda model: None, model)
    assert moved[:2] == [0, 0] and min(moved[2:]) > 0


def test_a_layer_that_is_unfrozen_after_some_updates_is_told_unless_the_optimizer_is_given_it():
    model = network()
    model[0].requires_grad_(False)
    sgd, *_ = lbsgd.parts_for(model, lbsgd.Plan.read(recipe(), 1))
    sgd.step(), sgd.step()
    model[0].requires_grad_(True)
    with pytest.raises(ConfigError, match="^0.weight of the network was added, replaced or unfrozen after parts_for"):
        sgd.step()
    sgd.add_param_group({"params": model[0].parameters()})
    sgd.step()


def test_a_pruned_batch_norm_trains_and_does_not_decay():
    model = network()
    prune.l1_unstructured(model[1], "weight", 0.5)
    sgd, *_ = lbsgd.parts_for(model, lbsgd.Plan.read(recipe(), 1))
    [norm] = [group for group in sgd.param_groups if group["name"] == "batch_norm"]
    assert any(p is model[1].weight_orig for p in norm["params"]) and len(norm["params"]) == 2
    model(torch.randn(8, 4)).sum().backward()
    sgd.step()


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm])
def test_batch_norms_that_are_converted_again_after_parts_for_are_told_at_the_first_step(convert):
    said = step_after(convert)
    assert said.startswith("1 of the network became a SyncBatchNorm") and "\n" not in said


def test_a_layer_without_parameters_is_told_too_if_it_stands_in_the_place_of_a_converted_one():
    model = network()
    model[1] = nn.BatchNorm1d(8, affine=False)
    assert step_after(nn.SyncBatchNorm.convert_sync_batchnorm, model).startswith("1 of the network became")


def test_an_optimizer_of_the_parts_takes_further_hooks():
    model, seen = network(), []
    sgd, *_ = lbsgd.parts_for(model, lbsgd.Plan.read(recipe(), 1))
    sgd.register_step_pre_hook(lambda *_: seen.append(1))
    sgd.step(), sgd.step()
    assert seen == [1, 1]


def test_a_frozen_teacher_with_batch_norms_of_its_own_may_come_after_parts_for():
    def teach(model):
        model[0].teacher = network().requires_grad_(False)

    moved = step_after(teach)
    assert [distance > 0 for distance in moved] == [True] * 2 + [False] * 6 + [True] * 4


def test_a_loop_goes_on_from_the_state_dicts_of_model_optimizer_and_scheduler():
    config = recipe(micro_batch=32, momentum={"form": "lr_inside"})
    images = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))

    def train(first, last, state=None):
        plan = lbsgd.Plan.read(config, 1)
        model = network() if state is None else nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        parts = lbsgd.parts_for(model, plan, num_images=len(images))
        stateful = model, parts.optimizer, parts.scheduler
        for each, saved in zip(stateful, state or (), strict=False):
            each.load_state_dict(saved)
        assert parts.scheduler.last_epoch == first
        epoch, first_iteration = divmod(parts.scheduler.last_epoch, plan.iterations_per_epoch)
        parts.sampler.set_epoch(epoch, first_iteration)
        while parts.scheduler.last_epoch < last:
            for number, batch in enumerate(parts.sampler, start=1):
                (model(images[batch]).square().mean() / plan.accumulation_steps).backward()
                if number % plan.accumulation_steps == 0:
                    parts.optimizer.step(), parts.optimizer.zero_grad(), parts.scheduler.step()
                if parts.scheduler.last_epoch == last:
                    break
            epoch += 1
            parts.sampler.set_epoch(epoch)
        return [each.state_dict() for each in stateful]

    whole, resumed = train(0, 6)[0], train(3, 6, train(0, 3))[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def under_fsdp():
    torch.distributed.init_process_group("gloo")

    def flat(use_orig_params):
        return lambda model: FullyShardedDataParallel(
            model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    alone = network()
    fully_shard(alone[1])
    try:
        lbsgd.parts_for(alone, lbsgd.Plan.read(recipe(), 2))
    except ConfigError as error:
        said = str(error)
    converted = lbsgd.convert_batch_norm(network(), 4)
    fully_shard(converted[1])
    fully_shard(converted)
    lbsgd.parts_for(converted, lbsgd.Plan.read(recipe(), 2))
    return [step_after(fully_shard), step_after(flat(False)), step_after(flat(True)), said]


def test_fsdp_after_parts_for_is_told_where_it_replaces_the_parameters():
    for sharded, flattened, kept, alone in in_processes(2, under_fsdp):
        assert "1 is a FSDPBatchNorm1d" in alone and "then fully_shard, then parts_for" in alone
        assert "0.weight of the network was" in sharded and "fully_shard" in sharded
        assert "_flat_param of the network was" in flattened and "use_orig_params=True" in flattened
        assert len(kept) == 6 and sum(kept) > 0
