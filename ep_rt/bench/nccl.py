"""Packed rows through NCCL's all-to-all, by torch."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import time
from typing import Final

from ..exchange import Group
from .library import Library, Packed, agreed_port
from .measure import Times
from .places import CudaPlace, preset

_NUM_CALLS: Final = 20
_TIMEOUT: Final = datetime.timedelta(seconds=60)


class Nccl(Library):
    """A process group of torch over the ranks."""

    option = "nccl"
    label = "NCCL"

    def __init__(self, group: Group, place: CudaPlace, repeat: int) -> None:
        super().__init__(group, place, repeat)
        preset(NCCL_NVLS_ENABLE="0")
        import torch

        self._torch = torch
        self._device = torch.device("cuda", place.device)
        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)
        torch.distributed.init_process_group(
            "nccl",
            init_method=f"tcp://127.0.0.1:{agreed_port(group)}",
            rank=group.rank,
            world_size=group.size,
            timeout=_TIMEOUT,
        )
        version = ".".join(map(str, torch.cuda.nccl.version()))
        self.title = f"NCCL {version} all-to-all of packed rows; op: on the stream"

    @classmethod
    def _missing(cls) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "NCCL is used through torch, which is not installed"
        import torch

        has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        if not (torch.cuda.is_available() and has_nccl):
            return "this torch has no CUDA or no NCCL"
        return None

    def measure(self, packed: Packed) -> Times:
        torch = self._torch
        sent = packed.counts[self._group.rank].tolist()
        received = packed.counts[:, self._group.rank].tolist()
        with torch.cuda.stream(self._stream):
            send = torch.from_numpy(packed.rows).to(self._device)
            recv = torch.empty(packed.expected.shape, dtype=torch.uint8, device=self._device)

            def run() -> None:
                torch.distributed.all_to_all_single(recv, send, received, sent)

            run()
            self._stream.synchronize()
            self._check(packed, recv.cpu().numpy())
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

    def close(self) -> None:
        self._torch.distributed.destroy_process_group()
