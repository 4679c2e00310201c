"""When a kernel gave up: what the ranks saw, who is to blame, and how they start again together.

A rank that gives up is late for its peers, so what one rank saw is not enough to name anyone. Every rank's
record also lies in its slab, where its peers can read it without its help; they are put together here.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import ClosedError, CollectiveMismatchError, DeviceError, EpError, PeerTimeoutError
from .layout import (
    HANG_RECORD,
    SLAB_HEADER,
    Operation,
    Reason,
    field_offset,
    operation_name,
    signal_epoch,
    signal_operation,
    signal_word,
)
from .memory import Slab

# A rank that gave up told its peers, and their kernels leave within microseconds of hearing it.
_SETTLE_S: Final = 0.1
_HOST_ALLOC_PORTABLE_MAPPED: Final = 1 | 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one rank saw when it gave up. Twin of a `HANG_RECORD` that holds something.

    Attributes:
        waits: (expected, seen) signal words by peer, of the peers that had not arrived.
    """

    rank: int
    reason: int
    operation: int
    phase: int
    epoch: int
    waits: Mapping[int, tuple[int, int]]

    @classmethod
    def of(cls, rank: int, record: NDArray[Any]) -> Report | None:
        """The report in a record [1] of type `HANG_RECORD`; None when the rank has not given up."""
        fields = record[0]
        if fields["reason"] == Reason.NOTHING:
            return None
        waits = fields["waits"]
        return cls(
            rank=rank,
            reason=int(fields["reason"]),
            operation=int(fields["operation"]),
            phase=int(fields["phase"]),
            epoch=int(fields["epoch"]),
            waits={
                int(peer): (int(waits[peer]["expected"]), int(waits[peer]["seen"]))
                for peer in np.flatnonzero(waits["expected"])
            },
        )


def verdict(reports: Sequence[Report | None], *, rank: int, timeout_s: float) -> EpError:
    """The error that this rank raises, given every rank's report (None: has not given up, or cannot be read).

    The earliest wait decides, by epoch and phase: later ones are its consequences. At that epoch, ranks in
    different operations are a `CollectiveMismatchError`. Else those are late that a rank whose own deadline
    passed had not heard from; ranks that gave up themselves are named only when nobody else is left.
    The error's `seen` and `expected` count the calls of the slab.
    """
    known = [report for report in reports if report is not None]
    epoch, phase = min((report.epoch, report.phase) for report in known)
    operations = _operations_at(epoch, known)
    if len(set(operations.values())) > 1:
        return CollectiveMismatchError(
            [operation_name(operations[peer]) if peer in operations else None for peer in range(len(reports))]
        )
    first = [report for report in known if (report.epoch, report.phase) == (epoch, phase)]
    witnesses = [report for report in first if report.reason == Reason.EXPIRED] or first
    late = {peer for report in witnesses for peer in report.waits if not _gave_up(report.waits[peer][1])}
    late = late or {peer for report in witnesses for peer in report.waits}
    peers = sorted(late - {report.rank for report in known}) or sorted(late)
    witness = next((report for report in witnesses if report.rank == rank), witnesses[0])
    wait = witness.waits.get(peers[0])
    return PeerTimeoutError(
        rank=rank,
        peers=peers,
        phase=f"{operation_name(witness.operation)} (call {epoch}, phase {phase})",
        timeout_s=timeout_s,
        seen=None if wait is None else signal_epoch(wait[1]),
        expected=None if wait is None else signal_epoch(wait[0]),
    )


def _operations_at(epoch: int, reports: Sequence[Report]) -> dict[int, int]:
    """Which operation each rank was in at `epoch`, where that is known."""
    operations = {report.rank: report.operation for report in reports if report.epoch == epoch}
    for report in reports:
        for peer, (_, seen) in report.waits.items():
            if signal_epoch(seen) == epoch and not _gave_up(seen):
                operations.setdefault(peer, signal_operation(seen))
    return operations


def _gave_up(word: int) -> bool:
    return signal_operation(word) == Operation.GAVE_UP


class HangWatch:
    """Notices when a kernel of this rank gave up, and says why.

    Args:
        slab: every kernel that is watched works on it.
        timeout_s: the kernels' deadline, for the message.

    Attributes:
        record_pointer: a `HANG_RECORD` in pinned memory; an argument of every kernel.
    """

    def __init__(self, slab: Slab, *, timeout_s: float) -> None:
        import cupy

        self._slab = slab
        self._timeout_s = timeout_s
        self._memory = cupy.cuda.PinnedMemory(HANG_RECORD.itemsize, _HOST_ALLOC_PORTABLE_MAPPED)
        # With unified addressing the device uses the same address.
        self.record_pointer: int = self._memory.ptr
        buffer = (ctypes.c_uint8 * HANG_RECORD.itemsize).from_address(self.record_pointer)
        self._record: NDArray[Any] = np.frombuffer(memoryview(buffer), HANG_RECORD)
        self._record[:] = 0
        self._reason = ctypes.c_uint64.from_address(self.record_pointer)
        self._error: EpError | None = None

    def check(self) -> None:
        """Raise if a kernel of this rank gave up since the last `reset`. Local; a memory read otherwise.

        Does not wait: a kernel still running has not given up yet.

        Raises:
            PeerTimeoutError: naming the ranks that were really late.
            CollectiveMismatchError: ranks were in different operations.
        """
        if self._reason.value:
            if self._error is None:
                self._error = self._explain()
            raise self._error

    def reset(self, *, timeout_s: float | None = None) -> None:
        """Let the ranks start again after an error. Collective; waits for this rank's device.

        Raises:
            PeerTimeoutError, PeerFailedError: a peer did not come; build the slab anew over the others.
        """
        import cupy

        group = self._slab.group
        with cupy.cuda.Device(self._slab.device):
            cupy.cuda.runtime.deviceSynchronize()
        header = self._slab.read(group.rank, 0, SLAB_HEADER)
        epochs = group.allgather(int(header["epoch"][0]), op="reset", timeout_s=timeout_s)
        # Every device is idle now. Above every word stored so far: calls in flight had max(epochs) + 1.
        base = max(epochs) + 2
        header[:] = 0
        header["signals"] = signal_word(base, Operation.NO_OPERATION)
        header["epoch"] = base
        self._slab.write(0, header)
        self._record[:] = 0
        self._error = None
        group.allgather(None, op="reset done", timeout_s=timeout_s)

    def _explain(self) -> EpError:
        own = self._slab.group.rank
        settled_at = time.monotonic() + _SETTLE_S
        while True:
            reports = [
                Report.of(rank, self._record if rank == own else self._read_record(rank))
                for rank in range(self._slab.group.size)
            ]
            if None not in reports or time.monotonic() > settled_at:
                return verdict(reports, rank=own, timeout_s=self._timeout_s)
            time.sleep(0.002)

    def _read_record(self, rank: int) -> NDArray[Any]:
        try:
            return self._slab.read(rank, field_offset(SLAB_HEADER, "hang"), HANG_RECORD)
        except (ClosedError, DeviceError):
            return np.zeros(1, HANG_RECORD)
