"""Processes of one host whose messages are files: no launcher ends them all when one of them dies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ep_rt.exchange import ByteArray, Message, PeerGroup, Pending, pickled, unpickled


class FileGroup(PeerGroup):
    """Without transfers of bytes, which buffers on GPUs do not need. A dead peer is only late.

    Args:
        directory: empty at first, the same for all ranks.
    """

    def __init__(self, directory: Path, rank: int, size: int, *, timeout_s: float = 60.0) -> None:
        super().__init__(rank, size, timeout_s)
        self._directory = directory
        self._num_sent = [0] * size
        self._num_taken = [0] * size

    def _path(self, src: int, dst: int, number: int) -> Path:
        return self._directory / f"{src} to {dst}, {number}"

    def _post(self, peers: Sequence[int], message: Message) -> None:
        data = pickled(message)
        for peer in peers:
            temporary = self._directory / f"temporary {self.rank}"
            temporary.write_bytes(data)
            temporary.replace(self._path(self.rank, peer, self._num_sent[peer]))
            self._num_sent[peer] += 1

    def _poll(self) -> None:
        for peer in range(self.size):
            while (path := self._path(peer, self.rank, self._num_taken[peer])).exists():
                self._num_taken[peer] += 1
                self._deliver(peer, unpickled(path.read_bytes()))

    def _start(self, number: int, send: Sequence[ByteArray], recv: Sequence[ByteArray]) -> Pending:
        raise NotImplementedError("files carry messages alone")

    def _idle(self, idle_rounds: int, limit_s: float) -> None:
        time.sleep(min(limit_s, 1e-3))
