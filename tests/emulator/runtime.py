"""The runtime's C interface. Twin of cpp/api.h."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char, c_char_p, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from enum import IntEnum
from functools import cache
from typing import Any, Final

from . import build


class Kind(IntEnum):
    """Who may touch a piece of memory beside its rank."""

    OWN = 0
    SLAB = 1
    SYMMETRIC = 2


class Strategy(IntEnum):
    """How the scheduler chooses who runs next."""

    UNIFORM = 0
    CHANGE_POINTS = 1
    STARVE_ONE = 2
    REST = 3


class Geometry(Structure):
    _fields_ = (
        ("num_ranks", c_int32),
        ("ranks_per_node", c_int32),
        ("max_threads", c_int32),
        ("num_streams", c_int32),
        ("shared_bytes", c_uint64),
    )


class StreamShape(Structure):
    _fields_ = (("rank", c_int32), ("max_blocks", c_int32))


class Options(Structure):
    _fields_ = (
        ("seed", c_uint64),
        ("max_steps", c_uint64),
        ("timeout_ns", c_int64),
        ("strategy", c_int32),
        ("finds_races", c_int32),
        ("is_strict", c_int32),
        ("checks_uninitialised", c_int32),
        ("orders_queue_pairs", c_int32),
        ("dead_rank", c_int32),
        ("lost_node", c_int32),
        ("dead_step", c_uint64),
        ("lost_step", c_uint64),
        ("max_resident", c_int32),
    )


class Access(Structure):
    _fields_ = (
        ("pc", c_uint32),
        ("library", c_int32),
        ("rank", c_int32),
        ("block", c_int32),
        ("thread", c_int32),
        ("what", c_char * 32),
    )


class Result(Structure):
    _fields_ = (
        ("kind", c_char * 16),
        ("text", c_char * 256),
        ("address", c_uint64),
        ("first", Access),
        ("second", Access),
        ("steps", c_uint64),
        ("switches", c_uint64),
        ("delayed_stores", c_uint64),
        ("bulk_copies", c_uint64),
        ("puts", c_uint64),
        ("virtual_ns", c_uint64),
        ("strategy", c_int32),
    )


_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "emu_struct_bytes": (c_uint64, (c_int32,)),
    "emu_open": (None, (POINTER(Geometry), POINTER(StreamShape))),
    "emu_allocate": (c_uint64, (c_int32, c_uint64, c_int32)),
    "emu_load": (c_int32, (c_char_p,)),
    "emu_load_error": (c_char_p, ()),
    "emu_entry": (c_void_p, (c_int32, c_char_p)),
    "emu_shared_bytes": (c_uint64, (c_int32,)),
    "emu_enqueue_kernel": (None, (c_int32, c_int32, c_void_p, c_void_p, c_uint64, c_int32, c_int32)),
    "emu_enqueue_copy": (None, (c_int32, c_uint64, c_uint64, c_uint64)),
    "emu_enqueue_record": (None, (c_int32, c_int32)),
    "emu_enqueue_wait": (None, (c_int32, c_int32)),
    "emu_save": (None, ()),
    "emu_run": (None, (POINTER(Options), POINTER(Result))),
}


@cache
def library() -> Any:
    """The runtime of this process. Kernels find its functions in it, so its symbols are global."""
    loaded = ctypes.CDLL(str(build.runtime()), mode=ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    for which, struct in enumerate((Geometry, StreamShape, Options, Access, Result)):
        assert loaded.emu_struct_bytes(which) == ctypes.sizeof(struct), struct.__name__
    return loaded
