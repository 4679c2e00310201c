"""Ranks of one NVLink domain meet, on their streams."""

from __future__ import annotations

from typing import Any

from . import kernels
from .hang import HangWatch, timeout_ns
from .launch import Kernel, pack, stream_pointer
from .layout import Operation
from .memory import Slab


class Barrier:
    """A barrier over the ranks of a slab. The kernel is compiled and loaded at construction, which is local.

    Args:
        watch: reports a barrier that gave up; may be shared by everything that works on the slab.
        timeout_s: deadline of each barrier, counted from the start of its kernel.
        operation: what the barrier belongs to; ranks in barriers of different operations do not meet.
    """

    def __init__(
        self, slab: Slab, watch: HangWatch, *, timeout_s: float, operation: int = Operation.BARRIER
    ) -> None:
        import cupy

        self._watch = watch
        spec = kernels.barrier(len(slab.pointers))
        with cupy.cuda.Device(slab.device):
            self._launch = Kernel(spec).bind(
                pack(
                    spec.args,
                    hang=watch.record_pointer,
                    timeout_ns=timeout_ns(timeout_s),
                    rank=slab.group.rank,
                    num_ranks=len(slab.pointers),
                    operation=operation,
                    slabs=slab.pointers,
                ),
                num_blocks=1,
            )

    def run(self, stream: Any) -> None:
        """Enqueue one barrier: later work of `stream` sees everything that any rank stored before its own.

        Args:
            stream: an integer, or an object with ``__cuda_stream__``, on the slab's device, which is current.

        Raises:
            PeerTimeoutError, CollectiveMismatchError: an earlier call gave up; nothing was enqueued.

        Collective: all ranks, same order of calls. Host wait: none. Graph capture: allowed.
        """
        self._watch.check()
        self._launch(stream_pointer(stream))

    def check(self) -> None:
        """See `HangWatch.check`."""
        self._watch.check()

    def reset(self, *, timeout_s: float | None = None) -> None:
        """See `HangWatch.reset`."""
        self._watch.reset(timeout_s=timeout_s)
