"""NVSHMEM over the ranks of a `Group`: its start, symmetric memory, modules of kernels, and its end.

NVSHMEM has one state for a process: every rank is a process, and what is open at the same time shares it.
Calls of NVSHMEM that wait for other ranks have no deadline: before each the ranks meet in their group.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from ..config import DEFAULT_TIMEOUT_S
from ..errors import (
    BackendError,
    ClosedError,
    ConfigError,
    DeviceError,
    EpError,
    PeerFailedError,
    PeerTimeoutError,
    TopologyError,
    on_all_ranks,
)
from ..exchange import LATE, Group
from ..network_options import NetworkOptions, restore_environment, set_network_environment
from . import nvml, nvshmem_files, nvshmem_host
from .launch import make_context_current
from .memory import device_errors
from .nvshmem_host import HostLibrary

_LOG = logging.getLogger("ep_rt")
T = TypeVar("T")

Member = tuple[str, int, str]
"""A rank's host, process, and GPU."""


@dataclass(slots=True)
class _Started:
    """NVSHMEM as this process runs it.

    Attributes:
        members: of all ranks, in order.
        is_ours: it was started here, so it ends here.
        environment: what its start has changed in the environment, as it was before.
        modules: that were initialised, by their handles, which are held so that they stay loaded.
        num_users: open `Network`s.
    """

    library: HostLibrary
    members: tuple[Member, ...]
    is_ours: bool
    environment: Mapping[str, str | None] = field(default_factory=dict)
    modules: dict[int, object] = field(default_factory=dict)
    num_users: int = 0


@dataclass(slots=True)
class _Process:
    """The state of this process. `lost`: why NVSHMEM can be neither used nor ended any more."""

    started: _Started | None = None
    lost: str | None = None


_PROCESS: Final = _Process()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What a rank tells its peers before NVSHMEM starts.

    Attributes:
        num_bytes: of symmetric memory that it will ask for.
        started: members of the NVSHMEM that runs in its process, empty if started by somebody else; None
            if none runs.
        needs_transport: loads and stores of its GPU do not reach those of all ranks.
    """

    num_bytes: int
    version: tuple[int, ...] = ()
    started: tuple[Member, ...] | None = None
    needs_transport: bool = False
    error: str | None = None


class SymmetricMemory:
    """Memory at the same place of every rank's symmetric heap, zero at first.

    Attributes:
        pointer: this rank's part. Kernels that put give the same address, which stands for the peer's part.
    """

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.pointer = pointer
        self.num_bytes = num_bytes


class Network:
    """NVSHMEM for one user of it. Construction, `allocate` and `close` are collective.

    Args:
        group: every rank a process of its own, with a GPU of its own, which is current. Any kind of group.
        num_bytes: that will be allocated at most: the symmetric heap is made so large, unless
            ``NVSHMEM_SYMMETRIC_SIZE`` is set. What is opened while NVSHMEM runs shares its heap.
        options: settings of the network; they count for the first that opens.
        timeout_s: deadline of each exchange between the ranks, and of NVSHMEM's start.

    Attributes:
        device: the current device at construction.

    Raises:
        TopologyError: ranks share a process or a GPU, or NVSHMEM runs over other ranks.
        ConfigError: `num_bytes` differs between ranks.
        BackendError: NVSHMEM is missing somewhere, versions do not go together, or no transport reaches all
            ranks. All of these on every rank.
        PeerTimeoutError: ranks did not come.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_bytes: int,
        options: NetworkOptions | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        import cupy

        self.group = group
        self.device: int = cupy.cuda.runtime.getDevice()
        self._timeout_s = timeout_s
        self._num_bytes = num_bytes
        self._memory: list[SymmetricMemory] = []
        self._is_closed = False
        bus_id = cupy.cuda.runtime.deviceGetPCIBusId(self.device)
        member: Member = (platform.node(), os.getpid(), bus_id)
        members = tuple(group.allgather(member, op="network members", timeout_s=timeout_s))
        _check_members(members)
        make_context_current()
        library, facts = _library(num_bytes, needs_transport=_needs_transport(member, members))
        everyone: list[_Facts] = group.allgather(facts, op="network facts", timeout_s=timeout_s)
        _check_facts(everyone, members)
        assert library is not None
        if facts.started is None:
            environment = set_network_environment(
                options or NetworkOptions(),
                symmetric_bytes=num_bytes,
                needs_transport=any(each.needs_transport for each in everyone),
            )
            try:
                self._start(library)
            except EpError as error:
                _PROCESS.lost = f"its start failed: {error}"
                restore_environment(environment)
                raise
            _PROCESS.started = _Started(library, members, is_ours=True, environment=environment)
        elif not facts.started:
            self._adopt(library)
            _PROCESS.started = _Started(library, members, is_ours=False)
        assert _PROCESS.started is not None
        self._started = _PROCESS.started
        self._started.num_users += 1

    @property
    def library(self) -> str:
        """How NVSHMEM is called, and its version."""
        version = ".".join(map(str, self._started.library.version()))
        return f"NVSHMEM {version} through {self._started.library.name}"

    def allocate(self, num_bytes: int) -> SymmetricMemory:
        """Symmetric memory of the same size on every rank, zero on all of them when this returns.

        Raises:
            ConfigError: sizes differ, or it is more than the network was opened for. NVSHMEM, which ends the
                process when it has no room, is not asked then.
            DeviceError: there is not enough. All on every rank.
        """
        self._check_open()
        sizes = self._allgather(num_bytes, "network allocate")
        if len(set(sizes)) > 1:
            raise on_all_ranks(ConfigError(f"symmetric memory of different sizes: {_listed(sizes)}"))
        left = self._num_bytes - sum(memory.num_bytes for memory in self._memory)
        if num_bytes > left:
            raise on_all_ranks(
                ConfigError(
                    f"{num_bytes} bytes of symmetric memory are more than the {left} that are left of the "
                    f"{self._num_bytes} which the network was opened for"
                )
            )
        pointer = self._on_device(self._started.library.allocate, num_bytes)
        error = None
        if pointer:
            try:
                self._on_device(_clear, pointer, num_bytes)
            except DeviceError as failure:
                error = str(failure)
        else:
            error = f"{num_bytes} bytes are more than is left; set NVSHMEM_SYMMETRIC_SIZE to more"
        errors = self._allgather(error, "network memory")
        failed = next((rank for rank, text in enumerate(errors) if text is not None), None)
        if failed is not None:
            raise on_all_ranks(DeviceError(f"rank {failed}: allocating symmetric memory: {errors[failed]}"))
        memory = SymmetricMemory(pointer, num_bytes)
        self._memory.append(memory)
        return memory

    def free(self, memory: SymmetricMemory) -> None:
        """Give memory back. Collective, in the same order on all ranks; no kernel of any rank uses it."""
        self._check_open()
        self._memory.remove(memory)
        self._allgather(None, "network free")
        self._on_device(self._started.library.free, memory.pointer)

    def settle(self) -> None:
        """All that any rank has put has arrived. Collective; every rank is about to come."""
        self._check_open()
        self._on_device(self._started.library.barrier)

    def clear(self, memory: SymmetricMemory, num_bytes: int) -> None:
        """Zero the first bytes of this rank's part. Nobody puts there."""
        self._on_device(_clear, memory.pointer, num_bytes)

    def pointers(self, memory: SymmetricMemory) -> tuple[int, ...]:
        """Every rank's part of `memory`, as loads and stores of this one reach it; 0 where not. Local."""
        self._check_open()
        pointer_at = self._started.library.peer_pointer
        return tuple(pointer_at(memory.pointer, peer) for peer in range(self.group.size))

    def direct_peers(self, memory: SymmetricMemory) -> tuple[int, ...]:
        """The ranks whose part of `memory` loads and stores reach, this one included. Local."""
        return tuple(peer for peer, pointer in enumerate(self.pointers(memory)) if pointer)

    def adopt(self, module: Any) -> None:
        """Initialise a loaded module, once for all its users. Local; no kernel of this rank is running.

        Args:
            module: CuPy's, of the current device. It stays loaded until NVSHMEM has ended.
        """
        self._check_open()
        handle = int(module.ptr)
        if handle not in self._started.modules:
            self._on_device(self._started.library.initialise_module, handle)
            self._started.modules[handle] = module

    def close(self, absent: Sequence[int] = ()) -> None:
        """Give all memory back; the last one that closes ends NVSHMEM. Collective. May be called twice.

        Args:
            absent: ranks that will not come.

        When a peer does not come in time, or has failed, everything stays as it is until the process ends,
        since NVSHMEM would wait for it for ever: a warning is logged and nothing is raised.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._on_device(_synchronize)
        except DeviceError as error:
            _LOG.warning("device %d failed before its network was closed: %s", self.device, error)
        if absent:
            _lose(f"no word from ranks {list(absent)}")
            return
        try:
            confirmed = self.group.allgather(
                _PROCESS.lost, op="network close", timeout_s=self._timeout_s, skip_late=True
            )
        except (PeerTimeoutError, PeerFailedError) as failure:
            _lose(str(failure))
            return
        late = [rank for rank, value in enumerate(confirmed) if value is LATE]
        lost = [value for value in confirmed if isinstance(value, str)]
        if late or lost:
            _lose(f"no word from ranks {late}" if late else lost[0])
            return
        self._on_device(self._end)

    # Steps.

    def _end(self) -> None:
        """All ranks are here, and their devices are idle."""
        started = self._started
        started.num_users -= 1
        is_last = started.num_users == 0
        started.library.barrier()
        if is_last:
            for handle in started.modules:
                started.library.finalise_module(handle)
        for memory in self._memory:
            started.library.free(memory.pointer)
        self._memory.clear()
        if is_last:
            _PROCESS.started = None
            if started.is_ours:
                started.library.finish()
                restore_environment(started.environment)
            # Modules may be unloaded from here on.
            started.modules.clear()

    def _start(self, library: HostLibrary) -> None:
        rank, size = self.group.rank, self.group.size
        unique_id: bytes | EpError | None = None
        if rank == 0:
            unique_id = _attempt(library.unique_id)
        unique_id = self._allgather(unique_id, "network id")[0]
        if isinstance(unique_id, EpError):
            raise on_all_ranks(BackendError(f"rank 0: {unique_id}"))
        assert unique_id is not None
        content = unique_id
        outcome = _attempt(
            lambda: _within(
                self._timeout_s, lambda: self._on_device(library.start, content, rank, size), rank=rank
            )
        )
        # Twice the time: a rank whose start failed at once hears those that waited to the end.
        failures = self.group.allgather(
            str(outcome) if isinstance(outcome, EpError) else None,
            op="network start",
            timeout_s=2 * self._timeout_s,
        )
        failed = next((each for each, text in enumerate(failures) if text is not None), None)
        if failed is not None:
            raise on_all_ranks(
                BackendError(
                    f"rank {failed}: {failures[failed]}. Where ranks are on several hosts, or GPUs have "
                    "no P2P, a transport must reach them all: `python -m ep_rt doctor` shows links, cards "
                    "and settings, NVSHMEM_DEBUG=INFO what NVSHMEM tried"
                )
            )

    def _adopt(self, library: HostLibrary) -> None:
        mine = library.place()
        places = self._allgather(mine, "network place")
        if places != [(rank, self.group.size) for rank in range(self.group.size)]:
            raise on_all_ranks(
                TopologyError(f"NVSHMEM was started elsewhere, with other ranks than this group: {places}")
            )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the network is closed")
        if _PROCESS.lost is not None:
            raise BackendError(f"NVSHMEM cannot be used any more: {_PROCESS.lost}")

    def _allgather(self, value: object, op: str) -> list[Any]:
        return self.group.allgather(value, op=op, timeout_s=self._timeout_s)

    def _on_device(self, call: Callable[..., T], *args: Any) -> T:
        import cupy

        with cupy.cuda.Device(self.device):
            make_context_current()
            return call(*args)


def _needs_transport(mine: Member, members: Sequence[Member]) -> bool:
    """Whether some rank is on another host, or on a GPU that loads and stores of this one do not reach."""
    if any(host != mine[0] for host, _, _ in members):
        return True
    unreached = nvml.without_p2p(nvml.links(), nvml.address(mine[2]))
    return any(nvml.address(bus_id) in unreached for _, _, bus_id in members)


def _library(num_bytes: int, *, needs_transport: bool) -> tuple[HostLibrary | None, _Facts]:
    """Load NVSHMEM; what to tell the peers, errors included."""
    try:
        if _PROCESS.lost is not None:
            raise BackendError(f"NVSHMEM cannot be used any more in this process: {_PROCESS.lost}")
        if _PROCESS.started is not None:
            library = _PROCESS.started.library
            started: tuple[Member, ...] | None = _PROCESS.started.members
        else:
            library = nvshmem_host.load(nvshmem_files.find())
            started = () if library.is_started else None
        facts = _Facts(
            num_bytes=num_bytes,
            version=library.version(),
            started=started,
            needs_transport=needs_transport,
        )
        return library, facts
    except EpError as error:
        return None, _Facts(num_bytes=num_bytes, error=str(error))


def _check_members(members: Sequence[Member]) -> None:
    """Raise `TopologyError` on every rank if two are one process, or use one GPU."""
    places: dict[str, list[tuple[object, ...]]] = {
        "process, which NVSHMEM cannot serve: start one for each, for instance by mpirun": [
            (host, process) for host, process, _ in members
        ],
        "GPU, which NVSHMEM cannot serve: make one of its own current on each": [
            (host, gpu) for host, _, gpu in members
        ],
    }
    for what, shared in places.items():
        for rank, place in enumerate(shared):
            first = shared.index(place)
            if first != rank:
                raise on_all_ranks(TopologyError(f"ranks {first} and {rank} share a {what}"))


def _check_facts(everyone: Sequence[_Facts], members: tuple[Member, ...]) -> None:
    """Raise on every rank what keeps NVSHMEM from serving all of them."""
    for rank, facts in enumerate(everyone):
        if facts.error is not None:
            raise on_all_ranks(BackendError(f"rank {rank}: {facts.error}"))
    sizes = [facts.num_bytes for facts in everyone]
    if len(set(sizes)) > 1:
        raise on_all_ranks(ConfigError(f"symmetric heaps of different sizes: {_listed(sizes)}"))
    versions = [".".join(map(str, facts.version)) for facts in everyone]
    if len(set(versions)) > 1:
        raise on_all_ranks(BackendError(f"versions of NVSHMEM differ: {_listed(versions)}"))
    if len({facts.started for facts in everyone}) > 1 or everyone[0].started not in (None, (), members):
        raise on_all_ranks(
            TopologyError(
                "NVSHMEM already runs in some of these processes over other ranks, and it has one state for "
                "a process: close what uses it first, or open it over the same ranks in the same order"
            )
        )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))


def _attempt(call: Callable[[], T]) -> T | EpError:
    try:
        return call()
    except EpError as error:
        return error


def _within(timeout_s: float, call: Callable[[], None], *, rank: int) -> None:
    """Do what NVSHMEM has no deadline for. If it does not return in time, only the process can end it."""
    outcome: list[EpError | None] = []
    done = threading.Event()

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except EpError as error:
            outcome.append(error)
        except BaseException as error:
            outcome.append(BackendError(f"NVSHMEM: starting failed: {error!r}"))
        finally:
            done.set()

    threading.Thread(target=run, name=f"ep_rt NVSHMEM start, rank {rank}", daemon=True).start()
    if not done.wait(timeout_s):
        raise BackendError(f"NVSHMEM did not start within {timeout_s:g} s")
    if outcome[0] is not None:
        raise outcome[0]


def _lose(reason: str) -> None:
    _PROCESS.lost = reason
    _LOG.warning("NVSHMEM is left as it is until the process ends: %s", reason)


def _clear(pointer: int, num_bytes: int) -> None:
    import cupy

    with device_errors("clearing symmetric memory"):
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.runtime.memsetAsync(pointer, 0, num_bytes, stream.ptr)
        stream.synchronize()


def _synchronize() -> None:
    import cupy

    with device_errors("waiting for the device"):
        cupy.cuda.runtime.deviceSynchronize()
