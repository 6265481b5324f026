"""Keys that came later than a checkpoint, with the value that changes nothing: their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from lbsgd.config.schema import Recipe


def completed(saved: Mapping[str, Any], block: type[BaseModel] = Recipe) -> dict[str, Any]:
    """Return a saved block with the default of every key that it does not have, blocks inside it included.

    A key's default must be what the code did before the key existed. A key without a default stays missing.
    """
    found = dict(saved)
    for name, field in block.model_fields.items():
        inner = field.annotation if isinstance(field.annotation, type) else None
        if name not in found:
            if not field.is_required():
                default = field.get_default(call_default_factory=True)
                found[name] = default.model_dump() if isinstance(default, BaseModel) else default
        elif inner and issubclass(inner, BaseModel) and isinstance(found[name], Mapping):
            found[name] = completed(found[name], inner)
    return found
