"""The ranks of an NVLink domain, or several: slabs and streams, and results that are compared in the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from ep_rt.cuda.layout import (
    EXCHANGE,
    EXCHANGE_OFFSET,
    HANG_RECORD,
    OFFSET_UNIT,
    PAYLOAD_OFFSET,
    SLAB_HEADER,
    WORKSPACE,
    Operation,
    signal_word,
)

from .kernels import Kernels, bound
from .machine import TIMEOUT_NS, Array, Conditions, EmulatedKernel, Machine, Memory
from .runtime import Kind

MAX_STAGERS: Final = 2  # blocks of a combine, besides those that sum


def stamped(epoch: int, value: int) -> int:
    """Twin of `stamped` in layout.cuh."""
    return (epoch << 32 | value) & 0xFFFFFFFFFFFFFFFF


class Ranks:
    """Ranks with a slab each, their workspaces and a stream each.

    Args:
        ranks_per_node: of one NVLink domain; default all. `barrier` and calls of the normal mode are those of
            each domain by itself.
        num_blocks: of the collective kernels.
        epoch: calls that the slabs have completed before.
        num_places: of a slab: results and inputs of calls take them in turn.
        place_bytes: size of each.
        max_grid: blocks of the largest kernel, if that is not of the normal mode.
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
        max_grid: int = 0,
        ranks_per_node: int = 0,
    ) -> None:
        self.ranks_per_node = ranks_per_node or num_ranks
        self.is_failing = is_failing
        self.dead: int | None = None  # that never comes, in programs that go on without it
        self.mistaken: int | None = None  # which errors must name
        self.farewells: Callable[[int], list[int]] | None = None  # see `HangWatch`, of calls over the network
        self.num_ranks, self.num_blocks, self.load = num_ranks, num_blocks, load
        self.num_places, self.place_bytes = num_places, place_bytes
        self.timeout_ns = timeout_ns
        self.num_calls = 0
        self.machine = Machine(
            num_ranks,
            specs,
            [
                *((rank, max(num_blocks + MAX_STAGERS, max_grid)) for rank in range(num_ranks)),
                *((rank, 1) for rank in range(num_ranks)),  # of the hosts
            ],
            ranks_per_node=self.ranks_per_node,
            conditions=replace(conditions or Conditions(), timeout_ns=timeout_ns),
        )
        ranks = range(num_ranks)
        slab_bytes = PAYLOAD_OFFSET + num_places * place_bytes
        self.slabs = [self.machine.allocate(r, slab_bytes, "slab", Kind.SLAB) for r in ranks]
        self.hangs = [self.machine.allocate(r, HANG_RECORD.itemsize, "hang record") for r in ranks]
        self.workspaces = [self.machine.allocate(r, WORKSPACE.itemsize, "workspace") for r in ranks]
        for slab in self.slabs:
            header = slab.array(SLAB_HEADER, (1,))
            header["epoch"] = header["block_epochs"] = epoch
            header["signals"] = signal_word(epoch, Operation.NO_OPERATION)
            self._leave_words(slab, epoch)
        for workspace in self.workspaces:
            workspace.array(WORKSPACE, (1,))["block_counts"] = stamped(epoch, 7)
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
                    exchange[part][name][0, parity] = stamped(last, 7)
            exchange["expert_counts"][0, parity] = stamped(last, 7)
            exchange["segment_counts"][0, parity] = stamped(last, 7)
        exchange["arrivals"] = signal_word(epoch, Operation.BARRIER)

    def common(self, rank: int) -> dict[str, Any]:
        """Fields of every collective call of a node."""
        first = rank // self.ranks_per_node * self.ranks_per_node
        return {
            "hang": self.hangs[rank].address,
            "workspace": self.workspaces[rank].address,
            "timeout_ns": self.timeout_ns,
            "rank": rank - first,
            "num_ranks": self.ranks_per_node,
            "slabs": [slab.address for slab in self.slabs[first : first + self.ranks_per_node]],
        }

    def low_latency_common(self, rank: int) -> dict[str, Any]:
        """Fields of every low-latency call, which all ranks make together."""
        common = self.common(rank)
        return {
            **common,
            "rank": rank,
            "num_ranks": self.num_ranks,
            "first_rank": rank - common["rank"],
            "num_local_ranks": common["num_ranks"],
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

    def expect(
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
        self.expect(name, rank, memory, expected, where)

    # Calls.

    def barrier(self, *, only: Collection[int] | None = None) -> None:
        """On all ranks, or on some, which is then a mistake of the program."""
        for rank in range(self.num_ranks) if only is None else only:
            kernel = self.load.barrier(self.ranks_per_node)
            args = bound(kernel, {"operation": Operation.BARRIER}, self.common(rank))
            self.machine.launch(rank, kernel, args, 1)
        self.epoch += 1

    def place(self, rank: int, number: int, *, before_end: int | None = None) -> tuple[int, int]:
        """Address of a place of the slab, or so much before its end, and as words tell it to the peers."""
        offset = PAYLOAD_OFFSET + number % self.num_places * self.place_bytes
        if before_end is not None:
            offset += self.place_bytes - before_end
        return self.slabs[rank].address + offset, offset // OFFSET_UNIT
