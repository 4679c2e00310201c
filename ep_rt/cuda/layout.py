"""The bytes that kernels, ranks and hosts share. Twin of `kernels_cu/layout.cuh`.

Every rendered kernel asserts that both twins agree, so a difference is a compile error.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

import numpy as np

MAX_RANKS: Final = 128
"""Most ranks of one NVLink domain."""

OPERATION_BITS: Final = 16

Struct = np.dtype[Any]
"""A C struct: fields by name, aligned as C++ aligns them."""


class Operation(IntEnum):
    """The call that a signal belongs to."""

    NO_OPERATION = 0
    BARRIER = 1
    GAVE_UP = 0xFFFF


class Reason(IntEnum):
    """Why a kernel left before its work was done."""

    NOTHING = 0
    EXPIRED = 1
    CONTRADICTED = 2


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
    [("signals", "<u8", (MAX_RANKS,)), ("epoch", "<u8"), ("failed", "<u8"), ("hang", HANG_RECORD)], align=True
)


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


PAYLOAD_OFFSET: Final = align_up(SLAB_HEADER.itemsize, 128)
"""Where the part of a slab begins that the header does not use."""


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
    return [
        f"static_assert(ep::kMaxRanks == {MAX_RANKS});",
        f"static_assert(ep::kOperationBits == {OPERATION_BITS});",
        *(f"static_assert(ep::{_cxx_constant(member.name)} == {member.value});" for member in Operation),
        *(f"static_assert(ep::{_cxx_constant(member.name)} == {member.value});" for member in Reason),
        *twin_asserts("ep::PeerWait", PEER_WAIT),
        *twin_asserts("ep::HangRecord", HANG_RECORD),
        *twin_asserts("ep::SlabHeader", SLAB_HEADER),
    ]


def _cxx_constant(name: str) -> str:
    return "k" + name.title().replace("_", "")
