"""Change what DeepSpeed does while it builds an engine: leave a warning out, and send parameters without dimension."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def unwarned(words: str) -> Iterator[None]:
    """Leave out what DeepSpeed's logger says with these words meanwhile."""
    logger = logging.getLogger("DeepSpeed")

    def others(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


@contextmanager
def scalars_sent(engine_class: Any) -> Iterator[None]:
    """Let a DeepSpeed engine that is made inside send parameters without a dimension, at which 0.19.8 raises."""
    send = engine_class._broadcast_model

    def send_all(engine: Any) -> None:
        scalars = [parameter for parameter in engine.module.parameters() if parameter.dim() == 0]
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        send(engine)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    engine_class._broadcast_model = send_all
    try:
        yield
    finally:
        engine_class._broadcast_model = send
