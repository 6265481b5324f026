"""The public home of `SharedShuffleOrder`, the one shuffle of all workers in FFCV's own loader (Remark 4)."""

from lbsgd.data.ffcv_loader import SharedShuffleOrder

__all__ = ["SharedShuffleOrder"]
