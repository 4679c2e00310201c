"""Who the peers are: ranks of an MPI communicator, threads of this process, or a torch process group."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from .config import DEFAULT_TIMEOUT_S
from .errors import BackendError, ConfigError, PeerFailedError
from .exchange import LATE, ByteArray, Group, Message, PeerGroup, Pending, Transfer, pickled, unpickled

__all__ = ["LATE", "ByteArray", "Group", "Transfer", "as_group", "run_local"]

T = TypeVar("T")

_log = logging.getLogger("ep_rt")
_GRACE_S = 5.0
_END = "the end of its program"

# Set by the launchers of MPICH and its relatives, of Open MPI, and of PMIx in general.
_MPI_LAUNCH_VARIABLES = ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK")


def as_group(peers: object = None) -> Group:
    """The `Group` behind anything that names peers.

    Args:
        peers: a `Group`; an mpi4py communicator; a torch `ProcessGroup`; or None, which means
            ``MPI.COMM_WORLD`` in a program started by an MPI launcher and one rank otherwise.

    Raises:
        ConfigError: `peers` is none of these.
        BackendError: an MPI launcher started this program, and mpi4py is not there.
        PeerTimeoutError: names the ranks of a new communicator that did not call.

    Collective over a communicator seen for the first time; all ranks in the same order of calls.
    """
    if peers is None:
        if "mpi4py.MPI" in sys.modules or any(name in os.environ for name in _MPI_LAUNCH_VARIABLES):
            return _mpi_group(None)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _log.warning(
                "one rank, although WORLD_SIZE=%s: under torchrun pass group=torch.distributed.group.WORLD",
                os.environ["WORLD_SIZE"],
            )
        return thread_groups(1)[0]
    # Asked of the modules that are loaded: what is not loaded has made no object.
    mpi, torch = sys.modules.get("mpi4py.MPI"), sys.modules.get("torch.distributed")
    if mpi is not None and isinstance(peers, mpi.Comm):
        if isinstance(peers, mpi.Intracomm) and peers != mpi.COMM_NULL:
            return _mpi_group(peers)
    elif torch is not None and torch.is_available() and isinstance(peers, torch.ProcessGroup):
        from .groups_torch import TorchGroup

        return TorchGroup(peers)
    elif isinstance(peers, Group):
        return peers
    raise ConfigError(
        f"group={peers!r} names no peers; give an mpi4py communicator, a torch process group, "
        "an ep_rt Group, or None"
    )


# Threads of one process.


def run_local(
    fn: Callable[..., T], num_ranks: int, *args: object, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[T]:
    """Run ``fn(group, *args)`` once per rank, each rank a thread of this process.

    Args:
        fn: called with the rank's own `Group` and `args`, which all ranks share.
        timeout_s: default deadline of the groups' collectives.

    Returns:
        What each rank returned, in rank order.

    Raises:
        Exception: the first one that a rank raised. The other ranks are stopped at their next collective.
            A rank that does not reach one within 5 s is left behind as a daemon thread.
    """
    groups = thread_groups(num_ranks, timeout_s)
    results: list[Any] = [None] * num_ranks
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run(group: ThreadGroup) -> None:
        try:
            results[group.rank] = fn(group, *args)
            ended.put(None)
        except BaseException as error:
            # First here, then to the peers: the error that stops them is seen before what it causes.
            ended.put(error)
            group.abort(error)

    threads = [
        threading.Thread(target=run, args=(group,), name=f"ep_rt rank {group.rank}", daemon=True)
        for group in groups
    ]
    for thread in threads:
        thread.start()
    failure: BaseException | None = None
    try:
        for _ in threads:
            failure = ended.get()
            if failure is not None:
                break
    except BaseException as interrupt:
        failure = interrupt
        for group in groups:
            group.abort(interrupt)
    if failure is not None:
        grace_until = time.monotonic() + _GRACE_S
        for thread in threads:
            thread.join(timeout=max(0.0, grace_until - time.monotonic()))
        raise failure
    return results


def thread_groups(num_ranks: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ThreadGroup]:
    """One connected `Group` per rank, each for a thread of its own."""
    if num_ranks < 1:
        raise ConfigError(f"num_ranks={num_ranks} must be at least 1")
    mailboxes = [_Mailbox() for _ in range(num_ranks)]
    return [ThreadGroup(rank, mailboxes, timeout_s) for rank in range(num_ranks)]


class _Mailbox:
    """What arrived for one rank. Any thread puts, the owner takes."""

    def __init__(self) -> None:
        self.messages: deque[tuple[int, Message]] = deque()
        self.parcels: dict[tuple[int, int], _Parcel] = {}
        self.arrived = threading.Event()


@dataclass(slots=True)
class _Parcel:
    """Bytes offered to a peer, which copies them out of the sender's array."""

    array: ByteArray
    taken: bool = False


class ThreadGroup(PeerGroup):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, mailboxes: Sequence[_Mailbox], timeout_s: float) -> None:
        super().__init__(rank, len(mailboxes), timeout_s)
        self._mailboxes = mailboxes
        self._mine = mailboxes[rank]

    def _post(self, peers: Sequence[int], message: Message) -> None:
        for peer in peers:
            self._mailboxes[peer].messages.append((self.rank, message))
            self._mailboxes[peer].arrived.set()

    def _poll(self) -> None:
        # Cleared before looking: what arrives after the look sets it again and ends the next idle.
        self._mine.arrived.clear()
        while self._mine.messages:
            self._deliver(*self._mine.messages.popleft())

    def _start(self, number: int, send: Sequence[ByteArray], recv: Sequence[ByteArray]) -> Pending:
        return _ThreadTransfer(self.rank, number, self._mailboxes, send, recv)

    def _idle(self, idle_rounds: int, limit_s: float) -> None:
        self._mine.arrived.wait(min(limit_s, 60.0))  # no limit is math.inf, which it refuses


class _ThreadTransfer:
    def __init__(
        self,
        rank: int,
        number: int,
        mailboxes: Sequence[_Mailbox],
        send: Sequence[ByteArray],
        recv: Sequence[ByteArray],
    ) -> None:
        self._number = number
        self._mailboxes = mailboxes
        self._mine = mailboxes[rank]
        self._recv = {src: array for src, array in enumerate(recv) if array.size and src != rank}
        self.sources = frozenset(self._recv)
        self._sent = {dst: _Parcel(array) for dst, array in enumerate(send) if array.size and dst != rank}
        for dst, parcel in self._sent.items():
            mailboxes[dst].parcels[rank, number] = parcel
            mailboxes[dst].arrived.set()

    def missing(self, deadline: float) -> list[int]:
        for src in list(self._recv):
            parcel = self._mine.parcels.pop((src, self._number), None)
            if parcel is not None:
                array = self._recv.pop(src)
                if parcel.array.size != array.size:
                    raise ConfigError(f"rank {src} sent {parcel.array.size} bytes, not {array.size}")
                np.copyto(array, parcel.array)
                parcel.taken = True
                self._mailboxes[src].arrived.set()
        return list(self._recv)

    def unsent(self, deadline: float | None) -> list[int]:
        return [dst for dst, parcel in self._sent.items() if not parcel.taken]


# MPI.


def _mpi_group(communicator: Any) -> MpiGroup:
    try:
        mpi = _mpi()
    except ImportError as error:
        raise BackendError(
            "this program was started by an MPI launcher but mpi4py cannot be imported "
            f"({error}); install ep-rt[mpi]"
        ) from error
    communicator = mpi.COMM_WORLD if communicator is None else communicator
    # The group is kept with its communicator, so that every buffer over it counts the same rounds.
    group: MpiGroup | None = communicator.Get_attr(_mpi_key())
    if group is None:
        group = MpiGroup(communicator)
        communicator.Set_attr(_mpi_key(), group)
    return group


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI


@cache
def _mpi_key() -> int:
    key: int = _mpi().Comm.Create_keyval()
    return key


class MpiGroup(PeerGroup):
    """Ranks of an MPI communicator, over a duplicate of it. Only non-blocking calls are made.

    A call that fails because its peer died counts as silence of that peer: the deadline names it.
    """

    _TAG_MESSAGE = 32767  # the largest that MPI guarantees
    _NUM_TRANSFER_TAGS = 16384

    def __init__(self, communicator: Any, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(communicator.Get_rank(), communicator.Get_size(), timeout_s)
        self._comm = communicator
        self._sending: list[tuple[_Request, bytes]] = []
        self._incoming: list[tuple[int, _Request, bytearray]] = []
        self._transfers: list[_MpiTransfer] = []
        # MPI's own collectives cannot say who is missing: meet first.
        self.allgather(None, op="as_group")
        duplicate, request = communicator.Idup()
        # A rank that has no peers waits too: with Open MPI the duplicate cannot be used before.
        everyone = [peer for peer in range(self.size) if peer != self.rank] or [self.rank]
        self._wait(lambda deadline: [] if request.Test() else everyone, "as_group", None, False)
        duplicate.Set_errhandler(_mpi().ERRORS_RETURN)
        self._comm = duplicate
        atexit.register(self._leave)

    def _post(self, peers: Sequence[int], message: Message) -> None:
        data = pickled(message)
        for peer in peers:
            request = _Request(self._comm.Isend, data, dest=peer, tag=self._TAG_MESSAGE)
            self._sending.append((request, data))

    def _poll(self) -> None:
        mpi = _mpi()
        self._sending = [sending for sending in self._sending if not sending[0].done()]
        status = mpi.Status()
        with contextlib.suppress(mpi.Exception):
            while (found := self._comm.Improbe(tag=self._TAG_MESSAGE, status=status)) is not None:
                data = bytearray(status.Get_count(mpi.BYTE))
                self._incoming.append((status.Get_source(), _Request(found.Irecv, data), data))
        # In order for each source, but a message that its source cannot complete stops no other source.
        incomplete: list[tuple[int, _Request, bytearray]] = []
        for source, request, data in self._incoming:
            if any(source == earlier[0] for earlier in incomplete) or not request.done():
                incomplete.append((source, request, data))
            else:
                self._deliver(source, unpickled(data))
        self._incoming = incomplete

    def _start(self, number: int, send: Sequence[ByteArray], recv: Sequence[ByteArray]) -> Pending:
        # The tag tells transfers apart while several are in flight.
        tag = 1 + number % self._NUM_TRANSFER_TAGS
        transfer = _MpiTransfer(self._comm, tag, self.rank, send, recv)
        # Kept until it is complete, also if the caller drops it: MPI reads and writes its arrays.
        self._transfers = [*(earlier for earlier in self._transfers if not earlier.complete), transfer]
        return transfer

    def _idle(self, idle_rounds: int, limit_s: float) -> None:
        # Ranks may outnumber cores. time.sleep(0) would take 50 us, a bare spin the rest of a time slice.
        if idle_rounds < 200:
            os.sched_yield()
        else:
            time.sleep(min(limit_s, 1e-3, 5e-7 * idle_rounds))

    def _leave(self) -> None:
        """At exit: tell the peers; if ranks are lost, limit MPI_Finalize, which would wait for them."""
        if _mpi().Is_finalized():
            return
        # The interpreter keeps the exception that ends the program, if there is one.
        error = getattr(sys, "last_value", None)
        self._poll()
        is_lossy = error is not None or self._broken is not None or any(map(_is_loss, self._left.values()))
        if error is not None:
            self.abort(error)
        elif self._broken is None:
            self._break(PeerFailedError(rank=self.rank, peer=self.rank, reason=_END))
        until = time.monotonic() + 0.5
        while self._sending and time.monotonic() < until:
            self._poll()
            time.sleep(1e-3)
        if is_lossy:
            # Nothing of Python runs any more when MPI_Finalize does: only the kernel can end it.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(1 if error is not None else 3)


def _is_loss(farewell: PeerFailedError | tuple[int, ...]) -> bool:
    return not (isinstance(farewell, PeerFailedError) and farewell.reason == _END)


class _Request:
    """An MPI request that never completes if MPI refuses to work with its peer."""

    def __init__(self, start: Callable[..., Any], *args: object, **kwargs: object) -> None:
        self._request: Any = None
        with contextlib.suppress(_mpi().Exception):
            self._request = start(*args, **kwargs)
        self._done = False

    def done(self) -> bool:
        """Whether it is complete. Never waits."""
        if not self._done and self._request is not None:
            mpi = _mpi()
            try:
                self._done = self._request.Test()
            except mpi.Exception as error:
                self._request = None
                if error.Get_error_class() == mpi.ERR_TRUNCATE:
                    raise ConfigError("a peer sent more bytes than were expected") from error
        return self._done


class _MpiTransfer:
    def __init__(
        self, comm: Any, tag: int, rank: int, send: Sequence[ByteArray], recv: Sequence[ByteArray]
    ) -> None:
        peers = [(rank + shift) % len(send) for shift in range(1, len(send))]
        self._recv = {p: _Request(comm.Irecv, recv[p], source=p, tag=tag) for p in peers if recv[p].size}
        self.sources = frozenset(self._recv)
        self._send = {p: _Request(comm.Isend, send[p], dest=p, tag=tag) for p in peers if send[p].size}

    def missing(self, deadline: float) -> list[int]:
        self.unsent(deadline)
        self._recv = {src: request for src, request in self._recv.items() if not request.done()}
        return list(self._recv)

    def unsent(self, deadline: float | None) -> list[int]:
        self._send = {dst: request for dst, request in self._send.items() if not request.done()}
        return list(self._send)

    @property
    def complete(self) -> bool:
        return not self.missing(0.0) and not self._send
