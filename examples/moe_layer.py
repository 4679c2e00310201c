"""One MoE layer over several ranks: dispatch, experts, combine; then the low-latency pair of calls.

    mpiexec -n 4 python examples/moe_layer.py      ranks are processes
    python examples/moe_layer.py --ranks 4         ranks are threads; needs no MPI

On a node with GPUs every rank computes on one; else, or with --backend host, in CPU memory.

Every rank has tokens of its own and num_experts / num_ranks of the experts. A token's output is the sum over
its top-k experts of gate weight times expert(token). Rank 0 then computes the same layer for the tokens of
all ranks by itself, and the results are compared.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are the parallelism; NumPy reads it when it loads

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from frameworks import BF16, Library
from launch import FRAMEWORKS, add_sizes, example_parser, launch, place_of
from numpy.typing import NDArray

import ep_rt

Array = Any  # of the library that computes
Rows = NDArray[Any]  # bfloat16, what travels
Floats = NDArray[np.float32]


LOW_LATENCY = "low-latency mode"


class Tokens(NamedTuple):
    """Tokens of one rank, and where the gate sends them."""

    x: Array  # [num_tokens, hidden], bfloat16
    topk_idx: Array  # [num_tokens, num_topk], int64
    topk_weights: Array  # [num_tokens, num_topk], float32


class Expert(NamedTuple):
    """A small MLP, in float32."""

    up: Array  # [hidden, ffn]
    down: Array  # [ffn, hidden]

    def __call__(self, rows: Array) -> Array:
        return (rows @ self.up).clip(0, None) @ self.down


class Result(NamedTuple):
    """What a rank got out of the layer, and what it took."""

    y: Rows  # [num_tokens, hidden]
    num_sent: NDArray[np.int32]  # [num_ranks], tokens for each rank, this one included
    num_recv: int  # rows received
    seconds: dict[str, float]  # of each phase


def random_expert(options: argparse.Namespace, number: int) -> Expert:
    """Expert `number` of the layer, the same whichever rank asks."""
    rng = np.random.default_rng([options.seed, 1, number])
    up = rng.standard_normal((options.hidden, options.ffn), np.float32)
    down = rng.standard_normal((options.ffn, options.hidden), np.float32)
    return Expert(up * (2 / options.hidden) ** 0.5, down * (2 / options.ffn) ** 0.5)


def random_tokens(options: argparse.Namespace, rank: int) -> Tokens:
    """Random rows, routed to the top-k experts of a random gate, weighted by the softmax of their scores."""
    gate_rng = np.random.default_rng([options.seed, 2])
    gate = gate_rng.standard_normal((options.hidden, options.num_experts), np.float32)
    rng = np.random.default_rng([options.seed, 3, rank])
    x = rng.standard_normal((options.tokens, options.hidden), np.float32).astype(BF16)
    scores = x.astype(np.float32) @ gate / options.hidden**0.5
    topk_idx = np.argsort(-scores, axis=1)[:, : options.topk]
    e = np.exp(np.take_along_axis(scores, topk_idx, axis=1))
    return Tokens(x, topk_idx, e / e.sum(axis=1, keepdims=True))


class Stopwatch:
    """Times phases that all ranks begin and end together; of several rounds, the fastest counts."""

    def __init__(self, group: ep_rt.Group) -> None:
        self.group = group
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.group.barrier()
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.group.barrier()  # see Library.communication
        self.seconds[name] = min(elapsed, self.seconds.get(name, elapsed))


def normal_layer(
    buffer: ep_rt.Buffer, lib: Library, tokens: Tokens, experts: Sequence[Expert], num_rounds: int
) -> Result:
    """A token travels once to each rank that has one of its experts. That rank applies the gate weights."""
    xp = lib.xp
    watch = Stopwatch(buffer.group)
    for _ in range(num_rounds):
        with watch.phase("dispatch"):
            recv_x, recv_topk_idx, recv_topk_weights, _, handle, _ = buffer.dispatch(
                tokens.x, topk_idx=tokens.topk_idx, topk_weights=tokens.topk_weights
            )
            lib.wait_for(recv_x)
        with watch.phase("experts"):
            rows = xp.asarray(recv_x, dtype=xp.float32)
            partial = xp.zeros_like(rows)
            for local_expert, expert in enumerate(experts):
                row, k = xp.where(recv_topk_idx == local_expert)
                term = recv_topk_weights[row, k, None] * expert(rows[row])
                partial = lib.assign(partial, row, partial[row] + term)
            partial = xp.asarray(partial, dtype=lib.bfloat16)
            lib.wait_for(partial)
        with watch.phase("combine"):
            y = buffer.combine(partial, handle).combined_x
            lib.wait_for(y)
    return result(buffer, lib, tokens, y, len(recv_x), watch)


def low_latency_layer(
    buffer: ep_rt.Buffer, lib: Library, tokens: Tokens, experts: Sequence[Expert], num_rounds: int
) -> Result:
    """Every expert gets its rows side by side, with room for the worst case. Combine applies the weights."""
    xp = lib.xp
    watch = Stopwatch(buffer.group)
    for _ in range(num_rounds):
        with watch.phase("dispatch"):
            recv_x, recv_count, handle, _, _ = buffer.low_latency_dispatch(
                tokens.x, tokens.topk_idx, len(tokens.x), use_fp8=False
            )
            lib.wait_for(recv_x)
        with watch.phase("experts"):
            counts = lib.fetch(recv_count).tolist()
            rows = xp.zeros_like(recv_x)
            for local_expert, (expert, count) in enumerate(zip(experts, counts, strict=True)):
                output = expert(xp.asarray(recv_x[local_expert, :count], dtype=xp.float32))
                where = (local_expert, slice(count))
                rows = lib.assign(rows, where, xp.asarray(output, dtype=lib.bfloat16))
            lib.wait_for(rows)
        with watch.phase("combine"):
            y = buffer.low_latency_combine(rows, tokens.topk_idx, tokens.topk_weights, handle).combined_x
            lib.wait_for(y)
    return result(buffer, lib, tokens, y, sum(counts), watch)


def result(
    buffer: ep_rt.Buffer, lib: Library, tokens: Tokens, y: Array, num_recv: int, watch: Stopwatch
) -> Result:
    """What `report` needs of a rank, in NumPy."""
    layout = buffer.get_dispatch_layout(tokens.topk_idx)
    return Result(lib.fetch(y), lib.fetch(layout.num_tokens_per_rank), num_recv, watch.seconds)


def dense_layer(tokens: Sequence[Tokens], options: argparse.Namespace) -> tuple[Floats, Floats, Floats]:
    """The layer without communication, for the tokens of all ranks.

    Returns:
        The output, how far bfloat16 payload may take a right result from it, and how much further where rows
        are rounded once more on their way; [num_ranks, tokens, hidden].
    """
    x = np.stack([of_rank.x for of_rank in tokens])
    topk_idx = np.stack([of_rank.topk_idx for of_rank in tokens])
    topk_weights = np.stack([of_rank.topk_weights for of_rank in tokens])
    y = np.zeros(x.shape, np.float32)
    magnitude = np.zeros(x.shape, np.float32)
    for number in range(options.num_experts):
        rank, token, k = np.nonzero(topk_idx == number)
        expert = random_expert(options, number)
        term = topk_weights[rank, token, k, None] * expert(x[rank, token].astype(np.float32))
        y[rank, token] += term
        magnitude[rank, token] += np.abs(term)
    # What an expert's rank returns is rounded to bfloat16, by at most 2^-8 of itself, and so is the sum. The
    # float32 sums inside round too, by less than their length times 2^-24 of the token's largest term: next
    # to nothing, but all there is where an output happens to be close to zero.
    in_float32 = (options.hidden + options.ffn) * 2**-24 * magnitude.max(axis=-1, keepdims=True)
    once = 2**-8 * (1 + 2**-8)
    return y, once * (magnitude + np.abs(y)) + in_float32, once * (1 + 2**-8) * magnitude


def table(results: Sequence[Result], row_bytes: int) -> str:
    """A line per rank. Bytes are those of dispatch; combine moves as many, the other way.

    Logical bytes are the rows received, also those from the rank itself. The wire carries a token once to
    each other rank that has experts of it. GB/s are logical bytes by time.
    """
    sent_to = [f"to {rank}" for rank in range(len(results))]
    moved = ["received", "logical MiB", "wire MiB"]
    lines = [["rank", *sent_to, *moved, "dispatch ms", "GB/s", "experts ms", "combine ms", "GB/s"]]
    for rank, result in enumerate(results):
        logical = result.num_recv * row_bytes
        wire = sum(src.num_sent[rank] for src in results if src is not result) * row_bytes
        dispatch, experts, combine = (result.seconds[phase] for phase in ("dispatch", "experts", "combine"))
        moved = [f"{result.num_recv}", f"{logical / 2**20:.2f}", f"{wire / 2**20:.2f}"]
        took = [f"{1e3 * dispatch:.2f}", f"{logical / dispatch / 1e9:.2f}", f"{1e3 * experts:.2f}"]
        took += [f"{1e3 * combine:.2f}", f"{logical / combine / 1e9:.2f}"]
        lines.append([f"{rank}", *map(str, result.num_sent), *moved, *took])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def report(everyone: Sequence[tuple[Tokens, dict[str, Result]]], options: argparse.Namespace) -> bool:
    """Print what moved, and compare with the layer on one rank. Whether every mode is right."""
    tokens = [of_rank for of_rank, _ in everyone]
    dense, allowed, once_more = dense_layer(tokens, options)
    errors, shares = [], []
    for mode in everyone[0][1]:
        results = [modes[mode] for _, modes in everyone]
        num_tokens = len(results[0].y)
        print(f"\n{mode}, {num_tokens} tokens per rank")
        print(table(results, row_bytes=options.hidden * BF16.itemsize))
        y = np.stack([result.y for result in results]).astype(np.float32)
        error = np.abs(y - dense[:, :num_tokens])
        errors.append(error.max())
        # There the experts' outputs are bfloat16, and then the sums of each rank are.
        is_rounded_twice = mode == LOW_LATENCY
        limit = allowed + once_more if is_rounded_twice else allowed
        shares.append((error / limit[:, :num_tokens]).max())
    passed = bool(np.max(shares) <= 1)
    print(
        f"\ncheck {'passed' if passed else 'FAILED'}: max error {np.max(errors):.4f}, "
        f"at most {np.max(shares):.0%} of what rounding to bfloat16 allows"
    )
    return passed


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    if options.topk > options.num_experts:
        raise ep_rt.ConfigError(f"--topk {options.topk} of --num-experts {options.num_experts} is impossible")
    tokens = random_tokens(options, group.rank)
    results = {}
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
        if group.rank == 0:
            print(
                f"{group.size} rank{'s' * (group.size > 1)}, {buffer.backend} backend, {lib.name} arrays, "
                f"top-{options.topk} of {options.num_experts} experts, hidden {options.hidden} in bfloat16\n"
                "to r: tokens sent to rank r; received: rows for the experts of this rank",
                flush=True,
            )
        num_local_experts = options.num_experts // group.size
        first_expert = group.rank * num_local_experts
        experts = [
            Expert(*map(lib.put, random_expert(options, first_expert + e))) for e in range(num_local_experts)
        ]
        many = Tokens(*map(lib.put, tokens))
        few = Tokens(*(lib.put(array[: options.decode_tokens]) for array in tokens))
        results["normal mode"] = normal_layer(buffer, lib, many, experts, options.rounds)
        results[LOW_LATENCY] = low_latency_layer(buffer, lib, few, experts, options.rounds)
    everyone = group.allgather((tokens, results))
    if group.rank == 0 and not report(everyone, options):
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    parser = example_parser(__doc__, frameworks=FRAMEWORKS)
    sizes = {
        "tokens": (512, "tokens per rank"),
        "decode-tokens": (64, "as many of them also go through the low-latency calls"),
        "hidden": (1024, "numbers per token"),
        "ffn": (256, "width inside an expert"),
        "num-experts": (32, "experts, of all ranks together"),
        "topk": (4, "experts per token"),
        "rounds": (3, "times to repeat; the fastest is shown"),
    }
    add_sizes(parser, sizes)
    return parser


if __name__ == "__main__":
    launch(parser(), main)
