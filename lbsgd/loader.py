"""The public home of `SharedShuffleOrder`: one shuffle for all workers in FFCV's own Loader (Remark 4)."""

from lbsgd.errors import missing_ffcv

try:
    from lbsgd.data.ffcv_loader import SharedShuffleOrder
except ImportError as error:  # still an ImportError, because other projects catch that
    raise ImportError(str(missing_ffcv(error)), name=error.name) from error

__all__ = ["SharedShuffleOrder"]
