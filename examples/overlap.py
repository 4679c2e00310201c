"""Hide a dispatch behind a matrix product: what it gains, by the number of SMs that communication gets.

    mpiexec -n 4 python examples/overlap.py      ranks are processes, one GPU each
    python examples/overlap.py --ranks 4         ranks are threads, one GPU each

In many models every token also goes through a shared expert. Its rank has the token already, so the product
with that expert's matrix can run while the token travels to its other experts:

    out = buffer.dispatch(x, ..., config=Config(num_sms=n), async_finish=True)
    with out.event, ep_rt.leaving_sms(n):    # the body runs beside the dispatch
        shared = x @ w
    use(out.recv_x)          # after the body, the current stream has waited for the dispatch

The kernels of a dispatch keep some SMs (streaming multiprocessors) to themselves. More of them move the
tokens faster, and leave fewer to the product, which must be told: else it counts on all of them, and what it
meant for those of the dispatch begins only after that. ``Buffer.set_num_sms(n)`` sets their number for every
call, ``config=Config(num_sms=n)`` for one. The table shows for several numbers

    dispatch, product    each alone                 in turn     the product after the dispatch
    together             as in the code above       untold      the same without `leaving_sms`
    overlap              (in turn - together) / the shorter of the two

as medians of device time in ms, over the ranks. For figures start processes: threads of one process take
turns to enqueue their work.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are the parallelism; NumPy reads it when it loads

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from frameworks import BF16, Library
from launch import add_sizes, example_parser, launch, place_of, positive
from numpy.typing import NDArray

import ep_rt
from ep_rt import Config

NUM_WARM_UP = 3
CHECKED_TOKENS = 64
CHECKED_COLUMNS = 64


class Tokens(NamedTuple):
    """Tokens of one rank, and the experts that they go to."""

    x: NDArray[Any]  # [num_tokens, hidden], bfloat16
    topk_idx: NDArray[np.int64]  # [num_tokens, num_topk]
    topk_weights: NDArray[np.float32]


class Times(NamedTuple):
    """Milliseconds for one number of SMs."""

    num_sms: int
    dispatch: float
    product: float
    in_turn: float
    untold: float
    together: float

    @property
    def overlap(self) -> float:
        """The share of the shorter of the two that was hidden behind the other."""
        return (self.in_turn - self.together) / min(self.dispatch, self.product)


def random_tokens(options: argparse.Namespace, rank: int, num_tokens: int) -> Tokens:
    rng = np.random.default_rng([options.seed, rank, num_tokens])
    x = rng.standard_normal((num_tokens, options.hidden), np.float32).astype(BF16)
    topk_idx = np.argsort(rng.random((num_tokens, options.num_experts)), axis=1)[:, : options.topk]
    return Tokens(x, topk_idx, np.full(topk_idx.shape, 1 / options.topk, np.float32))


def random_matrix(options: argparse.Namespace, num_columns: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([options.seed, num_columns])
    return rng.standard_normal((options.hidden, num_columns), np.float32) / np.float32(options.hidden**0.5)


class Layer:
    """The dispatch to the experts of other ranks, and the product with the shared expert's matrix `w`."""

    def __init__(
        self, buffer: ep_rt.Buffer, lib: Library, tokens: Tokens, w: NDArray[np.float32], dtype: Any
    ) -> None:
        self.buffer = buffer
        self.framework = lib.name
        self.x, self.topk_idx, self.topk_weights = map(lib.put, tokens)
        self.x_of_product = lib.xp.asarray(self.x, dtype=dtype)
        self.w = lib.xp.asarray(lib.put(w), dtype=dtype)
        self.num_worst_tokens = len(tokens.x) * buffer.num_ranks

    def dispatch(self, config: Config, *, async_finish: bool = False) -> ep_rt.Dispatched:
        # With room for the worst case the host need not wait until the number of received rows is known.
        return self.buffer.dispatch(
            self.x,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            num_worst_tokens=self.num_worst_tokens,
            config=config,
            async_finish=async_finish,
        )

    def product(self) -> Any:
        return self.x_of_product @ self.w

    def in_turn(self, config: Config) -> tuple[ep_rt.Dispatched, Any]:
        return self.dispatch(config), self.product()

    def untold(self, config: Config) -> tuple[ep_rt.Dispatched, Any]:
        out = self.dispatch(config, async_finish=True)
        with out.event:
            shared = self.product()
        return out, shared

    def together(self, config: Config) -> tuple[ep_rt.Dispatched, Any]:
        if self.buffer.backend == "host":
            return self.untold(config)
        with ep_rt.leaving_sms(config.num_sms, framework=self.framework):
            return self.untold(config)


def check(buffer: ep_rt.Buffer, lib: Library, dtype: Any, options: argparse.Namespace) -> bool:
    """Whether a small layer, done together, gives this rank the rows of the oracle and the right product."""
    everyone = [random_tokens(options, rank, CHECKED_TOKENS) for rank in range(buffer.num_ranks)]
    tokens, w = everyone[buffer.rank], random_matrix(options, CHECKED_COLUMNS)
    layer = Layer(buffer, lib, tokens, w, dtype)
    layer.product()  # loads its kernels
    with lib.communication():
        out, shared = layer.together(Config(num_sms=options.sms[0]))
    x, topk_idx, _ = zip(*everyone, strict=True)
    oracle = ep_rt.reference.dispatch(x, topk_idx, num_experts=options.num_experts)[buffer.rank]
    received = lib.fetch(out.recv_x)[: oracle.num_recv_tokens]
    expected = tokens.x.astype(np.float32) @ w
    error = np.abs(lib.fetch(lib.xp.asarray(shared, dtype=lib.xp.float32)) - expected).max()
    # Inputs and the result of the product are rounded to a type with at least 8 bits.
    return received.tobytes() == oracle.recv_x.tobytes() and bool(error <= 2**-6 * np.abs(expected).max())


def median_ms(group: ep_rt.Group, layer: Layer, step: Callable[[], object], num_rounds: int) -> float:
    """The median time of a step on the GPU, of many that follow each other without a pause."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    events = [cupy.cuda.Event() for _ in range(num_rounds + 1)]
    # The product first, by itself: it loads kernels and takes memory, see Library.communication.
    for warm_up in (layer.product, step):
        for _ in range(NUM_WARM_UP):
            warm_up()
        stream.synchronize()
        group.barrier()
    for _ in range(num_rounds):  # keep the GPU busy while the host enqueues what is measured
        layer.product()
    step()  # the ranks come into step
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    stream.synchronize()
    return float(median(map(cupy.cuda.get_elapsed_time, events, events[1:])))


def measure(buffer: ep_rt.Buffer, layer: Layer, options: argparse.Namespace) -> list[Times]:
    """A row for every number of SMs, the same on all ranks. Collective."""
    rows = []
    for num_sms in options.sms:
        config = Config(num_sms=num_sms)
        steps: list[Callable[[], object]] = [
            partial(layer.dispatch, config),
            layer.product,
            partial(layer.in_turn, config),
            partial(layer.untold, config),
            partial(layer.together, config),
        ]
        mine = [median_ms(buffer.group, layer, step, options.rounds) for step in steps]
        of_ranks = buffer.group.allgather(mine)
        rows.append(Times(num_sms, *(median(column) for column in zip(*of_ranks, strict=True))))
    return rows


def table(rows: Sequence[Times], wire_bytes: float) -> str:
    lines = [["SMs", "dispatch", "wire GB/s", "product", "in turn", "untold", "together", "overlap"]]
    for row in rows:
        gigabytes = wire_bytes / row.dispatch / 1e6
        times = [f"{time:.3f}" for time in (row.product, row.in_turn, row.untold, row.together)]
        lines.append(
            [f"{row.num_sms}", f"{row.dispatch:.3f}", f"{gigabytes:.0f}", *times, f"{row.overlap:.0%}"]
        )
    return "\n".join("".join(f"{cell:>11}" for cell in line) for line in lines)


def save_plot(path: Path, rows: Sequence[Times], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    place = np.arange(len(rows))
    for number, name in enumerate(("dispatch", "product", "in_turn", "untold", "together")):
        heights = [getattr(row, name) for row in rows]
        axes.bar(place + 0.16 * (number - 2), heights, 0.16, label=name.replace("_", " "))
    axes.set_xticks(place, [str(row.num_sms) for row in rows])
    axes.set(xlabel="SMs of the dispatch", ylabel="ms", title=title)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    if options.topk > options.num_experts:
        raise ep_rt.ConfigError(f"--topk {options.topk} of --num-experts {options.num_experts} is impossible")
    with place_of(group, options) as place:
        if any(group.allgather(place.is_shared)):
            raise ep_rt.ConfigError(
                "ranks that share a GPU take turns instead of overlapping: start as many as there are GPUs"
            )
        with ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=max(options.tokens, CHECKED_TOKENS),
            hidden=options.hidden,
            num_experts=options.num_experts,
            num_topk=options.topk,
            backend=place.backend,
        ) as buffer:
            lib = Library.of(buffer, place)
            run(buffer, lib, options)


def run(buffer: ep_rt.Buffer, lib: Library, options: argparse.Namespace) -> None:
    group, is_first = buffer.group, buffer.rank == 0
    # CuPy multiplies bfloat16 less well.
    dtype = {"torch": lib.bfloat16, "cupy": np.float16, "numpy": np.float32}[lib.name]
    passed = all(group.allgather(check(buffer, lib, dtype, options)))
    if is_first:
        print(f"{group.size} rank{'s' * (group.size > 1)}, {buffer.backend} backend, {lib.name} arrays")
        print(f"check {'passed' if passed else 'FAILED'}: rows and product of a small layer", flush=True)
    if not passed:
        sys.exit(1)
    if buffer.backend == "host":
        if is_first:
            print("nothing to overlap: on the host backend a call is done when it returns; it needs GPUs")
        return

    layer = Layer(
        buffer,
        lib,
        random_tokens(options, buffer.rank, options.tokens),
        random_matrix(options, options.columns),
        dtype,
    )
    layout = buffer.get_dispatch_layout(layer.topk_idx)
    sent = np.array(group.allgather(lib.fetch(layout.num_tokens_per_rank)))  # [from, to]
    row_bytes = options.hidden * BF16.itemsize
    received, crossed = sent.sum() / group.size, (sent.sum() - np.trace(sent)) / group.size
    rows = measure(buffer, layer, options)
    if is_first:
        import cupy

        gpu = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
        shape = f"[{options.tokens}, {options.hidden}] @ [{options.hidden}, {options.columns}]"
        print(
            f"{gpu}; {options.tokens} tokens per rank, top-{options.topk} of {options.num_experts} experts, "
            f"hidden {options.hidden} in bfloat16\n"
            f"a rank receives {received:.0f} rows, {received * row_bytes / 2**20:.1f} MiB, of which "
            f"{crossed * row_bytes / 2**20:.1f} MiB cross the wire\n"
            f"product {shape} in {str(layer.w.dtype).removeprefix('torch.')}\n\n"
            f"{table(rows, crossed * row_bytes)}"
        )
        if options.plot is not None:
            save_plot(options.plot, rows, f"{group.size} x {gpu}")
            print(f"\nbar chart saved to {options.plot}")


def parser() -> argparse.ArgumentParser:
    parser = example_parser(__doc__, frameworks=("numpy", "cupy", "torch"))
    sizes = {
        "tokens": (4096, "tokens per rank"),
        "hidden": (7168, "numbers per token"),
        "num-experts": (256, "experts, of all ranks together"),
        "topk": (8, "experts per token"),
        "columns": (4096, "of the shared expert's matrix"),
        "rounds": (30, "times to repeat; the median is shown"),
    }
    add_sizes(parser, sizes)
    sms = [4, 8, 12, 16, 24, 32]
    parser.add_argument("--sms", type=positive, nargs="+", default=sms, metavar="N", help=f"default: {sms}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a bar chart")
    return parser


if __name__ == "__main__":
    launch(parser(), main)
