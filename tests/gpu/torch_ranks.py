"""Ranks for the GPU tests that use torch, with tensors on their device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import torch
import torch_places
from ranks import run_ranks

from ep_rt import Group

_WAITING_CALLS = ("dispatch", "combine", "low_latency_dispatch", "low_latency_combine")


def run_torch(place: str, body: Callable[[Group], Any], *, num_virtual_ranks: int = 4) -> None:
    """Run ``body(group)`` on every rank of a place, its device torch's default one.

    Processes use torch as it comes: the default stream is current, and autograd has its threads. Ranks that
    are threads have a stream of their own, and go backward themselves: those of one GPU would share a thread
    of autograd's.
    """

    def on_rank(group: Group) -> None:
        index = cupy.cuda.runtime.getDevice()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.cuda.device(index))
            stack.enter_context(torch.device("cuda", index))
            if place != "mpi":
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
                stack.enter_context(cupy.cuda.Stream(non_blocking=True))
                stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            body(group)
            torch_places.settle()

    run_ranks(place, on_rank, num_virtual_ranks=num_virtual_ranks)


@contextlib.contextmanager
def meeting(buffer: Any, place: str) -> Iterator[None]:
    """Let ranks that are threads meet before and after each call of an `ep_rt.Buffer` that waits for peers.

    Processes go on as they like. See `torch_places.meet`.
    """

    def with_meetings(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            torch_places.meet(buffer)
            result = call(*args, **options)
            torch_places.meet(buffer)
            return result

        return run

    names = () if place == "mpi" else _WAITING_CALLS
    for name in names:
        setattr(buffer, name, with_meetings(getattr(buffer, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(buffer, name)


def points_into_slab(buffer: Any, tensor: Any) -> bool:
    """Whether a tensor lies in the communication memory of an `ep_rt.Buffer`."""
    slab = buffer._engine._domain.slab
    offset = tensor.data_ptr() - slab.pointers[buffer.topology.local_rank]
    return bool(0 <= offset < slab.num_bytes)
