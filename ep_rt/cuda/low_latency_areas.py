"""Where low-latency calls of one shape land: a piece of every slab, set up once by all ranks together."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from ..errors import ConfigError, EpError, HandleError, on_all_ranks
from . import low_latency_plan as plan
from .domain import Call, Domain
from .layout import FIRST_COMBINE_ZONE, LOW_LATENCY_STATE, LOW_LATENCY_ZONES, MAX_LOCAL_RANKS, PAYLOAD_OFFSET
from .low_latency_plan import AreaLayout, AreaShape
from .memory import device_errors
from .pool import Lease

MASKS_BYTES: Final = 8 * MAX_LOCAL_RANKS


@dataclass(slots=True, eq=False)
class Pending:
    """A receive phase that has not been enqueued yet. A later call in the same zone takes its place."""

    is_taken: bool = False

    def check(self) -> None:
        """Raise if what was to be received is gone."""
        if self.is_taken:
            raise HandleError(
                "this hook comes too late: two calls of its kind were made since, and the last one uses its "
                "landing zone"
            )


class Area:
    """Calls of one shape.

    Attributes:
        shape, layout: see `low_latency_plan`.
        pointers: of the area on every rank, as this rank sees them.
        state: address of the `LOW_LATENCY_STATE`.
        max_blocks: blocks that an SM count allows, the same on every rank.
    """

    def __init__(
        self, domain: Domain, shape: AreaShape, lease: Lease, pointers: tuple[int, ...], max_blocks: int
    ) -> None:
        import cupy

        self._domain = domain
        self._lease = lease
        self.shape = shape
        self.layout = AreaLayout.of(shape)
        self.pointers = pointers
        self._state = cupy.cuda.alloc(LOW_LATENCY_STATE.itemsize)
        self.state: int = self._state.ptr
        self.max_send_blocks = plan.max_send_blocks(shape, max_blocks=max_blocks)
        self.reset_pending()

    @property
    def num_bytes(self) -> int:
        """In the slab."""
        return self._lease.num_bytes

    def take_zone(self, *, first: int) -> int:
        """The zone of the next call: those of a kind alternate. Nothing is enqueued yet.

        Args:
            first: 0 for dispatch, `FIRST_COMBINE_ZONE` for combine.
        """
        kind = first // FIRST_COMBINE_ZONE
        self._next[kind] ^= 1
        zone = first + self._next[kind]
        pending, self._pending[zone] = self._pending[zone], None
        if pending is not None:
            pending.is_taken = True
        return zone

    def postpone(self, zone: int) -> Pending:
        """The receive phase of the call that took the zone last comes later."""
        pending = self._pending[zone] = Pending()
        return pending

    def clear(self, stream: int) -> None:
        """As at the start: enqueue it. Nobody stores here."""
        runtime = self._domain.runtime
        base = self.pointers[self._domain.group.rank]
        with device_errors("clearing a low-latency area"):
            runtime.memsetAsync(self.state, 0, LOW_LATENCY_STATE.itemsize, stream)
            runtime.memsetAsync(base, 0, self.layout.num_bytes, stream)
            for zone in self.layout.combine:
                runtime.memsetAsync(base + zone.rows, plan.POISON, zone.end - zone.rows, stream)

    def reset(self) -> None:
        """Forget calls that are under way. The same on every rank."""
        for pending in self._pending:
            if pending is not None:
                pending.is_taken = True
        self.reset_pending()

    def reset_pending(self) -> None:
        """No zone has been taken yet."""
        self._next = [0, 0]
        self._pending: list[Pending | None] = [None] * LOW_LATENCY_ZONES


class Areas:
    """The areas of one rank, and which ranks are left out.

    Attributes:
        masks: address of the kernels' masks; 0 where late ranks are errors.
    """

    def __init__(self, domain: Domain, *, enable_shrink: bool) -> None:
        import cupy

        self._domain = domain
        self._areas: dict[AreaShape, Area] = {}
        self._masks = cupy.cuda.alloc(MASKS_BYTES)
        self.masks: int = self._masks.ptr if enable_shrink else 0
        self._write_masks(np.zeros(MAX_LOCAL_RANKS, np.uint64))

    @property
    def num_bytes(self) -> int:
        """In the slab, of all areas."""
        return sum(area.num_bytes for area in self._areas.values())

    def main(self, shape: AreaShape) -> AreaShape:
        """The shape of the area where dispatches land, given the sizes of the calls."""
        # With masks nothing is polled, so the main area serves every combine.
        return replace(shape, is_main=True, has_columns=bool(self.masks))

    def others(self, shape: AreaShape) -> AreaShape:
        """That of combines whose rows are not polled."""
        return self.main(shape) if self.masks else replace(shape, is_main=False, has_columns=True)

    def get(self, shape: AreaShape, call: Call) -> Area:
        """The area of a shape. The first time it is made, by all ranks together; hosts meet then.

        Raises:
            ConfigError: no room in the slab of some rank, on every rank.
        """
        area = self._areas.get(shape)
        if area is None:
            if call.is_capturing:
                raise ConfigError(
                    "the first low-latency call of a shape sets up memory, which a CUDA graph cannot hold: "
                    "make one call outside of the capture first"
                )
            area = self._areas[shape] = self._make(shape)
        return area

    def _make(self, shape: AreaShape) -> Area:
        domain = self._domain
        group, layout = domain.group, AreaLayout.of(shape)
        lease, error = None, None
        try:
            lease = domain.take(layout.num_bytes, "the landing zones of low-latency calls (num_rdma_bytes)")
        except EpError as failure:
            error = str(failure)
        mine = (shape, domain.max_blocks, None if lease is None else lease.offset, error)
        answers = group.allgather(mine, op="low-latency area", timeout_s=domain.timeout_s)
        for rank, (their_shape, _, _, text) in enumerate(answers):
            if their_shape != shape:
                raise on_all_ranks(
                    ConfigError(f"low-latency calls differ: rank {rank} has {their_shape}, others {shape}")
                )
            if text is not None:
                raise on_all_ranks(ConfigError(f"rank {rank}: {text}"))
        assert lease is not None
        pointers = tuple(
            base + PAYLOAD_OFFSET + offset
            for base, (_, _, offset, _) in zip(domain.slab.pointers, answers, strict=True)
        )
        area = Area(domain, shape, lease, pointers, min(blocks for _, blocks, _, _ in answers))
        self._clear([area])
        # Peers may store here from now on.
        group.allgather(None, op="low-latency area ready", timeout_s=domain.timeout_s)
        return area

    def _clear(self, areas: list[Area]) -> None:
        domain = self._domain
        domain.turns.begin(domain.comm.pointer)
        for area in areas:
            area.clear(domain.comm.pointer)
        domain.comm.synchronize()

    def forget(self) -> None:
        """The buffer is being closed."""
        self._areas.clear()

    def reset(self) -> None:
        """After an error, while no rank has work under way: the same on every rank."""
        self._clear(list(self._areas.values()))
        for area in self._areas.values():
            area.reset()

    # Masks.

    def masked(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """uint64 [MAX_LOCAL_RANKS], after the calls so far."""
        masks = np.zeros(MAX_LOCAL_RANKS, np.uint64)
        self._domain.on_device(self._domain.fetch, self._masks.ptr, masks)
        return masks

    def mask(self, rank: int, masked: bool) -> None:
        """For the calls from now on."""
        masks = self.masked()
        masks[rank] = masked
        self._domain.on_device(self._write_masks, masks)

    def unmask(self) -> None:
        """All of them."""
        self._domain.on_device(self._write_masks, np.zeros(MAX_LOCAL_RANKS, np.uint64))

    def _write_masks(self, masks: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        domain = self._domain
        stream = domain.comm.pointer
        with contextlib.ExitStack() as stack:
            stack.enter_context(device_errors("writing masks"))
            domain.turns.begin(stream)
            domain.comm.synchronize()
            domain.runtime.memcpyAsync(
                self._masks.ptr, masks.ctypes.data, masks.nbytes, domain.runtime.memcpyHostToDevice, stream
            )
            domain.comm.synchronize()
