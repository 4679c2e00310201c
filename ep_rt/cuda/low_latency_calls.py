"""What low-latency dispatch and combine on one rank share: kernels, phases, hooks, and memory of a handle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import ConfigError
from ..events import EventOverlap
from ..handle import LowLatencyHandle
from ..requests import Schedule
from . import kernels, plan
from .domain import Call, Domain
from .heap import Block
from .kernels import WIRES
from .launch import Kernel, Launch, ModuleOwner, bind
from .layout import LOW_LATENCY_RECORD, MAX_GRID_BLOCKS, OFFSET_UNIT, ROUTE, align_up
from .low_latency_areas import Area, Pending
from .low_latency_places import Places
from .low_latency_plan import AreaShape
from .operations import Operations

SENDS: Final = 1
RECEIVES: Final = 2


class LowLatencyKernels:
    """The kernels of the mode, loaded. The device is current.

    Args:
        places: of ranks on several nodes, with the `network` that they are on; None for one NVLink domain.
    """

    def __init__(
        self,
        operations: Operations,
        *,
        max_blocks: int,
        places: Places | None = None,
        network: ModuleOwner | None = None,
    ) -> None:
        self._common = dict(operations.common)
        over_network = places is not None
        if places is not None:
            self._common |= {
                "rank": places.group.rank,
                "num_ranks": places.group.size,
                "first_rank": places.first_rank,
                "num_local_ranks": operations.common["num_ranks"],
            }
        # One kernel may have blocks that send and blocks that receive, of which two share an SM.
        self._num_resident = plan.LOW_LATENCY_BLOCKS_PER_SM * max_blocks
        self._dispatch = [
            Kernel(kernels.low_latency_dispatch(quantizes=each, over_network=over_network), network=network)
            for each in (False, True)
        ]
        self._combine = {
            wire: Kernel(kernels.low_latency_combine(wire, over_network=over_network), network=network)
            for wire in WIRES
        }

    def dispatch(self, *, quantizes: bool, **fields: Any) -> Launch:
        """Of low_latency_dispatch.cu."""
        return self._bind(self._dispatch[quantizes], fields)

    def combine(self, wire: str, **fields: Any) -> Launch:
        """Of low_latency_combine.cu."""
        return self._bind(self._combine[wire], fields)

    def _bind(self, kernel: Kernel, fields: dict[str, Any]) -> Launch:
        return bind(kernel, MAX_GRID_BLOCKS, fields, self._common, num_resident=self._num_resident)


@dataclass(frozen=True, slots=True)
class HandleLayout:
    """Byte offsets in the block that a handle keeps.

    Attributes:
        record: `LOW_LATENCY_RECORD`. sent_ids: int32 [T, K]. routes: `ROUTE` [R, M, K].
        recv_count, src_info, layout_range, expert_rows: arrays for the caller.
        end: size of the block.
    """

    record: int
    sent_ids: int
    routes: int
    recv_count: int
    src_info: int
    layout_range: int
    expert_rows: int
    end: int

    @classmethod
    def of(cls, shape: AreaShape, num_tokens: int, *, with_rows: bool) -> HandleLayout:
        num_local_experts = shape.num_experts // shape.num_ranks
        num_rows = num_local_experts * shape.num_ranks * shape.num_max_tokens
        sizes = (
            LOW_LATENCY_RECORD.itemsize,
            4 * num_tokens * shape.num_topk,
            ROUTE.itemsize * shape.num_ranks * shape.num_pairs,
            4 * num_local_experts,
            4 * num_rows,
            8 * num_local_experts * shape.num_ranks,
            4 * num_rows if with_rows else 0,
        )
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + align_up(size, OFFSET_UNIT))
        return cls(*offsets)


@dataclass(slots=True, eq=False)
class CudaLowLatencyHandle(LowLatencyHandle):
    """Of the CUDA backend.

    Attributes:
        block: see `HandleLayout`.
        area, zone: where the rows landed.
        sizes: of the calls, before it is said which area.
        is_received: holds something once the receive phase is enqueued.
    """

    block: Block = field(repr=False)
    at: HandleLayout = field(repr=False)
    area: Area = field(repr=False)
    zone: int = field(repr=False)
    sizes: AreaShape = field(repr=False)
    is_received: list[bool] = field(repr=False)

    def check_received(self) -> None:
        """Raise if the hook of the dispatch was not called."""
        if not self.is_received:
            raise ConfigError("call the hook of the dispatch before its combine")


def run(
    domain: Domain,
    call: Call,
    launch: Launch,
    num_blocks: tuple[int, int, int],
    *,
    pending: Pending | None,
    received: list[bool],
    kept: tuple[Any, ...],
) -> tuple[EventOverlap, Callable[[], None] | None]:
    """Enqueue a call whose memory was taken: as a whole, or its send phase. Its event, and its hook.

    Args:
        launch: with all arguments but the phases.
        num_blocks: of the send phase, of the receive phase, and of both in one.
        pending: for a call in two phases.
        received: gets an element when the receive phase is enqueued.
        kept: what the hook must keep alive besides `call`.
    """
    phases = SENDS if pending is not None else SENDS | RECEIVES
    launch.args.phases = phases
    launch(call.stream, num_blocks[phases - 1])
    event = domain.finish(call)
    if pending is None:
        received.append(True)
        return event, None
    return event, _hook(domain, call, launch, num_blocks[RECEIVES - 1], pending, received, kept)


def _hook(
    domain: Domain,
    call: Call,
    launch: Launch,
    num_blocks: int,
    pending: Pending,
    received: list[bool],
    kept: tuple[Any, ...],
) -> Callable[[], None]:
    """What enqueues the receive phase, see `run`."""
    arguments = launch.saved()

    def receive() -> None:
        domain.check()
        if received:
            return
        pending.check()
        later = domain.begin(call.frameworks, call.inputs, Schedule())
        domain.order(later)
        launch.restore(arguments)
        launch.args.phases = RECEIVES
        launch(later.stream, num_blocks)
        received.append(True)
        pending.is_received = True
        domain.finish(later)

    def hook(kept: tuple[Any, ...] = kept) -> None:
        domain.on_device(receive)

    return hook
