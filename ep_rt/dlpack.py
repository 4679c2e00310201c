"""The bytes of a DLPack capsule, read and relabelled through ctypes. Knows no framework.

NumPy's own consumer refuses bfloat16 and float8, and takes no device memory; these structures take both.
Source: dlpack.h of DLPack 1.1.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

HOST_DEVICE_TYPES = (1, 3)  # kDLCPU, kDLCUDAHost
CUDA_DEVICE_TYPES = (2, 13)  # kDLCUDA, kDLCUDAManaged

_UNVERSIONED = b"dltensor"  # the name of a capsule with a DLManagedTensor

# (type code, bits) of DLDataType.
CODES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "float32": (2, 32),
        "float16": (2, 16),
        "bfloat16": (4, 16),
        "float8_e4m3fn": (10, 8),
        "uint8": (1, 8),
        "int32": (0, 32),
        "int64": (0, 64),
        "bool": (6, 8),
    }
)


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )

    def dtype_name(self) -> str:
        """The name in `CODES`, or a description of what is not there."""
        for name, code in CODES.items():
            if (self.code, self.bits, self.lanes) == (*code, 1):
                return name
        return f"(DLPack code {self.code}, {self.bits} bits, {self.lanes} lanes)"

    def strides_bytes(self) -> list[int] | None:
        """None where the producer left them out, which means C-contiguous."""
        if not self.strides:
            return None
        return [stride * (self.bits // 8) for stride in self.strides[: self.ndim]]


class ManagedTensorVersioned(ctypes.Structure):
    """DLManagedTensorVersioned. Its elder, DLManagedTensor, begins with the tensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


def open_capsule(capsule: object) -> tuple[Tensor, bool]:
    """The tensor inside a capsule, and whether it is read-only. Valid while the capsule lives.

    The capsule keeps its name, so it stays unconsumed and releases the memory when it is dropped.
    """
    get_name, get_pointer = _capsule_functions()
    name = get_name(capsule)
    address = get_pointer(capsule, name)
    if name != _UNVERSIONED:
        managed = ManagedTensorVersioned.from_address(address)
        return managed.tensor, bool(managed.flags & 1)
    return Tensor.from_address(address), False


def relabel(capsule: object, *, cuda_index: int, dtype: str) -> None:
    """Say that the tensor in an unconsumed, unversioned capsule lies on a CUDA device and has this dtype."""
    _, get_pointer = _capsule_functions()
    tensor = Tensor.from_address(get_pointer(capsule, _UNVERSIONED))
    tensor.device_type, tensor.device_id = CUDA_DEVICE_TYPES[0], cuda_index
    tensor.code, tensor.bits = CODES[dtype]


@functools.cache
def _capsule_functions() -> tuple[Any, Any]:
    """PyCapsule_GetName and PyCapsule_GetPointer. Making them takes longer than a call."""
    get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    return (
        get_name(("PyCapsule_GetName", ctypes.pythonapi)),
        get_pointer(("PyCapsule_GetPointer", ctypes.pythonapi)),
    )
