"""The rule that says what computes batch norm in training: fixed by device and layout, never by a measurement of a run.

So all processes of a run, and the run that goes on from its checkpoint, compute the same. The JSON's
`lbsgd.batch_norm.implementation` overrides it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from lbsgd.algorithm.choices import Implementation, ImplementationOrRule

# Written from measurements on an H100 and an H200 (docs/gpu.md): in channels_last an update with the Triton kernels
# takes half the loop's time, and less than with torch's batch norm. In NCHW they win on large maps only.
RULE: dict[tuple[str, torch.memory_format], Implementation] = {
    ("cpu", torch.channels_last): "loop",
    ("cpu", torch.contiguous_format): "loop",
    ("cuda", torch.channels_last): "triton",
    ("cuda", torch.contiguous_format): "loop",
}


def implementation_for(
    asked: ImplementationOrRule, device: str, layout: torch.memory_format
) -> tuple[Implementation, str]:
    """Return what computes batch norm on a kind of device, and why in words.

    Raises ValueError for Triton on a CPU, or where it is not installed.
    """
    if asked == "rule":
        where, found = f"{device}, {str(layout).removeprefix('torch.')}", RULE.get((device, layout), "loop")
        if found == "triton" and find_spec("triton") is None:
            return "loop", f"the rule for {where}, without the package triton"
        return found, f"the rule for {where}"
    if asked == "triton" and device == "cpu":
        raise ValueError(f"implementation triton needs a GPU, and this device is {device}: use rule or loop")
    if asked == "triton" and find_spec("triton") is None:
        raise ValueError("implementation triton needs the package triton, which is not installed: use rule or loop")
    return asked, "the JSON"
