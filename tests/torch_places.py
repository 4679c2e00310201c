"""Where tests of torch tensors run: one body for CPU tensors and, by torch's default device, for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from ep_rt import Group
from ep_rt.compat import deep_ep

Tensor = Any
T = TypeVar("T")

SLOW_CYCLES = 60_000_000  # of a GPU, about 30 ms: much longer than all else that a test enqueues
NUM_TOKENS, HIDDEN = 64, 1024

WAYS = ("on one stream", "behind an event", "on another stream")


def is_on_gpu() -> bool:
    return bool(torch.get_default_device().type == "cuda")


def settle() -> None:
    """Wait on the host for what is enqueued on the current stream."""
    if is_on_gpu():
        torch.cuda.current_stream().synchronize()


def meet(buffer: Any) -> None:
    """Come together with the other ranks of an `ep_rt.Buffer`, each when what it enqueued is done.

    While ranks that are threads wait for each other on a GPU, nothing may load a kernel, ask the driver for
    memory or copy to ordinary host memory, and torch does all of it whenever it likes.
    """
    settle()
    if is_on_gpu():
        buffer.get_comm_stream().synchronize()
    buffer.group.barrier()


def slow() -> None:
    """Let later work of the current stream come late."""
    if is_on_gpu():
        torch.cuda._sleep(SLOW_CYCLES)


class Streams:
    """Two streams besides the current one; on CPU tensors everything happens at once."""

    def __init__(self) -> None:
        self._streams = [torch.cuda.Stream() for _ in range(2)] if is_on_gpu() else []

    def current(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Make one of them current."""
        return torch.cuda.stream(self._streams[number]) if self._streams else contextlib.nullcontext()

    def settle(self) -> None:
        for stream in self._streams:
            stream.synchronize()


class Replay(Generic[T]):
    """What `fn` enqueues, to be run again and again: a CUDA graph; on CPU tensors `fn` itself.

    Attributes:
        results: what `fn` returned; of the last run, on CPU tensors.
    """

    def __init__(self, group: Group, fn: Callable[[], T], *, has_threads_beside: bool) -> None:
        self._fn = fn
        self._graph: Any = None
        if not is_on_gpu():
            self.results = fn()
            return
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        # torch gives memory back before a capture, for which the driver waits: nothing may be running.
        for turn in range(group.size):
            group.barrier()
            if turn == group.rank:
                mode = "thread_local" if has_threads_beside else "global"
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode=mode):
                    self.results = fn()
        group.barrier()

    def __call__(self) -> None:
        if self._graph is None:
            self.results = self._fn()
        else:
            self._graph.replay()


Layer = Callable[..., "tuple[Tensor, Tensor]"]


def everywhere(num_ranks: int) -> Tensor:
    """Ids that send every token to every rank, which has one expert."""
    return torch.arange(num_ranks).repeat(NUM_TOKENS, 1)


def check_order(buffer: Any, streams: Streams, layer: Layer, *, dtype: Any) -> None:
    """Calls wait for what writes their inputs, and what reads their results waits for the calls.

    In turn one rank's tokens are written late, so whoever does not wait sends, or reads, what was there
    before. The host waits only at the end.

    Args:
        buffer: an `ep_rt.Buffer`.
        layer: ``layer(x, is_async=, previous=)`` sends x [NUM_TOKENS, HIDDEN] to every rank, doubles what
            arrives, and gives it back with the sums. `previous` is the event behind x, None where the
            current stream is; with `is_async` calls may leave the current stream, and wait for it at the end.
    """
    rank, num_ranks = buffer.rank, buffer.num_ranks

    def value(src: int, number: int) -> int:
        return 1 + src + 8 * (number % 4)  # so small that all sums are exact in bfloat16

    x = torch.zeros((NUM_TOKENS, HIDDEN), dtype=dtype)
    meet(buffer)
    results = []
    for number in range(2 * num_ranks * len(WAYS)):
        way = WAYS[number % len(WAYS)]
        with streams.current(0):
            if rank == number // len(WAYS) % num_ranks:
                slow()
            x.fill_(value(rank, number))
            previous = None if way == "on one stream" else deep_ep.Buffer.capture()
        with streams.current(int(way == "on another stream")):
            recv_x, combined_x = layer(x, is_async=previous is not None, previous=previous)
            results.append((number, recv_x.clone(), combined_x.clone()))
            done = deep_ep.Buffer.capture()
        with streams.current(0):
            done.current_stream_wait()  # before x is written again
    streams.settle()
    meet(buffer)
    for number, recv_x, combined_x in results:
        expected = [value(src, number) for src in range(num_ranks) for _ in range(NUM_TOKENS)]
        assert recv_x.shape == (len(expected), HIDDEN)
        assert (recv_x.cpu() == torch.tensor(expected, device="cpu").view(-1, 1)).all(), number
        assert (combined_x == 2 * num_ranks * value(rank, number)).all(), number
