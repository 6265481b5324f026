"""What another library needs to train a plan: a DeepSpeed JSON, and the library's own arguments.

Tried with transformers 5.24.0, accelerate 1.15.0, lightning 2.6.6 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lbsgd.config.keypath import put
from lbsgd.config.libraries.arguments import CALLS, HUGGING_FACE, Library, arguments_of, require_library
from lbsgd.config.plan import Plan, require_plan

FROM_PARTS = ("optimizer", "scheduler", "lbsgd")  # blocks that the parts in the code replace

# Where each call takes the JSON.
FILE_ARGUMENT: dict[str, dict[str, str]] = {
    "TrainingArguments": {"deepspeed": "FILE"},
    "Accelerator": {"deepspeed_plugin": "DeepSpeedPlugin(hf_ds_config=FILE)"},
    "Trainer": {"strategy": "DeepSpeedStrategy(config=FILE)"},
}

# If DDP runs instead of DeepSpeed, process 0's running statistics would overwrite the others' in each pass. Lightning
# would divide the images a second time among processes that already have their own share.
FOR_PARTS: dict[Library, dict[str, Any]] = {
    "transformers": {"ddp_broadcast_buffers": False},
    "lightning": {"use_distributed_sampler": False},
}
EPOCHS: dict[Library, str] = {"transformers": "num_train_epochs", "lightning": "max_epochs"}

ALONE: dict[Library, tuple[str, ...]] = {
    "transformers": ("Trainer(optimizers=...) is not used: optimizer and scheduler are the JSON's",),
    "accelerate": (
        "optimizer = DummyOptim(model.parameters()); scheduler = DummyScheduler(optimizer): both are the JSON's",
        "DataLoader(dataset, batch_size=train_micro_batch_size_per_gpu, drop_last=True), as each process takes it",
    ),
    "lightning": (
        "configure_optimizers is not called: optimizer and scheduler are the JSON's",
        "return loss * trainer.accumulate_grad_batches from training_step: both Lightning and DeepSpeed divide by it",
    ),
    "deepspeed": ("deepspeed.initialize(model=model, model_parameters=model.parameters(), config=FILE)",),
}
WITH_PARTS: dict[Library, tuple[str, ...]] = {
    "transformers": (
        "class Trainer(lbsgd.LargeMinibatchTrainer, transformers.Trainer): ...  # Trainer(plan=plan, ...)",
    ),
    "accelerate": (
        "prepare model and optimizer of lbsgd.parts_for, not its scheduler: a prepared one steps once per process",
    ),
    "lightning": (
        "configure_optimizers returns optimizer and scheduler of lbsgd.parts_for, with interval step",
        "return loss * trainer.accumulate_grad_batches from training_step: both Lightning and DeepSpeed divide by it",
    ),
    "deepspeed": (
        "deepspeed.initialize(model=model, optimizer=parts.optimizer, config=FILE); lbsgd.initialize does all of it",
    ),
}


@dataclass(frozen=True)
class Needs:
    """What a library needs for a plan.

    config       its DeepSpeed JSON
    call         its class that takes `arguments`; empty if there is none
    arguments    what that class needs, by keyword
    remarks      further lines for the user
    """

    config: dict[str, Any]
    call: str
    arguments: dict[str, Any]
    remarks: tuple[str, ...] = ()

    def text(self, file: str) -> str:
        """Return the call as a user types it, with the JSON's name in it, and the remarks as comments."""
        given = {**FILE_ARGUMENT.get(self.call, {}), **{name: repr(value) for name, value in self.arguments.items()}}
        lines = [f"    {name}={value},".replace("FILE", repr(file)) for name, value in given.items()]
        call = [f"{self.call}(", *lines, ")"] if self.call else []
        return "\n".join([*call, *(f"# {remark}".replace("FILE", repr(file)) for remark in self.remarks)])


def needs_of(plan: Plan, library: Library, parts: bool = False) -> Needs:
    """Return what a library needs for a plan on its number of processes.

    Without parts the JSON works without lbsgd, with DeepSpeed's own optimizer and warmup. With parts, optimizer and
    schedule come from `parts_for` or `LargeMinibatchTrainer`, and the JSON leaves them to the code.
    Raises ConfigError for an unknown library.
    """
    require_plan(plan)
    require_library(library)
    config = {key: deepcopy(value) for key, value in plan.config.items() if not parts or key not in FROM_PARTS}
    if library in HUGGING_FACE and "lbsgd" in config:  # they refuse "auto" anywhere, and aggregation has it
        config["lbsgd"].pop("aggregation", None)
    put(config, "gradient_accumulation_steps", plan.accumulation_steps)
    arguments = arguments_of(config, library)
    if library == "lightning":  # it writes the number of passes itself, and refuses a JSON that has it
        arguments["accumulate_grad_batches"] = config.pop("gradient_accumulation_steps")
    if parts:
        arguments |= FOR_PARTS.get(library, {})
    if parts and library == "transformers":  # it seeds augmentation and model_init with it
        arguments["seed"] = plan.recipe.seed
    if library in EPOCHS and plan.recipe.epochs is not None:
        arguments[EPOCHS[library]] = plan.recipe.epochs
    elif library in EPOCHS:  # a run that is counted in iterations
        arguments["max_steps"] = plan.num_iterations
    remarks = WITH_PARTS[library] if parts else ALONE[library] + missing(plan)
    return Needs(batches_first(config), CALLS[library], arguments, remarks)


def batches_first(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON with the batch sizes and the number of passes first."""
    first = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {key: config[key] for key in (*first, *config) if key in config}


def missing(plan: Plan) -> tuple[str, ...]:
    """List the parts of a plan that no JSON can tell DeepSpeed's own optimizer and scheduler."""
    recipe, is_frozen = plan.recipe, plan.recipe.detection is not None
    images = "all" if recipe.batch_norm.scope == "all" else "n"
    can_be_lost = {
        "the decay of the learning rate": plan.schedule.decay_iterations,
        "the constant warmup": recipe.warmup.kind == "constant",
        "momentum without its correction": not recipe.momentum.correction,
        f"batch norm over {images} images": not is_frozen,
        "frozen batch norm": is_frozen,
        "no weight decay on batch norm": not recipe.weight_decay.on_batch_norm,
        "the learning rate of biases": recipe.biases.lr_factor != 1,
        "no weight decay on biases": not recipe.biases.weight_decay,
        "the one shuffle": True,
    }
    lost = [what for what, is_lost in can_be_lost.items() if is_lost]
    return (f"not in a JSON alone: {', '.join(lost)} (--parts, docs/in_your_project.md)",)
