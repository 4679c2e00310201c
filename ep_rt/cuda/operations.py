"""The kernels of one rank, loaded, and launches of them with everything bound that calls have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from . import kernels
from .heap import Workspace
from .kernels import ELEMENTS
from .launch import Kernel, Launch, bind
from .layout import WORKSPACE

# Of kernels that wait for nobody.
_LOCAL_BLOCKS: Final = 64


class Operations:
    """Binds launches. The device is current.

    Methods that return a `Launch` take the fields of the argument struct that hold for all its calls, by
    name, pointers as integers; the others are zero and are assigned before a call.

    Args:
        hang, slabs, rank, num_ranks, timeout_ns: as the kernels take them.
        max_blocks: the most that a call may ask for; all of them must be resident.
        segmented: dispatch and combine are the part within a node of calls over several nodes.
        counts: they add up the bytes that they move between ranks, in `WORKSPACE`.

    Attributes:
        workspace: of the kernels.
        common: fields of every collective kernel.
    """

    def __init__(
        self,
        *,
        hang: int,
        slabs: Sequence[int],
        rank: int,
        num_ranks: int,
        timeout_ns: int,
        max_blocks: int,
        segmented: bool = False,
        counts: bool = False,
    ) -> None:
        self._max_blocks = max_blocks
        self.workspace = Workspace(WORKSPACE.itemsize)
        self.common = {
            "hang": hang,
            "workspace": self.workspace.pointer,
            "timeout_ns": timeout_ns,
            "rank": rank,
            "num_ranks": num_ranks,
            "slabs": slabs,
        }
        self._is_segmented = segmented
        flags = {"segmented": segmented, "counts": counts}
        self._dispatch = [
            Kernel(kernels.intranode_dispatch(quantizes=each, **flags)) for each in (False, True)
        ]
        self._combine = {element: Kernel(kernels.intranode_combine(element, **flags)) for element in ELEMENTS}
        self._layout = Kernel(kernels.dispatch_layout())
        self._contiguous = bind(Kernel(kernels.contiguous()), _LOCAL_BLOCKS)

    def dispatch(self, *, quantizes: bool, **fields: int) -> Launch:
        """Of intranode_dispatch.cu."""
        # Over several nodes beside the exchange that brings tokens.
        kernel, is_early = self._dispatch[quantizes], self._is_segmented
        return bind(kernel, self._max_blocks, fields, self.common, starts_early=is_early)

    def combine(self, element: str, **fields: int) -> Launch:
        """Of intranode_combine.cu, for rows of one of `ELEMENTS`."""
        return bind(self._combine[element], self._max_blocks, fields, self.common)

    def dispatch_layout(self) -> Launch:
        """Of layout.cu."""
        return bind(self._layout, _LOCAL_BLOCKS)

    def contiguous(self, stream: int, **fields: int) -> None:
        """Enqueue contiguous.cu."""
        for name, value in fields.items():
            setattr(self._contiguous.args, name, value)
        self._contiguous(stream)
