"""Blocks of bytes between all ranks through NVSHMEM, checked: whether the network works, and how fast."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import BackendError, ConfigError, PeerTimeoutError, TopologyError, on_all_ranks
from ..exchange import LATE
from . import kernels
from .hang import PinnedStruct, Report, timeout_ns, verdict
from .heap import Workspace
from .launch import Kernel, pack, stream_pointer
from .layout import HANG_RECORD, MAX_RANKS, align_up
from .memory import device_errors
from .nvshmem import Network

_PART_ALIGN_BYTES = 256
_MAX_BLOCK_BYTES = 1 << 26
# Words of the workspace: calls completed, whether one was not, threads that found wrong bytes.
_EPOCH, _FAILED, _NUM_WRONG, _NUM_WORDS = range(4)


class Ping:
    """Each `run` puts a block from every rank to every rank. Construction is collective.

    Args:
        network: over at most `MAX_RANKS` ranks. Its device is current.
        block_bytes: a multiple of 8.
        scope: who puts a block: one of `kernels.SCOPES`.
        timeout_s: deadline of each run, counted from the start of its kernel.

    Attributes:
        memory: the symmetric memory of the blocks.

    Raises:
        TopologyError, ConfigError: too many ranks; a size that is no multiple of 8, or too large.
        CompileError, BackendError: see `jit.cubin`.
        DeviceError: there is not enough symmetric memory.
    """

    def __init__(
        self, network: Network, *, block_bytes: int = 4096, scope: str = "warp", timeout_s: float = 10.0
    ) -> None:
        group = network.group
        if group.size > MAX_RANKS:
            raise on_all_ranks(TopologyError(f"{group.size} ranks; a ping serves {MAX_RANKS}"))
        if block_bytes % 8 or not 0 < block_bytes <= _MAX_BLOCK_BYTES:
            raise ConfigError(f"block_bytes={block_bytes} is no multiple of 8 up to {_MAX_BLOCK_BYTES}")
        self._group = group
        self._timeout_s = timeout_s
        spec = kernels.nvshmem_ping(scope)
        self.memory = network.allocate(self.num_bytes(group.size, block_bytes))
        self._hang = PinnedStruct(HANG_RECORD)
        self._words = Workspace(8 * _NUM_WORDS)
        signals_bytes, part_bytes = _parts(group.size, block_bytes)
        outbox = self.memory.pointer + signals_bytes
        args = pack(
            spec.args,
            hang=self._hang.pointer,
            outbox=outbox,
            inbox=outbox + part_bytes,
            signals=self.memory.pointer,
            epoch=self._words.pointer + 8 * _EPOCH,
            failed=self._words.pointer + 8 * _FAILED,
            num_wrong=self._words.pointer + 8 * _NUM_WRONG,
            timeout_ns=timeout_ns(timeout_s),
            rank=group.rank,
            num_ranks=group.size,
            block_bytes=block_bytes,
        )
        self._launch = Kernel(spec, network=network).bind(args, num_blocks=1)
        # No deadline of a run is to count the compilation on a peer.
        group.allgather(None, op="ping")

    @staticmethod
    def num_bytes(num_ranks: int, block_bytes: int) -> int:
        """The symmetric memory that it allocates."""
        signals_bytes, part_bytes = _parts(num_ranks, block_bytes)
        return signals_bytes + 2 * part_bytes

    def run(self, stream: Any) -> None:
        """Enqueue one. Every rank does, and as often. Host wait: none. Graph capture: allowed.

        Args:
            stream: an integer, or an object with ``__cuda_stream__``, on the network's device, which is
                current.
        """
        self._launch(stream_pointer(stream))

    def check(self, stream: Any) -> int:
        """Wait for the runs on `stream`, and see with all ranks how they went. Collective.

        Returns:
            How many runs were completed so far.

        Raises:
            PeerTimeoutError: naming the ranks whose blocks did not come, or that did not call this. No more
                runs can be enqueued, here or on its peers.
            BackendError: blocks came with other bytes than were sent.
        """
        words = self._read_words(stream_pointer(stream))
        report = Report.of(self._group.rank, self._hang.array)
        answers = self._group.allgather(
            (report, words), op="ping check", timeout_s=2 * self._timeout_s, skip_late=True
        )
        reports = [None if answer is LATE else answer[0] for answer in answers]
        if any(reports):
            raise verdict(reports, rank=self._group.rank, timeout_s=self._timeout_s)
        late = [rank for rank, answer in enumerate(answers) if answer is LATE]
        if late:
            raise PeerTimeoutError(rank=self._group.rank, peers=late, phase="ping check")
        wrong = [rank for rank, answer in enumerate(answers) if answer[1][_NUM_WRONG]]
        if wrong:
            raise on_all_ranks(BackendError(f"ping: ranks {wrong} received other bytes than were sent"))
        return words[_EPOCH]

    def _read_words(self, stream: int) -> tuple[int, ...]:
        from cupy.cuda import runtime

        words = np.zeros(_NUM_WORDS, np.uint64)
        with device_errors("ping"):
            runtime.memcpyAsync(
                words.ctypes.data, self._words.pointer, words.nbytes, runtime.memcpyDeviceToHost, stream
            )
            runtime.streamSynchronize(stream)
        return tuple(int(word) for word in words)


def _parts(num_ranks: int, block_bytes: int) -> tuple[int, int]:
    """Bytes of the signals, and of an outbox or inbox: two sets of blocks, see nvshmem_ping.cu."""
    signals_bytes = align_up(3 * MAX_RANKS * 8, _PART_ALIGN_BYTES)
    return signals_bytes, align_up(2 * num_ranks * block_bytes, _PART_ALIGN_BYTES)
