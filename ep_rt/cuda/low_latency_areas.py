"""Where low-latency calls of one shape land: a piece of every slab, set up once by all ranks together."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from ..errors import (
    ConfigError,
    DeviceError,
    EpError,
    HandleError,
    PeerFailedError,
    PeerTimeoutError,
    on_all_ranks,
)
from ..exchange import LATE, PeerGroup
from . import low_latency_plan as plan
from .domain import Call, Domain
from .layout import (
    FIRST_COMBINE_ZONE,
    LOW_LATENCY_AREA,
    LOW_LATENCY_STATE,
    LOW_LATENCY_ZONES,
    MAX_LOW_LATENCY_RANKS,
    field_offset,
)
from .low_latency_places import Piece, Places
from .low_latency_plan import AreaLayout, AreaShape
from .memory import device_errors

MASKS_BYTES: Final = 8 * MAX_LOW_LATENCY_RANKS


@dataclass(slots=True, eq=False)
class Pending:
    """A receive phase that has not been enqueued yet. A later call in the same zone takes its place."""

    is_taken: bool = False
    is_received: bool = False

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
        own: address of it here.
        pointers: of the area on every rank, as this rank sees them; 0 where stores do not reach.
        state: address of the `LOW_LATENCY_STATE`.
        max_send_blocks, max_combine_blocks: that send rows, the same on every rank.
        is_alone: see `plan.max_combine_blocks`.
        absent: ranks that took no part in making it, so that nobody knows where they have theirs.
        piece: its memory here.
    """

    is_gone = False

    def __init__(
        self,
        domain: Domain,
        places: Places,
        shape: AreaShape,
        piece: Piece,
        pointers: tuple[int, ...],
        max_blocks: int,
        *,
        is_alone: bool,
    ) -> None:
        import cupy

        self.absent: Sequence[int] = ()
        self._domain = domain
        self.piece = piece
        self.own = pointers[places.group.rank]
        self.shape = shape
        self.layout = AreaLayout.of(shape)
        self.pointers = pointers
        self._state = cupy.cuda.alloc(LOW_LATENCY_STATE.itemsize)
        self.state: int = self._state.ptr
        self.is_alone = is_alone
        self.max_send_blocks = plan.max_send_blocks(shape, max_blocks=max_blocks)
        self.max_combine_blocks = plan.max_combine_blocks(shape, max_blocks=max_blocks, is_alone=is_alone)
        self.reset_pending()

    @property
    def num_bytes(self) -> int:
        """Of this rank."""
        return self.piece.num_bytes

    def check_there(self) -> None:
        """Raise if `Areas.reset` has given it up."""
        if self.is_gone:
            raise HandleError("this handle is of calls that a rank was missing from; reset() has ended them")

    def check(self, *, first: int) -> None:
        """Raise if the next zone of a kind, see `take_zone`, must not be taken yet.

        Puts may arrive at any time until they are awaited, also over what a later call puts there.
        """
        pending = self._pending[first + (self._next[first // FIRST_COMBINE_ZONE] ^ 1)]
        if self.shape.over_network and pending is not None and not pending.is_received:
            raise HandleError(
                "over several nodes a third call of a kind comes after the hook of the first: call that"
            )

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
        base = self.own
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

    def give_up(self) -> None:
        """Nothing may be called with it any more."""
        self.reset()
        self.is_gone = True

    def reset_pending(self) -> None:
        """No zone has been taken yet."""
        self._next = [0, 0]
        self._pending: list[Pending | None] = [None] * LOW_LATENCY_ZONES


class Areas:
    """The areas of one rank, and which ranks are left out.

    Attributes:
        masks: address of the kernels' masks; 0 where late ranks are errors.
        rank, num_ranks: of all ranks that call.
        max_blocks: see `plan.max_send_blocks`.

    Args:
        num_sms: of the GPU, that calls may take at most; None: all.
    """

    def __init__(
        self,
        domain: Domain,
        places: Places,
        *,
        enable_shrink: bool,
        num_sms: int | None = None,
        label: str = "",
    ) -> None:
        import cupy

        self._label = label
        self._domain = domain
        self._places = places
        self.rank, self.num_ranks = places.group.rank, places.group.size
        self._is_limited = num_sms is not None
        self.max_blocks = domain.max_blocks if num_sms is None else domain.num_blocks(num_sms)
        self._areas: dict[AreaShape, Area] = {}
        self._masks = cupy.cuda.alloc(MASKS_BYTES)
        self.masks: int = self._masks.ptr if enable_shrink else 0
        self._write_masks(np.zeros(MAX_LOW_LATENCY_RANKS, np.uint64))

    @property
    def polls(self) -> bool:
        """Whether combines poll what lands, where that can be told from what lay there."""
        return not self.masks and not self._places.is_over_network

    @property
    def num_bytes(self) -> int:
        """Of all areas."""
        return sum(area.num_bytes for area in self._areas.values())

    def main(self, shape: AreaShape) -> AreaShape:
        """The shape of the area where dispatches land, given the sizes of the calls."""
        # Where nothing is polled the main area serves every combine.
        over_network = self._places.is_over_network
        has_columns = bool(self.masks) and not over_network
        return replace(shape, is_main=True, has_columns=has_columns, over_network=over_network)

    def others(self, shape: AreaShape) -> AreaShape:
        """That of combines whose rows are not polled."""
        return replace(shape, is_main=False, has_columns=True) if self.polls else self.main(shape)

    def get(self, shape: AreaShape, call: Call) -> Area:
        """The area of a shape. The first time it is made, by all ranks together; hosts meet then.

        Where late ranks are masked those are that do not come, and those that are masked are not waited for.

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
        domain, places = self._domain, self._places
        layout = AreaLayout.of(shape)
        piece, error = None, None
        try:
            piece = places.take(layout.num_bytes)
        except EpError as failure:
            error = str(failure)
        ranks = self._unmasked() if self.masks else list(range(self.num_ranks))
        where = self.max_blocks, domain.gpu
        mine = (shape, where, None if piece is None else piece.offset, error)
        answers = self._meet(mine, ranks, "low-latency area")
        for rank, (their_shape, _, _, text) in answers.items():
            if their_shape != shape:
                raise on_all_ranks(
                    ConfigError(f"low-latency calls differ: rank {rank} has {their_shape}, others {shape}")
                )
            if text is not None:
                raise on_all_ranks(ConfigError(f"rank {rank}: {text}"))
        assert piece is not None
        # Nothing is stored to ranks that are masked, as these are from now on: any place will do for theirs.
        offsets = [answers.get(rank, answers[self.rank])[2] for rank in range(self.num_ranks)]
        max_blocks, gpus = zip(*(each for _, each, _, _ in answers.values()), strict=True)
        area = Area(
            domain,
            places,
            shape,
            piece,
            places.pointers(offsets),
            min(max_blocks),
            is_alone=max(Counter(gpus).values()) == 1 and not self._is_limited,
        )
        self._clear([area])
        # Peers may store here from now on.
        ready = self._meet(None, list(answers), "low-latency area ready")
        area.absent = [rank for rank in range(self.num_ranks) if rank not in ready]
        if late := [rank for rank in area.absent if rank in ranks]:
            self._mask(late)
        return area

    def _meet(self, value: object, ranks: Sequence[int], op: str) -> dict[int, Any]:
        """What some ranks say, this one among them. Where late ranks are masked, without those."""
        domain, may_be_late = self._domain, bool(self.masks)
        answers = self._places.group.allgather(
            value,
            op=op,
            timeout_s=domain.timeout_s,
            ranks=ranks if may_be_late else None,
            skip_late=may_be_late,
        )
        return {rank: answers[rank] for rank in ranks if answers[rank] is not LATE}

    def _clear(self, areas: list[Area]) -> None:
        domain = self._domain
        domain.turns.begin(domain.comm.pointer)
        for area in areas:
            area.clear(domain.comm.pointer)
        domain.comm.synchronize()

    def forget(self) -> None:
        """The buffer is being closed."""
        self._areas.clear()

    def part(self) -> tuple[Sequence[int], Callable[[], Sequence[int]] | None]:
        """Before the buffer is closed: wait until no rank that is not masked will make a call any more.

        Ranks come here from different calls, since those that were lost made fewer.

        Returns:
            The ranks that did not come, and what does the same once more and returns those of this node that
            did not come then. None where no rank may be lost.
        """
        group = self._places.group
        if not self.masks or not isinstance(group, PeerGroup):
            return (), None
        there = set(range(self.num_ranks))
        with contextlib.suppress(DeviceError):  # the slab logs what became of the device
            there = set(self._unmasked())

        def part(op: str) -> Sequence[int]:
            op = f"{op}{self._label}"
            absent = group.part(op=op, timeout_s=self._domain.timeout_s, ranks=sorted(there))
            there.difference_update(absent)
            return absent

        absent: Sequence[int] = ()
        with contextlib.suppress(PeerTimeoutError, PeerFailedError):  # it says so once more
            absent = part("close")
        first = self._places.first_rank
        of_node = range(first, first + self._domain.group.size)
        return absent, lambda: [rank for rank in part("slab close") if rank in of_node]

    def reset(self) -> bool:
        """After an error, while no rank has work under way: the same on every rank. Collective.

        Returns:
            Whether areas were given up, because a rank has no part in them.
        """
        self._places.settle()
        num_before = len(self._areas)
        if self.masks:
            self._give_up_partial_areas()
        self._clear(list(self._areas.values()))
        for area in self._areas.values():
            area.reset()
        return len(self._areas) < num_before

    def _give_up_partial_areas(self) -> None:
        whole = {shape for shape, area in self._areas.items() if not area.absent}
        answers = self._places.group.allgather(
            whole, op="low-latency areas", timeout_s=self._domain.timeout_s
        )
        whole = whole.intersection(*answers)
        for shape in self._areas.keys() - whole:
            self._areas.pop(shape).give_up()
        self._places.keep([area.piece for area in self._areas.values()])

    def farewells(self) -> list[int]:
        """A word for each rank: not 0 once it has given a call up over the network. Waits for no call."""
        words = np.zeros(MAX_LOW_LATENCY_RANKS, np.uint64)
        for area in self._areas.values():
            at = area.own + field_offset(LOW_LATENCY_AREA, "farewells")
            words |= self._domain.slab.read_at(at, np.dtype(("<u8", (MAX_LOW_LATENCY_RANKS,))))[0]
        return [int(word) for word in words]

    # Masks.

    def masked(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """uint64 [MAX_LOW_LATENCY_RANKS], after the calls so far."""
        masks = np.zeros(MAX_LOW_LATENCY_RANKS, np.uint64)
        self._domain.on_device(self._domain.fetch, self._masks.ptr, masks)
        return masks

    def _unmasked(self) -> list[int]:
        return [rank for rank, masked in enumerate(self.masked()[: self.num_ranks]) if not masked]

    def mask(self, rank: int, masked: bool) -> None:
        """For the calls from now on.

        Raises:
            ConfigError: nobody knows where the rank has an area.
        """
        if not masked and rank in self._absent():
            raise ConfigError(
                f"rank {rank} was not there when low-latency calls of a shape were first made: reset() first"
            )
        masks = self.masked()
        masks[rank] = masked
        self._domain.on_device(self._write_masks, masks)

    def _mask(self, ranks: Sequence[int]) -> None:
        masks = self.masked()
        masks[ranks] = 1
        self._write_masks(masks)

    def unmask(self) -> None:
        """All of them but those of whom nobody knows where they have an area."""
        masks = np.zeros(MAX_LOW_LATENCY_RANKS, np.uint64)
        masks[self._absent()] = 1
        self._domain.on_device(self._write_masks, masks)

    def _absent(self) -> list[int]:
        return sorted({rank for area in self._areas.values() for rank in area.absent})

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
