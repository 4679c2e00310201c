"""The bytes that kernels, ranks and hosts share. Twin of `kernels_cu/layout.cuh`.

Every rendered kernel asserts that both twins agree, so a difference is a compile error.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np

MAX_RANKS: Final = 128
"""Most ranks of one NVLink domain."""

OPERATION_BITS: Final = 16

MAX_LOCAL_RANKS: Final = 8
"""Most ranks of one NVLink domain that the normal mode serves."""

MAX_LOCAL_EXPERTS: Final = 512
"""Most experts of one rank."""

MAX_BLOCKS: Final = 256
"""Most blocks of a kernel."""

MAX_EXPAND_TOPK: Final = 64
"""Most columns of ``topk_idx`` with the expert-major layout."""

MAX_CHUNKS: Final = 512
"""Most chunks in which rows are copied to where peers read them."""

OFFSET_UNIT: Final = 256
"""Bytes; slab offsets travel as 32-bit multiples."""

MAX_GRID_BLOCKS: Final = 640
"""Most blocks of any kernel that advances the epoch."""

LOW_LATENCY_ZONES: Final = 4
"""Landing zones of a low-latency area: two of dispatch, then two of combine."""

FIRST_COMBINE_ZONE: Final = 2

MAX_SEND_BLOCKS: Final = 256
"""Most blocks that send rows in a low-latency call."""

MAX_WAVES: Final = 4
"""Most waves of what a block sends in a low-latency dispatch, with a flag behind each."""

MAX_CLEAR_BLOCKS: Final = 32
"""Most blocks that clear the lists of a low-latency dispatch."""

MAX_LOW_LATENCY_RANKS: Final = 32
"""Most ranks of all nodes that low-latency calls serve."""

MAX_NODES: Final = 32
"""Most nodes that the two-level mode serves."""

MAX_CHANNELS: Final = 32
"""Most rings between two ranks in one direction."""

MAX_SLOTS: Final = 8
"""Most slots of a ring."""

MAX_SECTIONS: Final = 4
"""Most parts of a row that cross the network."""

Struct = np.dtype[Any]
"""A C struct: fields by name, aligned as C++ aligns them."""


class Operation(IntEnum):
    """The call that a signal belongs to."""

    NO_OPERATION = 0
    BARRIER = 1
    DISPATCH = 2
    COMBINE = 3
    EXPAND = 4
    LOW_LATENCY_DISPATCH = 5
    LOW_LATENCY_COMBINE = 6
    PING = 16
    GAVE_UP = 0xFFFF


class Reason(IntEnum):
    """Why a kernel left before its work was done."""

    NOTHING = 0
    EXPIRED = 1
    CONTRADICTED = 2
    DISAGREED = 3
    LEFT = 4
    OVERFULL = 5


PEER_WAIT: Final[Struct] = np.dtype([("expected", "<u8"), ("seen", "<u8")], align=True)

HANG_RECORD: Final[Struct] = np.dtype(
    [
        ("reason", "<u8"),
        ("operation", "<u8"),
        ("phase", "<u8"),
        ("epoch", "<u8"),
        ("waits", PEER_WAIT, (MAX_RANKS,)),
    ],
    align=True,
)

SLAB_HEADER: Final[Struct] = np.dtype(
    [
        ("signals", "<u8", (MAX_RANKS,)),
        ("epoch", "<u8"),
        ("failed", "<u8"),
        ("hang", HANG_RECORD),
        ("block_epochs", "<u8", (MAX_GRID_BLOCKS,)),
    ],
    align=True,
)


DISPATCH_OFFER: Final[Struct] = np.dtype(
    [("counts", "<u8", (MAX_LOCAL_RANKS,)), ("offset", "<u8"), ("capacity", "<u8"), ("digest", "<u8")],
    align=True,
)

COMBINE_OFFER: Final[Struct] = np.dtype(
    [("offset", "<u8"), ("weights_offset", "<u8"), ("digest", "<u8"), ("staged", "<u8")], align=True
)

EXCHANGE: Final[Struct] = np.dtype(
    [
        ("dispatch", DISPATCH_OFFER, (2, MAX_LOCAL_RANKS)),
        ("combine", COMBINE_OFFER, (2, MAX_LOCAL_RANKS)),
        ("expert_counts", "<u8", (2, MAX_LOCAL_RANKS, MAX_LOCAL_EXPERTS)),
        ("arrivals", "<u8", (MAX_LOCAL_RANKS,)),
        ("segment_counts", "<u8", (2, MAX_LOCAL_RANKS, MAX_NODES, MAX_LOCAL_RANKS)),
    ],
    align=True,
)

DISPATCH_RESULT: Final[Struct] = np.dtype(
    [
        ("call", "<u8"),
        ("num_recv_tokens", "<i4"),
        ("overfull_ranks", "<u4"),
        ("expert_counts", "<i4", (MAX_LOCAL_EXPERTS,)),
    ],
    align=True,
)

SEND_PLAN: Final[Struct] = np.dtype(
    [
        ("base", "<i4", (MAX_LOCAL_RANKS,)),
        ("limit", "<i4", (MAX_LOCAL_RANKS,)),
        ("recv_counts", "<i4", (MAX_LOCAL_RANKS,)),
        ("recv_ends", "<i4", (MAX_LOCAL_RANKS,)),
        ("expert_ends", "<i4", (MAX_LOCAL_EXPERTS,)),
        ("segment_base", "<i4", (MAX_NODES, MAX_LOCAL_RANKS)),
        ("segment_counts", "<i4", (MAX_NODES, MAX_LOCAL_RANKS)),
    ],
    align=True,
)

WORKSPACE: Final[Struct] = np.dtype(
    [
        ("calls", "<u8"),
        ("tickets", "<u8", (2,)),
        ("arrived", "<u8", (2,)),
        ("finished", "<u8", (2,)),
        ("leaving", "<u8"),
        ("block_counts", "<u8", (MAX_BLOCKS, MAX_LOCAL_RANKS)),
        ("expert_counts", "<u4", (2, MAX_LOCAL_RANKS * MAX_LOCAL_EXPERTS)),
        ("staged", "<u8", (2, MAX_CHUNKS)),
        ("begun", "<u8", (2,)),
        ("announced", "<u8", (2,)),
        ("landed", "<u8", (2,)),
        ("returning", "<u8"),
        ("pieces_per_row", "<i4"),
        ("num_weight_warps", "<i4"),
        ("peer_bytes", "<u8"),
    ],
    align=True,
)


LOCAL_WORKSPACE: Final[Struct] = np.dtype(
    [
        ("calls", "<u8"),
        ("arrived", "<u8", (2,)),
        ("finished", "<u8", (2,)),
        ("tickets", "<u4", (2,)),
        ("counts", "<u8", (MAX_BLOCKS * MAX_LOCAL_EXPERTS,)),
    ],
    align=True,
)


LOW_LATENCY_AREA: Final[Struct] = np.dtype(
    [
        ("freed", "<u8", (LOW_LATENCY_ZONES, MAX_LOW_LATENCY_RANKS)),
        ("beats", "<u8", (MAX_LOW_LATENCY_RANKS,)),
        ("digests", "<u8", (LOW_LATENCY_ZONES, MAX_LOW_LATENCY_RANKS)),
        ("num_tokens", "<u8", (LOW_LATENCY_ZONES, MAX_LOW_LATENCY_RANKS)),
        ("flags", "<u8", (LOW_LATENCY_ZONES, MAX_LOW_LATENCY_RANKS, MAX_WAVES, MAX_SEND_BLOCKS)),
        ("doing", "<u8", (MAX_LOW_LATENCY_RANKS,)),
        ("farewells", "<u8", (MAX_LOW_LATENCY_RANKS,)),
        ("told_ids", "<u8", (LOW_LATENCY_ZONES, MAX_LOW_LATENCY_RANKS)),
        ("told_weights", "<u8", (LOW_LATENCY_ZONES, MAX_LOW_LATENCY_RANKS)),
    ],
    align=True,
)

LOW_LATENCY_STATE: Final[Struct] = np.dtype(
    [
        ("uses", "<u8", (LOW_LATENCY_ZONES, MAX_GRID_BLOCKS)),
        ("received", "<u8", (LOW_LATENCY_ZONES,)),
        ("decisions", "<u8", (LOW_LATENCY_ZONES, MAX_LOW_LATENCY_RANKS)),
        ("cleared", "<u8", (FIRST_COMBINE_ZONE, MAX_CLEAR_BLOCKS)),
        ("listed", "<u8", (FIRST_COMBINE_ZONE, MAX_LOW_LATENCY_RANKS)),
        ("posted", "<u8", (LOW_LATENCY_ZONES, MAX_LOW_LATENCY_RANKS)),
    ],
    align=True,
)

LOW_LATENCY_RECORD: Final[Struct] = np.dtype(
    [("epoch", "<u8"), ("use", "<u8"), ("max_tokens", "<i8")], align=True
)

ROUTE: Final[Struct] = np.dtype([("row", "<i4"), ("weight", "<f4")], align=True)

SEGMENTS: Final[Struct] = np.dtype(
    [
        ("num_tokens", "<i4"),
        ("num", "<i4"),
        ("own", "<i4"),
        ("first", "<i4", (MAX_NODES + 1,)),
        ("counts", "<i4", (MAX_NODES, MAX_LOCAL_RANKS)),
    ],
    align=True,
)

COUNT_MESSAGE: Final[Struct] = np.dtype(
    [("counts", "<i4", (MAX_LOCAL_RANKS,)), ("num_tokens", "<i4"), ("digest", "<u4")], align=True
)

NETWORK_AREA: Final[Struct] = np.dtype(
    [
        ("doing", "<u8", (MAX_NODES,)),
        ("farewells", "<u8", (MAX_NODES,)),
        ("counted", "<u8", (2, MAX_NODES)),
        ("landed", "<u8", (MAX_NODES, MAX_CHANNELS, MAX_SLOTS)),
        ("freed", "<u8", (MAX_NODES, MAX_CHANNELS, MAX_SLOTS)),
        ("incoming", COUNT_MESSAGE, (2, MAX_NODES)),
        ("outgoing", COUNT_MESSAGE, (2, MAX_NODES)),
    ],
    align=True,
)

NETWORK_STATE: Final[Struct] = np.dtype(
    [
        ("calls", "<u8"),
        ("sent", "<u8", (MAX_NODES, MAX_CHANNELS)),
        ("received", "<u8", (MAX_NODES, MAX_CHANNELS)),
        ("sent_bytes", "<u8", (MAX_NODES,)),
    ],
    align=True,
)

NETWORK_PLAN: Final[Struct] = np.dtype(
    [
        ("segments", SEGMENTS),
        ("send_counts", "<i4", (MAX_NODES,)),
        ("landed_first", "<i4", (MAX_NODES,)),
        ("returned_first", "<i4", (MAX_NODES,)),
    ],
    align=True,
)

SECTION: Final[Struct] = np.dtype(
    [("source", "<u8"), ("target", "<u8"), ("bytes", "<i4"), ("offset", "<i4")], align=True
)


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


EXCHANGE_OFFSET: Final = align_up(SLAB_HEADER.itemsize, 128)
"""Where a slab's `EXCHANGE` lies."""

PAYLOAD_OFFSET: Final = align_up(EXCHANGE_OFFSET + EXCHANGE.itemsize, OFFSET_UNIT)
"""Where the part of a slab begins that holds no control words."""


class ReceiveLayout(NamedTuple):
    """Byte offsets of the parts of what a rank receives, from the place it offers."""

    topk_idx: int
    topk_weights: int
    sf: int
    x: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedRow:
    """Bytes that a received token takes in each part; 0 where the part is absent."""

    idx_bytes: int
    weights_bytes: int
    sf_bytes: int
    row_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of a token in all parts together."""
        return self.idx_bytes + self.weights_bytes + self.sf_bytes + self.row_bytes

    def layout(self, capacity: int) -> ReceiveLayout:
        """Where the parts lie when `capacity` tokens must fit. Twin of ``receive_layout``."""
        topk_weights = align_up(capacity * self.idx_bytes, OFFSET_UNIT)
        sf = topk_weights + align_up(capacity * self.weights_bytes, OFFSET_UNIT)
        x = sf + align_up(capacity * self.sf_bytes, OFFSET_UNIT)
        end = x + align_up(capacity * self.row_bytes, OFFSET_UNIT)
        return ReceiveLayout(0, topk_weights, sf, x, end)

    def capacity(self, num_bytes: int) -> int:
        """Tokens that fit into `num_bytes` for certain, whatever the alignment of the parts costs."""
        return max(0, num_bytes - 4 * OFFSET_UNIT) // self.total_bytes

    def num_bytes(self, capacity: int) -> int:
        """Bytes from which on `capacity` tokens fit for certain. The inverse of `capacity`."""
        return align_up(capacity * self.total_bytes + 4 * OFFSET_UNIT, OFFSET_UNIT)


def signal_word(epoch: int, operation: int) -> int:
    """The word of a rank that is in `operation`, the `epoch`-th collective call of its slab."""
    return epoch << OPERATION_BITS | operation


def signal_epoch(word: int) -> int:
    """The inverse of `signal_word`."""
    return word >> OPERATION_BITS


def signal_operation(word: int) -> int:
    """The inverse of `signal_word`."""
    return word & ((1 << OPERATION_BITS) - 1)


def operation_name(operation: int) -> str:
    """How errors call an operation."""
    try:
        return Operation(operation).name.lower()
    except ValueError:
        return f"operation {operation}"


def field_offset(struct: Struct, name: str) -> int:
    """Byte offset of a field."""
    assert struct.fields is not None
    return int(struct.fields[name][1])


def twin_asserts(cxx_name: str, struct: Struct) -> list[str]:
    """The C++ lines that hold `cxx_name` to `struct`: its size, and the place of every field."""
    return [
        f"static_assert(sizeof({cxx_name}) == {struct.itemsize});",
        *(
            f"static_assert(EP_OFFSETOF({cxx_name}, {name}) == {field_offset(struct, name)});"
            for name in struct.names or ()
        ),
    ]


def layout_asserts() -> list[str]:
    """The C++ lines that hold layout.cuh to this file."""
    constants = {
        "kMaxRanks": MAX_RANKS,
        "kOperationBits": OPERATION_BITS,
        "kMaxLocalRanks": MAX_LOCAL_RANKS,
        "kMaxLocalExperts": MAX_LOCAL_EXPERTS,
        "kMaxBlocks": MAX_BLOCKS,
        "kMaxChunks": MAX_CHUNKS,
        "kMaxExpandTopk": MAX_EXPAND_TOPK,
        "kOffsetUnit": OFFSET_UNIT,
        "kMaxGridBlocks": MAX_GRID_BLOCKS,
        "kLowLatencyZones": LOW_LATENCY_ZONES,
        "kFirstCombineZone": FIRST_COMBINE_ZONE,
        "kMaxSendBlocks": MAX_SEND_BLOCKS,
        "kMaxWaves": MAX_WAVES,
        "kMaxClearBlocks": MAX_CLEAR_BLOCKS,
        "kMaxLowLatencyRanks": MAX_LOW_LATENCY_RANKS,
        "kMaxNodes": MAX_NODES,
        "kMaxChannels": MAX_CHANNELS,
        "kMaxSlots": MAX_SLOTS,
        "kMaxSections": MAX_SECTIONS,
        "kExchangeOffset": EXCHANGE_OFFSET,
        "kPayloadOffset": PAYLOAD_OFFSET,
    }
    structs = {
        "PeerWait": PEER_WAIT,
        "HangRecord": HANG_RECORD,
        "SlabHeader": SLAB_HEADER,
        "DispatchOffer": DISPATCH_OFFER,
        "CombineOffer": COMBINE_OFFER,
        "Exchange": EXCHANGE,
        "DispatchResult": DISPATCH_RESULT,
        "SendPlan": SEND_PLAN,
        "Workspace": WORKSPACE,
        "LocalWorkspace": LOCAL_WORKSPACE,
        "LowLatencyArea": LOW_LATENCY_AREA,
        "LowLatencyState": LOW_LATENCY_STATE,
        "LowLatencyRecord": LOW_LATENCY_RECORD,
        "Route": ROUTE,
        "Segments": SEGMENTS,
        "CountMessage": COUNT_MESSAGE,
        "NetworkArea": NETWORK_AREA,
        "NetworkState": NETWORK_STATE,
        "NetworkPlan": NETWORK_PLAN,
        "Section": SECTION,
    }
    return [
        *(f"static_assert(ep::{name} == {value});" for name, value in constants.items()),
        *(f"static_assert(ep::{_cxx_constant(member.name)} == {member.value});" for member in Operation),
        *(f"static_assert(ep::{_cxx_constant(member.name)} == {member.value});" for member in Reason),
        *(line for name, struct in structs.items() for line in twin_asserts(f"ep::{name}", struct)),
        *_receive_layout_asserts(),
    ]


def _receive_layout_asserts() -> list[str]:
    """The two functions agree where every part needs padding, and where parts are absent."""
    samples = [
        (1001, ReceivedRow(idx_bytes=72, weights_bytes=36, sf_bytes=224, row_bytes=7184)),
        (3, ReceivedRow(idx_bytes=0, weights_bytes=0, sf_bytes=4, row_bytes=16)),
    ]
    return [
        f"static_assert(ep::receive_layout({capacity}, {row.idx_bytes}, {row.weights_bytes}, {row.sf_bytes}, "
        f"{row.row_bytes}).{part} == {getattr(row.layout(capacity), part)});"
        for capacity, row in samples
        for part in ReceiveLayout._fields
    ]


def _cxx_constant(name: str) -> str:
    return "k" + name.title().replace("_", "")
