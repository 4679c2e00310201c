"""How low-latency calls are laid over memory and blocks: offsets, slots, grids. Pure.

Twin of what `kernels_cu/low_latency_session.cuh` and `wire.cuh` say of turns and slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, count
from typing import Final

from ..errors import ConfigError
from ..requests import FP8_BLOCK
from .layout import (
    FIRST_COMBINE_ZONE,
    LOW_LATENCY_AREA,
    MAX_CLEAR_BLOCKS,
    MAX_GRID_BLOCKS,
    MAX_SEND_BLOCKS,
    OFFSET_UNIT,
    align_up,
)
from .plan import LOW_LATENCY_THREADS

MAX_TOPK: Final = 64
"""Most columns of ``topk_idx``: two for each lane of a warp."""

PIECE_CHANNELS: Final = 512
"""Channels of a row that a warp moves in one turn."""

TURNS_PER_BLOCK: Final = 4
"""Blocks are added until each has so many turns."""

SPEAKERS: Final = 1
"""Blocks of every kernel that only tell the peers where this rank is."""

_WARPS: Final = LOW_LATENCY_THREADS // 32

_CLEARED_BYTES: Final = 32768
"""Of the lists of a dispatch, that a block clears; more where there are too few blocks."""

_LISTED_PAIRS: Final = 256
"""Of a source rank, that a block lists; more where there are too few blocks."""

_LIST_BLOCKS: Final = 8
"""At most, of a source rank: each looks at all ids."""

POISON: Final = 0xFF
"""What zones whose data are polled hold at rest, in every byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AreaShape:
    """What the calls of an area have in common; the same on every rank.

    Attributes:
        is_main: dispatches land here, and combines of one row for each rank. Where such rows are polled they
            need zones that nothing else is stored to, so the other combines have an area of their own.
        has_columns: rows may come back for each column.
        over_network: ranks are on several nodes, or to be treated so: beside the zones there is room for
            what goes out by puts. Nothing is polled then, and nothing comes back for each column.
    """

    num_ranks: int
    num_max_tokens: int
    hidden: int
    num_experts: int
    num_topk: int
    is_main: bool = True
    has_columns: bool = False
    over_network: bool = False

    @property
    def num_slots(self) -> int:
        """Of a token where rows come back: for each rank, or also for each column."""
        return max(self.num_ranks, self.num_topk) if self.has_columns else self.num_ranks

    @property
    def num_pieces(self) -> int:
        """Of a row."""
        return -(-self.hidden // PIECE_CHANNELS)

    @property
    def num_pairs(self) -> int:
        """Pairs of (token, column) of a rank, at most."""
        return self.num_max_tokens * self.num_topk

    def scale_words(self, *, packed: bool) -> int:
        """32-bit words that the scale factors of an FP8 row take."""
        num_scales = self.hidden // FP8_BLOCK
        return -(-num_scales // 4) if packed else num_scales


@dataclass(frozen=True, slots=True)
class DispatchZone:
    """Byte offsets within an area. Rows of FP8 have their scale factors behind all rows; others have none.

    Attributes:
        places: where pairs belong among the rows of their experts.
        landed: words behind rows that were put, then behind their scale factors.
        out_ids, out_weights, out_rows: the outbox. The same place if there is none.
        end: of the zone, where the outbox begins, and `out_end` its end.
    """

    ids: int
    weights: int
    places: int
    landed: int
    rows: int
    end: int
    out_ids: int
    out_weights: int
    out_rows: int
    out_end: int

    def sf(self, shape: AreaShape) -> int:
        """Where the scale factors of FP8 rows begin."""
        return align_up(self.rows + shape.num_ranks * shape.num_max_tokens * shape.hidden, OFFSET_UNIT)

    def out_sf(self, shape: AreaShape) -> int:
        """The same of the outbox."""
        return align_up(self.out_rows + shape.num_max_tokens * shape.hidden, OFFSET_UNIT)


@dataclass(frozen=True, slots=True)
class CombineZone:
    """Byte offsets within an area, as `DispatchZone`."""

    weights: int
    landed: int
    rows: int
    end: int
    out_weights: int
    out_rows: int
    out_end: int


@dataclass(frozen=True, slots=True)
class AreaLayout:
    """Where the parts of an area lie: control words, then two zones of dispatch and two of combine."""

    dispatch: tuple[DispatchZone, DispatchZone]
    combine: tuple[CombineZone, CombineZone]
    num_bytes: int

    @classmethod
    def of(cls, shape: AreaShape) -> AreaLayout:
        num_ranks, num_max_tokens, hidden = shape.num_ranks, shape.num_max_tokens, shape.hidden
        with_puts = int(shape.over_network)
        pairs_bytes = align_up(8 * num_ranks * shape.num_pairs, OFFSET_UNIT)
        ids_bytes = align_up(8 * num_ranks * -(-shape.num_pairs // 2), OFFSET_UNIT)
        landed_bytes = with_puts * align_up(8 * num_ranks * num_max_tokens, OFFSET_UNIT)
        dispatch_sizes = (
            ids_bytes,
            pairs_bytes,
            pairs_bytes,
            2 * landed_bytes,
            _rows_bytes(num_ranks * num_max_tokens, hidden),
            with_puts * ids_bytes,
            with_puts * pairs_bytes,
            with_puts * _rows_bytes(num_max_tokens, hidden),
        )
        num_slots, num_out_slots = num_max_tokens * shape.num_slots, num_max_tokens * num_ranks
        combine_sizes = (
            pairs_bytes,
            landed_bytes,
            align_up(num_slots * slot_bytes(hidden), OFFSET_UNIT),
            with_puts * pairs_bytes,
            with_puts * align_up(num_out_slots * slot_bytes(hidden), OFFSET_UNIT),
        )
        at = align_up(LOW_LATENCY_AREA.itemsize, OFFSET_UNIT)
        dispatches, combines = [], []
        for _ in range(FIRST_COMBINE_ZONE):
            sizes = [int(shape.is_main) * size for size in dispatch_sizes]
            ends = list(accumulate(sizes, initial=at))
            dispatches.append(DispatchZone(*ends[:6], *ends[5:]))
            at = ends[-1]
        for _ in range(FIRST_COMBINE_ZONE):
            ends = list(accumulate(combine_sizes, initial=at))
            combines.append(CombineZone(*ends[:4], *ends[3:]))
            at = ends[-1]
        return cls((dispatches[0], dispatches[1]), (combines[0], combines[1]), at)


def _rows_bytes(num_rows: int, hidden: int) -> int:
    # An FP8 row with its scale factors never takes more than the bfloat16 row, but for the alignment.
    return align_up(2 * num_rows * hidden, OFFSET_UNIT) + OFFSET_UNIT


def slot_bytes(hidden: int) -> int:
    """Of one row on its way back: 2 bytes for a channel, and 4 for each block of them. Twin of wire.cuh."""
    return align_up(2 * hidden + 4 * -(-hidden // FP8_BLOCK), 16)


def num_send_blocks(num_turns: int, max_blocks: int) -> int:
    """Twin of low_latency_session.cuh."""
    return min(max_blocks, -(-num_turns // TURNS_PER_BLOCK))


def num_combine_blocks(num_turns: int, few_blocks: int, max_blocks: int) -> int:
    """Twin of low_latency_session.cuh."""
    filled = -(-num_turns // _WARPS)
    return num_send_blocks(num_turns, few_blocks) if filled <= few_blocks else min(max_blocks, filled)


def least_sms(num_ranks: int) -> int:
    """SMs of a rank that have room for all kinds of blocks of a call, one that sends and one that copies."""
    return next(each for each in count(1) if 2 * each - _num_others(num_ranks, each) >= 2)


def max_send_blocks(shape: AreaShape, *, max_blocks: int) -> int:
    """Blocks that send rows of a dispatch when every rank has as many tokens as it may; the same on all.

    Args:
        max_blocks: as many of a rank may run at once, one for each SM; of low-latency kernels twice as many.

    Raises:
        ConfigError: no room for all kinds of blocks that a call has.
    """
    if max_blocks < (least := least_sms(shape.num_ranks)):
        raise ConfigError(
            f"low-latency calls of {shape.num_ranks} ranks need {least} SMs for each rank, and "
            f"{max_blocks} are there"
        )
    room = 2 * max_blocks - _num_others(shape.num_ranks, max_blocks)
    most = max_blocks if room - max_blocks >= max_blocks // 2 else room // 2
    most = min(most, MAX_SEND_BLOCKS - 1)  # the last flag is that of the metadata
    return max(1, num_send_blocks(shape.num_max_tokens * shape.num_ranks * shape.num_pieces, most))


def max_combine_blocks(shape: AreaShape, *, max_blocks: int, is_alone: bool) -> int:
    """Blocks that send rows of a combine when every rank has as many tokens as it may.

    Args:
        is_alone: every rank has a GPU to itself, all of it. Then those that add may come after those that
            send. Else there may be no place left when these are done, or others whom they wait for need it.
    """
    few = max_send_blocks(shape, max_blocks=max_blocks)
    if not is_alone:
        return few
    room = 2 * max_blocks - shape.num_ranks - SPEAKERS
    num_turns = shape.num_max_tokens * shape.num_pieces
    return max(few, min(num_combine_blocks(num_turns, few, room), MAX_SEND_BLOCKS - 1))


def _max_clear_blocks(max_blocks: int) -> int:
    return max(1, min(max_blocks // 8, MAX_CLEAR_BLOCKS))


def num_clear_blocks(shape: AreaShape, num_lists: int, *, max_blocks: int) -> int:
    """Blocks that clear lists of a dispatch with an entry for each row that an expert may get."""
    num_local_experts = shape.num_experts // shape.num_ranks
    num_bytes = 4 * num_lists * num_local_experts * shape.num_ranks * shape.num_max_tokens
    return max(1, min(_max_clear_blocks(max_blocks), -(-num_bytes // _CLEARED_BYTES)))


def num_list_blocks(shape: AreaShape, *, max_blocks: int) -> int:
    """Blocks that list what came from one source rank."""
    wanted = -(-shape.num_max_tokens * shape.num_topk // _LISTED_PAIRS)
    return max(1, min(_max_list_blocks(shape.num_ranks, max_blocks), wanted))


def _max_list_blocks(num_ranks: int, max_blocks: int) -> int:
    return max(1, min(_LIST_BLOCKS, max_blocks // (4 * num_ranks)))


def _num_others(num_ranks: int, max_blocks: int) -> int:
    # The most of a dispatch that neither send rows nor copy.
    num_lists = num_ranks * _max_list_blocks(num_ranks, max_blocks)
    return SPEAKERS + num_ranks + _max_clear_blocks(max_blocks) + num_lists


def num_copy_blocks(shape: AreaShape, num_senders: int, *, max_blocks: int) -> int:
    """Blocks that copy rows to their experts, beside `num_senders` and all others."""
    return max(1, 2 * max_blocks - _num_others(shape.num_ranks, max_blocks) - num_senders)


def num_sum_blocks(
    shape: AreaShape, num_tokens: int, num_senders: int, *, max_blocks: int, is_alone: bool
) -> int:
    """Blocks that add what came back: beside `num_senders`, or after them, see `max_combine_blocks`."""
    num_turns = num_tokens * shape.num_pieces
    num_others = shape.num_ranks + SPEAKERS + num_senders
    if not is_alone:
        return max(1, num_send_blocks(num_turns, 2 * max_blocks - num_others))
    # They wait for peers, which may be in a call of another buffer first: its senders need a place here.
    most = min(2 * max_blocks - max_blocks // 4, MAX_GRID_BLOCKS - num_others)
    return max(1, num_combine_blocks(num_turns, max_blocks, most))


def dispatch_blocks(
    shape: AreaShape,
    num_tokens: int,
    max_send_blocks: int,
    num_clear_blocks: int,
    num_list_blocks: int,
    num_copy_blocks: int,
) -> tuple[int, int, int]:
    """Blocks of a dispatch: of its send phase, of its receive phase, and of both in one kernel.

    Those that send ids also tell what came, and a receive phase by itself has them too.
    """
    num_first = SPEAKERS + shape.num_ranks
    num_senders = num_clear_blocks + num_send_blocks(num_tokens * shape.num_pieces, max_send_blocks)
    num_receivers = shape.num_ranks * num_list_blocks + num_copy_blocks
    return num_first + num_senders, num_first + num_receivers, num_first + num_senders + num_receivers


def combine_blocks(
    shape: AreaShape, max_combine_blocks: int, num_sum_blocks: int, *, sends_weights: bool
) -> tuple[int, int, int]:
    """Blocks of a combine, as `dispatch_blocks`."""
    num_senders = max_combine_blocks + (shape.num_ranks if sends_weights else 0)
    return SPEAKERS + num_senders, SPEAKERS + num_sum_blocks, SPEAKERS + num_senders + num_sum_blocks


def area_bytes_hint(
    num_max_tokens: int,
    hidden: int,
    num_ranks: int,
    num_experts: int,
    num_topk: int = 32,
    *,
    with_columns: bool = False,
    over_network: bool = False,
) -> int:
    """Bytes for calls of one shape.

    Args:
        num_topk: hardly matters without `with_columns`, so more than usual are assumed.
        with_columns: with the area of combines whose rows come back for each column.
        over_network: with the outbox, and without that area, which there is not.
    """
    shape = AreaShape(
        num_ranks=num_ranks,
        num_max_tokens=num_max_tokens,
        hidden=hidden,
        num_experts=num_experts,
        num_topk=num_topk,
        over_network=over_network,
    )
    num_bytes = AreaLayout.of(shape).num_bytes
    if with_columns and not over_network:
        num_bytes += AreaLayout.of(replace(shape, is_main=False, has_columns=True)).num_bytes
    return num_bytes
