"""The recipe in the first line of a log, or in a checkpoint: the values that count, by key paths, and defaults."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from lbsgd.config.checks.block import block_of
from lbsgd.config.schema import Recipe


def that_counts(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of a recipe that the run used, without nulls and without defaults that another key replaces."""
    leaves = {key: value for key, value in flat(recipe).items() if value is not None}
    unused = ["decay.epochs"] if "decay.iterations" in leaves else []
    if recipe.get("detection"):  # detection has its own image sizes, and crops nothing
        unused += ["augmentation.resolution", "augmentation.crop_scale"]
    return {key: value for key, value in leaves.items() if key not in unused}


def flat(block: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the leaves of a block by their key paths."""
    leaves: dict[str, Any] = {}
    for key, value in block.items():
        name = f"{path}.{key}" if path else key
        leaves.update(flat(value, name) if isinstance(value, dict) else {name: value})
    return leaves


def with_defaults(block: dict[str, Any], schema: type[BaseModel] = Recipe) -> dict[str, Any]:
    """Return a recipe, or a block of it, with the default of each key that its log or checkpoint is too old to have.

    A key's default must be what the code did before the key existed. A key without a default stays missing.
    """
    filled = dict(block)
    for name, field in schema.model_fields.items():
        if name not in filled and not field.is_required():
            filled[name] = field.default.model_dump() if isinstance(field.default, BaseModel) else field.default
        elif isinstance(filled.get(name), dict) and (inner := block_of(field.annotation)):
            filled[name] = with_defaults(filled[name], inner)
    return filled


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
