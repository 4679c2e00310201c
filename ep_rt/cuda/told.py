"""What the host of an exact dispatch waits for: how many rows came, and how many for each expert."""

from __future__ import annotations

import os
import time
from typing import Final, NoReturn

import numpy as np

from .. import arrays
from ..arrays import ArrayView
from ..errors import ConfigError, DeviceError, on_all_ranks
from ..exchange import Group
from .domain import Domain
from .hang import PinnedStruct
from .inputs import Input, Inputs, itemsize
from .layout import DISPATCH_RESULT, ReceivedRow
from .pool import Lease

# A host that polls this often in a tight loop goes on more slowly: what it waits for takes long.
_EAGER_POLLS: Final = 4000
_LAZY_POLL_S: Final = 50e-6


class HostResult:
    """A `DISPATCH_RESULT` that kernels write and this rank's host polls.

    Args:
        group: the ranks of all nodes.

    Attributes:
        pointer: its address, an argument of the kernel.
    """

    def __init__(self, domain: Domain, inputs: Inputs, group: Group) -> None:
        self._domain = domain
        self._inputs = inputs
        self._group = group
        self._struct = PinnedStruct(DISPATCH_RESULT)
        self.pointer = self._struct.pointer
        self._abandoned: list[Lease] = []

    def close(self) -> None:
        """No kernel writes any more, and nobody waits."""
        self._struct.close()

    def reset(self) -> None:
        """The ranks reset together: nobody writes to what was given up."""
        self._abandoned.clear()

    def wait(
        self,
        number: int,
        row: ReceivedRow,
        lease: Lease,
        *,
        num_local_experts: int,
        counted: ArrayView | None,
    ) -> tuple[int, list[int]]:
        """Of call `number`: rows that come, and pairs for each expert here, once all ranks have counted.

        Args:
            row, lease: what lands, and where.
            counted: what the callers counted, [num_experts], where the kernel cannot: without expert ids.
                The hosts exchange it, and wait for the calls so far.

        Raises:
            ConfigError: on every rank of a node, if more goes to one than fits there.
            PeerTimeoutError, CollectiveMismatchError: the kernel gave up.
        """
        pool = self._domain.pool
        fields = self._struct.fields
        try:
            self._poll(number)
            # All ranks take part, those of a node where rows do not fit too: the others do not know of it.
            counts = fields.expert_counts if counted is None else self._exchanged(counted)
        except Exception:
            # Peers may still write there: kept until the ranks reset together, and no longer, although the
            # error holds `lease` for as long as its traceback is held.
            self._abandoned.append(pool.transfer(lease))
            raise
        if fields.overfull_ranks:
            # Later calls come after this kernel, which ends when nobody writes there any more.
            pool.transfer(lease)
            self._raise_overfull(fields.num_recv_tokens, row)
        first = 0 if counted is None else self._group.rank * num_local_experts
        return int(fields.num_recv_tokens), counts[first : first + num_local_experts]

    def _exchanged(self, view: ArrayView) -> list[int]:
        """What all ranks counted, added."""
        domain = self._domain
        copy = domain.heap.take(itemsize(view) * view.shape[0])
        self._inputs.copy(Input.of(view), view.pointer, copy.pointer, domain.comm.pointer)
        counts = np.zeros(view.shape, arrays.np_dtype(view.dtype))
        domain.fetch(copy.pointer, counts)
        everyone = self._group.allgather(counts, op="dispatch counts", timeout_s=domain.timeout_s)
        total: list[int] = np.sum(everyone, axis=0).tolist()
        return total

    def _poll(self, number: int) -> None:
        domain, word = self._domain, self._struct.word
        # The kernel has a deadline of its own, from its start; what was enqueued before it comes on top.
        limit_s = 2 * domain.timeout_s + 10.0
        deadline = time.monotonic() + limit_s
        polls = 0
        while word.value != number:
            polls += 1
            if polls < _EAGER_POLLS:
                os.sched_yield()
            else:
                time.sleep(_LAZY_POLL_S)
            if polls % 64 == 0:
                domain.watch.check()
            if polls % 1024 == 0 and domain.turns.are_done() and word.value != number:
                domain.watch.check()
                raise DeviceError("dispatch left without a result")
            if polls % 1024 == 0 and time.monotonic() > deadline:
                raise DeviceError(
                    f"dispatch has no result after {limit_s:g} s: work enqueued before it is still running"
                )

    def _raise_overfull(self, num_recv_tokens: int, row: ReceivedRow) -> NoReturn:
        domain = self._domain
        available = domain.pool.num_bytes
        needed = available - domain.pool.largest_free() + row.num_bytes(num_recv_tokens)
        if domain.group is not self._group:
            # Nothing is exchanged: the ranks of other nodes do not know of it, and would be out of step.
            raise ConfigError(
                f"dispatch does not fit: num_nvl_bytes is {available} and must be at least {needed}, with "
                f"the arrays held now (rank {self._group.rank} receives {num_recv_tokens} tokens)"
                if needed > available
                else "dispatch does not fit on another rank of this node, which says how much would"
            )
        answers = domain.group.allgather(
            (needed, available, num_recv_tokens), op="dispatch sizes", timeout_s=domain.timeout_s
        )
        listing = "; ".join(
            f"rank {rank} receives {tokens} tokens and needs {needed} bytes"
            for rank, (needed, available, tokens) in enumerate(answers)
            if needed > available
        )
        most = max(needed for needed, _, _ in answers)
        raise on_all_ranks(
            ConfigError(
                f"dispatch does not fit: num_nvl_bytes is {available} and must be at least {most}, with the "
                f"arrays held now ({listing})"
            )
        )
