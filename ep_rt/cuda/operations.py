"""The kernels of one rank's engine, loaded, with everything bound that does not change between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from . import kernels
from .kernels import ELEMENTS, KernelSpec
from .launch import Kernel, Launch, pack
from .layout import WORKSPACE

# Of kernels that wait for nobody.
_LOCAL_BLOCKS: Final = 64


class Operations:
    """Enqueues operations on a stream. The device is current.

    Every method takes the fields of its argument struct that differ between calls, by name, pointers as
    integers. One call at a time: the arguments are changed in place.

    Args:
        hang, slabs, rank, num_ranks, timeout_ns: as the kernels take them.
        max_blocks: the most that a call may ask for; all of them must be resident.
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
    ) -> None:
        import cupy

        self._num_ranks = num_ranks
        self._workspace = cupy.cuda.alloc(WORKSPACE.itemsize)
        self.reset()
        common = {
            "hang": hang,
            "workspace": self._workspace.ptr,
            "timeout_ns": timeout_ns,
            "rank": rank,
            "num_ranks": num_ranks,
            "slabs": slabs,
        }
        self._dispatch = _bind(kernels.intranode_dispatch(), max_blocks, common)
        self._combines = {
            element: _bind(kernels.intranode_combine(element), max_blocks, common) for element in ELEMENTS
        }
        self._layout = _bind(kernels.dispatch_layout(), _LOCAL_BLOCKS, {"num_ranks": num_ranks})
        self._contiguous = _bind(kernels.contiguous(), _LOCAL_BLOCKS, {})

    def reset(self) -> None:
        """Forget what calls left that were given up. No kernel is running on this device."""
        import cupy

        runtime = cupy.cuda.runtime
        stream = cupy.cuda.Stream(non_blocking=True)
        runtime.memsetAsync(self._workspace.ptr, 0, WORKSPACE.itemsize, stream.ptr)
        stream.synchronize()

    def dispatch(self, stream: int, num_blocks: int, **fields: Any) -> None:
        _launch(self._dispatch, stream, num_blocks, fields)

    def combine(self, stream: int, num_blocks: int, element: str, **fields: Any) -> None:
        bias = fields.pop("bias")
        launch = self._combines[element]
        launch.args.bias[0], launch.args.bias[1] = bias
        _launch(launch, stream, num_blocks, fields)

    def dispatch_layout(self, stream: int, **fields: Any) -> None:
        _launch(self._layout, stream, _LOCAL_BLOCKS, fields)

    def contiguous(self, stream: int, **fields: Any) -> None:
        _launch(self._contiguous, stream, _LOCAL_BLOCKS, fields)


def _bind(spec: KernelSpec, num_blocks: int, values: dict[str, Any]) -> Launch:
    absent = {
        name: () if spec.args[name].shape else 0 for name in spec.args.names or () if name not in values
    }
    return Kernel(spec).bind(pack(spec.args, **values, **absent), num_blocks=num_blocks)


def _launch(launch: Launch, stream: int, num_blocks: int, fields: dict[str, Any]) -> None:
    args = launch.args
    for name, value in fields.items():
        setattr(args, name, value)
    launch(stream, num_blocks)
