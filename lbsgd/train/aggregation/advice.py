"""Tell when aggregation slows training down, and what could be changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MUCH_PCT = 20.0  # of the time of an epoch's iterations; at the paper's 90 % efficiency all losses are half of that


@dataclass
class AggregationAdvice:
    """Collects the iteration records of an epoch, and gives advice once in a run.

    waited, of    time spent waiting, and time in all; a record may cover several iterations
    """

    waited: float = 0.0
    of: float = 0.0
    given: bool = False

    def note(self, record: Mapping[str, Any]) -> None:
        """Add an iteration record; skip a record without a share."""
        share = record.get("aggregation_wait_pct")
        if share is None or not record.get("images_per_second"):
            return
        time = record["num_iterations"] / record["images_per_second"]
        self.waited += share * time
        self.of += time

    def of_epoch(self) -> str | None:
        """Return the advice if the epoch's records call for it, and begin another epoch."""
        share = self.waited / self.of if self.of else 0.0
        self.waited = self.of = 0.0
        if share <= MUCH_PCT or self.given:
            return None
        self.given = True
        return (
            f"warning: {share:.0f} % of the epoch's iterations were spent waiting for aggregation: with "
            "zero_optimization.overlap_comm true, try another reduce_bucket_size, lbsgd.aggregation.hierarchy servers "
            "where servers share a slow link, or a larger micro batch, whose back-propagation hides more"
        )
