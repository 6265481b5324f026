"""Compare a run with the checkpoint that it resumes from: recipe, network, data and so on must be the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lbsgd.errors import CheckpointError
from lbsgd.report.recipe import with_defaults

MODEL = "model"  # the identity's key for the network's name, used in messages


def require_same_run(path: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise CheckpointError, naming the first difference, if a checkpoint's identity is not the run's."""
    there, here = state["identity"].get(MODEL), identity.get(MODEL)
    networks = f" ({there} there, {here} here)" if there and there != here else ""
    require_same(f"{path} is of another run{networks}", comparable(state, identity), filled(identity), "")


def comparable(state: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """Return those keys of a saved identity that this run has.

    Precision, decoder and windows count as equal if the checkpoint, an early one, lacks them.
    """
    saved = {"precision": state.get("plan", {}).get("precision"), **state["identity"]}
    later = {
        key: identity[key] for key in ("precision", "decoder", "windows") if key in identity and saved.get(key) is None
    }
    return {key: value for key, value in filled(saved | later).items() if key in identity}


def filled(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with every key of the recipe. Keys that were added later change nothing by default."""
    if not isinstance(identity.get("recipe"), dict):
        return identity
    return {**identity, "recipe": with_defaults(identity["recipe"])}


def require_same(other: str, saved: Any, now: Any, what: str) -> None:
    """Raise CheckpointError, naming the first difference, if two descriptions of a run differ.

    other: what to call the saved one in the message. A different name of the network alone is not a difference.
    """
    if what == MODEL:
        return
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in saved | now:
            require_same(other, saved.get(key), now.get(key), f"{what}.{key}" if what else key)
    elif saved != now:
        raise CheckpointError(
            f"{other}: {in_json(what)} is {in_words(saved)} there and {in_words(now)} here; "
            "use the same recipe, network and data, or another --output_dir"
        )


def in_words(value: Any) -> str:
    """Return an identity's value as JSON, or `none` if only the other run has one."""
    return "none" if value is None else json.dumps(value)


def in_json(key: str) -> str:
    """Return an identity's key as in the user's JSON, where `recipe` is the `lbsgd` block."""
    return f"lbsgd.{key.removeprefix('recipe.')}" if key.startswith("recipe.") else key
