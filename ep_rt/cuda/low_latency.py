"""Low-latency mode on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from ..errors import BackendError


class NoLowLatency:
    """Stands for the low-latency mode, which the CUDA backend does not have yet: every call says so.

    Args:
        close: what `close` does.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        raise BackendError(
            "the CUDA backend has no low-latency calls yet; use backend='host' with CPU arrays"
        )
