"""Which engine a buffer runs on."""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Sequence
from typing import NamedTuple

from .config import settings
from .errors import BackendError, ConfigError

BACKENDS = ("auto", "cuda", "host")

MAX_CUDA_RANKS = 8

_MIN_CAPABILITY = 80

_log = logging.getLogger("ep_rt")


class GpuPlace(NamedTuple):
    """The GPU that is current for a rank: its host, and its PCI address."""

    host: str
    bus_id: str


def requested(backend: str) -> str:
    """What a caller's ``backend`` means: one of `BACKENDS`; for "auto" what ``EP_RT_BACKEND`` says, if set.

    Raises:
        ConfigError: no such backend.
        BackendError: "cuda" was asked for and cannot run here; the message says what is missing.
    """
    if backend == "auto":
        backend = settings().backend or "auto"
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}; one of {', '.join(BACKENDS)}")
    if backend == "cuda":
        missing = _missing_for_cuda()
        if missing is not None:
            raise BackendError(f"backend='cuda' cannot run here: {missing}")
    return backend


def gpu_place() -> GpuPlace | None:
    """Where this rank would compute on a GPU; None where it cannot."""
    missing = _missing_for_cuda()
    if missing is not None:
        _log.debug("no GPU: %s", missing)
        return None
    from cupy.cuda import runtime

    return GpuPlace(platform.node(), runtime.deviceGetPCIBusId(runtime.getDevice()))


def choose(places: Sequence[GpuPlace | None], *, num_nodes: int) -> str:
    """What "auto" means for ranks at these places, the same on all: "cuda" where it serves every one.

    Ranks that share a GPU get the host backend: processes would wait for each other in time slices, and
    threads need streams of their own, so who wants that asks for "cuda".
    """
    reason = _reason_for_host(places, num_nodes)
    if reason is None:
        _log.info("backend: cuda")
        return "cuda"
    _log.info("backend: host, because %s", reason)
    return "host"


def _reason_for_host(places: Sequence[GpuPlace | None], num_nodes: int) -> str | None:
    present = [place for place in places if place is not None]
    if len(present) < len(places):
        return f"{len(places) - len(present)} of {len(places)} ranks have no GPU"
    if num_nodes > 1 or len(places) > MAX_CUDA_RANKS:
        return f"{len(places)} ranks on {num_nodes} nodes; the CUDA backend serves {MAX_CUDA_RANKS} of one"
    if len(set(present)) < len(present):
        return "the same GPU is the current one of several ranks"
    return None


def _missing_for_cuda() -> str | None:
    """What the CUDA engine lacks on this machine; None if nothing."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; install ep-rt[cuda12] or ep-rt[cuda13]"
    import cupy

    try:
        num_devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no device ({error})"
    if num_devices == 0:
        return "CUDA finds no device"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-python is not installed; install ep-rt[cuda12] or ep-rt[cuda13]"
    capability = cupy.cuda.Device().compute_capability
    if int(capability) < _MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[:-1]}.{capability[-1]}; 8.0 or later is needed"
    return None
