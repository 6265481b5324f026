"""Describe a run in the first line of its log and in lines on the screen."""

from __future__ import annotations

from typing import Any

import torch

from lbsgd.config.memory import NETWORKS, memory
from lbsgd.report.measure import as_data
from lbsgd.train.aggregation.aggregation import aggregation_words
from lbsgd.train.device_rules import norm_implementation
from lbsgd.train.facts import environment
from lbsgd.train.graphs import GraphChoice
from lbsgd.train.progress import Progress
from lbsgd.train.run import Run


def header_of(run: Run, engine: Any, graphs: GraphChoice) -> dict[str, Any]:
    """Return the content of the log's first line."""
    optional = {
        "started_from": run.started_from,
        "classes": run.images.class_names,
        "decoder": run.images.decoder,
        "errors": run.images.errors,
        "compiled": "each residual block" if run.compiled else None,
        "cuda_graphs": graphs.words,
    }
    return {
        "model": run.task.name,
        "judged_by": as_data(run.task.judged_by),
        **run.plan.as_dict(),
        "data": run.images.fingerprint,
        "aggregation": aggregation_words(run.plan, engine),
        "batch_norm": norm_described(run, engine.device),
        **{key: value for key, value in optional.items() if value},
        **estimated_memory(run, engine.device),
        "environment": {**environment(run.images.place), "script": run.script, **of_the_device(engine.device)},
    }


def say_what_runs(progress: Progress, header: dict[str, Any]) -> None:
    """Print what the plan leaves open: the data, and what computes."""
    lines = {
        "data": header["environment"]["data"],
        "decoder": header.get("decoder"),
        "errors": header.get("errors"),
        "aggregation": header["aggregation"],
        "batch norm": header["batch_norm"],
        "CUDA graphs": header.get("cuda_graphs"),
    }
    for name, words in lines.items():
        if words:
            progress.say_fact(name, words)


def norm_described(run: Run, device: torch.device) -> str:
    """Return what computes batch norm in training, and why. A detector's batch norm is frozen."""
    if run.plan.recipe.detection:
        return "frozen"
    implementation, reason = norm_implementation(run.plan, device)
    outside = " outside of compiled blocks" if run.compiled and implementation == "triton" else ""
    return f"{implementation}{outside}, by {reason}"


def estimated_memory(run: Run, device: torch.device) -> dict[str, int]:
    """Return, for the log, `lbsgd plan`'s estimate of a GPU's memory, empty if it does not know the network."""
    size, plan = NETWORKS.get(run.task.name), run.plan
    if size is None or device.type != "cuda":
        return {}
    return {"memory_estimate_bytes": memory(plan, size, plan.zero_stage).total}


def of_the_device(device: torch.device) -> dict[str, Any]:
    """Return, for the log, what computes and, on a GPU, in which operations torch computes float32 as TF32."""
    found: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["deterministic"] = torch.backends.cudnn.deterministic
        found["tf32"] = {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        }
    return found
