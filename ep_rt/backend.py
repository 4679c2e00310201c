"""Which engine a buffer runs on."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
from collections.abc import Sequence
from itertools import permutations

from .config import settings
from .cuda import nvml, nvshmem_files
from .cuda.internode import Internode
from .errors import BackendError, ConfigError, EpError, TopologyError
from .topology import GpuPlace, Topology

BACKENDS = ("auto", "cuda", "host")

MAX_CUDA_RANKS = 8

_MIN_CAPABILITY = 80

_log = logging.getLogger("ep_rt")


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

    bus_id = nvml.address(runtime.deviceGetPCIBusId(runtime.getDevice()))
    links = nvml.links()
    return GpuPlace(
        platform.node(),
        os.getpid(),
        bus_id,
        without_nvlink=nvml.without_nvlink(links, bus_id),
        without_p2p=nvml.without_p2p(links, bus_id),
        has_nvshmem=_has_nvshmem(),
    )


def choose(places: Sequence[GpuPlace | None], topology: Topology) -> str:
    """What "auto" means for ranks at these places, the same on all: "cuda" where it serves every one.

    Ranks that share a GPU get the host backend: processes would wait for each other in time slices, and
    threads need streams of their own, so who wants that asks for "cuda". So does who has ranks on several
    hosts, or GPUs that do not reach each other: only NVSHMEM's start shows whether a network joins them.
    Several nodes of one host, as where GPUs have no NVLink, need NVSHMEM and a process for each rank.

    Args:
        topology: of nodes that NVLink joins.
    """
    reason = _reason_for_host(places, topology)
    if reason is None:
        _log.info("backend: cuda")
        return "cuda"
    # Who has GPUs, but of this kind, is told once.
    is_unexpected = topology.lacks_nvlink and topology.rank == 0
    _log.log(logging.WARNING if is_unexpected else logging.INFO, "backend: host, because %s", reason)
    return "host"


def _reason_for_host(places: Sequence[GpuPlace | None], topology: Topology) -> str | None:
    present = [place for place in places if place is not None]
    if len(present) < len(places):
        return f"{len(places) - len(present)} of {len(places)} ranks have no GPU"
    if len({place.host for place in present}) > 1:
        return f"{len(places)} ranks on several hosts: ask for backend='cuda' if a network joins them"
    if len({place.bus_id for place in present}) < len(present):
        return "the same GPU is the current one of several ranks"
    if topology.num_nodes > 1:
        return _reason_against_network(present, topology)
    if len(places) > MAX_CUDA_RANKS:
        return f"{len(places)} ranks on one node; the CUDA backend serves {MAX_CUDA_RANKS}"
    return None


def _reason_against_network(places: Sequence[GpuPlace], topology: Topology) -> str | None:
    """Of several nodes of one host."""
    nodes = f"{len(places)} ranks on {topology.num_nodes} nodes{topology.hint}"
    try:
        Internode.check(topology)
    except TopologyError as error:
        return str(error)
    if len({place.process for place in places}) < len(places):
        return f"NVSHMEM needs a process for each rank: {nodes}"
    without = [rank for rank, place in enumerate(places) if not place.has_nvshmem]
    if without:
        return (
            f"NVSHMEM is not installed for rank {without[0]}, which ep-rt[cuda12] or ep-rt[cuda13] does: "
            f"{nodes}"
        )
    for (one, place), (two, other) in permutations(enumerate(places), 2):
        if other.bus_id in place.without_p2p:
            pair = f"the GPUs of ranks {one} and {two} have no P2P"
            return f"{pair}: ask for backend='cuda' if a network joins them"
    return None


def _has_nvshmem() -> bool:
    try:
        nvshmem_files.find()
    except EpError:
        return False
    return True


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
