"""Rules about a DeepSpeed JSON in another library: values that the library refuses or silently replaces.

Read from, and tried with, transformers 5.24.0, accelerate 1.15.0, lightning 2.6.6 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.keypath import BATCH, MICRO, PASSES, automatic_keys, is_count, paths_to_auto
from lbsgd.config.libraries.arguments import CALLS, HUGGING_FACE, Library, arguments_of
from lbsgd.config.libraries.automatic import DEFAULTS, FILLED, FROM_HIDDEN_SIZE
from lbsgd.units import counted

WRITE_IT = "let `lbsgd config --from FILE --for LIBRARY --gpus N` write the file"


@dataclass(frozen=True)
class InLibrary:
    """A DeepSpeed JSON, and the library that will read it."""

    config: Mapping[str, Any]
    library: Library

    @property
    def automatic(self) -> list[str]:
        """Key paths of all values "auto" that must be filled in; in Hugging Face's libraries these are all "auto".

        With Lightning, which refuses any number of passes, that key is left out.
        """
        refused = {PASSES} if self.library == "lightning" else set()
        found = paths_to_auto(self.config) if self.library in HUGGING_FACE else automatic_keys(self.config)
        return [key for key in found if key not in refused]


@rule(
    "L01",
    "a number of passes that a library takes as 1",
    lbsgd="error",
    plain="error",
    why="DeepSpeed works the number of passes out where it is left out. transformers and accelerate write 1 into the "
    "file instead, and DeepSpeed then refuses it unless train_batch_size is micro batch x processes. With --for "
    "transformers or accelerate.",
    fix=WRITE_IT,
    example={"gradient_accumulation_steps": None},
)
def passes_left_out(use: InLibrary) -> Iterator[Hit]:
    kn, micro = use.config.get(BATCH), use.config.get(MICRO)
    left_out = use.library in HUGGING_FACE and PASSES not in use.config
    if left_out and is_count(kn) and is_count(micro):
        on = f"{counted(kn // micro, 'process')} only" if kn % micro == 0 else "no number of processes"
        said = f"is left out, and {use.library} takes 1: {kn} = {micro} x 1 x N holds on {on}"
        yield Hit(PASSES, said)


@rule(
    "L02",
    "a number of passes that Lightning writes itself",
    lbsgd="error",
    plain="error",
    why="Lightning puts accumulate_grad_batches of its Trainer into the file, and refuses a file that has a number. "
    "With --for lightning.",
    fix="delete the key, and give Trainer(accumulate_grad_batches=...)",
    example={"gradient_accumulation_steps": 32},
)
def passes_given(use: InLibrary) -> Iterator[Hit]:
    if use.library == "lightning" and PASSES in use.config:
        yield Hit(PASSES, "stands in the file, and Lightning refuses that")


@rule(
    "L03",
    "a file without a ZeRO block",
    lbsgd="error",
    plain="error",
    why="DeepSpeed takes a missing block for stage 0. transformers and accelerate refuse the file. With --for "
    "transformers or accelerate.",
    fix='write "zero_optimization": {"stage": 0}',
    example={"zero_optimization": None},
)
def no_zero_block(use: InLibrary) -> Iterator[Hit]:
    if use.library in HUGGING_FACE and "zero_optimization" not in use.config:
        yield Hit("zero_optimization", f"is left out, and {use.library} refuses that")


@rule(
    "L04",
    'an "auto" that nobody fills in',
    lbsgd="error",
    plain="error",
    why="transformers and accelerate fill in the keys that repeat arguments of theirs. Any other, and every key in "
    'Lightning and DeepSpeed itself, reaches DeepSpeed as the text "auto". With any library.',
    fix="write the value",
    example={"zero_optimization": {"allgather_bucket_size": "auto"}},
)
def unfilled(use: InLibrary) -> Iterator[Hit]:
    for key in use.automatic:
        if key not in FILLED[use.library]:
            yield Hit(key, f'is "auto", which {use.library} does not fill in')


@rule(
    "L05",
    'an "auto" that becomes a default',
    lbsgd="warning",
    plain="note",
    why='A key on "auto" takes a library\'s argument, and that has a default of its own: gradients are clipped at 1.0, '
    "which the paper does not do, and transformers' learning rate is 5e-05. With --for transformers or accelerate.",
    fix="write the number, so that another argument is refused instead of taken",
    example={"gradient_clipping": "auto"},
)
def becomes_a_default(use: InLibrary) -> Iterator[Hit]:
    for key in use.automatic:
        if key in DEFAULTS.get(use.library, {}):
            yield Hit(key, f'is "auto" and becomes {DEFAULTS[use.library][key]}')


@rule(
    "L06",
    'an "auto" that needs a transformer',
    lbsgd="error",
    plain="note",
    why="These sizes are worked out from model.config.hidden_size or hidden_sizes. A network of torchvision or timm "
    "has none, and is refused. With --for transformers or accelerate.",
    fix="write a number where the network has no hidden_size",
    example={"zero_optimization": {"reduce_bucket_size": "auto"}},
)
def needs_a_hidden_size(use: InLibrary) -> Iterator[Hit]:
    said = 'is "auto", and is worked out from model.config.hidden_size, which few image networks have'
    for key in use.automatic:
        if key in FROM_HIDDEN_SIZE and key in FILLED[use.library]:
            fix = f"write a number where the network has no hidden_size, such as {FROM_HIDDEN_SIZE[key]}"
            yield Hit(key, said, fix)


@rule(
    "L07",
    "arguments that must repeat the file",
    lbsgd="note",
    plain="note",
    why="These arguments of the library's own name the same numbers again. transformers refuses other ones, its "
    "defaults included; elsewhere the file wins, or both act. With any library but deepspeed.",
    fix="give the library these arguments",
    example={"gradient_clipping": 0.5},
)
def arguments_to_give(use: InLibrary) -> Iterator[Hit]:
    arguments = arguments_of(use.config, use.library)
    if arguments:
        call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        yield Hit("file", f"goes with {CALLS[use.library]}({call})")
