"""Choose what computes batch norm in training by device, layout and Triton, never by measuring during a run.

So all processes of a run, and a resumed run, compute the same if the same packages are installed.
The JSON's `lbsgd.batch_norm.implementation` overrides the choice.
"""

from __future__ import annotations

import torch

from lbsgd.algorithm.choices import Implementation, ImplementationOrRule
from lbsgd.units import installed, numbers

TRIED = 3, 6  # the oldest Triton that the kernels have run with

# From measurements on an H100 (docs/gpu.md): in channels_last a step with the Triton kernels takes the GPU 0.4 to 0.8
# of its time with the loop, and less than with torch's batch norm. In NCHW they win on large maps only.
RULE: dict[tuple[str, torch.memory_format], Implementation] = {
    ("cpu", torch.channels_last): "loop",
    ("cpu", torch.contiguous_format): "loop",
    ("cuda", torch.channels_last): "triton",
    ("cuda", torch.contiguous_format): "loop",
}


def triton_version() -> tuple[int, ...]:
    """Return the installed Triton's version, such as (3, 6); empty if Triton is not installed."""
    return numbers(installed("triton"))


def implementation_for(
    asked: ImplementationOrRule, device: str, layout: torch.memory_format
) -> tuple[Implementation, str]:
    """Return the implementation of batch norm for a kind of device, and the reason in words.

    Raises ValueError if "triton" is asked for on a CPU, or if Triton is not installed.
    """
    if asked == "rule":
        where, found = f"{device}, {str(layout).removeprefix('torch.')}", RULE.get((device, layout), "loop")
        if found == "triton" and (has := triton_version()) < TRIED:
            without = (
                f"with triton {'.'.join(map(str, has))}, which was not tried" if has else "without the package triton"
            )
            return "loop", f"the rule for {where}, {without}"
        return found, f"the rule for {where}"
    if asked == "triton" and device == "cpu":
        raise ValueError(f"implementation triton needs a GPU, and this device is {device}: use rule or loop")
    if asked == "triton" and not triton_version():
        raise ValueError("implementation triton needs the package triton, which is not installed: use rule or loop")
    return asked, "the JSON"
