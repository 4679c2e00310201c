"""The expert-major layout on one rank: what its kernels need, where its parts lie, and their launches.

Behind a dispatch, `expand` makes the result out of what landed; before a combine, `collapse` makes what the
peers pull. Both wait for no other rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..errors import ConfigError
from . import kernels
from .heap import Workspace
from .kernels import ELEMENTS
from .launch import Kernel, Launch, bind
from .layout import LOCAL_WORKSPACE, MAX_EXPAND_TOPK, OFFSET_UNIT, ReceivedRow, align_up

MAX_ROWS: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PlacesLayout:
    """Byte offsets in the block that a handle of this layout keeps.

    Attributes:
        num_needed_rows: int64; what the padded segments need, and never less than the tokens that came.
        psum: int32 [num_local_experts], where each expert's true rows end; an array for the caller, too.
        expert_row: int32 [row capacity, num_topk], the row of each (received token, column), -1 for none.
        end: size of the block.
    """

    num_needed_rows: int
    psum: int
    expert_row: int
    end: int

    @classmethod
    def of(cls, *, row_capacity: int, num_topk: int, num_local_experts: int) -> PlacesLayout:
        psum = OFFSET_UNIT
        expert_row = psum + align_up(4 * num_local_experts, OFFSET_UNIT)
        return cls(0, psum, expert_row, expert_row + 4 * row_capacity * num_topk)


def expert_row_bytes(received: ReceivedRow) -> ReceivedRow:
    """Bytes of an expert-major row, for received rows of `received`: no ids, and one weight.

    ``expert_row_bytes(row).layout(num_rows)`` says where the parts of a result lie; its `topk_idx` is empty.
    """
    return replace(received, idx_bytes=0, weights_bytes=4 if received.weights_bytes else 0)


def num_expert_rows(lengths: Sequence[int], alignment: int) -> int:
    """Rows of the result, for the lengths of all experts' padded segments.

    Raises:
        ConfigError: more than kernels can number.
    """
    num_rows = sum(lengths)
    if num_rows > MAX_ROWS:
        raise ConfigError(
            f"expert_alignment={alignment} pads the result to {num_rows} rows; at most {MAX_ROWS}"
        )
    return num_rows


def check_columns(num_topk: int) -> None:
    """Raise ConfigError for more columns of ``topk_idx`` than the kernels serve."""
    if num_topk > MAX_EXPAND_TOPK:
        raise ConfigError(f"topk_idx has {num_topk} columns; with layout='expert' at most {MAX_EXPAND_TOPK}")


class ExpertMajor:
    """Binds launches of expand.cu and collapse.cu. The device is current.

    Methods take the fields of the argument struct that hold for all calls of the launch, by name, pointers as
    integers; the others are zero and are assigned before a call. All calls come one after another.

    Args:
        header: of this rank's slab, as this rank sees it.
        hang, timeout_ns: as the kernels take them.
        max_blocks: the most that a call may ask for; all of them must be resident.

    Attributes:
        workspace: of the kernels.
    """

    def __init__(self, *, header: int, hang: int, timeout_ns: int, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self.workspace = Workspace(LOCAL_WORKSPACE.itemsize)
        self._common = {
            "header": header,
            "hang": hang,
            "workspace": self.workspace.pointer,
            "timeout_ns": timeout_ns,
        }
        self._expand = Kernel(kernels.expand())
        self._collapse = {element: Kernel(kernels.collapse(element)) for element in ELEMENTS}

    def expand(self, **fields: int) -> Launch:
        """Of expand.cu."""
        return bind(self._expand, self._max_blocks, fields, self._common)

    def collapse(self, element: str, **fields: int) -> Launch:
        """Of collapse.cu, for rows of one of `ELEMENTS`."""
        return bind(self._collapse[element], self._max_blocks, fields, self._common)
