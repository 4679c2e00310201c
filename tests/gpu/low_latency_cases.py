"""Random low-latency calls on GPUs beside the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import ml_dtypes
import numpy as np
from device_arrays import fetch, overwrite, put
from emulator import blocks
from host_cases import Case, low_latency_combine_options, random_bits, random_values, same_bits
from ranks import LOW_LATENCY_OVER_NETWORK

from ep_rt import Buffer, arrays, reference

Array = Any
BF16 = np.dtype(ml_dtypes.bfloat16)
SCALES = ((False,) * 3, (True, False, False), (True, True, False), (True,) * 3)


def draw_case(seed: int, num_ranks: int, *, hidden: int | None = None, max_tokens: int = 40) -> Case:
    """One whose experts all have room: at most 9 columns, each of which may name the same expert."""
    return Case.draw(seed, num_ranks, hidden=hidden or 128 * (1 + seed % 5), max_tokens=max_tokens)


def most_rows(case: Case) -> int:
    """The least num_max_dispatch_tokens_per_rank: an expert may be named several times by one token."""
    pairs = [np.bincount(ids[ids >= 0], minlength=1).max() for ids in case.topk_idx if ids.size]
    return int(max([1, *case.num_tokens, *pairs]))


def expert_outputs(rng: np.random.Generator, shape: tuple[int, ...], *, below_one: bool = False) -> Array:
    """Rows that differ from all near them, also past an expert's last one. Few are drawn: it is quick.

    Args:
        below_one: every other row has blocks of every kind that LogFMT casts.
    """
    num_different = 257
    rows = (random_values(rng, (num_different, shape[-1]), np.float32) / 64).astype(BF16)
    if below_one:
        rows[::2] = blocks.below_one(rng, rows[::2].shape)
    which = np.arange(int(np.prod(shape[:-1]))) * 3 % num_different
    return rows.view(np.uint16)[which].view(BF16).reshape(shape)


def rows_in_use(mine: reference.LowLatencyDispatched) -> Array:
    """bool, for each row of recv_x whether it was sent by somebody: the others are unspecified."""
    num_rows = mine.src_info.shape[1]
    if mine.expert_rows is None:
        return mine.recv_count[:, None] > np.arange(num_rows)
    is_there = np.zeros(num_rows, bool)
    is_there[mine.expert_rows[mine.expert_rows >= 0]] = True
    return is_there.reshape(mine.recv_x.shape[:2])


def same_but_for_nan(got: Array, expected: Array) -> bool:
    """Bit for bit, but a NaN that was made is like any other."""
    nan = np.isnan(expected.astype(np.float32))
    return bool(
        got.shape == expected.shape
        and (np.isnan(got.astype(np.float32)) == nan).all()
        and (got.view(np.uint16) == expected.view(np.uint16))[~nan].all()
    )


def fetch_any(array: Any, dtype: Any = None) -> Array:
    """As `fetch`, also with the last two axes swapped."""
    seen = arrays.view(array)
    if len(seen.shape) == 3 and seen.strides[1] == 1 and seen.shape[1] != 1:
        return fetch(array.swapaxes(1, 2), dtype).swapaxes(1, 2)
    return fetch(array, dtype)


class ChangingTokens:
    """Tokens that a kernel changes, so that each replay of a graph has others; the host can tell which.

    Loads its kernel when it is made, which must not happen while ranks on this GPU wait for each other.

    Attributes:
        x: bfloat16 [num_tokens, hidden], as they are now.
    """

    _SOURCE = r"""
    extern "C" __global__ void change(unsigned* x, const unsigned* first, int* count, int num_words) {
        const unsigned number = *count & 127;  // of bits that keep a finite number finite
        for (int i = threadIdx.x; i < num_words; i += blockDim.x) x[i] = first[i] ^ (number << 16 | number);
        __syncthreads();
        if (threadIdx.x == 0) ++*count;
    }
    """

    def __init__(self, num_tokens: int, hidden: int) -> None:
        self.x, self._first = (put(np.zeros((num_tokens, hidden), BF16)) for _ in range(2))
        self._count = put(np.zeros(1, np.int32))
        self._num_words = np.int32(num_tokens * hidden // 2)
        self._kernel = loaded(self._SOURCE, "change")

    def restart(self, first: Array) -> None:
        """The next change gives ``after(0, first)``. Waits for the current stream."""
        overwrite(self._first, first)
        overwrite(self._count, np.zeros(1, np.int32))

    def change(self) -> None:
        """Enqueue it."""
        pointers = [_pointer(each) for each in (self.x, self._first, self._count)]
        self._kernel((1,), (1024,), (*pointers, self._num_words))

    @staticmethod
    def after(number: int, first: Array) -> Array:
        """What that change makes of the first ones."""
        return (first.view(np.uint16) ^ np.uint16(number & 127)).view(BF16)


class NegatingExperts:
    """Experts that give every row back negated. Loads its kernel as `ChangingTokens` does.

    Attributes:
        y: bfloat16 [El, R*M, hidden], their answers.
    """

    _SOURCE = r"""
    extern "C" __global__ void answer(unsigned* y, const unsigned* x, const int* rows, int num_rows,
                                      int row_words) {
        for (int to = blockIdx.x; to < num_rows; to += gridDim.x) {
            const int from = rows == nullptr ? to : rows[to];
            for (int i = threadIdx.x; from >= 0 && i < row_words; i += blockDim.x)
                y[to * row_words + i] = x[from * row_words + i] ^ 0x80008000u;
        }
    }
    """

    def __init__(self, num_local_experts: int, num_rows: int, hidden: int) -> None:
        self.y = put(np.zeros((num_local_experts, num_rows, hidden), BF16))
        self._sizes = np.int32(num_local_experts * num_rows), np.int32(hidden // 2)
        self._kernel = loaded(self._SOURCE, "answer")

    def answer(self, out: Any) -> None:
        """Enqueue the answers to a dispatch without FP8, of either layout."""
        rows = out.handle.expert_rows
        where = np.uint64(0) if rows is None else _pointer(rows)
        self._kernel((16,), (256,), (_pointer(self.y), _pointer(out.recv_x), where, *self._sizes))

    @staticmethod
    def expected(mine: reference.LowLatencyDispatched) -> Array:
        """The same on the host; other rows are unspecified."""
        rows = mine.recv_x
        if mine.expert_rows is not None:
            rows = rows.reshape(-1, rows.shape[-1])[mine.expert_rows]
        return (rows.view(np.uint16) ^ np.uint16(0x8000)).view(BF16)


def loaded(source: str, name: str) -> Any:
    """A kernel, there before its first launch."""
    kernel = cupy.RawModule(code=source).get_function(name)
    kernel.kernel  # noqa: B018
    return kernel


def _pointer(array: Any) -> np.uint64:
    return np.uint64(arrays.view(array).pointer)


def check_received(out: Any, mine: reference.LowLatencyDispatched) -> None:
    """All that a dispatch delivered, of either layout."""
    recv_x, recv_sf = (out.recv_x, None) if mine.sf is None else out.recv_x
    assert same_bits(fetch(out.recv_count), mine.recv_count)
    assert same_bits(fetch(out.handle.src_info), mine.src_info)
    assert same_bits(fetch(out.handle.layout_range), mine.layout_range)
    if mine.expert_rows is None:
        assert out.handle.expert_rows is None
    else:
        assert same_bits(fetch(out.handle.expert_rows), mine.expert_rows)
    rows, where = fetch(recv_x, mine.recv_x.dtype), rows_in_use(mine)
    assert rows.shape == mine.recv_x.shape
    assert same_bits(rows[where], mine.recv_x[where])
    if mine.sf is not None:
        sf = fetch_any(recv_sf)
        assert sf.shape == mine.sf.shape
        assert same_bits(np.ascontiguousarray(sf[where]), mine.sf[where])
        strides, (_, num_rows, num_words) = arrays.view(recv_sf).strides, sf.shape
        is_column_major = mine.expert_rows is None
        assert num_rows == 1 or strides[1] == (1 if is_column_major else num_words)
        assert num_words == 1 or strides[2] == (num_rows if is_column_major else 1)


def check_low_latency(
    buffer: Buffer,
    seed: int,
    *,
    case: Case | None = None,
    hook: bool = False,
    hook_stream: Any = None,
    num_max_tokens: int = 0,
    framework: str = "cupy",
    pause: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """low_latency_dispatch and combine of one random layer.

    Args:
        hook_stream: a CuPy stream that hooks are called on, ordered by events alone; default: the one of all
            else.
        num_max_tokens: of each rank; default: as few as may be.
        between: what is done between the phases, with `hook`. All ranks are there then.
        options: of both calls.
    """

    def receive(result: Any) -> None:
        if not hook:
            result.event.current_stream_wait()
            return
        between()
        pause()
        if hook_stream is None:
            result.hook()
            return
        stream = cupy.cuda.get_current_stream()
        hook_stream.wait_event(stream.record())
        with hook_stream:
            result.hook()
        stream.wait_event(hook_stream.record())

    case = case or draw_case(seed, buffer.num_ranks)
    rng, rank = case.rng, buffer.rank
    use_fp8, round_scale, use_ue8m0 = SCALES[seed % 4 if case.hidden % 128 == 0 else 0]
    layout = ("expert", "rank")[int(rng.integers(2))]
    num_max_tokens = num_max_tokens or most_rows(case)
    with_weights = bool(rng.integers(2))
    shapes = [(count, case.hidden) for count in case.num_tokens]
    x = [
        random_values(rng, shape, BF16) if use_fp8 or seed % 3 else random_bits(rng, shape, BF16)
        for shape in shapes
    ]
    ids = [some.astype((np.int64, np.int32)[seed % 2]) for some in case.topk_idx]
    scales = {"use_fp8": use_fp8, "round_scale": round_scale, "use_ue8m0": use_ue8m0}
    expected = reference.low_latency_dispatch(
        x,
        ids,
        num_max_dispatch_tokens_per_rank=num_max_tokens,
        num_experts=case.num_experts,
        layout=layout,
        **scales,
    )
    mine = expected[rank]
    stats = put(np.full(case.num_experts // case.num_ranks, 5, np.int32), framework)
    waited = put(np.zeros(case.num_ranks, np.int64), framework)
    given_ids, given_weights = put(ids[rank], framework), put(case.topk_weights[rank], framework)
    pause()
    out = buffer.low_latency_dispatch(
        put(x[rank], framework),
        given_ids,
        num_max_tokens,
        case.num_experts,
        stats,
        waited,
        return_recv_hook=hook,
        topk_weights=given_weights if with_weights else None,
        layout=layout,
        **scales,
        **options,
    )
    receive(out)
    check_received(out, mine)
    assert same_bits(fetch(stats), mine.recv_count + np.int32(5))
    assert (fetch(waited) >= 0).all()

    back_options = low_latency_combine_options(rng, over_network=LOW_LATENCY_OVER_NETWORK)
    if case.hidden % 128:
        back_options |= {"use_logfmt": False, "use_fp8": False}
    shape = (*mine.src_info.shape, case.hidden)
    y = [expert_outputs(rng, shape, below_one=bool(back_options["use_logfmt"])) for _ in expected]
    combined = reference.low_latency_combine(y, expected, ids, case.topk_weights, **back_options)[rank]
    zero_copy, has_target = bool(rng.integers(2)), bool(rng.integers(2))
    target = put(np.zeros((case.num_tokens[rank], case.hidden), BF16), framework) if has_target else None
    given_y = put(y[rank], framework)
    if zero_copy and framework != "jax":
        overwrite(buffer.get_next_low_latency_combine_buffer(out.handle), y[rank])
        given_y = put(np.zeros_like(y[rank]), framework)
    pause()
    back = buffer.low_latency_combine(
        given_y,
        given_ids,
        given_weights,
        out.handle,
        zero_copy=zero_copy and framework != "jax",
        out=target,
        return_recv_hook=hook,
        **back_options,
        **options,
    )
    receive(back)
    assert same_but_for_nan(fetch(back.combined_x), combined)
    assert target is None or back.combined_x is target
