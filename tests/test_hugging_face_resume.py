"""A run of Hugging Face's Trainer that is resumed in the middle of an epoch ends as the uninterrupted run.

A second run of the same Trainer begins without the first one's momentum.
"""

import warnings
from unittest.mock import patch

import pytest
import torch
from oracle import BOUND, distance
from processes import in_processes
from test_libraries import Named, Recorder, WithLoss, config_of, floats

import lbsgd
from lbsgd.config.libraries.needs import needs_of
from lbsgd.errors import ConfigError
from lbsgd.train.engine import start_processes
from lbsgd.train.hugging_face import _EpochLoader

STOPPED, UPDATES = 3, 6  # an epoch has two updates
CASES = [  # with DeepSpeed, form of momentum, ZeRO stage
    (True, "lr_inside", 0),
    (True, "lr_inside", 2),
    (True, "lr_outside", 1),
    (False, "lr_inside", 0),
]


class Watched(Named):
    """Notes which images are requested."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __getitem__(self, number):
        self.asked.append(number)
        return super().__getitem__(number)


def make_trainer(folder, config, with_deepspeed, dataset, model):
    import transformers

    class Trainer(lbsgd.LargeMinibatchTrainer, transformers.Trainer):
        pass

    plan = lbsgd.Plan.read(config, torch.distributed.get_world_size(), num_images=len(dataset))
    needs = needs_of(plan, "transformers", parts=True)
    saving = dict(save_strategy="steps", save_steps=STOPPED, report_to=[], disable_tqdm=True, logging_strategy="no")
    options = {**needs.arguments, **saving, "deepspeed": needs.config if with_deepspeed else None, "use_cpu": True}
    args = transformers.TrainingArguments(folder, **options)
    return Trainer(model=model, args=args, train_dataset=dataset, plan=plan)


def train(folder, config, with_deepspeed, checkpoint=None):
    """Return a run's weights, the images that it requested and its learning rates, or those after a checkpoint."""
    dataset, model = Watched(), WithLoss()
    if checkpoint is not None:  # the checkpoint holds the values
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    trainer = make_trainer(folder, config, with_deepspeed, dataset, model)
    with Recorder() as recorder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=checkpoint)
    assert not [each.message for each in caught if "lbsgd: " in str(each.message)]
    return floats(trainer.model.state_dict()), dataset.asked, recorder.lrs


def whole_and_resumed(folder):
    from accelerate.state import DistributedType, PartialState

    prepare, found = PartialState._prepare_backend, []
    start_processes()
    for case in CASES:
        with_deepspeed, form, stage = case
        # On a CPU, with DeepSpeed, each process would take itself for the only one.
        PartialState._prepare_backend = (lambda *_: ("gloo", DistributedType.NO)) if with_deepspeed else prepare
        config, place = config_of(), f"{folder}/{CASES.index(case)}"
        config["lbsgd"]["momentum"], config["zero_optimization"]["stage"] = {"form": form}, stage
        whole = train(place, config, with_deepspeed)
        found.append((whole, train(place, config, with_deepspeed, f"{place}/checkpoint-{STOPPED}")))
    return found


@pytest.mark.parametrize("processes", [1, 2])  # of four and of two passes per update
def test_in_the_middle_of_an_epoch_images_learning_rates_and_momentum_go_on(tmp_path, processes):
    for found in in_processes(processes, whole_and_resumed, str(tmp_path), imports="transformers.trainer"):
        for case, ((weights, images, lrs), (weights_after, images_after, lrs_after)) in zip(CASES, found, strict=True):
            assert images_after == images[len(images) // 2 :] and len(images) == 64 * UPDATES / processes, case
            assert lrs_after == lrs[len(lrs) // 2 :], case
            assert distance(weights_after, weights) < 1e-7, case
            assert distance(weights, found[0][0][0]) < BOUND, case


def trained_again(folder):
    """The weights and lbsgd's warnings after each of three runs of one Trainer, from the same first weights.

    The third run does not tell the loader its epochs.
    """
    start_processes()
    model, ends, told = WithLoss(), [], []
    trainer = make_trainer(folder, config_of(), False, Watched(), model)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    for announce in (_EpochLoader.set_epoch, _EpochLoader.set_epoch, lambda *_: None):
        model.load_state_dict(first)
        with patch.object(_EpochLoader, "set_epoch", announce), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        ends.append({name: value.clone() for name, value in floats(model.state_dict()).items()})
        told.append([str(each.message) for each in caught if "lbsgd" in str(each.message)])
    trainer.args.gradient_accumulation_steps *= 2
    with pytest.raises(ConfigError) as refused:
        trainer.train()
    return ends, told, str(refused.value)


def test_a_second_run_of_a_trainer_begins_without_momentum_and_epochs_that_repeat_are_told(tmp_path):
    [((once, again, _), told, refused)] = in_processes(1, trained_again, str(tmp_path))
    assert distance(again, once) == 0.0
    assert told[:2] == [[], []]
    [said] = told[2]
    assert said.startswith("lbsgd: another epoch takes the batches of epoch 0 in the same order")
    assert "TrainingArguments has gradient_accumulation_steps=" in refused  # changed between two runs
