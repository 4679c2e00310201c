"""Collectives built from messages between pairs of ranks, with a deadline on every wait.

A library collective that blocks cannot say who is missing. Here every rank sends its message to every
peer and polls for theirs, so a rank that waits knows exactly which peers it has not heard from.

Protocol   the n-th collective of a group is round n on every rank; a message is (round, op, value).
           Messages of one pair arrive in order. An older round than the one waited for comes from a
           rank that was skipped and has caught up: it is dropped. A newer one says that the peer went
           on without this rank.
Leaving    a rank that gives up, or leaves with an exception, posts a farewell to all peers: either the
           failure it knows of, or the ranks it waited for. Who gives up listens for a moment to the
           farewells of the others and blames those that were waited for and said nothing: of a chain
           of ranks that wait for each other only the end is late.
Parting    a rank that has nothing more to do says so, in no round, and waits for others to say the same.
           Until then they may go on without it; after it the rounds and transfers of those that waited for
           each other are counted alike again. The n-th parting of a rank meets the n-th of the others, if
           it is for the same reason. Who would begin anew takes one back that not all others have met.
"""

from __future__ import annotations

import abc
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .config import DEFAULT_TIMEOUT_S
from .errors import (
    CollectiveMismatchError,
    ConfigError,
    EpError,
    PeerFailedError,
    PeerTimeoutError,
    on_all_ranks,
)

ByteArray = NDArray[np.uint8]
Message = tuple[int, str, Any]

_FAREWELL: Final = "farewell"
_PARTING: Final = "parting"
_WENT_ON: Final = "it went on to a later collective without this rank"


class _Late:
    def __repr__(self) -> str:
        return "LATE"


LATE: Final = _Late()
"""Stands for the value of a rank that did not arrive in a call with ``skip_late``."""


@runtime_checkable
class Group(Protocol):
    """What names the peers of a collective. All calls are collective unless they say otherwise."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def allgather(
        self,
        value: object,
        *,
        op: str = "allgather",
        timeout_s: float | None = None,
        ranks: Sequence[int] | None = None,
        skip_late: bool = False,
    ) -> list[Any]:
        """Every rank's `value` (any picklable object), in rank order.

        Args:
            value: not to be changed afterwards: ranks that are threads see this very object.
            op: what this rank is doing; ranks doing different things is an error on all of them.
            timeout_s: how long to wait; `math.inf` for as long as it takes. Default: the group's own.
            ranks: who takes part (this rank is always included); the others' entries are None. They
                call too, with `ranks` of their own, or are gone: every call counts as a round.
            skip_late: do not raise for peers that are late or gone; their entries are `LATE`.

        Raises:
            ConfigError: `ranks` names a rank that does not exist; on this rank, nothing was sent.
            CollectiveMismatchError: on every rank; the group stays usable.
            PeerTimeoutError: names the late ranks, at most 1 s after the deadline.
            PeerFailedError: names the rank that left, and why. After these two the group cannot be used
                any more: further calls raise the same error at once.
        """

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return once every rank has called. Raises as `allgather`."""

    def alltoallv(
        self,
        send: Sequence[ByteArray],
        recv: Sequence[ByteArray],
        *,
        op: str = "alltoallv",
        timeout_s: float | None = None,
    ) -> None:
        """Send ``send[d]`` to each rank d and fill ``recv[s]`` from each rank s.

        Args:
            send, recv: one contiguous 1-D uint8 array per rank; sizes may be zero.

        Raises:
            ConfigError: on every rank, if a sender's size is not what the receiver expects or a rank's
                arrays are not what they must be; the group stays usable.
            CollectiveMismatchError, PeerTimeoutError, PeerFailedError: as `allgather`.
        """

    def ialltoallv(self, send: Sequence[ByteArray], recv: Sequence[ByteArray]) -> Transfer:
        """The same in two phases; `Transfer` completes it. Sizes were agreed beforehand.

        Raises:
            ConfigError: on this rank, if its arrays are not what they must be; nothing was sent.
        """

    def abort(self, error: BaseException) -> None:
        """Tell the peers that this rank leaves because of `error`; they raise `PeerFailedError`. Local."""


@dataclass(frozen=True, slots=True)
class _Parting:
    """What a rank says when it parts: what it does, and how many rounds and transfers it has counted."""

    op: str
    round: int
    num_transfers: int


class Pending(Protocol):
    """Bytes on their way. A transport's half of a `Transfer`."""

    @property
    def sources(self) -> Set[int]:
        """The ranks that send something here."""

    def missing(self, deadline: float) -> list[int]:
        """Sources whose bytes have not all arrived. May wait until `deadline` (time.monotonic)."""

    def unsent(self, deadline: float | None) -> list[int]:
        """Destinations that may still read this rank's send arrays.

        May wait until `deadline`, with None not at all.
        """


class Transfer:
    """An all-to-all in flight. The arrays given to `Group.ialltoallv` belong to it until it is finished."""

    def __init__(self, group: PeerGroup, pending: Pending) -> None:
        self._group = group
        self._pending = pending
        self.waited_s: dict[int, float] = {}
        """How long `receive` waited for each source, in seconds."""
        self.is_received = False
        """Whether `receive` has returned."""

    def receive(self, *, timeout_s: float | None = None, skip_late: bool = False) -> tuple[int, ...]:
        """Wait for this rank's bytes. Local: peers need not be receiving.

        Returns:
            With `skip_late` the late ranks, whose arrays are incomplete; otherwise ().

        Raises:
            PeerTimeoutError, PeerFailedError: as `Group.allgather`.
        """
        began = time.monotonic()

        def missing(deadline: float) -> list[int]:
            late = self._pending.missing(deadline)
            for src in self._pending.sources - self.waited_s.keys() - set(late):
                self.waited_s[src] = time.monotonic() - began
            return late

        late = self._group._wait(missing, "all-to-all", timeout_s, skip_late)
        self.is_received = True
        return late

    def finish(self, *, timeout_s: float | None = None, skip_late: bool = False) -> tuple[int, ...]:
        """Wait until every peer has its bytes; then the send arrays may change. Raises as `receive`."""
        return self._group._wait(self._pending.unsent, "all-to-all (sending)", timeout_s, skip_late)

    @property
    def finished(self) -> bool:
        """Whether every peer has its bytes. Never waits."""
        return not self._pending.unsent(None)


def pickled(message: Message) -> bytes:
    """A message as bytes."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def unpickled(data: bytes | bytearray) -> Message:
    """The message behind `pickled`, from a peer of the same program."""
    message: Message = pickle.loads(data)
    return message


def _sizes(name: str, arrays: Sequence[ByteArray], num_ranks: int) -> list[int]:
    """Bytes for each rank. Raises ConfigError for anything but one contiguous byte array per rank."""
    if len(arrays) != num_ranks:
        raise ConfigError(f"{name} has {len(arrays)} arrays for {num_ranks} ranks")
    for peer, array in enumerate(arrays):
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ConfigError(f"{name}[{peer}] is not a contiguous 1-D uint8 array")
        if name == "recv" and not array.flags.writeable:
            raise ConfigError(f"recv[{peer}] is read-only")
    return [array.size for array in arrays]


class PeerGroup(abc.ABC):
    """A `Group` over any transport that moves messages between pairs without blocking."""

    def __init__(self, rank: int, size: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._rank = rank
        self._size = size
        self.timeout_s = timeout_s
        self._round = 0
        self._inbox: list[deque[Message]] = [deque() for _ in range(size)]
        # Farewells: why a peer failed, or which ranks it waited for when it gave up.
        self._left: dict[int, PeerFailedError | tuple[int, ...]] = {}
        self._num_transfers = 0
        # What this rank has not done as often is ahead.
        self._partings: list[list[_Parting]] = [[] for _ in range(size)]
        self._num_partings = 0
        self._broken: EpError | None = None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size})"

    # What a transport provides. None of these blocks.

    @abc.abstractmethod
    def _post(self, peers: Sequence[int], message: Message) -> None:
        """Send; messages of one pair keep their order. Raises before the first is sent, or not at all."""

    @abc.abstractmethod
    def _poll(self) -> None:
        """Hand what has arrived to `_deliver`."""

    @abc.abstractmethod
    def _start(self, number: int, send: Sequence[ByteArray], recv: Sequence[ByteArray]) -> Pending:
        """Start moving bytes; entries of this rank itself are not to be moved. `number` is that of peers."""

    @abc.abstractmethod
    def _idle(self, idle_rounds: int, limit_s: float) -> None:
        """Nothing arrived since `_poll`: give the core away, at most for `limit_s`."""

    # Collectives.

    def allgather(
        self,
        value: object,
        *,
        op: str = "allgather",
        timeout_s: float | None = None,
        ranks: Sequence[int] | None = None,
        skip_late: bool = False,
    ) -> list[Any]:
        self._check_usable()
        taking_part = set(range(self.size) if ranks is None else ranks)
        if not taking_part <= set(range(self.size)):
            raise ConfigError(f"ranks={list(taking_part)} are not all within 0..{self.size - 1}")
        peers = sorted(taking_part - {self.rank})
        this_round = self._round
        self._post([peer for peer in peers if peer not in self._left], (this_round, op, value))
        self._round += 1
        messages: dict[int, Message] = {}

        def missing(deadline: float) -> list[int]:
            for peer in set(peers).difference(messages):
                parting = self._parting_of(peer)
                # What it says in rounds from its parting on is no part of this one, which it left out.
                if parting is None or this_round < parting.round:
                    message = self._take(peer, this_round)
                    if message is not None:
                        messages[peer] = message
                        if message[0] > this_round and not skip_late:
                            raise self._break(PeerFailedError(rank=self.rank, peer=peer, reason=_WENT_ON))
                        continue
                if parting is not None:
                    messages[peer] = (this_round + 1 if skip_late else this_round, parting.op, None)
            return [peer for peer in peers if peer not in messages]

        late = self._wait(missing, op, timeout_s, skip_late)
        operations: list[str | None] = [None] * self.size
        values: list[Any] = [None] * self.size
        operations[self.rank], values[self.rank] = op, value
        for peer in late:
            values[peer] = LATE
        for peer, (their_round, their_op, their_value) in messages.items():
            if their_round == this_round:
                operations[peer], values[peer] = their_op, their_value
            else:
                values[peer] = LATE
        if any(name is not None and name != op for name in operations):
            raise on_all_ranks(CollectiveMismatchError(operations))
        return values

    def part(
        self, *, op: str = "part", timeout_s: float | None = None, ranks: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Say that this rank calls nothing more until the others have said so, and wait until they have.

        Ranks may come here from different rounds. To calls of others with `skip_late` this rank is late at
        once; without, `op` is what it does instead of their operation.

        Args:
            op: who parts for another reason has not said so.
            ranks: whom to wait for; all are told.

        Returns:
            Ranks that have not said so, in time if they were waited for.
        """
        others = [peer for peer in range(self.size) if peer != self.rank]
        peers = [peer for peer in others if ranks is None or peer in ranks]

        def absent(among: Sequence[int]) -> list[int]:
            return [peer for peer in among if (said := self._parting_of(peer)) is None or said.op != op]

        self._tell_parting(op)
        self._wait(lambda deadline: absent(peers), op, timeout_s, skip_late=True)
        missing = absent(others)
        self._part_like(set(peers).difference(missing))
        return tuple(missing)

    def rejoin(self, *, op: str, timeout_s: float | None = None) -> None:
        """Begin anew with all ranks, also those that others went on without. Collective.

        Raises:
            CollectiveMismatchError: a rank parts for another reason.
            PeerTimeoutError: names the ranks that did not call. All may call again later.
            PeerFailedError: a rank has left.
        """
        peers = [peer for peer in range(self.size) if peer != self.rank]

        def operations() -> list[str | None]:
            partings = map(self._parting_of, range(self.size))
            said = [None if parting is None else parting.op for parting in partings]
            said[self.rank] = op
            return said

        def missing(deadline: float) -> list[int]:
            if any(each is not None and each != op for each in operations()):
                return []
            return [peer for peer in peers if self._parting_of(peer) is None]

        told = self._tell_parting(op)
        self._wait(missing, op, timeout_s, skip_late=True)
        called = operations()
        if all(each == op for each in called):
            self._part_like(peers)
            return
        self._post(told, (-1, _PARTING, None))
        if any(each is not None and each != op for each in called):
            raise on_all_ranks(CollectiveMismatchError(called))
        absent = [peer for peer in peers if called[peer] is None]
        for peer in absent:
            failure = self._left.get(peer)
            if isinstance(failure, PeerFailedError):
                raise PeerFailedError(rank=self.rank, peer=failure.peer, reason=failure.reason)
        raise PeerTimeoutError(
            rank=self.rank,
            peers=absent,
            phase=op,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
        )

    def _tell_parting(self, op: str) -> list[int]:
        """Say that this rank parts; whom it has told."""
        self._check_usable()
        told = [peer for peer in range(self.size) if peer != self.rank and peer not in self._left]
        self._post(told, (-1, _PARTING, _Parting(op, self._round, self._num_transfers)))
        return told

    def _part_like(self, peers: Iterable[int]) -> None:
        """This rank has parted, and counts like those that it met."""
        met = [parting for peer in peers if (parting := self._parting_of(peer)) is not None]
        self._round = max([self._round, *(parting.round for parting in met)])
        self._num_transfers = max([self._num_transfers, *(parting.num_transfers for parting in met)])
        self._num_partings += 1

    def _parting_of(self, peer: int) -> _Parting | None:
        """What a peer said when it parted where this rank has not."""
        partings = self._partings[peer]
        return partings[self._num_partings] if len(partings) > self._num_partings else None

    def barrier(self, *, timeout_s: float | None = None) -> None:
        self.allgather(None, op="barrier", timeout_s=timeout_s)

    def alltoallv(
        self,
        send: Sequence[ByteArray],
        recv: Sequence[ByteArray],
        *,
        op: str = "alltoallv",
        timeout_s: float | None = None,
    ) -> None:
        mine: tuple[list[int], list[int]] | str
        try:
            mine = _sizes("send", send, self.size), _sizes("recv", recv, self.size)
        except ConfigError as error:
            mine = str(error)
        table = self.allgather(mine, op=op, timeout_s=timeout_s)
        for rank, entry in enumerate(table):
            if isinstance(entry, str):
                raise on_all_ranks(ConfigError(f"rank {rank}: {entry}"))
        for src, (sent, _) in enumerate(table):
            for dst, (_, expected) in enumerate(table):
                if sent[dst] != expected[src]:
                    raise on_all_ranks(
                        ConfigError(
                            f"rank {src} sends {sent[dst]} bytes to rank {dst}, which expects {expected[src]}"
                        )
                    )
        transfer = self.ialltoallv(send, recv)
        transfer.receive(timeout_s=timeout_s)
        transfer.finish(timeout_s=timeout_s)

    def ialltoallv(self, send: Sequence[ByteArray], recv: Sequence[ByteArray]) -> Transfer:
        self._check_usable()
        sent, expected = _sizes("send", send, self.size), _sizes("recv", recv, self.size)
        if sent[self.rank] != expected[self.rank]:
            raise ConfigError(
                f"rank {self.rank} sends itself {sent[self.rank]} bytes and expects {expected[self.rank]}"
            )
        recv[self.rank][:] = send[self.rank]
        self._num_transfers += 1
        return Transfer(self, self._start(self._num_transfers, send, recv))

    def abort(self, error: BaseException) -> None:
        if self._broken is None:
            reason = f"{type(error).__name__}: {error}"
            self._break(PeerFailedError(rank=self.rank, peer=self.rank, reason=reason), error)

    # Waiting.

    def _wait(
        self,
        missing: Callable[[float], list[int]],
        phase: str,
        timeout_s: float | None,
        skip_late: bool,
    ) -> tuple[int, ...]:
        """Poll until ``missing(deadline)`` is empty; else raise, or with `skip_late` return it."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        idle_rounds = 0
        before = -1
        while True:
            self._poll()
            late = missing(deadline)
            if not late:
                return ()
            gone = [peer for peer in late if peer in self._left]
            now = time.monotonic()
            if skip_late and (now >= deadline or len(gone) == len(late)):
                return tuple(late)
            if now >= deadline:
                raise self._give_up(late, phase, timeout_s)
            if gone and not skip_late:
                # Others gave up on this rank, and it has hardly waited itself: it is the late one.
                is_late = now < deadline - timeout_s / 2 and self.rank in self._waited_for(gone)
                raise self._give_up([self.rank] if is_late else gone, phase, timeout_s)
            idle_rounds = idle_rounds + 1 if len(late) == before else 0
            before = len(late)
            self._idle(idle_rounds, deadline - now)

    def _give_up(self, late: Sequence[int], phase: str, timeout_s: float) -> EpError:
        """Leave, because `late` did not arrive or have left themselves; the error says who is to blame."""
        if not any(isinstance(self._left.get(peer), PeerFailedError) for peer in late):
            self._post_farewell(tuple(late))
        listen_until = time.monotonic() + min(1.0, 0.1 + timeout_s / 4)
        while True:
            self._poll()
            for peer in late:
                failure = self._left.get(peer)
                if isinstance(failure, PeerFailedError):
                    relayed = PeerFailedError(rank=self.rank, peer=failure.peer, reason=failure.reason)
                    return self._break(relayed, failure.__cause__)
            accused = {*late, *self._waited_for(self._left)}
            # Who said what it waited for is not to blame, unless it says that it was late itself.
            cleared = {
                peer
                for peer, farewell in [*self._left.items(), (self.rank, late)]
                if not isinstance(farewell, PeerFailedError) and peer not in farewell
            }
            now = time.monotonic()
            if now >= listen_until or accused - cleared <= {self.rank}:
                break
            self._idle(0, listen_until - now)
        self._broken = PeerTimeoutError(
            rank=self.rank, peers=sorted(accused - cleared or late), phase=phase, timeout_s=timeout_s
        )
        return self._broken

    def _waited_for(self, leavers: Iterable[int]) -> set[int]:
        """The ranks that `leavers` waited for when they gave up."""
        farewells = [self._left[peer] for peer in leavers]
        return {peer for farewell in farewells if isinstance(farewell, tuple) for peer in farewell}

    def _take(self, peer: int, this_round: int) -> Message | None:
        """The peer's message of this round, if it is there, or a newer one, which stays in the inbox."""
        inbox = self._inbox[peer]
        while inbox and inbox[0][0] < this_round:
            inbox.popleft()
        if inbox and inbox[0][0] > this_round:
            return inbox[0]
        return inbox.popleft() if inbox else None

    def _deliver(self, peer: int, message: Message) -> None:
        """For transports: `message` arrived. What a peer sent before its farewell stays valid."""
        if message[1] == _FAREWELL:
            self._left[peer] = message[2]
            return
        if message[1] == _PARTING:
            if message[2] is None:  # taken back; whom it was not told to hears nothing
                self._partings[peer].pop()
            else:
                self._partings[peer].append(message[2])
            return
        # Nobody takes the messages of a peer that is left out of the rounds: keep none that are over.
        inbox = self._inbox[peer]
        inbox.append(message)
        while inbox and inbox[0][0] < self._round - 1:
            inbox.popleft()

    def _break(self, error: PeerFailedError, cause: BaseException | None = None) -> PeerFailedError:
        """Leave with `error`: the peers are told. To be raised by the caller."""
        error.__cause__ = cause
        self._broken = error
        self._post_farewell(error)
        return error

    def _post_farewell(self, content: PeerFailedError | tuple[int, ...]) -> None:
        self._post([peer for peer in range(self.size) if peer != self.rank], (-1, _FAREWELL, content))

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise self._broken
