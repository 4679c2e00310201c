"""The exception tree.

Every error of the package is an `EpError`; the builtin a caller would expect is a second parent,
and the facts are attributes. An error that every rank of a group raises together carries
``is_collective = True``: after it the ranks are still in step and the group stays usable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar


class EpError(Exception):
    """Base of everything ep_rt raises on purpose."""

    is_collective: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between ranks; the default would call __init__ without its keywords.
        return _restored, (type(self), self.args, self.__dict__)


_E = TypeVar("_E", bound=EpError)


def _restored(kind: type[_E], args: tuple[Any, ...], facts: dict[str, Any]) -> _E:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


def on_all_ranks(error: _E) -> _E:
    """Mark an error that every rank raises at this point; to be raised by the caller."""
    error.is_collective = True
    return error


class ConfigError(EpError, ValueError):
    """A value, or a combination of values, that cannot work; also values that differ between ranks."""


class ArrayError(EpError, TypeError):
    """An array of the wrong shape, dtype, layout or device, or with ids out of range."""


class TopologyError(EpError, ValueError):
    """Ranks are spread over nodes in a way the requested mode cannot serve."""


class HandleError(EpError, ValueError):
    """A handle that does not belong to this buffer or to these arrays."""


class ClosedError(EpError, RuntimeError):
    """The buffer was closed."""


class BackendError(EpError, RuntimeError):
    """The requested backend is not available here; the message says what is missing."""


class CompileError(EpError, RuntimeError):
    """NVRTC refused a kernel. `log` is the compiler's output."""

    def __init__(self, kernel: str, *, source: str, options: Sequence[str], log: str) -> None:
        super().__init__(f"compiling {kernel} failed\noptions: {' '.join(options)}\n{log}")
        self.kernel = kernel
        self.source = source
        self.options = tuple(options)
        self.log = log


class DeviceError(EpError, RuntimeError):
    """A CUDA call failed, or the device cannot run what was asked of it."""


class CollectiveMismatchError(EpError, RuntimeError):
    """Ranks called different operations. `operations` says what each rank called."""

    def __init__(self, operations: Sequence[str | None]) -> None:
        calls: dict[str, list[int]] = {}
        for rank, operation in enumerate(operations):
            if operation is not None:
                calls.setdefault(operation, []).append(rank)
        listing = "; ".join(f"{operation} on {_ranks(ranks)}" for operation, ranks in calls.items())
        super().__init__(f"ranks called different operations: {listing}")
        self.operations = tuple(operations)


class PeerTimeoutError(EpError, TimeoutError):
    """Peers did not arrive in time.

    Attributes:
        rank: the rank that raises.
        peer: the first late rank; `peers` has all that are known to be late, this one perhaps among them.
        nodes: of the `peers`, where a call on GPUs was over several nodes; else empty.
        phase: what was being waited for.
        seen, expected: the progress word, where the wait was on one.
    """

    def __init__(
        self,
        *,
        rank: int,
        peers: Sequence[int],
        phase: str,
        timeout_s: float | None = None,
        reported_by: int | None = None,
        seen: int | None = None,
        expected: int | None = None,
        nodes: Sequence[int] = (),
    ) -> None:
        late = _ranks([f"{peer} (node {nodes[i]})" if nodes else peer for i, peer in enumerate(peers)])
        limit = "" if timeout_s is None else f" within {timeout_s:g} s"
        relay = "" if reported_by is None else f" (reported by rank {reported_by})"
        word = "" if expected is None else f"; saw {seen}, expected {expected}"
        super().__init__(f"rank {rank}: {late} did not arrive in {phase}{limit}{relay}{word}")
        self.rank = rank
        self.peers = tuple(peers)
        self.peer = peers[0]
        self.nodes = tuple(nodes)
        self.phase = phase
        self.timeout_s = timeout_s
        self.seen = seen
        self.expected = expected


class PeerFailedError(EpError, RuntimeError):
    """A peer left the group with an exception of its own. `peer` names it, `reason` is what it said."""

    def __init__(self, *, rank: int, peer: int, reason: str) -> None:
        super().__init__(f"rank {rank}: rank {peer} left: {reason}")
        self.rank = rank
        self.peer = peer
        self.reason = reason


def _ranks(ranks: Sequence[object]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
