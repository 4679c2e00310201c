"""Ranks for the GPU tests: threads that share one GPU, threads with a GPU each, or MPI processes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import loopback
import pytest

# Virtual ranks wait for each other, so their streams must not share a hardware queue. Read when CUDA starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

from ep_rt.config import settings
from ep_rt.exchange import Group
from ep_rt.groups import as_group, run_local

T = TypeVar("T")
NUM_VIRTUAL_RANKS = 8
IS_UNDER_MPI = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
_WITHOUT_NVLINK = 1 if IS_UNDER_MPI and settings().nvlink is False else None
RANKS_PER_NODE = settings().ranks_per_node or _WITHOUT_NVLINK
"""Set, the ranks of mpirun are on virtual nodes, and all tests go over the network between them. As nodes of
one rank with ``EP_RT_NVLINK=0``, which is how GPUs without NVLink are served."""
WITH_PUTS_ALONE = IS_UNDER_MPI and os.environ.get("EP_RT_TEST_LOW_LATENCY") == "puts"
"""Low-latency calls put to every rank, as to those that stores do not reach."""
LOW_LATENCY_OVER_NETWORK = bool(RANKS_PER_NODE) or WITH_PUTS_ALONE
RANKS_PER_GPU = int(os.environ.get("EP_RT_TEST_RANKS_PER_GPU", "1"))
"""More than one, the ranks of mpirun share GPUs and wait for each other in time slices: slow, but so more
ranks than GPUs can be had. With ``EP_RT_BACKEND=cuda``: by itself a buffer would be of the host."""
PLACES = ("mpi",) if IS_UNDER_MPI else ("virtual", "gpus")
GROUP_TIMEOUT_S = 30.0
_HEAP_BYTES = 512 << 20
_OPENED: list[Any] = []


def device_count() -> int:
    """GPUs that CuPy can use."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception:
        return 0


def run_ranks(place: str, fn: Callable[[Group], T], *, num_virtual_ranks: int = NUM_VIRTUAL_RANKS) -> list[T]:
    """Run ``fn(group)`` on every rank of a place, each on its device; skips if the place is not here.

    Under MPI the list holds this process's result alone.
    """
    num_devices = device_count()
    if num_devices == 0:
        pytest.skip("no GPU")
    if place == "mpi":
        group = as_group()
        if group.size > RANKS_PER_GPU * num_devices:
            pytest.skip(f"{group.size} processes wait for each other on {num_devices} GPUs")
        if RANKS_PER_NODE or WITH_PUTS_ALONE:
            _open_network(group)
        try:
            return [_on_device(group, _own_device(group), fn)]
        except BaseException as error:
            group.abort(error)
            raise
    devices = [0] * num_virtual_ranks if place == "virtual" else list(range(num_devices))
    if place == "gpus" and num_devices == 1:
        pytest.skip("one GPU")
    return run_on_devices(devices, fn)


def num_ranks_of(place: str, num_virtual_ranks: int) -> int:
    """How many ranks `run_ranks` runs."""
    return {"virtual": num_virtual_ranks, "gpus": device_count()}.get(place) or as_group().size


def run_on_devices(devices: Sequence[int], fn: Callable[[Group], T]) -> list[T]:
    """Run ``fn(group)`` in one thread per entry, on that device."""

    def run(group: Group) -> T:
        return _on_device(group, devices[group.rank], fn)

    return run_local(run, len(devices), timeout_s=GROUP_TIMEOUT_S)


def _on_device(group: Group, device: int, fn: Callable[[Group], T]) -> T:
    import cupy

    with cupy.cuda.Device(device):
        return fn(group)


def _own_device(group: Group) -> int:
    """Under MPI. As many ranks share each GPU: NVSHMEM does not start otherwise."""
    return group.rank % min(device_count(), -(-group.size // RANKS_PER_GPU))


def _open_network(group: Group) -> None:
    """NVSHMEM once for all tests: to start it takes longer than most of them."""
    if _OPENED:
        return
    from ep_rt.cuda import nvshmem

    if RANKS_PER_GPU > 1:
        # The product refuses that: who wants speed never wants it, and NVSHMEM has less to offer then.
        nvshmem._check_members = lambda members: None
    loopback.load_if_asked()
    network = _on_device(
        group,
        _own_device(group),
        lambda group: nvshmem.Network(group, num_bytes=_HEAP_BYTES, timeout_s=GROUP_TIMEOUT_S),
    )
    _OPENED.append(network)
    atexit.register(network.close)


class Payload:
    """Kernels that store a pattern to every peer and check what the peers stored, all on the stream.

    A round is ``send``, barrier, ``check``, barrier. The round number lives on the device, so a round can be
    captured. A word names its round, source rank, destination rank and place.
    """

    NUM_WORDS = 1024
    _SOURCE = r"""
    typedef unsigned long long u64;
    __device__ u64 word(u64 round, int src, int dst, int i) {
        return ((round * 64 + src) * 64 + dst) * 4096 + i;
    }
    extern "C" __global__ void send(u64* const* inboxes, int rank, int num_ranks, const u64* round) {
        for (int dst = 0; dst < num_ranks; ++dst)
            for (int i = threadIdx.x; i < 1024; i += blockDim.x)
                inboxes[dst][rank * 1024 + i] = word(*round, rank, dst, i);
    }
    extern "C" __global__ void check(const u64* inbox, int rank, int num_ranks, u64* round, u64* num_errors) {
        u64 errors = 0;
        for (int src = 0; src < num_ranks; ++src)
            for (int i = threadIdx.x; i < 1024; i += blockDim.x)
                errors += inbox[src * 1024 + i] != word(*round, src, rank, i);
        if (errors) atomicAdd(num_errors, errors);
        __syncthreads();
        if (threadIdx.x == 0) ++*round;
    }
    """

    @classmethod
    def num_bytes(cls, num_ranks: int) -> int:
        """Room that the inbox needs behind the header of a slab."""
        return num_ranks * cls.NUM_WORDS * 8

    def __init__(self, group: Group, pointers: tuple[int, ...], offset: int) -> None:
        import cupy

        module = cupy.RawModule(code=self._SOURCE)
        self._send, self._check = module.get_function("send"), module.get_function("check")
        self._group = group
        self._inboxes = cupy.array([pointer + offset for pointer in pointers], cupy.uint64)
        self._inbox = pointers[group.rank] + offset
        self._round = cupy.zeros(1, cupy.uint64)
        self._num_errors = cupy.zeros(1, cupy.uint64)
        self._send.kernel, self._check.kernel  # noqa: B018 (loads them, which must not happen while peers wait)
        cupy.cuda.get_current_stream().synchronize()

    def round(self, barrier: Any, stream: Any) -> None:
        """Enqueue one round."""
        rank, num_ranks = self._group.rank, self._group.size
        with stream:
            self._send((1,), (256,), (self._inboxes, rank, num_ranks, self._round))
            barrier.run(stream)
            self._check((1,), (256,), (self._inbox, rank, num_ranks, self._round, self._num_errors))
            barrier.run(stream)

    def restart(self, round_number: int, stream: Any) -> None:
        """Go on with this round on all ranks, and forget errors."""
        with stream:
            self._round.fill(round_number)
            self._num_errors.fill(0)
        stream.synchronize()

    def result(self) -> tuple[int, int]:
        """(rounds checked, words that were wrong) so far. The stream is idle."""
        return int(self._round.get()[0]), int(self._num_errors.get()[0])
