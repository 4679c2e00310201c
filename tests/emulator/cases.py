"""Random programs: what is enqueued, drawn from a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from ep_rt import reference
from ep_rt.arrays import np_dtype
from ep_rt.cuda.kernels import ELEMENTS

from . import normal
from .expert_major import ExpertMajor, contiguous, dispatch_layout, wire_limit
from .machine import Array
from .ranks import Ranks

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32, ml_dtypes.float8_e4m3fn, np.uint8)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Any bit pattern: what moves must arrive unchanged."""
    kind = np.dtype(dtype)
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * kind.itemsize), np.uint8).view(kind)


def random_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Numbers of very different size, so that another order of additions gives other bits."""
    scale = np.exp2(rng.integers(-6, 7, shape)).astype(np.float32)
    return (rng.standard_normal(shape, np.float32) * scale).astype(dtype)


def repeat(
    dispatched: list[reference.Dispatched], x: list[Array], sf: list[Array] | None
) -> list[reference.Dispatched]:
    """What a repeated dispatch delivers."""
    received = reference.dispatch_cached(x, dispatched, sf)
    return [
        replace(each, recv_x=rows, recv_sf=scales, recv_topk_weights=None)
        for each, (rows, scales) in zip(dispatched, received, strict=True)
    ]


@dataclass(frozen=True)
class Routing:
    """Where the tokens of all ranks go."""

    num_experts: int
    ids: list[Array]
    weights: list[Array]

    @property
    def num_tokens(self) -> list[int]:
        return [len(each) for each in self.ids]

    @classmethod
    def draw(cls, rng: np.random.Generator, num_ranks: int, *, max_tokens: int, max_topk: int = 9) -> Routing:
        # Warps look after 32 experts, and 32 columns, at a time.
        num_experts = num_ranks * int(rng.choice([1, 2, 3, 3, 40]))
        num_topk = int(rng.choice([1, 2, 3, max_topk]))
        dtype = (np.int64, np.int32)[rng.integers(2)]
        counts = rng.integers(0, max_tokens + 1, num_ranks)
        counts[rng.integers(num_ranks)] *= rng.integers(2)  # now and then a rank without any
        style = rng.integers(6)
        ids = []
        for count in counts:
            some = rng.integers(-1, num_experts, (int(count), num_topk))
            if style == 0:
                some[:] = num_experts - 1
            if style == 1:
                some[:] = -1
            ids.append(some.astype(dtype))
        return cls(num_experts, ids, [rng.random(some.shape, np.float32) for some in ids])


def _rows(
    rng: np.random.Generator, routing: Routing, hidden: int, dtype: Any, sf_width: int
) -> tuple[list[Array], list[Array] | None]:
    x = [random_bits(rng, (count, hidden), dtype) for count in routing.num_tokens]
    sf = [random_bits(rng, (count, sf_width), np.float32) for count in routing.num_tokens]
    return x, sf if sf_width else None


def draw_normal(
    rng: np.random.Generator,
    ranks: Ranks,
    *,
    num_calls: int,
    max_tokens: int,
    elements: Sequence[str] = ELEMENTS,
) -> None:
    """Dispatches, repeated dispatches, combines and barriers, all enqueued at once."""
    num_ranks = ranks.num_ranks
    done = 0
    while done < num_calls:
        routing = Routing.draw(rng, num_ranks, max_tokens=max_tokens)
        dtype = DTYPES[rng.integers(len(DTYPES))]
        hidden = 16 // np.dtype(dtype).itemsize * int(rng.integers(1, 12))
        sf_width = (0, 1, 4, 5)[rng.integers(4)]
        with_weights = bool(rng.integers(3))
        worst = int(rng.integers(1, 2 * sum(routing.num_tokens) + 2)) if rng.integers(2) else 0

        def places() -> list[int]:
            return [int(number) for number in rng.integers(0, ranks.num_places, num_ranks)]

        rows = partial(_rows, rng, routing, hidden, dtype, sf_width)
        x, sf = rows()
        expected = reference.dispatch(
            x,
            routing.ids,
            num_experts=routing.num_experts,
            topk_weights=routing.weights if with_weights else None,
            sf=sf,
            num_worst_tokens=worst,
        )
        handle, _ = normal.dispatch(
            ranks,
            x,
            expected,
            ids=routing.ids,
            weights=routing.weights if with_weights else None,
            sf=sf,
            num_experts=routing.num_experts,
            num_worst_tokens=worst,
            places=places(),
            max_redundant_tokens=(0, 512)[rng.integers(2)],
        )
        done += 1
        if done < num_calls and rng.integers(3) == 0:
            again, again_sf = rows()
            repeated = repeat(expected, again, again_sf)
            normal.dispatch(ranks, again, repeated, ids=None, sf=again_sf, handle=handle, places=places())
            done += 1
        if done < num_calls and rng.integers(4):
            summed = np_dtype(elements[int(rng.integers(len(elements)))])
            width = 16 // np.dtype(summed).itemsize * int(rng.integers(1, 50))
            y = [random_values(rng, (len(each.recv_x), width), summed) for each in expected]
            num_biases = int(rng.integers(3))
            normal.combine(
                ranks,
                y,
                handle,
                weights=[rng.random(each.recv_topk_idx.shape, np.float32) - 0.5 for each in expected]
                if rng.integers(2)
                else None,
                biases=[
                    [random_values(rng, (count, width), summed) for _ in range(num_biases)]
                    for count in routing.num_tokens
                ]
                if num_biases
                else (),
                places=places(),
                is_in_slab=bool(rng.integers(2)),
                num_stagers=int(rng.integers(3)),
            )
            done += 1
        if done < num_calls and rng.integers(4) == 0:
            ranks.barrier()
            done += 1
    ranks.check_epoch()


def draw_staged(rng: np.random.Generator, ranks: Ranks) -> None:
    """A combine of rows outside the slab that are staged in several chunks."""
    num_ranks = ranks.num_ranks
    counts = [int(count) for count in rng.integers(129, 150, num_ranks)]
    counts[rng.integers(num_ranks)] = int(rng.integers(257, 265))
    favourite = rng.integers(num_ranks)
    ids = [
        np.where(rng.random((count, 1)) < 0.2, rng.integers(0, num_ranks, (count, 1)), favourite)
        for count in counts
    ]
    expected = reference.dispatch(
        [np.zeros((count, 16), np.uint8) for count in counts], ids, num_experts=num_ranks
    )
    x = [np.zeros((count, 16), np.uint8) for count in counts]
    handle, _ = normal.dispatch(ranks, x, expected, ids=ids, num_experts=num_ranks, places=[0] * num_ranks)
    y = [random_values(rng, (len(each.recv_x), 16), ml_dtypes.bfloat16) for each in expected]
    num_stagers = int(rng.integers(3))
    normal.combine(ranks, y, handle, places=[1] * num_ranks, is_in_slab=False, num_stagers=num_stagers)
    ranks.check_epoch()


def draw_quantized(rng: np.random.Generator, ranks: Ranks, *, max_tokens: int) -> None:
    """A dispatch that casts to FP8, and a repeated one."""
    routing = Routing.draw(rng, ranks.num_ranks, max_tokens=max_tokens)
    hidden = 128 * int(rng.choice([1, 4, 8, 9]))

    def rows() -> tuple[list[Array], list[Array], list[Array]]:
        x = [random_values(rng, (count, hidden), ml_dtypes.bfloat16) for count in routing.num_tokens]
        for each in x:
            each.reshape(-1).view(np.uint16)[:3] = (0x7F81, 0xFF80, 0x8000)[: each.size]  # NaN, -inf, -0.0
        q, sf = zip(*map(reference.quantize_fp8, x), strict=True)
        return x, list(q), list(sf)

    def places() -> list[int]:
        return [int(number) for number in rng.integers(0, ranks.num_places, ranks.num_ranks)]

    x, q, sf = rows()
    expected = reference.dispatch(q, routing.ids, num_experts=routing.num_experts, sf=sf)
    handle, _ = normal.dispatch(
        ranks, x, expected, ids=routing.ids, num_experts=routing.num_experts, quantizes=True, places=places()
    )
    x, q, sf = rows()
    repeated = repeat(expected, q, sf)
    normal.dispatch(ranks, x, repeated, ids=None, quantizes=True, handle=handle, places=places())
    ranks.check_epoch()


def draw_without_ids(rng: np.random.Generator, ranks: Ranks, *, max_tokens: int) -> None:
    """A dispatch to ranks that the caller names, without experts."""
    routing = Routing.draw(rng, ranks.num_ranks, max_tokens=max_tokens)
    x = [random_bits(rng, (count, 48), np.uint8) for count in routing.num_tokens]
    expected = reference.dispatch(x, routing.ids, num_experts=routing.num_experts)
    in_rank = [
        reference.dispatch_layout(
            ids, num_experts=routing.num_experts, num_ranks=ranks.num_ranks
        ).is_token_in_rank.view(np.uint8)
        for ids in routing.ids
    ]
    normal.dispatch(
        ranks,
        x,
        expected,
        ids=None,
        in_rank=in_rank,
        places=[0] * ranks.num_ranks,
        max_redundant_tokens=(0, 512)[rng.integers(2)],
    )
    ranks.check_epoch()


def draw_expert_major(
    rng: np.random.Generator, ranks: Ranks, *, max_tokens: int, elements: Sequence[str] = ELEMENTS
) -> None:
    """A dispatch with layout "expert", the same again along its handle, and the combine."""
    local = ExpertMajor(ranks)
    routing = Routing.draw(rng, ranks.num_ranks, max_tokens=max_tokens, max_topk=40)
    num_local_experts = routing.num_experts // ranks.num_ranks
    alignment, zero_padding = int(rng.choice([1, 3, 8])), bool(rng.integers(2))
    width, sf_width = int(rng.integers(1, 10)), (0, 1, 4)[rng.integers(3)]
    with_weights = bool(rng.integers(3))
    worst = int(rng.integers(1, 2 * sum(routing.num_tokens) + 2)) if rng.integers(2) else 0

    rows = partial(_rows, rng, routing, 16 * width, np.uint8, sf_width)
    x, sf = rows()
    expected = reference.dispatch(
        x,
        routing.ids,
        num_experts=routing.num_experts,
        topk_weights=routing.weights if with_weights else None,
        sf=sf,
        num_worst_tokens=worst,
    )

    def expand(received: list[reference.Dispatched]) -> list[reference.Expanded]:
        return [
            reference.expand(
                each, num_local_experts=num_local_experts, alignment=alignment, num_worst_tokens=worst
            )
            for each in received
        ]

    expanded = expand(expected)
    common: dict[str, Any] = {
        "idx_bytes": routing.ids[0].itemsize,
        "alignment": alignment,
        "num_local_experts": num_local_experts,
        "zero_padding": zero_padding,
        "is_exact": not worst,
    }
    places = [0] * ranks.num_ranks
    handle, landed = normal.dispatch(
        ranks,
        x,
        expected,
        ids=routing.ids,
        weights=routing.weights if with_weights else None,
        sf=sf,
        num_experts=routing.num_experts,
        num_worst_tokens=worst,
        places=places,
    )
    blocks = local.expand(handle, landed, expanded, **common)
    if rng.integers(2):
        again, again_sf = rows()
        received = repeat(expected, again, again_sf)
        _, landed = normal.dispatch(
            ranks, again, received, ids=None, sf=again_sf, handle=handle, places=places
        )
        local.expand(handle, landed, expand(received), places=blocks, **common)
    summed = np_dtype(elements[int(rng.integers(len(elements)))])
    hidden = 16 // np.dtype(summed).itemsize * int(rng.integers(1, 50))
    local.combine(
        [random_values(rng, (len(each.row), hidden), summed) for each in expanded],
        handle,
        expanded,
        blocks,
        num_local_experts=num_local_experts,
        is_weighted=with_weights and bool(rng.integers(2)),
        is_exact=not worst,
        places=[int(number) for number in rng.integers(0, ranks.num_places, ranks.num_ranks)],
    )
    ranks.check_epoch()


def draw_local(rng: np.random.Generator, ranks: Ranks, *, max_tokens: int) -> None:
    """The small kernels beside the normal mode, and the copy that benchmarks compare with."""
    routing = Routing.draw(rng, ranks.num_ranks, max_tokens=max_tokens)
    for rank, ids in enumerate(routing.ids):
        dispatch_layout(ranks, rank, ids, num_experts=routing.num_experts)
        kind = (np.uint8, np.float16, np.float32, np.float64)[rng.integers(4)]
        array = random_bits(rng, (int(rng.integers(1, 12)), int(rng.integers(1, 12))), kind)
        views = (array[:, ::2], array[::2], array.T, array[:, :1])
        contiguous(ranks, rank, array, views[rng.integers(4)])
    if ranks.num_ranks > 1:
        shape = ranks.num_ranks, 512 * int(rng.integers(1, 6))
        sources = [random_bits(rng, shape, np.uint8) for _ in range(ranks.num_ranks)]
        wire_limit(ranks, sources, pulls=bool(rng.integers(2)))
    ranks.check_epoch()


def draw_mistaken(rng: np.random.Generator, ranks: Ranks, *, is_other_call: bool) -> None:
    """Some calls, then one in which a rank is in another call, or has other arguments."""
    num_ranks = ranks.num_ranks
    draw_normal(rng, ranks, num_calls=int(rng.integers(1, 3)), max_tokens=3, elements=ELEMENTS[2:])
    routing = Routing.draw(rng, num_ranks, max_tokens=3)
    x = [np.zeros((count, 16), np.uint8) for count in routing.num_tokens]
    expected = reference.dispatch(x, routing.ids, num_experts=routing.num_experts)
    mistaken = int(rng.integers(num_ranks))
    others = [rank for rank in range(num_ranks) if rank != mistaken]
    normal.dispatch(
        ranks,
        x,
        expected,
        ids=routing.ids,
        num_experts=routing.num_experts,
        places=[0] * num_ranks,
        only=others if is_other_call else None,
        digests=[77 + (rank == mistaken) for rank in range(num_ranks)],
    )
    if is_other_call:
        ranks.barrier(only=[mistaken])
    ranks.barrier()
