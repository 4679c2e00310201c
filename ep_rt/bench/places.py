"""Where ranks run, and how arrays get there and back.

Ranks are the processes that an MPI launcher started, or threads: with a GPU each, or all on one GPU. Ranks
that share a GPU wait for each other there, so nothing here may make the driver wait for the device while a
peer's kernel runs: callers meet before they allocate and before they copy.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from .. import arrays
from ..backend import gpu_place, requested
from ..errors import BackendError, ConfigError, on_all_ranks
from ..exchange import Group
from ..groups import as_group, run_local
from ..topology import discover
from .options import Options
from .workload import Array

T = TypeVar("T")

TIMEOUT_S: Final = 30.0
"""Deadline of every wait of one rank for another on the device."""

_GROUP_TIMEOUT_S: Final = 120.0
_HOST_RANKS: Final = 4
_CHUNK_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How the ranks are placed. The same on every rank."""

    backend: str  # "cuda" or "host"
    num_ranks: int
    ranks_are: str  # "processes" or "threads"
    is_shared: bool  # all ranks on one GPU
    num_nodes: int = 1

    @property
    def text(self) -> str:
        """For instance ``4 ranks on 2 nodes (processes, a GPU each)``."""
        gpus = "" if self.backend == "host" else ", all on one GPU" if self.is_shared else ", a GPU each"
        plural = "" if self.num_ranks == 1 else "s"
        nodes = f" on {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        return f"{self.num_ranks} rank{plural}{nodes} ({self.ranks_are}{gpus})"


class Place(Protocol):
    """Memory that one rank's arrays live in, and the work enqueued there."""

    setting: Setting
    opened_s: float

    def put(self, array: Array) -> Any:
        """The same bits there."""

    def write(self, there: Any, array: Array) -> None:
        """Other contents for an array there."""

    def chunks(self, there: Any) -> Iterator[tuple[int, Array]]:
        """The rows of a contiguous array in pieces, as (number of the first one, bytes [n, row])."""

    def synchronize(self) -> None:
        """Wait for the work enqueued."""


def fetch(place: Place, there: Any, like: Any) -> Array:
    """The whole of a small array, as the dtype `like`."""
    parts = [rows.copy() for _, rows in place.chunks(there)]
    width = int(np.prod(there.shape[1:]))
    raw = np.concatenate(parts) if parts else np.empty((0, width * np.dtype(like).itemsize), np.uint8)
    fetched: Array = raw.reshape(-1).view(like).reshape(there.shape)
    return fetched


class HostPlace:
    """Memory of this process."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.opened_s = 0.0

    def put(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def write(self, there: Array, array: Array) -> None:
        there[...] = array

    def chunks(self, there: Array) -> Iterator[tuple[int, Array]]:
        if len(there):
            yield 0, np.ascontiguousarray(there).view(np.uint8).reshape(len(there), -1)

    def synchronize(self) -> None:
        pass


class CudaPlace:
    """Memory of the current device. The current stream of this thread is this rank's own.

    Attributes:
        stream: a CuPy stream that waits for no other by itself.
    """

    def __init__(self, setting: Setting, stream: Any, opened_s: float) -> None:
        import cupy

        self.setting = setting
        self.opened_s = opened_s
        self.stream = stream
        self.device: int = cupy.cuda.runtime.getDevice()
        self.num_sms = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self._runtime = cupy.cuda.runtime

    @property
    def num_sharing(self) -> int:
        """Ranks on this device."""
        return self.setting.num_ranks if self.setting.is_shared else 1

    def put(self, array: Array) -> Any:
        import cupy

        contiguous = np.ascontiguousarray(array)
        memory = cupy.cuda.alloc(max(1, contiguous.nbytes))
        self.copy_in(memory.ptr, contiguous)
        return arrays.cuda_to_framework(
            memory.ptr,
            array.shape,
            arrays.dtype_name(array.dtype),
            device=f"cuda:{self.device}",
            framework="cupy",
            owner=memory,
        )

    def write(self, there: Any, array: Array) -> None:
        self.copy_in(there.data.ptr, np.ascontiguousarray(array))

    def chunks(self, there: Any) -> Iterator[tuple[int, Array]]:
        if not there.size:
            return
        yield from self.chunks_at(there.data.ptr, len(there), there.nbytes // len(there))

    def chunks_at(self, pointer: int, num_rows: int, row_bytes: int) -> Iterator[tuple[int, Array]]:
        """As `chunks`, of memory [num_rows, row_bytes]. A piece lasts until the next one is asked for."""
        rows_at_once = max(1, min(num_rows, _CHUNK_BYTES // row_bytes))
        staging = np.empty((rows_at_once, row_bytes), np.uint8)
        for first in range(0, num_rows, rows_at_once):
            rows = staging[: min(rows_at_once, num_rows - first)]
            self._copy(
                rows.ctypes.data,
                pointer + first * row_bytes,
                rows.nbytes,
                self._runtime.memcpyDeviceToHost,
            )
            yield first, rows

    def copy_in(self, pointer: int, array: Array) -> None:
        """Copy a contiguous array to device memory."""
        self._copy(pointer, array.ctypes.data, array.nbytes, self._runtime.memcpyHostToDevice)

    def synchronize(self) -> None:
        self.stream.synchronize()

    def _copy(self, destination: int, source: int, num_bytes: int, kind: int) -> None:
        # Work that is still enqueued would be waited for inside the driver, and other threads with it.
        self.stream.synchronize()
        if num_bytes:
            self._runtime.memcpyAsync(destination, source, num_bytes, kind, self.stream.ptr)
            self.stream.synchronize()


def on_every_rank(options: Options, body: Callable[[Group, Place], T]) -> T:
    """Run ``body(group, place)`` on every rank; what rank 0, or this process's rank, returned.

    Raises:
        ConfigError, BackendError: the options and this machine do not go together.
    """
    backend = _backend(options)
    group = as_group()
    if group.size > 1:
        return _on_process(group, backend, options, body)
    setting = _of_threads(backend, options)

    def run(group: Group) -> T:
        with _opened(setting, 0 if setting.is_shared else group.rank) as place:
            return body(group, place)

    return run_local(run, setting.num_ranks, timeout_s=_GROUP_TIMEOUT_S)[0]


def environment(**changes: str) -> dict[str, str]:
    """That of this process, changed, for one that it starts."""
    return {**os.environ, **changes}


def preset(**defaults: str) -> None:
    """Set variables that a library reads when it starts, unless the user has."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _backend(options: Options) -> str:
    if options.is_virtual:
        # Ranks that wait for each other must not share a hardware queue. Read when CUDA starts.
        preset(CUDA_DEVICE_MAX_CONNECTIONS="32")
    if options.backend != "auto":
        return requested(options.backend)
    try:
        return requested("cuda")
    except BackendError:
        return "host"


def _on_process(group: Group, backend: str, options: Options, body: Callable[[Group, Place], T]) -> T:
    try:
        if options.is_virtual or options.num_ranks:
            problem = "--ranks and --virtual start threads; mpirun started processes already"
            raise on_all_ranks(ConfigError(problem))
        # Nodes may be virtual: several of them on one host.
        hosts = group.allgather(socket.gethostname(), op="hosts")
        number, num_here = (ranks.count(hosts[group.rank]) for ranks in (hosts[: group.rank], hosts))
        if backend == "cuda" and num_here > _num_devices():
            raise ConfigError(
                f"{num_here} processes on this host, and {_num_devices()} GPUs: processes "
                "that wait for each other cannot share one; threads can: --ranks N --virtual"
            )
        setting = Setting(
            backend=backend,
            num_ranks=group.size,
            ranks_are="processes",
            is_shared=False,
            num_nodes=_num_nodes(group, backend, number),
        )
        with _opened(setting, number) as place:
            return body(group, place)
    except BaseException as error:
        if not getattr(error, "is_collective", False):
            group.abort(error)
        raise


def _num_nodes(group: Group, backend: str, device: int) -> int:
    """As a buffer finds them."""
    if backend == "host":
        return discover(group).num_nodes
    import cupy

    with cupy.cuda.Device(device):
        return discover(group, place=gpu_place()).num_nodes


def _of_threads(backend: str, options: Options) -> Setting:
    if backend == "host":
        num_ranks = options.num_ranks or _HOST_RANKS
    else:
        num_devices = _num_devices()
        num_ranks = options.num_ranks or (_HOST_RANKS if options.is_virtual else num_devices)
        if num_ranks > num_devices and not options.is_virtual:
            raise ConfigError(f"{num_ranks} ranks on {num_devices} GPUs: --virtual puts all of them on one")
    is_shared = backend == "cuda" and options.is_virtual and num_ranks > 1
    return Setting(backend=backend, num_ranks=num_ranks, ranks_are="threads", is_shared=is_shared)


def _num_devices() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


@contextlib.contextmanager
def _opened(setting: Setting, device: int) -> Iterator[Place]:
    if setting.backend == "host":
        yield HostPlace(setting)
        return
    start = time.perf_counter()
    import cupy

    with cupy.cuda.Device(device):
        cupy.cuda.runtime.free(0)  # makes the context
        with cupy.cuda.Stream(non_blocking=True) as stream:
            yield CudaPlace(setting, stream, time.perf_counter() - start)
