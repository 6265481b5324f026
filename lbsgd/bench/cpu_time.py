"""Measure the CPU time of this process and of its children that have ended, for benches that start processes."""

from __future__ import annotations

import resource


def cpu_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
