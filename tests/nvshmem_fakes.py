"""CuPy and NVSHMEM's host library as `ep_rt.cuda.nvshmem` sees them, for processes without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ep_rt.cuda import nvshmem_files, nvshmem_host
from ep_rt.errors import BackendError


class FakeLibrary:
    """Stands for `nvshmem_host.HostLibrary`; notes what is called.

    Attributes:
        fails: calls that do, by name.
        heap_bytes: what can be allocated.
    """

    name = "fake"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: set[str] = set()
        self.heap_bytes = 1 << 20
        self.version_numbers = (3, 4, 5)
        self.is_started = False
        self.where = (0, 1)

    def version(self) -> tuple[int, int, int]:
        return self.version_numbers

    def unique_id(self) -> bytes:
        self._note("unique_id")
        return b"the unique id"

    def start(self, unique_id: bytes, rank: int, num_ranks: int) -> None:
        self._note("start", unique_id, rank, num_ranks)
        self.where = (rank, num_ranks)
        self.is_started = True

    def place(self) -> tuple[int, int]:
        return self.where

    def finish(self) -> None:
        self._note("finish")
        self.is_started = False

    def allocate(self, num_bytes: int) -> int:
        self._note("allocate", num_bytes)
        if num_bytes > self.heap_bytes:
            return 0
        self.heap_bytes -= num_bytes
        return 0x1000 * len(self.calls)

    def free(self, pointer: int) -> None:
        self._note("free", pointer)

    def barrier(self) -> None:
        self._note("barrier")

    def peer_pointer(self, pointer: int, peer: int) -> int:
        return pointer if peer == self.where[0] else 0

    def initialise_module(self, module: int) -> None:
        self._note("initialise_module", module)

    def finalise_module(self, module: int) -> None:
        self._note("finalise_module", module)

    def names(self) -> list[str]:
        """What was called since the last time."""
        names = [call[0] for call in self.calls]
        self.calls.clear()
        return names

    def _note(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] in self.fails:
            raise BackendError(f"NVSHMEM: {call[0]} failed")


def install(rank: int) -> FakeLibrary:
    """Put the fakes in place, for the rest of this process. The GPU is that of `rank`."""
    library: Any = FakeLibrary()
    runtime = SimpleNamespace(
        getDevice=lambda: rank,
        deviceGetPCIBusId=lambda device: f"0000:{device:02}:00.0",
        free=lambda pointer: None,
        memsetAsync=lambda *args: library.calls.append(("clear", args[0], args[2])),
        deviceSynchronize=lambda: None,
        CUDARuntimeError=RuntimeError,
    )
    cuda: Any = ModuleType("cupy.cuda")
    cuda.runtime = runtime
    cuda.Device = _device
    cuda.Stream = lambda non_blocking: SimpleNamespace(ptr=1, synchronize=lambda: None)
    cupy: Any = ModuleType("cupy")
    cupy.cuda = cuda
    sys.modules["cupy"], sys.modules["cupy.cuda"] = cupy, cuda
    installed = nvshmem_files.NvshmemFiles(root=Path("/nvshmem"), version=(3, 4, 5), cuda_major=13)
    nvshmem_files.find = lambda: installed
    nvshmem_host.load = lambda files: library
    return library  # type: ignore[no-any-return]


@contextmanager
def _device(device: int) -> Iterator[None]:
    yield
