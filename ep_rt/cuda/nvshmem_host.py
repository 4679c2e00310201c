"""NVSHMEM's host library: found, loaded, and called with errors of this package.

Loaded from the files that kernels are linked with, so that host and device are of one version. Called through
nvshmem4py where that is installed, else through ctypes: the functions have the same names and take addresses
as integers. The functions here wait for all ranks where they say so, and NVSHMEM knows no deadline.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ..errors import BackendError
from .nvshmem_files import NvshmemFiles

# nvshmemx_uniqueid_t, nvshmemx_init_attr_t with its nested structs, and the versions that they begin with.
_UNIQUE_ID_BYTES: Final = 128
_ATTRIBUTES_BYTES: Final = 144
_ATTRIBUTES_VERSIONS: Final = {0: 144, 16: 128, 24: 24}  # size of the struct at each offset
_VERSION_1: Final = 1 << 16

_INIT_WITH_UNIQUEID: Final = 1 << 3
# nvshmemx_init_status: fully started, or with several ranks on a GPU.
_STARTED: Final = (2, 3, 4)


class HostLibrary:
    """The functions that are used, of the process's one NVSHMEM.

    Attributes:
        name: how it is called: "nvshmem4py" or "ctypes".
    """

    def __init__(self, functions: Any, name: str) -> None:
        self._functions = functions
        self.name = name

    def version(self) -> tuple[int, int, int]:
        """(major, minor, patch)."""
        numbers = [ctypes.c_int() for _ in range(3)]
        with _errors("asking for the version"):
            self._functions.vendor_get_version_info(*map(ctypes.addressof, numbers))
        major, minor, patch = (number.value for number in numbers)
        return major, minor, patch

    @property
    def is_started(self) -> bool:
        """Whether it is initialised, by whomever."""
        with _errors("asking for the status"):
            return int(self._functions.init_status()) in _STARTED

    def unique_id(self) -> bytes:
        """What all ranks need to find the one that made it."""
        unique_id = _unique_id(b"")
        with _errors("making a unique id"):
            self._functions.get_uniqueid(ctypes.addressof(unique_id))
        return bytes(unique_id.raw)

    def start(self, unique_id: bytes, rank: int, num_ranks: int) -> None:
        """Initialise NVSHMEM on the current device, whose context is current. Waits for all ranks.

        Raises:
            BackendError: it could not; mostly because no transport reaches some rank.
        """
        uid = _unique_id(unique_id)
        attributes = (ctypes.c_char * _ATTRIBUTES_BYTES)()
        for offset, num_bytes in _ATTRIBUTES_VERSIONS.items():
            ctypes.c_int.from_buffer(attributes, offset).value = _VERSION_1 + num_bytes
        where = ctypes.addressof(attributes)
        with _errors("starting"):
            self._functions.set_attr_uniqueid_args(rank, num_ranks, ctypes.addressof(uid), where)
            self._functions.hostlib_init_attr(_INIT_WITH_UNIQUEID, where)
        if not self.is_started:
            # Its initialisation ends well after a mere exchange of addresses when it finds no GPU.
            raise BackendError("NVSHMEM found its peers but did not start on this GPU")
        place = int(self._functions.my_pe()), int(self._functions.n_pes())
        if place != (rank, num_ranks):
            raise BackendError(f"NVSHMEM calls rank {rank} of {num_ranks} {place[0]} of {place[1]}")

    def place(self) -> tuple[int, int]:
        """(rank, number of ranks) as NVSHMEM has them."""
        return int(self._functions.my_pe()), int(self._functions.n_pes())

    def finish(self) -> None:
        """End NVSHMEM. Waits for all ranks."""
        with _errors("finishing"):
            self._functions.hostlib_finalize()

    def allocate(self, num_bytes: int) -> int:
        """Symmetric memory, the same size on all ranks; 0 where there is not enough. Waits for all ranks."""
        with _errors("allocating"):
            return int(self._functions.malloc(num_bytes) or 0)

    def free(self, pointer: int) -> None:
        """Give symmetric memory back, on all ranks in the same order. Waits for all ranks."""
        with _errors("freeing"):
            self._functions.free(pointer)

    def barrier(self) -> None:
        """Let all puts arrive, and wait for all ranks."""
        with _errors("a barrier"):
            self._functions.barrier_all()

    def peer_pointer(self, pointer: int, peer: int) -> int:
        """Where the peer's part of symmetric memory is mapped here; 0 if only puts reach it."""
        return int(self._functions.ptr(pointer, peer) or 0)

    def initialise_module(self, module: int) -> None:
        """Give a ``CUmodule`` the state that NVSHMEM's device functions need. Waits for the device."""
        self._module_call("initialising", self._functions.cumodule_init, module)

    def finalise_module(self, module: int) -> None:
        """The end of that, before NVSHMEM's own and before the module is unloaded."""
        self._module_call("finalising", self._functions.cumodule_finalize, module)

    def _module_call(self, doing: str, call: Callable[[int], Any], module: int) -> None:
        with _errors(f"{doing} a module"):
            status = call(module)
        if status:
            raise BackendError(
                f"NVSHMEM: {doing} a module failed with status {status}; host and device library may differ"
            )


def load(files: NvshmemFiles) -> HostLibrary:
    """Load the host library of an installation.

    Raises:
        BackendError: it cannot be loaded, or this process has already loaded one of a version that kernels
            linked with `files` do not work with.
    """
    try:
        # By its path first: nvshmem4py asks for it by name, and then gets this one.
        handle = ctypes.CDLL(str(files.host_library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BackendError(f"NVSHMEM's host library cannot be loaded: {error}") from error
    library = _through_nvshmem4py() or HostLibrary(_CtypesFunctions(handle), "ctypes")
    host = library.version()
    if host[0] != files.version[0] or host < files.version:
        raise BackendError(
            f"NVSHMEM's host library is of version {'.'.join(map(str, host))}, the device library in "
            f"{files.root} of version {files.version_text}: another one was loaded before, perhaps by "
            "LD_LIBRARY_PATH"
        )
    return library


def _through_nvshmem4py() -> HostLibrary | None:
    try:
        from nvshmem import bindings
    except ImportError:
        return None
    return HostLibrary(bindings, "nvshmem4py")


class _CtypesFunctions:
    """The functions by the names that nvshmem4py gives them."""

    def __init__(self, library: Any) -> None:
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        checked: dict[str, tuple[str, list[Any]]] = {
            "get_uniqueid": ("nvshmemx_get_uniqueid", [pointer]),
            "set_attr_uniqueid_args": ("nvshmemx_set_attr_uniqueid_args", [number, number, pointer, pointer]),
            "hostlib_init_attr": ("nvshmemx_hostlib_init_attr", [ctypes.c_uint, pointer]),
        }
        plain: dict[str, tuple[str, Any, list[Any]]] = {
            "vendor_get_version_info": ("nvshmemx_vendor_get_version_info", None, [pointer] * 3),
            "init_status": ("nvshmemx_init_status", number, []),
            "hostlib_finalize": ("nvshmemx_hostlib_finalize", None, []),
            "my_pe": ("nvshmem_my_pe", number, []),
            "n_pes": ("nvshmem_n_pes", number, []),
            "malloc": ("nvshmem_malloc", pointer, [size]),
            "free": ("nvshmem_free", None, [pointer]),
            "ptr": ("nvshmem_ptr", pointer, [pointer, number]),
            "barrier_all": ("nvshmem_barrier_all", None, []),
            "cumodule_init": ("nvshmemx_cumodule_init", number, [pointer]),
            "cumodule_finalize": ("nvshmemx_cumodule_finalize", number, [pointer]),
        }
        for name, (symbol, result, arguments) in plain.items():
            setattr(self, name, _declared(library, symbol, result, arguments))
        for name, (symbol, arguments) in checked.items():
            setattr(self, name, _raising(symbol, _declared(library, symbol, number, arguments)))


def _declared(library: Any, symbol: str, result: Any, arguments: list[Any]) -> Any:
    function = getattr(library, symbol)
    function.restype, function.argtypes = result, arguments
    return function


def _raising(symbol: str, function: Callable[..., int]) -> Callable[..., None]:
    def call(*arguments: int) -> None:
        status = function(*arguments)
        if status:
            raise RuntimeError(f"{symbol} returned {status}")

    return call


def _unique_id(content: bytes) -> Any:
    unique_id = (ctypes.c_char * _UNIQUE_ID_BYTES)()
    unique_id.raw = content.ljust(_UNIQUE_ID_BYTES, b"\0")
    if not content:
        ctypes.c_int.from_buffer(unique_id).value = _VERSION_1 + _UNIQUE_ID_BYTES
    return unique_id


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # nvshmem4py's own is a plain Exception
        raise BackendError(f"NVSHMEM: {doing} failed: {error}") from error
