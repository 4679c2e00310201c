"""When a kernel gave up: what the ranks saw, who is to blame, and how they start again together.

A rank that gives up is late for its peers, so what one rank saw is not enough to name anyone. Every rank's
record also lies in its slab, where its peers can read it without its help; they are put together here.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    ClosedError,
    CollectiveMismatchError,
    ConfigError,
    DeviceError,
    EpError,
    PeerTimeoutError,
    on_all_ranks,
)
from ..exchange import Group
from .launch import fields_type
from .layout import (
    HANG_RECORD,
    SLAB_HEADER,
    Operation,
    Reason,
    Struct,
    field_offset,
    operation_name,
    signal_epoch,
    signal_operation,
    signal_word,
)
from .leftovers import give_pinned_back, take_pinned
from .memory import Slab

# A rank that gave up told its peers, and their kernels leave within microseconds of hearing it.
_SETTLE_S: Final = 0.1
_HOST_ALLOC_PORTABLE_MAPPED: Final = 1 | 2

# About 30 years: the kernels add it in nanoseconds to a 64-bit clock.
MAX_TIMEOUT_S: Final = 1e9

NETWORK_PHASES: Final = (0, 9)
"""Of calls over several nodes, before and after all phases within a node. Twin of internode_exchange.cu."""

LOW_LATENCY_OPERATIONS: Final = (Operation.LOW_LATENCY_DISPATCH, Operation.LOW_LATENCY_COMBINE)


def timeout_ns(timeout_s: float) -> int:
    """What kernels take as their deadline.

    Raises:
        ConfigError: not positive, or too long for their clock.
    """
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise ConfigError(f"timeout_s={timeout_s} must be positive and at most {MAX_TIMEOUT_S:g}")
    return int(timeout_s * 1e9)


class PinnedStruct:
    """A zeroed struct in host memory that kernels write and this rank's host polls.

    Attributes:
        pointer: valid on every device; with unified addressing the same for host and device.
        array: the struct [1].
        fields: the same, as attributes, which NumPy is slow at.
        word: its first eight bytes, for polling.
    """

    def __init__(self, struct: Struct) -> None:
        self._memory = take_pinned(struct.itemsize, _HOST_ALLOC_PORTABLE_MAPPED)
        self.pointer: int = self._memory.ptr
        buffer = (ctypes.c_uint8 * struct.itemsize).from_address(self.pointer)
        self.array: NDArray[Any] = np.frombuffer(memoryview(buffer), struct)
        self.array[:] = 0
        self.fields = fields_type(struct).from_address(self.pointer)
        self.word = ctypes.c_uint64.from_address(self.pointer)

    def close(self) -> None:
        """Nobody uses it any more."""
        give_pinned_back(self.array.nbytes, self._memory)


@dataclass(frozen=True, slots=True)
class Farewell:
    """What a rank tells those of other nodes when it gives up. Twin of ``farewell_word``.

    Attributes:
        missing: bits of the nodes, or ranks, over which it did.
        call: the last bits of the number of the call.
    """

    missing: int
    reason: int
    operation: int
    call: int

    @classmethod
    def of(cls, word: int) -> Farewell:
        return cls(word >> 32, word & 0xF, word >> 4 & 0xFFFF, word >> 20 & 0xFFF)

    def is_other_call(self, word: int) -> bool:
        """Whether it was in another operation where this rank was in that of a signal word."""
        return self.call == signal_epoch(word) & 0xFFF and self.operation != signal_operation(word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one rank saw when it gave up. Twin of a `HANG_RECORD` that holds something.

    Attributes:
        waits: (expected, seen) signal words by peer, of the peers that had not arrived, whose arguments
            differ, or who sent too much.
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

    def with_farewells(self, farewells: Sequence[int], *, own: int) -> Report:
        """Of a wait over the network, knowing which ranks of other nodes gave up, why, and over whom.

        Those that waited are not to blame, but whom they waited for; and where arguments differ, all are to
        say so. They are told by other nodes, later than this rank gave up; so this is for hosts, that look
        again.

        Args:
            farewells: by peer as `waits`, that is by node or by rank, see `Farewell`.
            own: this rank, or its node.
        """
        waits = dict(self.waits)
        for peer, (expected, seen) in self.waits.items():
            is_elsewhere = signal_epoch(seen) >= signal_epoch(expected) and not _gave_up(seen)
            if is_elsewhere or not farewells[peer]:
                continue
            farewell = Farewell.of(farewells[peer])
            if farewell.is_other_call(expected):
                waits[peer] = expected, signal_word(signal_epoch(expected), farewell.operation)
                continue
            waits[peer] = expected, signal_word(self.epoch, Operation.GAVE_UP)
            over = [other for other in range(len(farewells)) if farewell.missing >> other & 1]
            absent = expected, signal_word(self.epoch - 1, Operation.NO_OPERATION)
            if farewell.reason in (Reason.DISAGREED, Reason.OVERFULL):
                if farewell.reason == Reason.DISAGREED and own in over:
                    over = [peer]  # this rank and that peer differ from each other
                return replace(self, reason=farewell.reason, waits=dict.fromkeys(over, absent))
            for other in over:
                if not farewells[other] and other != own:
                    waits.setdefault(other, absent)
        return replace(self, waits=waits)


@dataclass(frozen=True, slots=True)
class Names:
    """What the ranks of a node are called among those of all nodes.

    Attributes:
        local: the ranks of this node.
        num_ranks: of all nodes.
    """

    local: tuple[int, ...]
    num_ranks: int

    @property
    def node(self) -> int:
        """That of these ranks."""
        return self.local[0] // len(self.local)

    def informed(self, report: Report, farewells: Callable[[int], Sequence[int]], *, rank: int) -> Report:
        """A report of this node with what `rank` has heard from other nodes.

        All ranks hear of a low-latency call that another one gives up. Of other calls each hears from the
        ranks of its own local index, which its peers here did not wait for.

        Args:
            farewells: see `HangWatch`.
        """
        is_low_latency = report.operation in LOW_LATENCY_OPERATIONS
        is_own = report.rank == rank and report.phase in NETWORK_PHASES
        if len(self.local) == self.num_ranks or not (is_low_latency or is_own):
            return report
        own = self.local[report.rank] if is_low_latency else self.node
        return report.with_farewells(farewells(report.operation), own=own)

    def of(self, report: Report) -> Report:
        """The same report in these names.

        Low-latency calls wait for ranks of all nodes, other steps over the network for nodes, and all else
        for ranks of this node.
        """
        names = self.local
        if report.operation in LOW_LATENCY_OPERATIONS:
            names = tuple(range(self.num_ranks))
        elif report.phase in NETWORK_PHASES:
            names = tuple(range(report.rank, self.num_ranks, len(self.local)))
        waits = {names[peer]: wait for peer, wait in report.waits.items()}
        return replace(report, rank=self.local[report.rank], waits=waits)


def verdict(
    reports: Sequence[Report | None],
    *,
    rank: int,
    timeout_s: float,
    num_ranks: int | None = None,
    ranks_per_node: int | None = None,
) -> EpError:
    """The error that this rank raises, given every rank's report (None: has not given up, or cannot be read).

    The earliest wait decides, by epoch and phase: later ones are its consequences. At that epoch, ranks in
    different operations are a `CollectiveMismatchError`, and different arguments a `ConfigError`. Else those
    are late that a rank whose own deadline passed had not heard from; ranks that gave up themselves are named
    only when nobody else is left. The error's `seen` and `expected` count the calls of the slab.

    A rank that gave up among its own blocks waited for no peer: a `DeviceError` naming it, and its peers that
    find it late say the same.

    Args:
        num_ranks: if there are more than `reports`.
        ranks_per_node: if there are several nodes.
    """
    num_ranks = num_ranks or len(reports)
    known = [report for report in reports if report is not None]
    stuck = [report.rank for report in known if report.operation == Operation.EXPAND]
    if stuck:
        return DeviceError(
            f"{operation_name(Operation.EXPAND)}: the blocks of rank {', '.join(map(str, stuck))} did not "
            f"all run within {timeout_s:g} s: other work held their multiprocessors"
        )
    epoch, phase = min((report.epoch, report.phase) for report in known)
    operations = _operations_at(epoch, known)
    if len(set(operations.values())) > 1:
        return CollectiveMismatchError(
            [operation_name(operations[peer]) if peer in operations else None for peer in range(num_ranks)]
        )
    senders = {peer for report in known if report.reason == Reason.OVERFULL for peer in report.waits}
    if senders:
        return on_all_ranks(
            ConfigError(
                f"rank {', '.join(map(str, sorted(senders)))} sends more than "
                "num_max_dispatch_tokens_per_rank rows to one expert, which takes an expert that is repeated "
                "in a row of topk_idx"
            )
        )
    if any(report.epoch == epoch and report.reason == Reason.DISAGREED for report in known):
        return _disagreement(
            [report for report in known if report.epoch == epoch and report.reason == Reason.DISAGREED],
            num_ranks=num_ranks,
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
        nodes=[peer // ranks_per_node for peer in peers] if ranks_per_node else (),
    )


def _disagreement(reports: Sequence[Report], *, num_ranks: int) -> EpError:
    """Of ranks that saw arguments other than their own; they waited for exactly those peers."""
    alike = {tuple(peer for peer in range(num_ranks) if peer not in report.waits) for report in reports}
    # A rank that heard of it before it had compared left no such report: what others say of it must do.
    differing = tuple(sorted({peer for report in reports for peer in report.waits}))
    if len(alike) == 1:
        alike.add(differing)
    listing = "; ".join(", ".join(map(str, ranks)) for ranks in sorted(alike) if ranks)
    facts = _COMPARED.get(
        reports[0].operation,
        "dtype, hidden, scale factors, columns of topk_idx, topk_weights, num_experts, num_worst_tokens, "
        "num_max_tokens_per_rank or handle",
    )
    return on_all_ranks(
        ConfigError(
            f"{operation_name(reports[0].operation)} (call {reports[0].epoch}): ranks differ in {facts}. "
            f"Ranks that agree among each other: {listing}"
        )
    )


_COMPARED: Final[Mapping[int, str]] = {
    Operation.LOW_LATENCY_DISPATCH: "use_fp8, round_scale, use_ue8m0, topk_weights or earlier calls",
    Operation.LOW_LATENCY_COMBINE: "use_logfmt, use_fp8, reduce, topk_weights or earlier calls",
}


def _operations_at(epoch: int, reports: Sequence[Report]) -> dict[int, int]:
    """Which operation each rank was in at `epoch`, where that is known."""
    operations = {report.rank: report.operation for report in reports if report.epoch == epoch}
    for report in reports:
        for peer, (_, seen) in report.waits.items():
            # A rank that is said to have completed this call may have left it without an answer: nothing is
            # known of which one it was.
            is_named = signal_operation(seen) != Operation.NO_OPERATION and not _gave_up(seen)
            if signal_epoch(seen) == epoch and is_named:
                operations.setdefault(peer, signal_operation(seen))
    return operations


def _gave_up(word: int) -> bool:
    return signal_operation(word) == Operation.GAVE_UP


class HangWatch:
    """Notices when a kernel of this rank gave up, and says why.

    Args:
        slab: every kernel that is watched works on it.
        timeout_s: the kernels' deadline, for the message.
        names: of the slab's ranks; default their numbers.

    Attributes:
        record_pointer: a `HANG_RECORD` in pinned memory; an argument of every kernel.
        word: its first, not 0 once a kernel of this rank gave up; until `close`.
        farewells: over several nodes, of calls of an `Operation` whether peers gave up, see `Report`.
    """

    def __init__(self, slab: Slab, *, timeout_s: float, names: Names | None = None) -> None:
        self._slab = slab
        self._names = names or Names(tuple(range(slab.group.size)), slab.group.size)
        self._timeout_s = timeout_s
        self._pinned = PinnedStruct(HANG_RECORD)
        self._record = self._pinned.array
        self.word = self._pinned.word
        self.record_pointer = self._pinned.pointer
        self._error: EpError | None = None
        self.farewells: Callable[[int], Sequence[int]] | None = None

    def check(self) -> None:
        """Raise if a kernel of this rank gave up since the last `reset`. Local; a memory read otherwise.

        Does not wait: a kernel still running has not given up yet.

        Raises:
            PeerTimeoutError: naming the ranks that were really late.
            CollectiveMismatchError: ranks were in different operations.
            ConfigError: their arguments, which must agree, do not.
        """
        if self.word.value:
            if self._error is None:
                self._error = self._explain()
            raise self._error

    def reset(
        self,
        group: Group | None = None,
        *,
        timeout_s: float | None = None,
        meanwhile: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Let the ranks start again after an error. Collective; waits for this rank's device.

        Args:
            group: of the ranks whose calls go on together; default those of the slab.
            meanwhile: called while no rank has any work.

        Raises:
            PeerTimeoutError, PeerFailedError: a peer did not come; build the slab anew over the others.
        """
        import cupy

        group = group or self._slab.group
        with cupy.cuda.Device(self._slab.device):
            cupy.cuda.runtime.deviceSynchronize()
        header = self._slab.read(self._slab.group.rank, 0, SLAB_HEADER)
        epochs = group.allgather(int(header["epoch"][0]), op="reset", timeout_s=timeout_s)
        # Every device is idle now. Above every word stored so far: calls in flight had max(epochs) + 1.
        base = max(epochs) + 2
        header[:] = 0
        header["signals"] = signal_word(base, Operation.NO_OPERATION)
        header["epoch"] = header["block_epochs"] = base
        self._slab.write(0, header)
        self._record[:] = 0
        self._error = None
        for step in meanwhile:
            step()
        group.allgather(None, op="reset done", timeout_s=timeout_s)

    def close(self) -> None:
        """No kernel is watched any more, and nobody asks."""
        self._pinned.close()

    def _explain(self) -> EpError:
        own = self._slab.group.rank
        settled_at = time.monotonic() + _SETTLE_S
        while True:
            reports = [
                Report.of(rank, self._record if rank == own else self._read_record(rank))
                for rank in range(self._slab.group.size)
            ]
            if None not in reports or time.monotonic() > settled_at:
                names = self._names
                for peer, report in enumerate(reports):
                    if report is not None and self.farewells is not None:
                        reports[peer] = names.informed(report, self.farewells, rank=own)
                return verdict(
                    [None if report is None else names.of(report) for report in reports],
                    rank=names.local[own],
                    timeout_s=self._timeout_s,
                    num_ranks=names.num_ranks,
                    ranks_per_node=len(names.local) if len(names.local) < names.num_ranks else None,
                )
            time.sleep(0.002)

    def _read_record(self, rank: int) -> NDArray[Any]:
        try:
            return self._slab.read(rank, field_offset(SLAB_HEADER, "hang"), HANG_RECORD)
        except (ClosedError, DeviceError):
            return np.zeros(1, HANG_RECORD)
