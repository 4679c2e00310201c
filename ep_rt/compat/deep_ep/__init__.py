"""What DeepEP's users import, on ep_rt.

Programs run unchanged after::

    import sys
    from ep_rt.compat import deep_ep
    sys.modules["deep_ep"] = deep_ep

What they import from DeepEP's compiled module is in `deep_ep._C`, as from DeepEP's second version on; for
``from deep_ep_cpp import EventHandle`` say ``sys.modules["deep_ep_cpp"] = deep_ep``, too.

Calls, argument order, tuples, dtypes and strides are those of DeepEP; `Buffer`, `ElasticBuffer` and
`EPBuffer` say what differs. Under the name ``deep_ep`` Python loads the submodules a second time, and what
they name must stay the same: the files of this package import absolutely, and hold names only, or functions
that keep nothing.
"""

from typing import Any

from ep_rt.compat.buffer import Buffer
from ep_rt.compat.config import Config
from ep_rt.compat.deep_ep.comm import (
    destroy_all_managed_nccl_comm,
    get_logical_domain_size,
    get_physical_domain_size,
)
from ep_rt.compat.elastic import ALIGN_BYTES, ElasticBuffer
from ep_rt.compat.ep_buffer import EPBuffer
from ep_rt.compat.ep_handle import EPHandle
from ep_rt.compat.events import EventHandle
from ep_rt.events import EventOverlap

__version__ = "1.2.1"
"""Of the interface that is followed."""

__all__ = [
    "Buffer",
    "Config",
    "EPBuffer",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "destroy_all_managed_nccl_comm",
    "get_logical_domain_size",
    "get_num_allocation_alignment",
    "get_physical_domain_size",
    "topk_idx_t",
]


def get_num_allocation_alignment() -> int:
    """Bytes that sizes of buffers are a multiple of."""
    return ALIGN_BYTES


def __getattr__(name: str) -> Any:
    """`topk_idx_t`, for which torch is imported only when somebody asks."""
    if name == "topk_idx_t":
        import torch

        return torch.int64
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
