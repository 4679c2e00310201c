"""What NVML, which comes with the driver, knows of the links between the GPUs of this host.

It sees them all, whatever ``CUDA_VISIBLE_DEVICES`` hides from CUDA, but in a container only the container's.
NVLink counts where it carries loads and stores between two GPUs, directly or through NVSwitch.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from itertools import permutations
from typing import Any, Final

_LOG = logging.getLogger("ep_rt")

NVLINK, PCIE, NO_P2P = "NVLink", "PCIe", "no P2P"
"""How one GPU reaches another: over NVLink, else over PCIe, or not by loads and stores."""

Links = Mapping[tuple[str, str], str]
"""By the PCI addresses of two GPUs, how the first reaches the second. What is not known is left out."""

_LIBRARY: Final = "libnvidia-ml.so.1"
_FUNCTIONS: Final = (
    "nvmlInit_v2",
    "nvmlShutdown",
    "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetPciInfo_v3",
    "nvmlDeviceGetP2PStatus",
)
_SUCCESS: Final = 0

# Of nvmlGpuP2PCapsIndex_t and nvmlGpuP2PStatus_t.
_CAN_READ, _CAN_WRITE, _HAS_NVLINK = 0, 1, 2
_OK, _UNKNOWN = 0, 6


class _PciInfo(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = (
        ("bus_id_legacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("pci_device_id", ctypes.c_uint),
        ("pci_subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    )


def links() -> Links:
    """How the GPUs of this host reach each other. Empty where NVML is not there, or fails."""
    library = _load()
    if library is None or library.nvmlInit_v2() != _SUCCESS:
        _LOG.debug("NVML says nothing of NVLink")
        return {}
    try:
        devices = _devices(library)
        found = {
            (one, two): _link(library, devices[one], devices[two]) for one, two in permutations(devices, 2)
        }
    finally:
        library.nvmlShutdown()
    return {pair: link for pair, link in found.items() if link is not None}


def without_nvlink(links: Links, bus_id: str) -> frozenset[str]:
    """The GPUs that NVLink is known not to join to the one at `bus_id`."""
    return frozenset(two for (one, two), kind in links.items() if one == bus_id and kind != NVLINK)


def without_p2p(links: Links, bus_id: str) -> frozenset[str]:
    """The GPUs that loads and stores of the one at `bus_id` are known not to reach."""
    return frozenset(two for (one, two), kind in links.items() if one == bus_id and kind == NO_P2P)


def address(bus_id: str) -> str:
    """A PCI address as CUDA gives it, as `links` has it."""
    return bus_id.lower()


def _load() -> Any:
    try:
        library = ctypes.CDLL(_LIBRARY)
        for name in _FUNCTIONS:
            getattr(library, name)
    except (OSError, AttributeError):  # not there, or of a driver that is too old to have links worth asking
        return None
    return library


def _devices(library: Any) -> dict[str, ctypes.c_void_p]:
    """Handles, by address, of the GPUs that may be asked."""
    num_devices = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(num_devices)) != _SUCCESS:
        return {}
    devices = {}
    for index in range(num_devices.value):
        device, pci = ctypes.c_void_p(), _PciInfo()
        if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != _SUCCESS:
            continue
        if library.nvmlDeviceGetPciInfo_v3(device, ctypes.byref(pci)) == _SUCCESS:
            devices[f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"] = device
    return devices


def _link(library: Any, one: ctypes.c_void_p, two: ctypes.c_void_p) -> str | None:
    has_nvlink = _status(library, one, two, _HAS_NVLINK)
    if has_nvlink == _UNKNOWN:
        return None
    if has_nvlink == _OK:
        return NVLINK
    p2p = {_status(library, one, two, capability) for capability in (_CAN_READ, _CAN_WRITE)}
    return PCIE if p2p <= {_OK, _UNKNOWN} else NO_P2P


def _status(library: Any, one: ctypes.c_void_p, two: ctypes.c_void_p, capability: int) -> int:
    status = ctypes.c_int(_UNKNOWN)
    answer = library.nvmlDeviceGetP2PStatus(one, two, ctypes.c_int(capability), ctypes.byref(status))
    return status.value if answer == _SUCCESS else _UNKNOWN
