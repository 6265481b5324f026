"""Put the paper's algorithm into Hugging Face's Trainer, through the methods that it offers to subclasses.

    class Trainer(lbsgd.LargeMinibatchTrainer, transformers.Trainer): ...

    trainer = Trainer(model=model, args=args, train_dataset=dataset, plan=plan)

Nothing here imports transformers. Tried with 5.24.0.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from lbsgd.algorithm.batch_norm_statistics import agree_statistics
from lbsgd.algorithm.sampler import SharedShuffleSampler
from lbsgd.config.libraries.needs import needs_of
from lbsgd.config.plan import Plan, require_plan
from lbsgd.errors import ConfigError
from lbsgd.train.parts import Parts, parts_around, parts_for, require_images

OF_OTHER_OPTIMIZERS = ("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type")


class LargeMinibatchTrainer:
    """A base class, listed before transformers.Trainer, that gives it the parts of a plan.

    Batch norm is per worker (Sec. 2.3), γ and β do not decay, and momentum has the plan's form (Sec. 3, 5.1). Update t
    uses learning_rate(t), even after an update that fp16 overflow skipped. All processes share one shuffle per epoch
    (Remark 4). The workers' statistics agree before an evaluation, a prediction and a save, so all processes must call
    `save_model`.

    model         its forward takes the keys of a batch and returns the mean loss first, as the Trainer expects
    plan          a `Plan` for args.world_size processes and this train_dataset
    args          TrainingArguments with `needs_of(plan, "transformers", parts=True).arguments`

    Raises ConfigError before training begins if the arguments or the data are not the plan's.
    """

    # Provided by transformers.Trainer. Only annotated, because nothing here imports it.
    args: Any
    model: Any
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    optimizer_cls_and_kwargs: Any
    state: Any
    train_dataset: Any
    data_collator: Any
    _get_collator_with_removed_columns: Any

    _seeded = False  # whether this process has random numbers of its own

    def __init__(self, *args: Any, plan: Plan, **kwargs: Any) -> None:
        require_plan(plan)
        if type(self).__mro__[-2] is LargeMinibatchTrainer:  # only object comes after it
            raise ConfigError("make a class of both: class Trainer(lbsgd.LargeMinibatchTrainer, transformers.Trainer)")
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or self.lr_scheduler is not None or self.optimizer_cls_and_kwargs is not None:
            raise ConfigError(
                "the plan makes optimizer and schedule: leave out optimizers and optimizer_cls_and_kwargs"
            )
        # Else the Trainer assumes that a forward with **kwargs has already divided its loss by the passes.
        self.model_accepts_loss_kwargs = False
        self.plan = plan
        self._parts: Parts | None = None

    @property
    def parts(self) -> Parts:
        """The plan's optimizer, scheduler and sampler for this model. First use converts its batch norms."""
        if self._parts is None:
            self._require_the_plans_numbers()
            self._parts = parts_for(self.model, self.plan)
        return self._parts

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # An earlier call's optimizer has momentum, and its sampler the data of that time.
        self.optimizer = self._parts = None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self._parts = parts_around(self.parts.sampler, self.model, self.plan)  # the loader has this sampler already
            self.optimizer = self._parts.optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        self.lr_scheduler = self.parts.scheduler
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader[Any]:
        args = self.args
        if not args.dataloader_num_workers and not self._seeded:  # the process itself draws the crops
            self._seeded = True
            seed_worker(0, first=args.process_index)
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=self.parts.sampler,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, first=args.process_index * args.dataloader_num_workers),
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # After an update that overflow skipped, the Trainer does not step the scheduler, but counts the update.
        self.parts.scheduler.move_to(self.state.global_step)
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        agree_statistics(self.model)
        return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        agree_statistics(self.model)
        return super().predict(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, *args: Any, **kwargs: Any) -> Any:
        agree_statistics(self.model)
        return super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _require_the_plans_numbers(self) -> None:
        """Raise ConfigError if the Trainer would train with another global batch or other data than the plan."""
        if not self.args.deepspeed and self.args.world_size != self.plan.world_size:  # DeepSpeed asks torch itself
            raise ConfigError(
                f"the plan is for {self.plan.world_size} processes, and the Trainer knows of {self.args.world_size}, so"
                " each would train alone; on a CPU give TrainingArguments use_cpu=True"
            )
        needed = needs_of(self.plan, "transformers", parts=True).arguments
        for length in ("num_train_epochs", "max_steps"):  # a plan has one; a shorter run does not move the schedule
            needed.pop(length, None)
        for name, wanted in needed.items():
            given = getattr(self.args, name)
            if given != wanted:
                raise ConfigError(f"TrainingArguments has {name}={given!r}; the plan needs {name}={wanted!r}")
        self._require_no_other_optimizer()
        if self.args.ignore_data_skip:
            raise ConfigError(
                "TrainingArguments has ignore_data_skip=True, with which a resumed epoch takes its first images twice;"
                " leave it out: skipping reads no image here"
            )
        if not hasattr(self.train_dataset, "__len__"):
            raise ConfigError("train_dataset is missing or has no length; the shared shuffle needs all images' numbers")
        require_images(self.plan, len(self.train_dataset), "train_dataset")

    def _require_no_other_optimizer(self) -> None:
        """Raise ConfigError for arguments on the optimizer, its schedule or the shuffle, which the plan makes."""
        plan, fields = self.plan, type(self.args).__dataclass_fields__
        wanted = {
            "learning_rate": plan.schedule.reference_lr,
            "warmup_steps": plan.config["scheduler"]["params"]["warmup_num_steps"],
            "weight_decay": plan.config["optimizer"]["params"]["weight_decay"],
            "data_seed": plan.recipe.seed,
            "optim": "sgd",
        }
        for name in (*wanted, *OF_OTHER_OPTIMIZERS):
            if name in fields and getattr(self.args, name) not in (fields[name].default, wanted.get(name)):
                raise ConfigError(
                    f"TrainingArguments has {name}={getattr(self.args, name)!r}, and the plan makes optimizer, schedule"
                    " and shuffle; leave it out"
                )


def seed_worker(number: int, first: int) -> None:
    """Give each worker of each process its own random numbers, because all processes are seeded alike.

    first: the number of the process's first worker among all processes' workers.
    """
    seed = (torch.initial_seed() + first) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _EpochLoader(DataLoader[Any]):
    """A DataLoader that tells its batch sampler the epoch, which the Trainer announces to loaders only."""

    def set_epoch(self, epoch: int) -> None:
        sampler = self.batch_sampler
        assert isinstance(sampler, SharedShuffleSampler)
        sampler.set_epoch(epoch)
