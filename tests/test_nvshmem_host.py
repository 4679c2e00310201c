"""NVSHMEM's host library: loaded both ways, and what becomes of its errors. Needs no GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvrtc_here import require_nvshmem

from ep_rt.cuda import nvshmem_host
from ep_rt.cuda.nvshmem_files import NvshmemFiles
from ep_rt.errors import BackendError

FILES = NvshmemFiles(root=Path("/nowhere"), version=(3, 4, 5), cuda_major=13)


class Functions:
    """Stands for nvshmem4py's bindings. What a test needs otherwise it sets."""

    def __init__(self) -> None:
        self.version = (3, 4, 5)
        self.status = 2
        self.calls: list[Any] = []
        self.my_pe: Callable[[], int] = lambda: 1
        self.n_pes: Callable[[], int] = lambda: 4
        self.cumodule_init: Callable[[int], int] = lambda module: 0

    def vendor_get_version_info(self, *addresses: int) -> None:
        for address, number in zip(addresses, self.version, strict=True):
            ctypes.c_int.from_address(address).value = number

    def init_status(self) -> int:
        return self.status

    def set_attr_uniqueid_args(self, rank: int, num_ranks: int, uid: int, attributes: int) -> None:
        versions = [ctypes.c_int.from_address(attributes + offset).value for offset in (0, 16, 24)]
        self.calls.append((rank, num_ranks, ctypes.string_at(uid, 128), versions))

    def hostlib_init_attr(self, flags: int, attributes: int) -> None:
        self.calls.append(flags)

    def malloc(self, num_bytes: int) -> int | None:
        return None

    def barrier_all(self) -> None:
        raise RuntimeError("nothing answers")


@pytest.fixture
def functions() -> Functions:
    return Functions()


@pytest.fixture
def library(functions: Functions) -> nvshmem_host.HostLibrary:
    return nvshmem_host.HostLibrary(functions, "fake")


def test_start_hands_the_unique_id_on(library: nvshmem_host.HostLibrary, functions: Functions) -> None:
    library.start(b"x" * 128, 1, 4)
    assert functions.calls == [(1, 4, b"x" * 128, [65536 + 144, 65536 + 128, 65536 + 24]), 8]
    assert library.place() == (1, 4)


def test_a_start_that_only_met_is_an_error(library: nvshmem_host.HostLibrary, functions: Functions) -> None:
    functions.status = 1
    with pytest.raises(BackendError, match="found its peers but did not start"):
        library.start(b"x" * 128, 1, 4)


def test_a_start_as_somebody_else_is_an_error(library: nvshmem_host.HostLibrary) -> None:
    with pytest.raises(BackendError, match="calls rank 2 of 4 1 of 4"):
        library.start(b"x" * 128, 2, 4)


def test_errors_are_of_this_package(library: nvshmem_host.HostLibrary, functions: Functions) -> None:
    with pytest.raises(BackendError, match="a barrier failed: nothing answers"):
        library.barrier()
    functions.cumodule_init = lambda module: 7
    with pytest.raises(BackendError, match="initialising a module failed with status 7"):
        library.initialise_module(1)
    assert library.allocate(100) == 0


def test_a_library_that_cannot_be_loaded_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"cannot be loaded: .*libnvshmem_host\.so\.3"):
        nvshmem_host.load(FILES)


@pytest.mark.parametrize("version", [(3, 3, 24), (3, 4, 4), (4, 0, 0)])
def test_an_older_host_library_is_an_error(
    version: tuple[int, int, int], functions: Functions, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions.version = version
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: None)
    monkeypatch.setattr(
        nvshmem_host, "_through_nvshmem4py", lambda: nvshmem_host.HostLibrary(functions, "fake")
    )
    with pytest.raises(BackendError, match=r"host library is of version .* of version 3\.4\.5"):
        nvshmem_host.load(FILES)
    functions.version = (3, 8, 0)
    assert nvshmem_host.load(FILES).name == "fake"


PROGRAM = """
import sys
if sys.argv[1] == "ctypes":
    sys.modules["nvshmem"] = None
from ep_rt.cuda import nvshmem_files, nvshmem_host
files = nvshmem_files.find()
library = nvshmem_host.load(files)
unique_id = library.unique_id()
facts = library.version() == files.version, library.is_started, len(unique_id), any(unique_id[4:])
print(library.name, *facts)
heavy = {"nvshmem.core", "cupy", "torch"} & set(sys.modules)
print(heavy or "nothing heavy")
"""


@pytest.mark.parametrize("way", ["ctypes", "nvshmem4py"])
def test_the_real_library(way: str) -> None:
    """In a process of its own: it cannot be unloaded."""
    require_nvshmem()
    if way == "nvshmem4py":
        pytest.importorskip("nvshmem")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert ran.stdout.splitlines() == [f"{way} True False 128 True", "nothing heavy"], ran.stderr
