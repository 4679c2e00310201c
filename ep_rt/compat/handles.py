"""Handles that look like DeepEP's tuples."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Final, overload

import numpy as np

from ..handle import DispatchHandle, LowLatencyHandle

_MARK: Final = "ep_rt_handle"


class Handle(Sequence[Any], abc.ABC):
    """Goes back to the buffer whole; its elements are made when one is first looked at.

    Attributes:
        handle: what ep_rt's own calls take.
    """

    handle: DispatchHandle | LowLatencyHandle
    _made: tuple[Any, ...] | None = None

    @property
    def _elements(self) -> tuple[Any, ...]:
        # Not cached_property: until Python 3.12 it has a lock, which ranks that are threads would share.
        if self._made is None:
            self._made = self._make()
        return self._made

    @abc.abstractmethod
    def _make(self) -> tuple[Any, ...]:
        """The elements, in DeepEP's order."""

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._elements[index]

    def __len__(self) -> int:
        return len(self._elements)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.handle!r}>"


class NormalHandle(Handle):
    """Of a normal-mode dispatch.

    Unpacks like DeepEP's: rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix,
    recv_src_idx, is_token_in_rank, send_head. Of these there are ``rank_prefix_matrix[:, rank]``, where the
    rows of each source rank end (the other columns hold -1: no rank knows what others received), and
    ``is_token_in_rank`` as it was given. The others are None: nothing here travels in channels.

    Between nodes the elements are is_token_in_rank, three matrices of channels, recv_rdma_rank_prefix_sum,
    another matrix, recv_gbl_rank_prefix_sum, recv_src_meta, send_rdma_head, send_nvl_head. There are the
    first, and the seventh, which is as above.

    A tuple of the elements goes back in its place, as from ``ctx.save_for_backward(*handle)`` and
    ``ctx.saved_tensors``: the memory of the counts remembers the handle. Copies of them do not.

    On a GPU the first look waits for the dispatch.

    Args:
        is_token_in_rank: as the caller gave it, or None.
        device: of the tensors.
    """

    handle: DispatchHandle

    def __init__(
        self, handle: DispatchHandle, *, rank: int, is_token_in_rank: Any, device: Any, is_internode: bool
    ) -> None:
        self.handle = handle
        self._rank = rank
        self._is_token_in_rank = is_token_in_rank
        self._device = device
        self._is_internode = is_internode

    def _make(self) -> tuple[Any, ...]:
        import torch

        ends = np.cumsum(self.handle.num_recv_tokens_per_rank, dtype=np.int32)
        if self._is_internode:
            prefix_sum = self._marked(torch.from_numpy(ends))
            return self._is_token_in_rank, *(None,) * 5, prefix_sum, *(None,) * 3
        matrix = np.full((len(ends), len(ends)), -1, np.int32)
        matrix[:, self._rank] = ends
        return self._marked(torch.from_numpy(matrix)), None, None, None, self._is_token_in_rank, None

    def _marked(self, counts: Any) -> Any:
        """The same on the device, in memory of its own that leads back to the handle."""
        counts = counts.to(self._device)
        # The storage, because autograd returns other tensors of it.
        setattr(counts.untyped_storage(), _MARK, self.handle)
        return counts


class ExpertHandle(Handle):
    """Of a low-latency dispatch.

    Unpacks like DeepEP's: src_info, layout_range, num_max_dispatch_tokens_per_rank, hidden, num_experts.
    Rows of ``src_info`` past those of an expert hold -1. With a receive hook the hook fills both tensors.
    """

    handle: LowLatencyHandle

    def __init__(self, handle: LowLatencyHandle) -> None:
        self.handle = handle

    def _make(self) -> tuple[Any, ...]:
        import torch

        # The host backend makes NumPy arrays; a tensor shares their memory, into which a hook writes.
        return tuple(torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in self.handle)


def unwrapped(handle: Any) -> Any:
    """What ep_rt's calls take; they raise where it is something else."""
    if isinstance(handle, Handle):
        return handle.handle
    if isinstance(handle, (tuple, list)):
        storages = (each.untyped_storage() for each in handle if hasattr(each, "untyped_storage"))
        return next((getattr(each, _MARK) for each in storages if hasattr(each, _MARK)), handle)
    return handle
