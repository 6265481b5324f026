"""Choose how gradients are aggregated (Sec. 4) from the JSON, the servers' sizes and the backend, without torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lbsgd.config.keypath import enabled, get
from lbsgd.config.schema import Aggregation, Recipe
from lbsgd.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """A resolved algorithm.

    hierarchy    "servers": sum inside each server, all-reduce between them, gather inside; "flat": all processes alike
    between      how servers (flat: processes) all-reduce: "halving_doubling", or "backend": gloo's ring, NCCL's choice
    inside       how the processes of a server reduce-scatter and gather: one of the same two words
    reason       why this algorithm, or why not a faster one; for the reader
    """

    hierarchy: str
    between: str
    inside: str
    reason: str = ""

    @property
    def is_tree(self) -> bool:
        """Whether every element is summed as ((g0+g1)+(g2+g3))+..., whatever the buckets and the hosts."""
        return self.between == "halving_doubling" and (self.hierarchy == "flat" or self.inside == "halving_doubling")

    def as_dict(self) -> dict[str, Any]:
        """Return the choice as plain data, without the reason."""
        return {key: value for key, value in asdict(self).items() if key != "reason"}

    def __str__(self) -> str:
        how = "halving/doubling" if self.between == "halving_doubling" else "the backend's all-reduce"
        if self.hierarchy == "flat":
            return f"{how} between all processes ({self.reason})"
        inside = "halving/doubling" if self.inside == "halving_doubling" else "exchange"
        return f"three phases: {inside} inside each server, {how} between servers ({self.reason})"


def own_reduction(config: Mapping[str, Any], recipe: Recipe) -> str | None:
    """Return why DeepSpeed's own reduction runs with this JSON, or None if lbsgd aggregates."""
    stage = get(config, "zero_optimization.stage", 0)
    if recipe.aggregation is None:
        return "the JSON has no lbsgd.aggregation"
    if stage not in (0, 1):
        return f"ZeRO-{stage} reduces in every pass by itself"
    if stage == 1 and enabled(config, "torch_autocast"):
        return "ZeRO-1 under torch_autocast reduces in the autocast's precision"
    return None


class DecidesReduction:
    """A JSON with its recipe, which together decide who reduces the gradients."""

    config: Mapping[str, Any]
    recipe: Recipe

    @property
    def own_reduction(self) -> str | None:
        """Why DeepSpeed's own reduction runs, or None if lbsgd aggregates."""
        return own_reduction(self.config, self.recipe)

    @property
    def aggregates(self) -> bool:
        """Whether lbsgd aggregates; otherwise DeepSpeed does."""
        return self.own_reduction is None


def choose(wanted: Aggregation, sizes: Sequence[int], backend: str) -> Choice:
    """Return the algorithm for servers with these numbers of processes.

        gloo, 2^m processes on equal servers    halving/doubling over all bits of the rank, inside servers too
        gloo, other equal servers               phases, the backend's ring between servers
        nccl                                    one all-reduce per bucket: NCCL chooses ring or tree
        unequal servers, one server             flat

    wanted: what the JSON says; "auto" leaves the decision to this rule. backend: torch's, "gloo" or "nccl".
    Raises ConfigError if the JSON demands halving/doubling between a number that is not a power of two, or phases on
    servers of unequal size.
    """
    if wanted.hierarchy == "servers" and len(set(sizes)) > 1:
        raise ConfigError(
            "lbsgd.aggregation.hierarchy: servers needs equally many processes on each, and these have "
            f"{in_order(sizes)}; use flat or auto, or other servers"
        )
    flat, reason = is_flat(wanted, sizes, backend)
    parties, local = (sum(sizes), 1) if flat else (len(sizes), sizes[0])
    if wanted.between == "halving_doubling" and not power_of_two(parties):
        raise ConfigError(
            f"lbsgd.aggregation.between: halving_doubling needs a power of two, and {parties} "
            f"{'processes' if flat else 'servers'} take part; use backend or auto, or another number"
        )
    tree = power_of_two(parties) and power_of_two(local)
    if wanted.between == "auto" and backend == "gloo" and tree and len(set(sizes)) == 1:
        between, reason = "halving_doubling", f"{reason}; bits do not depend on how ranks are placed in blocks"
    elif wanted.between == "halving_doubling":
        between = wanted.between
    else:
        between = "backend"
        if backend == "gloo" and sum(sizes) > 2:
            reason = f"{reason}; bits depend on placement and buckets"
    inside = "halving_doubling" if between == "halving_doubling" and power_of_two(local) else "backend"
    return Choice("flat" if flat else "servers", between, inside, reason)


def is_flat(wanted: Aggregation, sizes: Sequence[int], backend: str) -> tuple[bool, str]:
    """Return whether there are no phases inside servers, and why."""
    shape = f"{len(sizes)} servers x {sizes[0]} processes"
    if len(sizes) == 1:
        return True, f"one server of {sizes[0]} processes"
    if len(set(sizes)) > 1:
        return True, f"servers of unequal size: {in_order(sizes)} processes"
    if sizes[0] == 1:
        return True, f"{len(sizes)} servers of one process"
    if wanted.hierarchy == "flat":
        return True, f"{shape}, flat as the JSON says"
    if wanted.hierarchy == "auto" and backend != "gloo":
        asked = wanted.between == "halving_doubling"
        return True, f"{shape}; {'as the JSON says' if asked else 'NCCL finds its own way between them'}"
    return False, shape


def in_order(sizes: Sequence[int]) -> str:
    """Format the sizes of servers in their order, with equal neighbours grouped: `31 x 8, 2`."""
    runs = [(size, len(list(alike))) for size, alike in itertools.groupby(sizes)]
    return ", ".join(f"{number} x {size}" if number > 1 else str(size) for size, number in runs)


def power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
