"""Names that programs import from DeepEP's compiled module."""  # noqa: N999  # its name

from typing import Any

from ep_rt.compat.config import Config
from ep_rt.compat.events import EventHandle

__all__ = ["Config", "EventHandle"]


def __getattr__(name: str) -> Any:
    """`topk_idx_t`, for which torch is imported only when somebody asks."""
    if name == "topk_idx_t":
        import torch

        return torch.int64
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
