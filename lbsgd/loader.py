"""The public home of `SharedShuffleOrder`: one shuffle of all workers for FFCV's own Loader (Remark 4)."""

from lbsgd.data.ffcv_loader import SharedShuffleOrder

__all__ = ["SharedShuffleOrder"]
