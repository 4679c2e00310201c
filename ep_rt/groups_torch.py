"""Ranks of a torch process group as an ep_rt group."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from .config import DEFAULT_TIMEOUT_S
from .errors import PeerFailedError
from .exchange import ByteArray, Message, PeerGroup, Pending, pickled, unpickled

_log = logging.getLogger("ep_rt")


class TorchGroup(PeerGroup):
    """Ranks of a torch process group.

    Messages go through the group's key-value store, which can be asked without blocking; bytes go
    through gloo, over a companion group if the given one has no CPU backend.
    """

    def __init__(self, process_group: Any, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_process_group_store

        super().__init__(process_group.rank(), process_group.size(), timeout_s)
        self._ranks = dist.get_process_group_ranks(process_group)
        store = _get_process_group_store(process_group)
        # Groups over one process group are made in the same order on every rank.
        number = store.add(f"ep_rt/groups/{self.rank}", 1)
        self._store = dist.PrefixStore(f"ep_rt/{number}", store)
        self._store_host = self._ranks.index(0) if 0 in self._ranks else 0
        self._posted = [0] * self.size
        self._received = [0] * self.size
        if "gloo" not in dist.get_backend_config(process_group):
            process_group = dist.new_group(self._ranks, backend="gloo", use_local_synchronization=True)
        self._gloo = process_group
        atexit.register(_leave, weakref.ref(self))

    def _post(self, peers: Sequence[int], message: Message) -> None:
        data = pickled(message)
        with self._lost_store_is_silence():
            for peer in peers:
                self._store.set(f"{self.rank}/{peer}/{self._posted[peer]}", data)
                self._posted[peer] += 1

    def _poll(self) -> None:
        with self._lost_store_is_silence():
            for peer in range(self.size):
                while peer != self.rank:
                    key = f"{peer}/{self.rank}/{self._received[peer]}"
                    if not self._store.check([key]):
                        break
                    self._deliver(peer, unpickled(self._store.get(key)))
                    self._store.delete_key(key)
                    self._received[peer] += 1

    @contextlib.contextmanager
    def _lost_store_is_silence(self) -> Iterator[None]:
        """The store lives in a process, mostly that of the first rank: if it died, no peer can be heard."""
        import torch.distributed as dist

        try:
            yield
        except dist.DistError as error:
            failure = PeerFailedError(
                rank=self.rank,
                peer=self._store_host,
                reason=f"the key-value store of the process group: {error}",
            )
            for peer in range(self.size):
                self._left.setdefault(peer, failure)

    def _start(self, number: int, send: Sequence[ByteArray], recv: Sequence[ByteArray]) -> Pending:
        return _TorchTransfer(self._gloo, self._ranks, self.rank, number, send, recv)

    def _idle(self, idle_rounds: int, limit_s: float) -> None:
        time.sleep(min(limit_s, 5e-3, 1e-4 * (1 + idle_rounds)))


def _leave(group: weakref.ref[TorchGroup]) -> None:
    """At exit: if an exception ends the program, tell the peers."""
    this, error = group(), getattr(sys, "last_value", None)
    if this is not None and error is not None:
        this.abort(error)


class _TorchTransfer:
    def __init__(
        self,
        gloo: Any,
        ranks: Sequence[int],
        rank: int,
        tag: int,
        send: Sequence[ByteArray],
        recv: Sequence[ByteArray],
    ) -> None:
        import torch
        import torch.distributed as dist

        def tensor(array: ByteArray) -> Any:
            with warnings.catch_warnings():  # a read-only array is only sent
                warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
                return torch.from_numpy(array)

        # None: gloo knew already that the peer is gone, so this never completes.
        self._recv = {
            src: _unless_gone(dist.irecv, tensor(array), src=ranks[src], group=gloo, tag=tag)
            for src, array in enumerate(recv)
            if array.size and src != rank
        }
        self.sources = frozenset(self._recv)
        self._send = {
            dst: _unless_gone(dist.isend, tensor(array), dst=ranks[dst], group=gloo, tag=tag)
            for dst, array in enumerate(send)
            if array.size and dst != rank
        }
        self._arrays = (send, recv)

    # gloo has no test that makes progress, and a wait that expires breaks all its connections: each wait
    # lasts until the deadline, and the short ones after it only ask what has arrived already.

    def missing(self, deadline: float) -> list[int]:
        _wait_each(self._recv, deadline)
        return list(self._recv)

    def unsent(self, deadline: float | None) -> list[int]:
        if deadline is None:
            self._send = {
                dst: work for dst, work in self._send.items() if work is None or not work.is_completed()
            }
        else:
            _wait_each(self._send, deadline)
        return list(self._send)


def _unless_gone(start: Callable[..., Any], tensor: Any, **where: Any) -> Any:
    try:
        return start(tensor, **where)
    except RuntimeError as error:
        _log.debug("gloo starts no transfer: %s", error)
        return None


def _wait_each(works: dict[int, Any], deadline: float) -> None:
    for peer in [peer for peer, work in works.items() if work is not None]:
        with contextlib.suppress(RuntimeError):
            remaining_s = min(deadline - time.monotonic(), 1e6)  # timedelta refuses math.inf
            works[peer].wait(timedelta(seconds=max(1e-3, remaining_s)))
            del works[peer]
