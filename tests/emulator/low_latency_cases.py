"""Random programs of the low-latency mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ep_rt import reference
from ep_rt.cuda.low_latency_plan import AreaShape, least_sms

from . import blocks, normal
from .engine import Engines
from .low_latency import BF16, Dispatched, LowLatency
from .machine import Array
from .ranks import Ranks

WIRES = ("bfloat16", "fp8", "logfmt")  # of a combine


def draw_ids(rng: np.random.Generator, shape: AreaShape, count: int, dtype: Any) -> Array:
    """Experts of some tokens, none of which gets more than it has room for."""
    ids = rng.integers(-1, shape.num_experts, (count, shape.num_topk))
    style = rng.integers(6)
    if style == 0:
        ids[:] = -1
        ids[:, 0] = shape.num_experts - 1
    if style == 1:
        ids[:] = -1
    for expert in range(shape.num_experts):
        token, k = np.nonzero(ids == expert)
        ids[token[shape.num_max_tokens :], k[shape.num_max_tokens :]] = -1
    return ids.astype(dtype)


def draw_reached(rng: np.random.Generator, ranks: Ranks) -> Array:
    """bool [R, R]: whose areas stores reach: those of a node, all, or a rank's own alone."""
    node = np.arange(ranks.num_ranks) // ranks.ranks_per_node
    beside: Array = node[:, None] == node[None]
    return (beside, beside, np.eye(ranks.num_ranks, dtype=bool))[rng.integers(3)]


def draw_low_latency(
    rng: np.random.Generator,
    ranks: Ranks,
    *,
    num_rounds: int,
    max_tokens: int,
    hiddens: Sequence[int],
    with_masks: bool = False,
    has_dead: bool = False,
    dies_midway: bool = False,
    over_network: bool = False,
    max_list_blocks: int = 2,
) -> None:
    """Rounds of one or two dispatches and their combines, in one kernel each or split, all enqueued at once.

    Args:
        hiddens: one of them is drawn.
        has_dead: one rank, `ranks.dead`, never comes, and its peers go on without it.
        over_network: rows go by puts to ranks of other nodes, or to all others.
        dies_midway: or stops at some time. Then it is open what its peers have of it: nothing is compared.
        max_list_blocks: of each source rank.
    """
    num_ranks = ranks.num_ranks
    shape = AreaShape(
        num_ranks=num_ranks,
        num_max_tokens=max_tokens,
        hidden=int(rng.choice(hiddens)),
        num_experts=num_ranks * int(rng.integers(1, 4)),
        num_topk=int(rng.choice([1, 2, 3, 5])),
        has_columns=with_masks and not over_network,
        over_network=over_network,
    )
    mode = LowLatency(
        ranks,
        shape,
        with_masks=with_masks,
        num_blocks=int(rng.integers(1, 3)),
        reached=draw_reached(rng, ranks) if over_network else None,
    )
    dead = int(rng.integers(num_ranks)) if has_dead else None
    absent = [] if dead is None else [dead]
    if dies_midway:
        absent = []
        mode.not_compared = mode.others.not_compared = frozenset(range(num_ranks))
    else:
        mode.not_compared = mode.others.not_compared = frozenset(absent)
    num_local = shape.num_experts // num_ranks
    dtype = (np.int64, np.int32)[rng.integers(2)]
    has_fp8 = shape.hidden % 128 == 0
    # None: a wire is drawn for each call.
    wire = (WIRES[rng.integers(3)] if has_fp8 else "bfloat16") if dies_midway else None

    def random_rows(count: int) -> Array:
        values = rng.standard_normal((count, shape.hidden), np.float32) * np.float32(0.3)
        if not rng.integers(3):  # any bits: no pattern is spared
            bits = rng.integers(0, 1 << 16, (count, shape.hidden)).astype(np.uint16)
            bits[rng.random(bits.shape) < 0.3] = 0xFFFF
            return bits.view(BF16)
        if has_fp8 and not rng.integers(2):
            return blocks.below_one(rng, values.shape)
        return values.astype(BF16)

    def draw() -> tuple[list[Array], list[Array]]:
        counts = rng.integers(0, max_tokens + 1, num_ranks)
        counts[rng.integers(num_ranks)] *= rng.integers(2)
        return [random_rows(int(n)) for n in counts], [draw_ids(rng, shape, int(n), dtype) for n in counts]

    left: list[Dispatched] = []  # results that are still in their zone
    for _ in range(num_rounds):
        is_split = bool(rng.integers(2))
        num_batches = 1 + int(is_split and rng.integers(2))
        handles: list[Dispatched] = []
        if not is_split or num_batches > 1:
            compare_left(left, num_ranks)
        is_fixed = num_batches == 1 and not left and bool(rng.integers(2))
        for _ in range(num_batches):
            x, ids = draw()
            again = []
            if num_batches == 1 and not is_split and not rng.integers(3):
                again = [
                    (
                        [random_rows(len(each)) for each in ids],
                        [draw_ids(rng, shape, len(each), dtype) for each in ids],
                    )
                ]
            handles.append(
                mode.dispatch(
                    x,
                    ids,
                    weights=[rng.random(each.shape, np.float32) for each in ids] if rng.integers(2) else None,
                    # A late rank's stores may meet those of others where the slots of a zone's uses differ.
                    scales=int(rng.integers(3)) if has_fp8 and rng.integers(2) and not dies_midway else None,
                    layout=("expert", "rank")[rng.integers(2)],
                    is_split=is_split,
                    is_fixed=is_fixed,
                    num_clear_blocks=int(rng.integers(1, 3)),
                    num_list_blocks=int(rng.integers(1, max_list_blocks + 1)),
                    num_copy_blocks=int(rng.integers(1, 3)),
                    repeats=again,
                    absent=absent,
                )
            )
        # Without a combine behind it a peer may be in the dispatch after this one while the result is read.
        hurries = bool(left)
        compare_left(left, num_ranks)
        keeps = handles[0].is_in_zone and not is_fixed and num_batches == 1 and not rng.integers(2)
        for rank in range(num_ranks):
            for number in rng.permutation(num_batches):
                if is_split:
                    handles[number].receive(rank)
                if not keeps:
                    handles[number].compare(rank)
        if keeps:  # until the next dispatch receives, if nobody combines
            left = handles
            continue
        receives = []
        for handle in handles:
            if rng.integers(5) < (4 if hurries else 1):
                continue
            y = [
                random_rows(int(np.prod(each.src_info.shape))).reshape(*each.src_info.shape, shape.hidden)
                for each in handle.expected
            ]
            reduce = "rank" if dies_midway or over_network or rng.integers(3) else "source"
            ids, weights = handle.ids, [rng.random(each.shape, np.float32) - 0.5 for each in handle.ids]
            if reduce == "source" or handle.weights is None:
                ids = [np.where(rng.random(each.shape) < 0.2, -1, each).astype(each.dtype) for each in ids]
            missing = [(each >= 0) & np.isin(each // num_local, absent) for each in ids]
            splits = bool(rng.integers(2))
            receive = mode.combine(
                y,
                handle,
                ids,
                weights,
                reduce=reduce,
                wire=wire or (WIRES[rng.integers(3)] if has_fp8 else "bfloat16"),
                is_split=splits,
                is_fixed=is_fixed,
                num_sum_blocks=int(rng.integers(1, 3)),
                missing=missing,
            )
            if splits:
                receives.append(receive)
        for rank in range(num_ranks):
            for number in rng.permutation(len(receives)):
                receives[number](rank)
        # A rank that gives up a call of its node alone tells other nodes nothing, which then blame it, too.
        is_within_node = over_network and ranks.is_failing
        if not rng.integers(4) and dead is None and not is_within_node:
            ranks.barrier()
        if not rng.integers(4) and not with_masks and not over_network:
            draw_dispatch(rng, ranks)
    compare_left(left, num_ranks)
    if dead is None:
        ranks.check_epoch()
    else:
        ranks.dead = dead
        check_survivors(mode, dead, is_late=dies_midway)


def draw_dispatch(rng: np.random.Generator, ranks: Ranks) -> None:
    """A dispatch of the normal mode, in between."""
    counts = rng.integers(0, 4, ranks.num_ranks)
    ids = [rng.integers(-1, ranks.num_ranks, (int(n), 1)) for n in counts]
    x = [rng.integers(0, 256, (len(each), 16), np.uint8) for each in ids]
    expected = reference.dispatch(x, ids, num_experts=ranks.num_ranks)
    normal.dispatch(ranks, x, expected, ids=ids, num_experts=ranks.num_ranks, places=[0] * ranks.num_ranks)


def draw_small(rng: np.random.Generator, ranks: Ranks, *, hidden: int, over_network: bool) -> LowLatency:
    """Calls of few tokens, one expert for each rank and one block of a kind, without masks."""
    shape = AreaShape(
        num_ranks=ranks.num_ranks,
        num_max_tokens=2,
        hidden=hidden,
        num_experts=ranks.num_ranks,
        num_topk=2,
        over_network=over_network,
    )
    reached = draw_reached(rng, ranks) if over_network else None
    return LowLatency(ranks, shape, with_masks=False, num_blocks=1, reached=reached)


def draw_mistaken(
    rng: np.random.Generator, ranks: Ranks, *, mistake: str, over_network: bool = False
) -> None:
    """A round, then a dispatch in which a rank makes another call, has other arguments or sends too much."""
    num_ranks = ranks.num_ranks
    mode = draw_small(rng, ranks, hidden=8, over_network=over_network)

    def dispatch(**options: Any) -> Dispatched:
        counts = [int(n) for n in rng.integers(1, 3, num_ranks)]
        ids = [draw_ids(rng, mode.shape, n, np.int64) for n in counts]
        return mode.dispatch([np.zeros((n, 8), BF16) for n in counts], ids, **options)

    first = dispatch(layout=("expert", "rank")[rng.integers(2)])
    mistaken = int(rng.integers(num_ranks))
    is_split = bool(rng.integers(2))
    if mistake == "call":
        mode.elsewhere = frozenset([mistaken])
    if mistake == "arguments":
        mode.digests[mistaken] += 1
    if mistake == "rows":
        ranks.mistaken = mistaken
        ids = [np.full((2, 2), -1) for _ in range(num_ranks)]
        rows = [np.zeros((2, 8), BF16) for _ in range(num_ranks)]
        made = mode.dispatch(rows, ids, is_split=is_split, overfull=mistaken)
    else:
        made = dispatch(is_split=is_split)
    if mistake == "call" and over_network:
        others, mode.elsewhere = mode.elsewhere, frozenset(range(num_ranks)) - mode.elsewhere
        rows = [np.zeros((*each.src_info.shape, mode.shape.hidden), BF16) for each in first.expected]
        mode.combine(rows, first, first.ids, [np.ones(each.shape, np.float32) for each in first.ids])
        mode.elsewhere = others
    elif mistake == "call":
        ranks.barrier(only=[mistaken])
    for rank in range(num_ranks):
        if is_split:
            made.receive(rank)
    ranks.barrier()


def draw_kept(rng: np.random.Generator, ranks: Ranks, *, over_network: bool = False) -> None:
    """Results that stay where they landed, read while the next dispatch is sent and before it is received."""
    num_ranks = ranks.num_ranks
    mode = draw_small(rng, ranks, hidden=64, over_network=over_network)

    def dispatch(**options: Any) -> Dispatched:
        ids = [draw_ids(rng, mode.shape, 2, np.int64) for _ in range(num_ranks)]
        x = [rng.standard_normal((2, mode.shape.hidden)).astype(BF16) for _ in ids]
        return mode.dispatch(x, ids, layout="rank", **options)

    for _ in range(2):
        kept, sent = dispatch(), dispatch(is_split=True)
        for rank in range(num_ranks):
            kept.compare(rank)
            sent.receive(rank)
            sent.compare(rank)
    ranks.check_epoch()


def compare_left(left: list[Dispatched], num_ranks: int) -> None:
    """The last moment for these."""
    for handle in left:
        for rank in range(num_ranks):
            handle.compare(rank)
    left.clear()


def check_survivors(mode: LowLatency, dead: int, *, is_late: bool) -> None:
    """Everybody else has completed everything, and has masked that rank alone.

    Where it stops in the middle, another one may be masked, too: time jumps while words are on their way.
    """
    ranks, wanted = mode.ranks, mode.ranks.epoch

    def check() -> str | None:
        for rank in range(ranks.num_ranks):
            header, masks = ranks.header(rank), mode.masks[rank].array(np.uint64)[: ranks.num_ranks]
            if rank == dead:
                continue
            if header["failed"][0] or header["epoch"][0] != wanted:
                return f"rank {rank} is at epoch {header['epoch'][0]}, not {wanted}, or gave up"
            wanted_masks = [int(peer == dead) for peer in range(ranks.num_ranks)]
            if masks.tolist() != wanted_masks and not is_late:
                return f"rank {rank} has masked {masks.tolist()}"
        return None

    ranks.check(check)


def draw_engine(
    rng: np.random.Generator,
    ranks: Ranks,
    *,
    num_rounds: int,
    max_tokens: int,
    over_network: bool = False,
) -> None:
    """The product's own host side: dispatches and combines of changing options, with and without hooks."""
    num_ranks = ranks.num_ranks
    reached = draw_reached(rng, ranks) if over_network else None
    engines = Engines(
        ranks,
        max_blocks=least_sms(num_ranks),
        is_alone=bool(rng.integers(2)),
        with_masks=bool(rng.integers(2)),
        reached=reached,
    )
    shape = AreaShape(
        num_ranks=num_ranks,
        num_max_tokens=max_tokens,
        hidden=128 * int(rng.integers(1, 6)),
        num_experts=num_ranks * int(rng.integers(1, 4)),
        num_topk=int(rng.integers(1, 4)),
    )
    check = LowLatency.__new__(LowLatency)  # for its comparisons
    check.ranks, check.not_compared = ranks, frozenset()

    def put(rank: int, array: Array) -> Array:
        memory = ranks.machine.allocate(rank, max(16, array.nbytes), "input")
        here = memory.array(array.dtype, array.shape)
        here[...] = array
        return here

    for _ in range(num_rounds):
        counts = [int(n) for n in rng.integers(0, max_tokens + 1, num_ranks)]
        x = [(rng.standard_normal((n, shape.hidden), np.float32) / 3).astype(BF16) for n in counts]
        ids = [draw_ids(rng, shape, n, np.int64) for n in counts]
        weights = [rng.random(each.shape, np.float32) for each in ids]
        scales = int(rng.integers(-1, 3))
        layout = ("expert", "rank")[rng.integers(2)]
        options = (max_tokens, shape.num_experts, scales >= 0, scales in (1, 2), scales == 2, layout)
        expected = reference.low_latency_dispatch(
            x,
            ids,
            num_max_dispatch_tokens_per_rank=max_tokens,
            num_experts=shape.num_experts,
            use_fp8=scales >= 0,
            round_scale=scales in (1, 2),
            use_ue8m0=scales == 2,
            layout=layout,
        )
        sends, splits = bool(rng.integers(2)), rng.integers(2, size=2)
        here = [[put(rank, each[rank]) for each in (x, ids, weights)] for rank in range(num_ranks)]
        outs = []
        for rank in range(num_ranks):
            rows, mine_ids, mine_weights = here[rank]
            stats = put(rank, np.zeros(shape.num_experts // num_ranks, np.int32))
            waits = put(rank, np.zeros(num_ranks, np.int64))
            inputs: tuple[Any, ...] = (rows, mine_ids, stats, waits, mine_weights if sends else None)
            outs.append(engines.dispatch(rank, inputs, options, with_hook=bool(splits[0])))
        ranks.epoch += 1
        for rank, out in enumerate(outs):
            if out.hook is not None:
                out.hook()
            compare_engine(check, rank, out, expected[rank])
        y = [
            (rng.standard_normal((*each.src_info.shape, shape.hidden), np.float32) / 3).astype(BF16)
            for each in expected
        ]
        reduce = "rank" if over_network else ("rank", "source")[rng.integers(2)]
        wire = int(rng.integers(3))
        combined = reference.low_latency_combine(
            y, expected, ids, weights, use_logfmt=wire == 1, use_fp8=wire == 2, reduce=reduce
        )
        backs = []
        for rank, out in enumerate(outs):
            _, mine_ids, mine_weights = here[rank]
            zero_copy, target = bool(rng.integers(2)), None
            rows = put(rank, y[rank])
            if zero_copy:
                buffer = engines.combines[rank].next_buffer(out.handle)
                ranks.machine.copy(rank, buffer.ctypes.data, rows.ctypes.data, rows.nbytes)
                rows = put(rank, np.zeros_like(y[rank]))
            if rng.integers(2):
                target = put(rank, np.zeros((counts[rank], shape.hidden), BF16))
            inputs = (rows, mine_ids, mine_weights, target, put(rank, np.zeros(num_ranks, np.int64)))
            back = engines.combine(
                rank,
                inputs,
                out.handle,
                (wire == 1, zero_copy, wire == 2, reduce),
                with_hook=bool(splits[1]),
            )
            backs.append(back)
        ranks.epoch += 1
        for rank, back in enumerate(backs):
            if back.hook is not None:
                back.hook()
            check._same_at("combined_x", rank, back.combined_x.ctypes.data, combined[rank])
    ranks.check_epoch()


def compare_engine(check: LowLatency, rank: int, out: Any, mine: reference.LowLatencyDispatched) -> None:
    """What a dispatch returned, beside the oracle's."""

    def same(name: str, got: Array, expected: Array, where: Array | None = None) -> None:
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), (name, got.shape, expected.shape)
        check._same_at(name, rank, got.ctypes.data, expected, where)

    recv_x, recv_sf = out.recv_x if mine.sf is not None else (out.recv_x, None)
    same("recv_count", out.recv_count, mine.recv_count)
    same("src_info", out.handle.src_info, mine.src_info)
    same("layout_range", out.handle.layout_range, mine.layout_range)
    if mine.expert_rows is None:
        counts = mine.recv_count[:, None] > np.arange(mine.src_info.shape[1])
        same("recv_x", recv_x, mine.recv_x, counts)
        if recv_sf is not None and mine.sf is not None:
            by_column = np.ascontiguousarray(mine.sf.transpose(0, 2, 1))
            there = np.broadcast_to(counts[:, None], by_column.shape)
            same("recv_sf", recv_sf.transpose(0, 2, 1), by_column, there)
        return
    same("expert_rows", out.handle.expert_rows, mine.expert_rows)
    there = np.zeros(mine.src_info.shape[1], bool)
    there[mine.expert_rows[mine.expert_rows >= 0]] = True
    there = there.reshape(mine.recv_x.shape[:2])
    same("recv_x", recv_x, mine.recv_x, there)
    if recv_sf is not None and mine.sf is not None:
        same("recv_sf", recv_sf, mine.sf, there)
