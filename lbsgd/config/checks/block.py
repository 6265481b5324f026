"""Parse the `lbsgd` block into a recipe, or into findings that name each wrong key."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lbsgd.algorithm.published import EPOCHS, IMAGENET_IMAGES
from lbsgd.config.checks.deepspeed_keys import similar
from lbsgd.config.checks.finding import Finding, refuse
from lbsgd.config.checks.recognise import misspelt_blocks
from lbsgd.config.checks.rule import Hit, findings_by, rule
from lbsgd.config.checks.subject import Document
from lbsgd.config.keypath import get, shown
from lbsgd.config.schema import Recipe
from lbsgd.errors import ConfigError

Complaints = Sequence[Mapping[str, Any]]  # pydantic's, of one ValidationError
WANTED = {  # by the type of complaint
    "model_type": "a block of keys",
    "dict_type": "a block of keys",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_pattern_mismatch": "one line of text",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "literal_error": "{expected}",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
}
IN_A_LOSS = "delete it; it fits into the `loss` of a recipe of your own (docs/running.md, Another network)"
ELSEWHERE = {  # what users expect in the block, and the paper does not have
    **dict.fromkeys(("label_smoothing", "mixup", "cutmix"), IN_A_LOSS),
    "ema": "delete it; recipes average no weights, and docs/in_your_project.md has the parts for a loop of your own",
}
PAPERS = {  # keys without a default
    "epochs": EPOCHS,
    "num_images": IMAGENET_IMAGES,
    "warmup": {"kind": "gradual", "epochs": 5},
}


def require_block(where: str, config: Mapping[str, Any]) -> None:
    """Raise ConfigError if a JSON has no `lbsgd` block, or has it under another name."""
    if "lbsgd" not in config:
        refuse(where, findings_by(NAME_RULES, Document(config), "plain"))
        batch = config.get("train_batch_size")
        raise ConfigError(
            f"{where}: has no lbsgd block, which says epochs, num_images and warmup; write a complete JSON with: "
            f"lbsgd config --global_batch {batch if type(batch) is int else 256} --gpus GPUS --output FILE"
        )


def parse_recipe(where: str, config: Mapping[str, Any]) -> Recipe:
    """Return the recipe in the `lbsgd` block. Raises ConfigError, which names each wrong key."""
    require_block(where, config)
    parsed = recipe_or_findings(config)
    if isinstance(parsed, Recipe):
        return parsed
    refuse(where, parsed)
    raise AssertionError("every finding about the block is an error")


def recipe_or_findings(config: Mapping[str, Any]) -> Recipe | list[Finding]:
    """Return the recipe in the `lbsgd` block, or what is wrong with it."""
    try:
        return Recipe.model_validate(config["lbsgd"])
    except ValidationError as error:
        block, found = config["lbsgd"], error.errors(include_url=False)
        return findings_by(RULES, [{**each, "written_right": written_right(block, each, found)} for each in found])


def key_of(complaint: Mapping[str, Any]) -> str:
    """Return the key path of one of pydantic's complaints."""
    return ".".join(["lbsgd", *map(str, complaint["loc"])])


@rule(
    "R21",
    "a misspelt lbsgd block",
    plain="error",
    why="Nothing reads the block under another name, so the recipe that it states is lost without a word.",
    fix="rename it to lbsgd",
    example={"lbsg": PAPERS},
)
def misspelt_block(document: Document) -> Iterator[Hit]:
    for key in misspelt_blocks(document.config):
        yield Hit(key, "is no block that lbsgd or DeepSpeed reads")


@rule(
    "R10",
    "an unknown key in the lbsgd block",
    lbsgd="error",
    why="A misspelt key would otherwise leave its default in place without a word.",
    fix="correct its spelling, or delete it",
    example={"lbsgd": {"warmup": {"epoch": 5}}},
)
def unknown_block_key(complaints: Complaints) -> Iterator[Hit]:
    for complaint in complaints:
        if complaint["type"] == "extra_forbidden":
            known = keys_beside(complaint["loc"])
            near = similar(str(complaint["loc"][-1]), known)
            fix = f"did you mean {near}?" if near else f"delete it; the keys there are {', '.join(sorted(known))}"
            yield Hit(key_of(complaint), "is an unknown key", ELSEWHERE.get(complaint["loc"][-1], fix))


@rule(
    "R11",
    "a key that is missing in the lbsgd block",
    lbsgd="error",
    why="Epochs (or iterations), num_images and warmup have no default, because nobody can guess them for other data.",
    fix="give it",
    example={"lbsgd": {"warmup": {"epochs": None}}},
)
def missing_block_key(complaints: Complaints) -> Iterator[Hit]:
    for complaint in complaints:
        if complaint["type"] == "missing":
            paper = get(PAPERS, ".".join(map(str, complaint["loc"])))
            yield Hit(key_of(complaint), "is missing", paper and f"give it; the paper has {json.dumps(paper)}")


def keys_beside(path: Sequence[str | int]) -> frozenset[str]:
    """Return all keys of the block that holds the last key of a path in the `lbsgd` block."""
    block: type[BaseModel] = Recipe
    for name in path[:-1]:
        block = block_of(block.model_fields[str(name)].annotation) or block
    return frozenset(block.model_fields)


def block_of(annotation: Any) -> type[BaseModel] | None:
    """Return the class of a block from a key's annotation, which may allow null as well; None if it is no block."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


@rule(
    "R12",
    "a value in the lbsgd block that cannot be right",
    lbsgd="error",
    why='The block is read strictly: "90" is not 90, and true is not 1. Some values also exclude each other, such '
    "as a warmup of kind none that takes epochs, or a decay inside the warmup.",
    fix="give a value within the bounds that the finding names",
    example={"lbsgd": {"epochs": "90"}},
)
def impossible_block_value(complaints: Complaints) -> Iterator[Hit]:
    for complaint in complaints:
        if complaint["type"] not in ("extra_forbidden", "missing"):
            wanted = wanted_of(complaint)
            fix = f"give {wanted}" if wanted else "correct it"
            yield Hit(*place_and_words(complaint), complaint["written_right"] or fix)


def place_and_words(complaint: Mapping[str, Any]) -> tuple[str, str]:
    """Return a complaint's key and its words; our own complaint about a block may begin with a key inside it."""
    key, words = key_of(complaint), in_words(complaint)
    inner, _, rest = words.partition(" ")
    is_ours = complaint["type"] == "value_error" and isinstance(complaint["input"], Mapping)
    return (f"{key}.{inner}", rest) if is_ours and inner in keys_beside([*complaint["loc"], ""]) else (key, words)


def written_right(block: Any, complaint: Mapping[str, Any], beside: Complaints) -> str | None:
    """Return the fix for a text that stands for a list or a number; None if that would be refused too.

    block is the whole `lbsgd` block, and beside are all complaints about it.
    """
    text = complaint["input"]
    if not isinstance(text, str) or complaint["type"] not in ("tuple_type", "list_type", "int_type", "float_type"):
        return None
    listed = text if complaint["type"] in ("int_type", "float_type") else f"[{text.strip('[]() ')}]"
    try:
        value = json.loads(listed)
        Recipe.model_validate(with_value(block, complaint["loc"], value))
    except ValidationError as error:
        others = [each["loc"] for each in beside if each["loc"] != complaint["loc"]]
        if not all(each["loc"] in others for each in error.errors()):
            return None
    except ValueError:
        return None
    return f"write {json.dumps(value)}"


def with_value(block: Any, path: Sequence[str | int], value: Any) -> Any:
    """Return a copy of a block or a list, with a new value at an existing path."""
    if not path:
        return value
    changed = copy.copy(block)
    changed[path[0]] = with_value(block[path[0]], path[1:], value)
    return changed


def in_words(complaint: Mapping[str, Any]) -> str:
    """Say what a value is and must be; our own validators' messages are complete."""
    is_, wanted = f"is {shown(complaint['input'])}", wanted_of(complaint)
    if wanted is None:
        message = complaint["msg"].removeprefix("Value error, ")
        return message if isinstance(complaint["input"], Mapping) else f"{message} ({is_})"
    return f"{is_}, and must be {wanted}" if complaint["written_right"] else is_


def wanted_of(complaint: Mapping[str, Any]) -> str | None:
    """Say what a value must be, with its bound; None for a complaint of our own validators."""
    bounds = {
        name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in complaint.get("ctx", {}).items()
    }
    wanted = WANTED.get(complaint["type"])
    return wanted and wanted.format(**bounds).replace("'", '"')


NAME_RULES = (misspelt_block,)  # apart, because they judge a JSON that may have no block
RULES = (unknown_block_key, missing_block_key, impossible_block_value)
