"""Checks of `ep_rt.jax` on one rank of a buffer: the same for the host backend and for GPUs.

Where sums are compared with those of a dense layer numbers are small integers, so that every sum is exact,
whatever the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from host_cases import ExpertMajorCase, random_values, same_bits

import ep_rt
import ep_rt.jax as ep
from ep_rt import reference

NUM_TOKENS = (0, 5, 3, 6)  # of the ranks, in turn
HIDDEN, NUM_EXPERTS, NUM_TOPK = 8, 8, 3
EXACT: dict[str, dict[str, Any]] = {
    "rank": {"layout": "rank"},
    "expert": {"layout": "expert"},
    "expert-aligned": {"layout": "expert", "expert_alignment": 4},
}
STATIC: dict[str, dict[str, Any]] = {
    "rank-worst": {"layout": "rank", "num_worst_tokens": 40},
    "expert-worst": {"layout": "expert", "expert_alignment": 4, "num_worst_tokens": 96},
}
SUMMED = (ml_dtypes.bfloat16, np.float16, np.float32)

ORDER_FORMS = ("plain", "jit", "checkpoint", "programs", "programs and eager calls")

Array = Any
Way = Callable[..., Any]  # how a function is run: as it is, or compiled


class Inputs(NamedTuple):
    """What has gradients. `scale` is the experts' parameter, the same on all ranks."""

    x: Array
    topk_weights: Array
    bias: Array
    scale: Array


class Case(NamedTuple):
    """What a rank knows."""

    inputs: Inputs
    topk_idx: Array
    grad: Array  # of the result

    @classmethod
    def of(cls, rank: int, dtype: Any = jnp.float32) -> Case:
        rng = np.random.default_rng(rank)
        num_tokens = NUM_TOKENS[rank % len(NUM_TOKENS)]

        def integers(low: int, high: int, *shape: int) -> Array:
            return jnp.asarray(rng.integers(low, high, (num_tokens, *shape)), dtype)

        return cls(
            inputs=Inputs(
                x=integers(-3, 4, HIDDEN),
                topk_weights=integers(1, 4, NUM_TOPK).astype(jnp.float32),
                bias=integers(-3, 4, HIDDEN),
                scale=jnp.full(HIDDEN, 2, dtype),
            ),
            topk_idx=integers(-1, NUM_EXPERTS, NUM_TOPK).astype(jnp.int32),
            grad=integers(-1, 2, HIDDEN),
        )


def layer(buffer: ep_rt.Buffer, options: dict[str, Any], topk_idx: Array, inputs: Inputs) -> Array:
    """Experts that square: not linear, so that a wrong row shows in the gradients."""
    x, topk_weights, bias, scale = inputs
    sent = ep.dispatch(buffer, x, topk_idx, topk_weights, num_experts=NUM_EXPERTS, **options)
    y = (sent.recv_x * scale) ** 2
    if options["layout"] == "expert":
        return ep.combine(y, sent.handle, sent.recv_topk_weights, bias).combined_x
    return ep.combine(y * sent.recv_topk_weights.sum(1, keepdims=True), sent.handle, bias=bias).combined_x


def dense(topk_idx: Array, inputs: Inputs) -> Array:
    x, topk_weights, bias, scale = inputs
    weight = (topk_weights * (topk_idx >= 0)).sum(axis=1, keepdims=True)
    return (x * scale) ** 2 * weight + bias


def with_gradients(
    fn: Callable[[Inputs], Array], inputs: Inputs, grad: Array, way: Way = lambda fn: fn
) -> tuple[Array, Inputs]:
    """The result, and the gradients of all inputs."""

    def both(inputs: Inputs) -> Any:
        result, pull = jax.vjp(fn, inputs)
        return result, pull(grad)[0]

    found: tuple[Array, Inputs] = way(both)(inputs)
    return found


def same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


def num_copies(topk_idx: Array, options: dict[str, Any], num_ranks: int = 4) -> Array:
    """[num_tokens, 1], the rows of so many ranks, or of all experts, that a token becomes."""
    ids = np.asarray(topk_idx)
    if options["layout"] == "expert":
        return jnp.asarray((ids >= 0).sum(axis=1, keepdims=True))
    ranks = [{expert * num_ranks // NUM_EXPERTS for expert in row if expert >= 0} for row in ids.tolist()]
    return jnp.asarray([len(each) for each in ranks], jnp.int32).reshape(-1, 1)


def check_gradients(buffer: ep_rt.Buffer, options: dict[str, Any], way: Way) -> None:
    """A layer against a dense one on this rank, whose experts are everywhere."""
    case = Case.of(buffer.rank)
    result, found = with_gradients(
        partial(layer, buffer, options, case.topk_idx), case.inputs, case.grad, way
    )
    wanted, expected = with_gradients(partial(dense, case.topk_idx), case.inputs, case.grad)
    assert same(result, wanted)
    for name in ("x", "topk_weights", "bias"):
        assert same(getattr(found, name), getattr(expected, name)), name
    # Each rank has a part of the experts' gradient: that of the rows that it received.
    everywhere = buffer.group.allgather((np.asarray(found.scale), np.asarray(expected.scale)))
    assert np.array_equal(*np.sum(everywhere, axis=0))


def check_oracle(
    buffer: ep_rt.Buffer,
    seed: int,
    layout: str,
    way: Way,
    *,
    is_exact: bool,
    ranks_per_node: int | None = None,
) -> None:
    """dispatch, repeated dispatch and combine of one random layer, bit for bit; rows may not fit."""
    drawn = ExpertMajorCase.draw(seed, buffer.num_ranks, is_exact=is_exact)
    assert drawn.quantize is None
    case, rank = drawn.case, buffer.rank
    weights = drawn.topk_weights

    def there(x: Array, again: Array, topk_idx: Array, topk_weights: Array | None) -> Any:
        sent = ep.dispatch(
            buffer,
            x,
            topk_idx,
            topk_weights,
            num_experts=case.num_experts,
            expert_alignment=drawn.alignment,
            num_worst_tokens=drawn.num_worst_tokens,
            layout=layout,
        )
        return sent, ep.dispatch(buffer, again, handle=sent.handle).recv_x, sent.handle.overflow

    x, again = (jnp.asarray(each[rank][0]) for each in (drawn.payload, drawn.again))
    sent, recv_again, overflow = way(there)(
        x, again, jnp.asarray(case.topk_idx[rank]), None if weights is None else jnp.asarray(weights[rank])
    )
    handle, d, e = sent.handle, drawn.dispatched[rank], drawn.expanded[rank]
    kept = min(d.num_recv_tokens, drawn.num_worst_tokens or d.num_recv_tokens)
    recv_x, recv_again = np.asarray(sent.recv_x), np.asarray(recv_again)
    assert handle.num_recv_tokens == d.num_recv_tokens
    assert handle.num_recv_tokens_per_expert.tolist() == d.num_recv_tokens_per_expert
    if layout == "rank":
        cached = reference.dispatch_cached([rows for rows, _ in drawn.again], drawn.dispatched)[rank][0]
        for found, wanted in ((recv_x, d.recv_x), (recv_again, cached)):
            assert same_bits(found[:kept], wanted[:kept])
            assert not any(found[kept:].tobytes())
        assert np.array_equal(sent.recv_topk_idx, d.recv_topk_idx)
        assert bool(overflow) == d.overflow
        recv_weights = d.recv_topk_weights
    else:
        assert same_bits(recv_x, e.x)
        assert same_bits(recv_again, drawn.expanded_again(rank)[0])
        assert sent.recv_topk_idx is None
        assert same_bits(np.asarray(handle.psum_num_tokens_per_expert), e.psum_num_tokens_per_expert)
        assert handle.num_needed_rows == e.num_needed_rows
        assert bool(overflow) == e.overflow
        recv_weights = e.weights
    if weights is None:
        assert sent.recv_topk_weights is None
    else:
        assert same_bits(np.asarray(sent.recv_topk_weights), recv_weights)

    rng, dtype = case.rng, SUMMED[seed % 3]
    if layout == "rank":
        num_rows = [len(each.recv_x) for each in drawn.dispatched]
    else:
        num_rows = [len(each.row) for each in drawn.expanded]
    y = [random_values(rng, (rows, case.hidden), dtype) for rows in num_rows]
    shapes = [(count, case.hidden) for count in case.num_tokens]
    biases = [tuple(random_values(rng, each, dtype) for _ in range(seed // 3 % 3)) for each in shapes]
    if layout == "rank":
        given = None
        if weights is not None:
            given = [random_values(rng, each.recv_topk_idx.shape, np.float32) for each in drawn.dispatched]
        combined = reference.combine(
            y,
            drawn.dispatched,
            num_tokens=case.num_tokens,
            topk_weights=given,
            bias=[each if len(each) == 2 else each[0] for each in biases] if biases[0] else None,
            ranks_per_node=ranks_per_node,
        )[rank]
    else:
        given = None if weights is None else [random_values(rng, (rows,), np.float32) for rows in num_rows]
        combined = drawn.combined(y, given, biases, ranks_per_node=ranks_per_node)[rank]
    combined_x, combined_weights = way(ep.combine)(
        jnp.asarray(y[rank]),
        handle,
        None if given is None else jnp.asarray(given[rank]),
        tuple(jnp.asarray(each) for each in biases[rank]),
    )
    assert same_bits(np.asarray(combined_x), combined.x)
    if combined_weights is None:
        assert combined.topk_weights is None
    else:
        assert same_bits(np.asarray(combined_weights), combined.topk_weights)


def deep_layers(
    buffer: ep_rt.Buffer, options: dict[str, Any], topk_idx: Array, inputs: Inputs, *, form: str
) -> Array:
    """Three layers, one after the other, and a fourth beside them; `form` says how they are written."""
    one = partial(layer, buffer, options, topk_idx)

    def step(inputs: Inputs) -> Inputs:
        return inputs._replace(x=one(inputs) * 0.25)

    wrapped = {"checkpoint": jax.checkpoint, "jit": jax.jit}.get(form, lambda fn: fn)(step)
    if form.startswith("scan"):
        body = jax.checkpoint(step) if form == "scan of checkpoints" else step
        deep, _ = jax.lax.scan(lambda carry, _: (body(carry), None), inputs, None, length=3)
    else:
        deep = wrapped(wrapped(wrapped(inputs)))
    return deep.x + one(inputs)


def deep_dense(topk_idx: Array, inputs: Inputs) -> Array:
    deep = inputs
    for _ in range(3):
        deep = deep._replace(x=dense(topk_idx, deep) * 0.25)
    return deep.x + dense(topk_idx, inputs)


def check_decided(buffer: ep_rt.Buffer, options: dict[str, Any]) -> None:
    """Layers in one branch, and as often as the data say; all ranks decide alike."""
    case = Case.of(buffer.rank)
    one = partial(layer, buffer, options, case.topk_idx)

    def choose(is_moe: Array, inputs: Inputs) -> Array:
        return jax.lax.cond(is_moe, one, lambda inputs: inputs.x, inputs)

    chosen = jax.jit(choose)
    assert same(chosen(True, case.inputs), dense(case.topk_idx, case.inputs))
    assert same(chosen(False, case.inputs), case.inputs.x)

    def repeat(times: Array, inputs: Inputs) -> Array:
        def again(state: Any) -> Any:
            count, inputs = state
            return count + 1, inputs._replace(x=0.5 * one(inputs))

        return jax.lax.while_loop(lambda state: state[0] < times, again, (0, inputs))[1].x

    repeated, expected = jax.jit(repeat), case.inputs
    for times in range(2):  # further squares would have more bits than float32
        assert same(repeated(times, case.inputs), expected.x)
        expected = expected._replace(x=0.5 * dense(case.topk_idx, expected))
    np.testing.assert_allclose(repeated(3, case.inputs), 0.5 * dense(case.topk_idx, expected), rtol=1e-5)


def check_deep(buffer: ep_rt.Buffer, options: dict[str, Any], form: str, way: Way) -> None:
    """Against dense layers on this rank; sums differ in their order."""
    case = Case.of(buffer.rank)
    inputs = case.inputs._replace(x=case.inputs.x * 0.25, scale=case.inputs.scale * 0.25)
    result, found = with_gradients(
        partial(deep_layers, buffer, options, case.topk_idx, form=form), inputs, case.grad, way
    )
    wanted, expected = with_gradients(partial(deep_dense, case.topk_idx), inputs, case.grad)
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)
    for name in ("x", "topk_weights", "bias"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    scales = buffer.group.allgather((np.asarray(found.scale), np.asarray(expected.scale)))
    total, wanted_total = np.sum(scales, axis=0)
    np.testing.assert_allclose(total, wanted_total, rtol=1e-4, atol=1e-4)


class Log(list[str]):
    """The calls of one rank, in the order in which its buffer gets them."""

    def watch(self, buffer: ep_rt.Buffer) -> None:
        for name in ("dispatch", "combine"):
            setattr(buffer, name, partial(self.call, name, getattr(buffer, name)))

    def call(self, name: str, fn: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        rows = x[0] if isinstance(x, tuple) else x
        self.append(f"{name} {rows.shape[1]}")  # layers are told apart by the width of their rows
        return fn(x, *args, **kwargs)


def check_order(buffer: ep_rt.Buffer, form: str) -> None:
    """Layers that do not depend on each other, with sums for losses: the data would allow any order."""
    case, log, num_rounds = Case.of(buffer.rank), Log(), 3
    log.watch(buffer)

    def one(width: int, x: Array) -> Array:
        # More to do before the first dispatch on some ranks than on others.
        for _ in range(40 * buffer.rank):
            x = jnp.sin(x @ jnp.ones((HIDDEN, HIDDEN)))
        rows = jnp.tile(x, (1, width // HIDDEN))
        sent = ep.dispatch(
            buffer, rows, case.topk_idx, num_experts=NUM_EXPERTS, layout="expert", num_worst_tokens=96
        )
        return ep.combine(sent.recv_x, sent.handle).combined_x.sum()

    there_and_back, widths = ("dispatch", "combine"), (8, 16, 24)
    wrap = {"jit": jax.jit, "checkpoint": jax.checkpoint}.get(form, lambda fn: fn)
    layers = [wrap(partial(one, width)) for width in widths]
    if form.startswith("programs"):
        programs = [jax.jit(jax.grad(each)) for each in layers]
        if form == "programs and eager calls":
            programs[1] = jax.grad(layers[1])
        for _ in range(num_rounds):
            jax.block_until_ready([program(case.inputs.x) for program in programs])
        wanted = [f"{name} {width}" for width in widths for name in there_and_back * 2]
    else:
        whole = jax.jit(jax.grad(lambda x: sum(each(x) for each in layers)))
        for _ in range(num_rounds):
            whole(case.inputs.x).block_until_ready()
        wanted = [f"{name} {width}" for width in (*widths, *widths[::-1]) for name in there_and_back]
    del buffer.dispatch, buffer.combine
    assert log == num_rounds * wanted
