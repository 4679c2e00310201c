"""The ranks of one NVLink domain, and the collective calls that are enqueued on all of them.

Every call arranges that its results are compared with the oracle's once everything has run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from ep_rt import reference
from ep_rt.cuda.digest import along
from ep_rt.cuda.handle import RESULT_OFFSET, SEND_PLAN_OFFSET, SEND_ROW_OFFSET, routing_bytes
from ep_rt.cuda.layout import (
    DISPATCH_RESULT,
    EXCHANGE,
    EXCHANGE_OFFSET,
    HANG_RECORD,
    MAX_LOCAL_RANKS,
    OFFSET_UNIT,
    PAYLOAD_OFFSET,
    SLAB_HEADER,
    WORKSPACE,
    Operation,
    ReceivedRow,
    signal_word,
)
from ep_rt.cuda.plan import scratch_bytes

from .kernels import Kernels, bound, host_reads
from .machine import TIMEOUT_NS, Array, Conditions, EmulatedKernel, Machine, Memory
from .runtime import Kind

MAX_STAGERS: Final = 2  # blocks of a combine, besides those that sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """What a dispatch leaves for a combine or a repeated dispatch, of all ranks."""

    call: int
    num_tokens: list[int]
    num_topk: int
    num_rows: list[int]
    routing: list[Memory]
    expected: list[reference.Dispatched]


@dataclass(frozen=True, slots=True)
class Landed:
    """Where a rank's received rows lie."""

    base: int
    capacity: int
    row: ReceivedRow


def _stamped(epoch: int, value: int) -> int:
    """Twin of `stamped` in layout.cuh."""
    return (epoch << 32 | value) & 0xFFFFFFFFFFFFFFFF


class Ranks:
    """The ranks of one NVLink domain, with a slab each, their workspaces and a stream each.

    Args:
        num_blocks: of the collective kernels.
        epoch: calls that the slabs have completed before.
        num_places: of a slab: results and inputs of calls take them in turn.
        place_bytes: size of each.
        is_failing: calls will be given up. Then nobody looks at results, which peers may still write to, and
            nothing is copied into the slabs.
    """

    def __init__(
        self,
        num_ranks: int,
        load: Kernels,
        specs: Sequence[EmulatedKernel],
        *,
        num_blocks: int = 2,
        epoch: int = 0,
        num_places: int = 2,
        place_bytes: int = 16 << 10,
        timeout_ns: int = TIMEOUT_NS,
        conditions: Conditions | None = None,
        is_failing: bool = False,
    ) -> None:
        self.is_failing = is_failing
        self.num_ranks, self.num_blocks, self.load = num_ranks, num_blocks, load
        self.num_places, self.place_bytes = num_places, place_bytes
        self.timeout_ns = timeout_ns
        self.num_calls = 0
        self.machine = Machine(
            num_ranks,
            specs,
            [
                *((rank, num_blocks + MAX_STAGERS) for rank in range(num_ranks)),
                *((rank, 1) for rank in range(num_ranks)),  # of the hosts
            ],
            conditions=replace(conditions or Conditions(), timeout_ns=timeout_ns),
        )
        ranks = range(num_ranks)
        slab_bytes = PAYLOAD_OFFSET + num_places * place_bytes
        self.slabs = [self.machine.allocate(r, slab_bytes, "slab", Kind.SLAB) for r in ranks]
        self.hangs = [self.machine.allocate(r, HANG_RECORD.itemsize, "hang record") for r in ranks]
        self.workspaces = [self.machine.allocate(r, WORKSPACE.itemsize, "workspace") for r in ranks]
        for slab in self.slabs:
            header = slab.array(SLAB_HEADER, (1,))
            header["epoch"] = epoch
            header["signals"] = signal_word(epoch, Operation.NO_OPERATION)
            self._leave_words(slab, epoch)
        for workspace in self.workspaces:
            workspace.array(WORKSPACE, (1,))["block_counts"] = _stamped(epoch, 7)
        self.epoch = epoch

    @staticmethod
    def _leave_words(slab: Memory, epoch: int) -> None:
        """What the last two calls would have left in every word that carries its epoch."""
        exchange = slab.array(EXCHANGE, (1,), offset=EXCHANGE_OFFSET)
        for parity in range(2):
            last = epoch - (epoch - parity) % 2
            if last <= 0:
                continue
            for part in ("dispatch", "combine"):
                for name in exchange.dtype[part].base.names or ():
                    exchange[part][name][0, parity] = _stamped(last, 7)
            exchange["expert_counts"][0, parity] = _stamped(last, 7)
        exchange["arrivals"] = signal_word(epoch, Operation.BARRIER)

    def common(self, rank: int) -> dict[str, Any]:
        """Fields of every collective call."""
        return {
            "hang": self.hangs[rank].address,
            "workspace": self.workspaces[rank].address,
            "timeout_ns": self.timeout_ns,
            "rank": rank,
            "num_ranks": self.num_ranks,
            "slabs": [slab.address for slab in self.slabs],
        }

    def header(self, rank: int) -> Array:
        return self.slabs[rank].array(SLAB_HEADER, (1,))

    def check(self, check: Callable[[], str | None]) -> None:
        """Of the results, after a run in which all ranks live."""
        if self.is_failing:
            return
        self.machine.checks.append(check)

    def check_epoch(self) -> None:
        """Every rank has completed everything that was enqueued, and no rank gave up."""
        wanted = self.epoch

        def check() -> str | None:
            for rank in range(self.num_ranks):
                header = self.header(rank)
                if header["failed"][0] or self.hangs[rank].array(HANG_RECORD, (1,))["reason"][0]:
                    return f"rank {rank} gave up"
                if header["epoch"][0] != wanted:
                    return f"rank {rank} is at epoch {header['epoch'][0]}, not {wanted}"
            return None

        self.check(check)

    def _same(
        self, name: str, rank: int, memory: Memory, expected: Array, where: Array | None = None
    ) -> None:
        wanted = np.ascontiguousarray(expected)
        here = memory.array(np.uint8, (wanted.nbytes,))
        raw = wanted.reshape(-1).view(np.uint8)
        rows = np.arange(len(wanted)) if where is None else np.flatnonzero(where)

        def check() -> str | None:
            if np.array_equal(here, raw):
                return None
            differs = (here != raw).reshape(*wanted.shape, wanted.itemsize).any(axis=-1)
            found = np.argwhere(differs[rows])
            if not len(found):
                return None
            got = here.view(wanted.dtype).reshape(wanted.shape)
            at = int(rows[found[0][0]]), *(int(i) for i in found[0][1:])
            return f"{name} of rank {rank}: {at} is {got[at]!r}, expected {wanted[at]!r}"

        self.check(check)

    def compare(
        self, name: str, rank: int, address: int, expected: Array | None, *, where: Array | None = None
    ) -> None:
        """Copy a result away behind what is enqueued, and compare it bit by bit in the end.

        Args:
            where: rows that count; default all.
        """
        if expected is None or expected.nbytes == 0 or self.is_failing:
            return
        memory = self.machine.allocate(rank, expected.nbytes, f"copy of {name}")
        self.machine.copy(rank, memory.address, address, expected.nbytes)
        self._same(name, rank, memory, expected, where)

    # Calls.

    def barrier(self, *, only: Collection[int] | None = None) -> None:
        """On all ranks, or on some, which is then a mistake of the program."""
        for rank in range(self.num_ranks) if only is None else only:
            kernel = self.load.barrier(self.num_ranks)
            args = bound(kernel, {"operation": Operation.BARRIER}, self.common(rank))
            self.machine.launch(rank, kernel, args, 1)
        self.epoch += 1

    def place(self, rank: int, number: int, *, before_end: int | None = None) -> tuple[int, int]:
        """Address of a place of the slab, or so much before its end, and as words tell it to the peers."""
        offset = PAYLOAD_OFFSET + number % self.num_places * self.place_bytes
        if before_end is not None:
            offset += self.place_bytes - before_end
        return self.slabs[rank].address + offset, offset // OFFSET_UNIT

    def dispatch(
        self,
        x: Sequence[Array],
        expected: list[reference.Dispatched],
        *,
        ids: Sequence[Array] | None,
        weights: Sequence[Array] | None = None,
        sf: Sequence[Array] | None = None,
        num_experts: int = 0,
        num_worst_tokens: int = 0,
        quantizes: bool = False,
        handle: Handle | None = None,
        in_rank: Sequence[Array] | None = None,
        places: Sequence[int],
        max_redundant_tokens: int = 512,
        only: Collection[int] | None = None,
        digests: Sequence[int] | None = None,
    ) -> tuple[Handle, list[Landed]]:
        """One dispatch; `expected` is what the oracle says of it.

        Args:
            places: of the slab, by rank.
            in_rank: for a dispatch without ids.
            only: ranks that take part, if not all: a mistake of the program.
            digests: of the ranks' arguments, where they differ.
        """
        kernel = self.load.dispatch(quantizes=quantizes)
        self.num_calls += 1
        self.epoch += 1
        rows, landed = [], []
        routing = handle.routing if handle is not None else []
        for rank in range(self.num_ranks):
            wanted = expected[rank]
            num_tokens = len(x[rank])
            num_topk = 0 if ids is None else ids[rank].shape[1]
            row = ReceivedRow(
                idx_bytes=0 if ids is None else num_topk * ids[rank].itemsize,
                weights_bytes=0 if weights is None else 4 * num_topk,
                sf_bytes=0 if wanted.recv_sf is None else wanted.recv_sf.itemsize * wanted.recv_sf.shape[1],
                row_bytes=wanted.recv_x.itemsize * wanted.recv_x.shape[1],
            )
            is_exact = handle is None and num_worst_tokens == 0
            room = row.capacity(self.place_bytes) if is_exact else len(wanted.recv_x)
            num_bytes = row.layout(room).end
            assert num_bytes <= self.place_bytes, "the case does not fit into a place of the slab"
            if handle is None:
                routing.append(self.machine.allocate(rank, routing_bytes(num_tokens), "routing"))
            scratch = self.machine.allocate(rank, scratch_bytes(num_tokens), "scratch")
            told = self.machine.allocate(rank, DISPATCH_RESULT.itemsize, "result") if is_exact else None
            # At the end of the place, so that a row too many lies beyond it.
            base, offset = self.place(rank, places[rank], before_end=num_bytes)
            if num_worst_tokens and handle is None:
                rows.append(num_worst_tokens)
            else:
                rows.append(len(wanted.recv_x))
            args = bound(
                kernel,
                {
                    "x": self._input(rank, x[rank], "x"),
                    "sf": self._input(rank, None if sf is None else sf[rank], "sf"),
                    "topk_idx": self._input(rank, None if ids is None else ids[rank], "topk_idx"),
                    "topk_weights": self._input(
                        rank, None if weights is None else weights[rank], "topk_weights"
                    ),
                    "is_token_in_rank": self._input(
                        rank, None if in_rank is None else in_rank[rank], "in_rank"
                    ),
                    "result": told.address if told else routing[rank].address + RESULT_OFFSET,
                    "send_row": routing[rank].address + SEND_ROW_OFFSET,
                    "send_plan": routing[rank].address + SEND_PLAN_OFFSET,
                    "masks": scratch.address + 4 * MAX_LOCAL_RANKS * num_tokens,
                    "send_token": scratch.address,
                    "call": self.num_calls,
                    "digest": along(digests[rank] if digests else 77, 0 if handle is None else handle.call),
                    "recv_offset": offset,
                    "recv_capacity": room,
                    "num_tokens": num_tokens,
                    "num_topk": num_topk,
                    "num_experts": num_experts,
                    "row_bytes": row.row_bytes,
                    "sf_row_bytes": row.sf_bytes,
                    "idx_bytes": 0 if ids is None else ids[rank].itemsize,
                    "is_cached": handle is not None,
                    "fill_rows": num_worst_tokens if handle is None else 0,
                    "max_redundant_tokens": max_redundant_tokens,
                },
                self.common(rank),
            )
            if only is None or rank in only:
                self.machine.launch(rank, kernel, args, self.num_blocks)
            landed.append(Landed(base, room, row))
            self._compare_received(rank, landed[-1], wanted, ids=ids, weights=weights)
            if told is not None:
                self._compare_told(rank, self._read_by_host(rank, told), 0, expected, ids)
            elif handle is None:
                self._compare_told(rank, routing[rank], RESULT_OFFSET, expected, ids)
        if handle is not None:
            return handle, landed
        made = Handle(
            call=self.num_calls,
            num_tokens=[len(each) for each in x],
            num_topk=0 if ids is None else ids[0].shape[1],
            num_rows=rows,
            routing=routing,
            expected=expected,
        )
        return made, landed

    def _input(self, rank: int, array: Array | None, name: str) -> int:
        """Of an input without elements nothing is read, but its address is not 0."""
        if array is not None and array.nbytes == 0:
            return self.slabs[rank].address + PAYLOAD_OFFSET
        return self.machine.put(rank, array, name)

    def _compare_received(
        self,
        rank: int,
        landed: Landed,
        expected: reference.Dispatched,
        *,
        ids: Sequence[Array] | None,
        weights: Sequence[Array] | None,
    ) -> None:
        at = landed.row.layout(landed.capacity)
        kept = min(expected.num_recv_tokens, len(expected.recv_x), landed.capacity)
        self.compare("recv_x", rank, landed.base + at.x, expected.recv_x[:kept])
        if expected.recv_sf is not None:
            self.compare("recv_sf", rank, landed.base + at.sf, expected.recv_sf[:kept])
        if ids is not None:
            # A worst-case result is filled up behind what came.
            got = expected.recv_topk_idx[: landed.capacity].astype(ids[rank].dtype)
            self.compare("recv_topk_idx", rank, landed.base, got)
        if weights is not None and expected.recv_topk_weights is not None:
            got = expected.recv_topk_weights[: landed.capacity]
            self.compare("recv_topk_weights", rank, landed.base + at.topk_weights, got)

    def _read_by_host(self, rank: int, told: Memory) -> Memory:
        """A copy by the rank's host, made as soon as it may, while kernels run."""
        kernel = self.load(host_reads())
        copy = self.machine.allocate(rank, DISPATCH_RESULT.itemsize, "result as the host read it")
        fields = {
            "result": told.address,
            "copy": copy.address,
            "call": self.num_calls,
            "timeout_ns": self.timeout_ns,
        }
        self.machine.launch(self.num_ranks + rank, kernel, bound(kernel, fields), 1)
        return copy

    def _compare_told(
        self,
        rank: int,
        memory: Memory,
        offset: int,
        expected: list[reference.Dispatched],
        ids: Sequence[Array] | None,
    ) -> None:
        """What the host, or the handle, is told."""
        told = memory.array(DISPATCH_RESULT, (1,), offset=offset)
        wanted = expected[rank]
        kept = wanted.src_rank[wanted.src_rank >= 0]
        counts = [int((kept == src).sum()) for src in range(self.num_ranks)]
        number = self.num_calls

        def check() -> str | None:
            seen = told[0]
            experts = wanted.num_recv_tokens_per_expert
            facts: dict[str, tuple[object, object]] = {
                "num_recv_tokens": (int(seen["num_recv_tokens"]), wanted.num_recv_tokens),
            }
            if offset == 0:  # a repeated dispatch stores its own number with the handle's result
                facts["call"] = int(seen["call"]), number
            if not wanted.overflow:
                facts["recv_counts"] = (seen["recv_counts"][: self.num_ranks].tolist(), counts)
            if ids is not None:
                facts["expert_counts"] = (seen["expert_counts"][: len(experts)].tolist(), experts)
            for name, (got, right) in facts.items():
                if got != right:
                    return f"{name} of rank {rank} is {got}, expected {right}"
            return None

        self.check(check)

    def combine(
        self,
        y: Sequence[Array],
        handle: Handle,
        *,
        weights: Sequence[Array] | None = None,
        biases: Sequence[Sequence[Array]] = (),
        places: Sequence[int],
        num_stagers: int = 0,
        is_in_slab: bool = True,
        is_there: bool = False,
    ) -> None:
        """One combine of the rows of a dispatch.

        Args:
            biases: at most two for each rank, in the order of addition.
            num_stagers: blocks that copy `y` into the slab, if it lies outside; they come on top. 0: some of
                those that sum.
            is_there: an earlier kernel has made `y` at its place in the slab.
        """
        element = y[0].dtype.name
        kernel = self.load.combine(element)
        self.num_calls += 1
        self.epoch += 1
        expected = reference.combine(
            list(y),
            handle.expected,
            num_tokens=handle.num_tokens,
            topk_weights=None if weights is None else list(weights),
            bias=None if not biases else [tuple(each) for each in biases],  # type: ignore[misc]
        )
        for rank in range(self.num_ranks):
            base, offset = self.place(rank, places[rank])
            num_tokens = handle.num_tokens[rank]
            row_bytes = y[rank].itemsize * y[rank].shape[1]
            weights_at = -(-y[rank].nbytes // OFFSET_UNIT) * OFFSET_UNIT
            given = self.machine.put(rank, y[rank], "y") if y[rank].nbytes and not is_there else 0
            stages = not is_in_slab and given != 0
            if not stages and given and not self.is_failing:
                self.machine.copy(rank, base, given, y[rank].nbytes)
            if weights is not None and weights[rank].nbytes and not self.is_failing:
                values = self.machine.put(rank, weights[rank], "weights")
                self.machine.copy(rank, base + weights_at, values, weights[rank].nbytes)
            num_topk = 0 if weights is None else weights[rank].shape[1]
            out = self.machine.allocate(rank, num_tokens * row_bytes, "combined x")
            out_weights = self.machine.allocate(rank, 4 * num_tokens * num_topk, "combined weights")
            args = bound(
                kernel,
                {
                    "send_row": handle.routing[rank].address + SEND_ROW_OFFSET,
                    "send_plan": handle.routing[rank].address + SEND_PLAN_OFFSET,
                    "y": given if stages else 0,
                    "bias": [self._input(rank, each, "bias") for each in biases[rank]] if biases else [],
                    "out": out.address,
                    "out_weights": out_weights.address,
                    "digest": along(78, handle.call),
                    "y_offset": offset,
                    "weights_offset": offset + weights_at // OFFSET_UNIT,
                    "num_tokens": num_tokens,
                    "num_rows": len(y[rank]),
                    "row_bytes": row_bytes,
                    "num_topk": num_topk,
                    "num_pullers": self.num_blocks,
                    "num_stagers": (num_stagers or max(1, self.num_blocks // 2)) if stages else 0,
                },
                self.common(rank),
            )
            self.machine.launch(rank, kernel, args, self.num_blocks + (num_stagers if stages else 0))
            self._same("combined x", rank, out, expected[rank].x)
            if weights is not None:
                summed = expected[rank].topk_weights
                assert summed is not None
                self._same("combined weights", rank, out_weights, summed)
