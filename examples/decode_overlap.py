"""Two batches of decode in turn: while one computes, the other one's rows travel, and no SM is held for them.

    mpiexec -n 4 python examples/decode_overlap.py      ranks are processes, one GPU each
    python examples/decode_overlap.py --ranks 4         ranks are threads; without GPUs, on the host

A low-latency call with ``return_recv_hook=True`` only sends, and returns. Between that and ``hook()``, which
receives, the GPU belongs to whatever else is enqueued:

    a = buffer.low_latency_dispatch(x_a, ..., return_recv_hook=True)
    attention(b)             # a product of matrices, here; the rows of batch a are on their way
    a.hook()                 # now they are there

The two batches take turns: each computes while the other one's dispatch, or combine, travels. The result is
compared with that of the same layer without hooks.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are the parallelism; NumPy reads it when it loads

import argparse
import sys
from typing import Any, NamedTuple

import numpy as np
from frameworks import BF16, Library
from launch import add_sizes, example_parser, launch, place_of

import ep_rt


class Batch(NamedTuple):
    """Tokens of one rank, and the experts that they go to."""

    x: Any  # [num_tokens, hidden], bfloat16
    topk_idx: Any
    topk_weights: Any


def random_batch(options: argparse.Namespace, lib: Library, rank: int, number: int) -> Batch:
    rng = np.random.default_rng([options.seed, rank, number])
    x = rng.standard_normal((options.tokens, options.hidden), np.float32).astype(BF16)
    topk_idx = np.argsort(rng.random((options.tokens, options.num_experts)), axis=1)[:, : options.topk]
    weights = np.full(topk_idx.shape, 1 / options.topk, np.float32)
    return Batch(lib.put(x), lib.put(topk_idx), lib.put(weights))


class Decode:
    """One layer: a rank multiplies its tokens with a matrix, and experts give rows back as they are."""

    def __init__(self, buffer: ep_rt.Buffer, lib: Library, options: argparse.Namespace) -> None:
        self.buffer, self.lib, self.options = buffer, lib, options
        rng = np.random.default_rng(options.seed)
        w = rng.standard_normal((options.hidden, options.hidden), np.float32) / np.float32(
            options.hidden**0.5
        )
        self.w = lib.xp.asarray(lib.put(w), dtype=lib.xp.float32)

    def attention(self, batch: Batch) -> Any:
        """Stands for what a layer does beside its experts."""
        return self.lib.xp.asarray(batch.x, dtype=self.lib.xp.float32) @ self.w

    def dispatch(self, batch: Batch, *, hook: bool) -> Any:
        return self.buffer.low_latency_dispatch(
            batch.x,
            batch.topk_idx,
            self.options.tokens,
            self.options.num_experts,
            use_fp8=False,
            topk_weights=batch.topk_weights,
            return_recv_hook=hook,
        )

    def combine(self, batch: Batch, out: Any, *, hook: bool) -> Any:
        return self.buffer.low_latency_combine(
            out.recv_x, batch.topk_idx, batch.topk_weights, out.handle, return_recv_hook=hook
        )

    def in_turn(self, batches: list[Batch]) -> list[Any]:
        """One batch after the other."""
        results = []
        for batch in batches:
            self.attention(batch)
            out = self.dispatch(batch, hook=False)
            results.append(self.combine(batch, out, hook=False).combined_x)
        return results

    def together(self, batches: list[Batch]) -> list[Any]:
        """Each computes while the other one travels."""
        first, second = batches
        self.attention(first)
        sent = self.dispatch(first, hook=True)
        self.attention(second)  # beside the dispatch of the first
        sent.hook()
        back = self.combine(first, sent, hook=True)
        other = self.dispatch(second, hook=True)
        self.attention(first)  # of the next layer's; beside both
        back.hook()
        other.hook()
        last = self.combine(second, other, hook=True)
        last.hook()
        return [back.combined_x, last.combined_x]


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    with (
        place_of(group, options) as place,
        ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=options.tokens,
            hidden=options.hidden,
            num_experts=options.num_experts,
            num_topk=options.topk,
            backend=place.backend,
            low_latency_mode=True,
        ) as buffer,
    ):
        lib = Library.of(buffer, place)
        decode = Decode(buffer, lib, options)
        batches = [random_batch(options, lib, group.rank, number) for number in range(2)]
        decode.attention(batches[0])  # loads its kernels
        with lib.communication():
            expected = [lib.fetch(rows) for rows in decode.in_turn(batches)]
            passed = True
            for _ in range(options.rounds):
                got = [lib.fetch(rows) for rows in decode.together(batches)]
                passed &= all(a.tobytes() == b.tobytes() for a, b in zip(got, expected, strict=True))
    everyone = group.allgather(passed)
    if group.rank == 0:
        verdict = "all as without hooks" if all(everyone) else "NOT as without hooks"
        print(
            f"{group.size} rank{'s' * (group.size > 1)}, {buffer.backend} backend, {lib.name} arrays: "
            f"{options.rounds} rounds of two batches of {options.tokens} tokens, {verdict}"
        )
        if not all(everyone):
            sys.exit(1)


def parser() -> argparse.ArgumentParser:
    parser = example_parser(__doc__, frameworks=("numpy", "cupy", "torch"))  # JAX arrays take no hooks
    sizes = {
        "tokens": (32, "tokens per rank and batch"),
        "hidden": (1024, "numbers per token"),
        "num-experts": (32, "experts, of all ranks together"),
        "topk": (4, "experts per token"),
        "rounds": (20, "times to repeat"),
    }
    add_sizes(parser, sizes)
    return parser


if __name__ == "__main__":
    launch(parser(), main)
