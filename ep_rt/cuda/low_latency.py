"""Low-latency mode on GPUs: its calls, its masks, and what stands there without it.

A call checks, takes memory and enqueues one kernel, or one for each phase. Rows land in areas that stay, of
the slab, or over several nodes of symmetric memory. The host only alternates between their zones, so a
captured call can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

import numpy as np

from .. import arrays
from ..errors import BackendError, ConfigError
from ..requests import LowLatencyCombineRequest, LowLatencyDispatchRequest, Schedule
from ..results import LowLatencyCombined, LowLatencyDispatched
from .domain import Domain
from .inputs import Inputs
from .low_latency_areas import Areas
from .low_latency_calls import LowLatencyKernels
from .low_latency_combine import LowLatencyCombine
from .low_latency_dispatch import LowLatencyDispatch
from .low_latency_places import Places
from .memory import device_errors


class CudaLowLatency:
    """The low-latency calls of one rank.

    Args:
        places: where its areas lie.
        owner: of the handles.
        enable_shrink: late ranks are masked.
        num_sms: see `Areas`.
        label: of the buffer, among those of its group.
        close: what `close` does.
    """

    def __init__(
        self,
        domain: Domain,
        load: LowLatencyKernels,
        inputs: Inputs,
        places: Places,
        *,
        owner: object,
        enable_shrink: bool,
        num_sms: int | None,
        label: str,
        close: Callable[[], None],
    ) -> None:
        self._close = close
        self._domain = domain
        self._areas = Areas(domain, places, enable_shrink=enable_shrink, num_sms=num_sms, label=label)
        self._dispatch = LowLatencyDispatch(domain, self._areas, load, inputs, owner=owner)
        self._combine = LowLatencyCombine(domain, self._areas, load, inputs, owner=owner)

    def part(self) -> tuple[Sequence[int], Callable[[], Sequence[int]] | None]:
        """See `Areas.part`."""
        return self._areas.part()

    def close(self) -> None:
        """Of the whole buffer. Collective."""
        # Arrays over landing zones may still be held; nothing else holds the areas then.
        self._dispatch.forget()
        self._combine.forget()
        self._combine.forget_buffers()
        self._areas.forget()
        self._close()

    def dispatch(
        self,
        given: tuple[Any, ...],
        options: tuple[Hashable, ...],
        build: Callable[..., LowLatencyDispatchRequest],
        *,
        with_hook: bool,
        schedule: Schedule,
    ) -> LowLatencyDispatched:
        return self._domain.on_device(self._dispatch, given, options, build, with_hook, schedule)

    def combine(
        self,
        given: tuple[Any, ...],
        handle: Any,
        options: tuple[Hashable, ...],
        build: Callable[..., LowLatencyCombineRequest],
        *,
        with_hook: bool,
        schedule: Schedule,
    ) -> LowLatencyCombined:
        return self._domain.on_device(self._combine, given, handle, options, build, with_hook, schedule)

    def next_combine_buffer(self, handle: Any) -> Any:
        """bfloat16 [El, R*M, H] that the next combine with ``zero_copy`` reads, in the caller's framework."""
        return self._domain.on_device(self._combine.next_buffer, handle)

    def reset(self) -> None:
        """Forget what was under way, while no rank has any work; see `HangWatch.reset`. Collective."""
        if self._domain.on_device(self._areas.reset):
            self._dispatch.forget()
            self._combine.forget()

    def farewells(self) -> list[int]:
        """See `Areas.farewells`."""
        return self._areas.farewells()

    @property
    def num_bytes(self) -> int:
        """Of the areas."""
        return self._areas.num_bytes

    @property
    def num_calls(self) -> tuple[int, int]:
        """Dispatches and combines so far."""
        return self._dispatch.num_calls, self._combine.num_calls

    # Masks. They wait for the calls so far.

    def update_mask(self, rank: int, masked: bool) -> None:
        self._check_shrink()
        own, num_ranks = self._areas.rank, self._areas.num_ranks
        if not 0 <= rank < num_ranks or rank == own:
            raise ConfigError(f"rank_to_mask={rank} is not a peer of rank {own} of {num_ranks}")
        self._areas.mask(rank, masked)

    def query_mask(self, status: Any) -> None:
        """Fill int32 [num_ranks], on the host or on the device."""
        self._check_shrink()
        masked = self._areas.masked()[: self._areas.num_ranks].astype(np.int32)
        view = arrays.view(status, name="mask_status", stream=self._domain.comm.pointer)
        if view.device == "cpu":
            arrays.host(status, name="mask_status", writable=True)[...] = masked
            return
        if view.dtype != "int32" or view.shape != masked.shape or view.readonly:
            raise ConfigError(f"mask_status must be a writable int32 [{len(masked)}]")
        self._domain.on_device(self._store, view.pointer, masked)

    def clean_mask(self) -> None:
        self._check_shrink()
        self._areas.unmask()

    def _store(self, pointer: int, array: np.ndarray[Any, Any]) -> None:
        domain = self._domain
        with device_errors("writing mask_status"):
            domain.comm.wait_for(arrays.current_streams(domain.device))
            domain.runtime.memcpyAsync(
                pointer,
                array.ctypes.data,
                array.nbytes,
                domain.runtime.memcpyHostToDevice,
                domain.comm.pointer,
            )
            domain.comm.synchronize()

    def _check_shrink(self) -> None:
        if not self._areas.masks:
            raise ConfigError("masks need a buffer made with enable_shrink=True")


class NoLowLatency:
    """Stands for the low-latency mode of a buffer that was made without: every call says so.

    Args:
        close: what `close` does.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        raise BackendError("low-latency calls on GPUs need a buffer made with low_latency_mode=True")
