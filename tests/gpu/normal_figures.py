"""Times of normal mode for a DeepSeek-V3 layer: in a CUDA graph, on a stream, and of the host's call.

``mpirun -n 8 python tests/gpu/normal_figures.py --tokens 128 1024 4096 --sms 12 16 24``; alone it takes one
thread per GPU. A result is checked before it is timed. Wire GB/s: rows and scale factors that leave a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import cupy
import ml_dtypes
import numpy as np
from device_arrays import Array, fetch, put
from ranks import IS_UNDER_MPI, device_count, run_on_devices

from ep_rt import Buffer, Config
from ep_rt.exchange import Group

NUM_IN_GRAPH = 10
NUM_REPLAYS = 4
NUM_CALLS = 20
FP8_BLOCK = 128


@dataclass(frozen=True)
class Layer:
    """One layer's routing for all ranks, and rows whose contents follow from rank and token."""

    ids: list[Array]
    hidden: int
    num_experts: int
    is_fp8: bool

    @classmethod
    def draw(cls, group: Group, options: argparse.Namespace, num_tokens: int) -> Layer:
        ids = []
        for rank in range(group.size):
            rng = np.random.default_rng([num_tokens, rank])
            chosen = np.argpartition(rng.random((num_tokens, options.experts)), options.topk, axis=1)
            ids.append(chosen[:, : options.topk].astype(np.int64))
        return cls(ids, options.hidden, options.experts, options.dtype == "fp8")

    @property
    def num_ranks(self) -> int:
        return len(self.ids)

    def destinations(self, rank: int) -> Array:
        """bool [T, R]"""
        owners = self.ids[rank] // (self.num_experts // self.num_ranks)
        found: Array = (owners[:, :, None] == np.arange(self.num_ranks)).any(axis=1)
        return found

    def rows(self, ranks: Array, tokens: Array) -> Array:
        """[N, hidden]: small integers, so that sums over eight ranks are exact in bfloat16."""
        values = ranks[:, None] * 5 + tokens[:, None] * 3 + np.arange(self.hidden) % 13
        rows: Array = (values % 32).astype(ml_dtypes.float8_e4m3fn if self.is_fp8 else ml_dtypes.bfloat16)
        return rows

    def received(self, rank: int) -> tuple[Array, Array]:
        """Source rank and token of every row that `rank` receives."""
        tokens = [np.flatnonzero(self.destinations(src)[:, rank]) for src in range(self.num_ranks)]
        return np.repeat(np.arange(self.num_ranks), list(map(len, tokens))), np.concatenate(tokens)

    def wire_rows(self) -> float:
        """Rows that leave a rank, the mean over ranks."""
        return float(
            np.mean(
                [np.delete(self.destinations(rank), rank, axis=1).sum() for rank in range(self.num_ranks)]
            )
        )


class Run:
    """One rank's arrays and calls."""

    def __init__(self, group: Group, buffer: Buffer, layer: Layer, num_sms: int) -> None:
        self.group, self.buffer, self.layer = group, buffer, layer
        self.config = Config(num_sms=num_sms)
        num_tokens = len(layer.ids[group.rank])
        rows = layer.rows(np.full(num_tokens, group.rank), np.arange(num_tokens))
        self.x: Any = put(rows.view(np.uint8) if layer.is_fp8 else rows)
        if layer.is_fp8:
            scales = np.random.default_rng(group.rank).random(
                (num_tokens, layer.hidden // FP8_BLOCK), np.float32
            )
            self.x = self.x, put(scales)
        self.ids = put(layer.ids[group.rank])
        self.weights = put(np.full(layer.ids[group.rank].shape, 0.125, np.float32))
        self.num_rows = max(len(layer.received(rank)[0]) for rank in range(group.size))

    def dispatch(self, *, is_exact: bool = False) -> Any:
        return self.buffer.dispatch(
            self.x,
            topk_idx=self.ids,
            topk_weights=self.weights,
            num_experts=self.layer.num_experts,
            num_worst_tokens=0 if is_exact else self.num_rows,
            config=self.config,
        )

    def check(self) -> None:
        layer, rank = self.layer, self.group.rank
        out = self.dispatch(is_exact=True)
        src_rank, src_token = layer.received(rank)
        recv_x = fetch(out.recv_x[0] if layer.is_fp8 else out.recv_x)
        assert len(recv_x) == len(src_rank)
        sample = np.random.default_rng(rank).choice(len(recv_x), min(len(recv_x), 500), replace=False)
        expected = layer.rows(src_rank[sample], src_token[sample])
        assert recv_x[sample].tobytes() == expected.tobytes(), "a row is wrong"
        first = replace(layer, hidden=8).rows(src_rank, src_token)
        assert recv_x[:, :8].tobytes() == first.tobytes(), "a row is in the wrong place"
        if not layer.is_fp8:
            back = fetch(self.buffer.combine(out.recv_x, out.handle, config=self.config).combined_x)
            copies = layer.destinations(rank).sum(axis=1)[:, None]
            mine = layer.rows(np.full(len(copies), rank), np.arange(len(copies))).astype(np.float32)
            assert np.array_equal(back.astype(np.float32), mine * copies), "a sum is wrong"

    def operations(self) -> dict[str, Callable[[], Any]]:
        handle = self.dispatch().handle
        y = self.buffer.empty((handle.num_recv_rows, self.layer.hidden), "bfloat16")
        elsewhere = put(np.zeros(y.shape, ml_dtypes.bfloat16))
        operations: dict[str, Callable[[], Any]] = {
            "dispatch": self.dispatch,
            "dispatch, cached": lambda: self.buffer.dispatch(self.x, handle=handle, config=self.config),
        }
        if not self.layer.is_fp8:
            operations["combine, in the slab"] = lambda: self.buffer.combine(y, handle, config=self.config)
            operations["combine, elsewhere"] = lambda: self.buffer.combine(
                elsewhere, handle, config=self.config
            )
        return operations

    def measure(self, operation: Callable[[], Any], *, in_graph: bool) -> tuple[float, float, float]:
        """Microseconds of this rank: in a graph, on a stream, of the host's call."""
        stream = cupy.cuda.get_current_stream()
        events = [cupy.cuda.Event() for _ in range(4)]
        kept = [operation()]
        stream.synchronize()
        self.group.barrier()
        graph_us = float("nan")
        if in_graph:
            stream.begin_capture()
            for _ in range(NUM_IN_GRAPH):
                kept = [operation()]  # the last one's memory stays: the others' is the same
            graph = stream.end_capture()
            graph.upload(stream)
            stream.synchronize()
            self.group.barrier()
            graph.launch(stream)
            events[0].record(stream)
            for _ in range(NUM_REPLAYS):
                graph.launch(stream)
            events[1].record(stream)
            stream.synchronize()
            graph_us = cupy.cuda.get_elapsed_time(events[0], events[1]) * 1e3 / (NUM_IN_GRAPH * NUM_REPLAYS)
            self.group.barrier()
        del kept
        operation()
        calls = []
        events[2].record(stream)
        for _ in range(NUM_CALLS):
            start = time.perf_counter()
            operation()
            calls.append(time.perf_counter() - start)
        events[3].record(stream)
        stream.synchronize()
        stream_us = cupy.cuda.get_elapsed_time(events[2], events[3]) * 1e3 / NUM_CALLS
        self.group.barrier()
        return graph_us, stream_us, median(calls) * 1e6


def measure_all(group: Group, options: argparse.Namespace) -> None:
    with cupy.cuda.Stream(non_blocking=True):
        for num_tokens in options.tokens:
            layer = Layer.draw(group, options, num_tokens)
            row_bytes = options.hidden * (1 if layer.is_fp8 else 2)
            metadata_bytes = 12 * options.topk + options.hidden // 32
            num_bytes = (
                4 * group.size * max(num_tokens, 64) * (row_bytes + 2 * options.hidden + metadata_bytes)
            )
            with Buffer(group, max(64 << 20, num_bytes), backend="cuda", timeout_s=10.0) as buffer:
                for num_sms in options.sms:
                    run = Run(group, buffer, layer, num_sms)
                    run.check()
                    operations = run.operations()
                    for name, operation in operations.items():
                        show(group, run, name, run.measure(operation, in_graph=True))
                    exact = run.measure(partial(run.dispatch, is_exact=True), in_graph=False)
                    show(group, run, "dispatch, exact shapes", exact)
                    del run, operations, operation


def show(group: Group, run: Run, name: str, times: tuple[float, float, float]) -> None:
    """One line of the table: median and range over ranks."""
    everyone = list(zip(*group.allgather(times), strict=True))
    if group.rank:
        return
    layer = run.layer
    row_bytes = layer.hidden * 2
    if layer.is_fp8:
        row_bytes = layer.hidden + layer.hidden // FP8_BLOCK * 4
    graph_us, stream_us, call_us = (median(column) for column in everyone)
    best_us = stream_us if np.isnan(graph_us) else graph_us
    wire = layer.wire_rows() * row_bytes / best_us / 1e3
    spread = f"{min(everyone[0]):.1f}-{max(everyone[0]):.1f}"
    print(
        f"{name:<24}{len(layer.ids[0]):>7}{run.config.num_sms:>5}{graph_us:>10.1f}{spread:>16}"
        f"{stream_us:>11.1f}{call_us:>10.1f}{wire:>10.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--sms", type=int, nargs="+", default=[16])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16")
    options = parser.parse_args()

    def body(group: Group) -> None:
        if group.rank == 0:
            print(f"{group.size} ranks, hidden {options.hidden}, top-{options.topk} of {options.experts}, us")
            print(
                f"{options.dtype:<24}{'tokens':>7}{'SMs':>5}{'in graph':>10}{'of ranks':>16}"
                f"{'on stream':>11}{'call':>10}{'wire GB/s':>10}",
                flush=True,
            )
        measure_all(group, options)

    if IS_UNDER_MPI:
        from ep_rt.groups import as_group

        group = as_group()
        with cupy.cuda.Device(group.rank % device_count()):
            body(group)
    else:
        run_on_devices(list(range(device_count())), body)


if __name__ == "__main__":
    main()
