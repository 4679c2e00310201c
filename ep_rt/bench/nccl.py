"""The same rows through NCCL's all-to-all, by torch: tokens packed by destination beforehand, nothing summed.

What a layer needs besides (counts, packing, unpacking, the sum of combine) is not in these times.
"""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import socket
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..exchange import Group
from .check import agree
from .measure import Times
from .places import CudaPlace, Place, preset
from .workload import BF16, Array, Element, Payload, Routing

_NUM_CALLS: Final = 20
_TIMEOUT: Final = datetime.timedelta(seconds=60)
_SALT: Final = 1


def absence(place: Place) -> str | None:
    """Why NCCL cannot be compared with here; None if it can."""
    setting = place.setting
    if not isinstance(place, CudaPlace):
        return "NCCL needs GPUs"
    if setting.ranks_are == "threads":
        return "NCCL by torch needs processes: mpirun -n N python -m ep_rt bench --compare nccl"
    if setting.num_ranks < 2:
        return "NCCL needs more than one GPU"
    if importlib.util.find_spec("torch") is None:
        return "NCCL is used through torch, which is not installed"
    import torch

    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    if not (torch.cuda.is_available() and has_nccl):
        return "this torch has no CUDA or no NCCL"
    return None


@dataclass(frozen=True, slots=True)
class _Shape:
    """Rows from this rank to each, and from each to this one."""

    sent: list[int]
    received: list[int]


class Nccl:
    """A process group of torch over the ranks. Construction and `close` are collective."""

    def __init__(self, group: Group, place: CudaPlace, repeat: int) -> None:
        preset(NCCL_NVLS_ENABLE="0")
        import torch

        self._torch = torch
        self._group, self._repeat = group, repeat
        self._device = torch.device("cuda", place.device)
        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)
        torch.distributed.init_process_group(
            "nccl",
            init_method=f"tcp://127.0.0.1:{_agreed_port(group)}",
            rank=group.rank,
            world_size=group.size,
            timeout=_TIMEOUT,
        )
        self.version = ".".join(map(str, torch.cuda.nccl.version()))

    def dispatch(self, element: Element, hidden: int, routing: Routing) -> Times:
        """Every token to the ranks of its experts, with its scale factors."""
        rank = self._group.rank
        sent = [np.flatnonzero(routing.destinations[rank][:, dst]) for dst in range(self._group.size)]
        src_rank, src_token = routing.received(rank)
        rows = _packed(element, hidden, rank, np.concatenate(sent))
        expected = _packed(element, hidden, src_rank, src_token)
        counts = _Shape(
            [len(tokens) for tokens in sent], np.bincount(src_rank, minlength=self._group.size).tolist()
        )
        return self._measure("dispatch", rows, expected, counts)

    def combine(self, hidden: int, routing: Routing) -> Times:
        """The rows of a bfloat16 dispatch back to where they came from."""
        rank = self._group.rank
        src_rank, src_token = routing.received(rank)
        returned = [np.flatnonzero(routing.destinations[rank][:, dst]) for dst in range(self._group.size)]
        rows = _packed(BF16, hidden, src_rank, src_token)
        expected = _packed(BF16, hidden, rank, np.concatenate(returned))
        counts = _Shape(
            np.bincount(src_rank, minlength=self._group.size).tolist(),
            [len(tokens) for tokens in returned],
        )
        return self._measure("combine", rows, expected, counts)

    def close(self) -> None:
        self._torch.distributed.destroy_process_group()

    def _measure(self, name: str, rows: Array, expected: Array, shape: _Shape) -> Times:
        torch = self._torch
        with torch.cuda.stream(self._stream):
            send = torch.from_numpy(rows).to(self._device)
            recv = torch.empty(expected.shape, dtype=torch.uint8, device=self._device)

            def run() -> None:
                torch.distributed.all_to_all_single(recv, send, shape.received, shape.sent)

            run()
            self._stream.synchronize()
            is_right = np.array_equal(recv.cpu().numpy(), expected)
            agree(self._group, None if is_right else f"NCCL's {name} brought other rows")
            events = [torch.cuda.Event(enable_timing=True) for _ in range(self._repeat + 1)]
            run()
            events[0].record(self._stream)
            for event in events[1:]:
                for _ in range(_NUM_CALLS):
                    run()
                event.record(self._stream)
            self._stream.synchronize()
            calls_us = []
            for _ in range(_NUM_CALLS):
                self._stream.synchronize()
                start = time.perf_counter()
                run()
                calls_us.append((time.perf_counter() - start) * 1e6)
            self._stream.synchronize()
        self._group.barrier()
        pairs = itertools.pairwise(events)
        return Times(
            kernel_us=None,
            op_us=tuple(first.elapsed_time(last) * 1e3 / _NUM_CALLS for first, last in pairs),
            call_us=tuple(calls_us),
        )


def _packed(element: Element, hidden: int, ranks: Array | int, tokens: Array) -> Array:
    """uint8 [N, row_bytes]: rows with their scale factors behind them."""
    payload = Payload(element, hidden)
    parts: list[Any] = [payload.rows(ranks, tokens, _SALT).view(np.uint8)]
    if element.block:
        parts.append(payload.scales(ranks, tokens, _SALT).view(np.uint8))
    return np.concatenate(parts, axis=1)


def _agreed_port(group: Group) -> int:
    """A port that is free on this host, the same on every rank."""
    port = 0
    if group.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    return int(group.allgather(port, op="bench port")[0])
