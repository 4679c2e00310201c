"""Dispatch and combine for JAX: differentiable, eager and within ``jax.jit``, with nothing to build.

    import ep_rt.jax

    sent = ep_rt.jax.dispatch(buffer, x, topk_idx, topk_weights, num_experts=16, num_worst_tokens=64)
    y = ep_rt.jax.combine(experts(sent), sent.handle).combined_x

Every call is one of `ep_rt.Buffer`, and so is every step of a backward pass:

    forward               backward
    dispatch              combine of the gradients of rows and weights
    dispatch, handle=     the same
    combine               dispatch of the gradient, with the handle
    layout "expert", gradient of topk_weights: besides, one combine of narrow rows

Within a compiled program XLA calls back into Python, once for each call, with its own buffers: what
``jax.experimental.buffer_callback`` does, with a token besides. On a GPU the callback enqueues on XLA's
stream, waits for nothing, and copies results to XLA's memory there. The program holds all of a handle in its
own arrays, so residuals and several uses of a handle are as for any array, and so are loops and branches,
which all ranks must go through alike. On GPUs those take JAX 0.11, and raise `NotImplementedError` before.

Order     a call is an ordered effect, as ordered ones of ``jax.debug`` are: XLA makes the calls of a
          program, and of programs started one after another, in the order in which the functions were
          written, forward and backward, whatever their data. No call is dropped, moved or made twice:
          ``jax.checkpoint`` keeps results of calls instead of repeating them. Ranks that run the same
          program make the same calls, also those without tokens. On CPUs a program has made its
          calls when it returns.
Shapes    are static, so within ``jit``, ``lax.scan`` and ``jax.checkpoint`` a dispatch needs
          ``num_worst_tokens``. What overflows is dropped, and `Handle.overflow` says so.
Devices   one for each rank: its process's, under mpiexec, or that of a thread of ``run_local``. JAX refuses
          ordered effects in a program of several devices, so ``shard_map`` over those of one process raises.
Nodes     on GPUs of several nodes a handle has room for all tokens that may come from the others, 32 bytes
          for each, and a compiled program copies it: ``num_max_tokens_per_rank`` of ``Buffer.for_moe``, or
          8192 without, from each other node.
Threads   need a function of their own to compile (one that is defined on the rank will do): JAX lets one
          thread compile and run a function for the first time, and the others wait. On CPUs callbacks that
          wait for each other take up threads of XLA, which starts as many as there are cores: with ranks
          that are threads the environment variable ``NPROC`` must say more than their number, before JAX
          starts.
Errors    in shapes, dtypes and options are raised when a function is traced; others, within a compiled
          program, as JAX raises errors of callbacks, with the error of ep_rt in the text.

Callbacks are not recorded in command buffers: a replay would use memory that the call has given back.
Gradients have gradients. Needs JAX 0.10 or 0.11, in which ordered effects have no public name.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import arrays
from .arrays import ArrayView
from .buffer import Buffer
from .errors import ArrayError, ConfigError, HandleError
from .handle import DispatchHandle, FlatField, FlatShape, HandleShape
from .jax_calls import aval, call_p, open_buffer
from .requests import SUMMED_DTYPES, CombineRequest, DispatchRequest, Place, local_experts

Array = Any  # jax.Array; in results also None, where the docstring says so

_ROW_ALIGN_BYTES = 16  # of what a buffer moves
_TRACED = Place("traced")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "parts",
        "num_recv_tokens",
        "num_needed_rows",
        "num_recv_tokens_per_expert",
        "psum_num_tokens_per_expert",
    ],
    meta_fields=["buffer", "shape"],
)
@dataclass(frozen=True, eq=False)
class Handle:
    """The routing of a dispatch, for `combine` and for a repeated `dispatch`. A pytree; keeps no buffer.

    Attributes:
        num_recv_tokens, num_needed_rows: int32 [], see `DispatchHandle`.
        num_recv_tokens_per_expert: int32 [num_local_experts], as ``num_recv_tokens_per_expert_list``.
        psum_num_tokens_per_expert: as `DispatchHandle.psum_num_tokens_per_expert`.
        shape: constants: the number of tokens, of rows, and the like.
        parts, buffer: see `Buffer.flatten_handle`.
    """

    parts: tuple[Array, ...] = field(repr=False)
    num_recv_tokens: Array
    num_needed_rows: Array
    num_recv_tokens_per_expert: Array
    psum_num_tokens_per_expert: Array
    buffer: weakref.ref[Buffer] = field(repr=False)
    shape: FlatShape

    @property
    def overflow(self) -> Array:
        """bool [], whether ``num_worst_tokens`` left room for fewer rows than were needed."""
        return self.num_needed_rows > self.shape.handle.num_recv_rows


class Dispatched(NamedTuple):
    """See `dispatch`."""

    recv_x: Array
    recv_topk_idx: Array
    recv_topk_weights: Array
    handle: Handle


class Combined(NamedTuple):
    """See `combine`."""

    combined_x: Array
    combined_topk_weights: Array


def dispatch(
    buffer: Buffer,
    x: Array,
    topk_idx: Array | None = None,
    topk_weights: Array | None = None,
    *,
    handle: Handle | None = None,
    num_experts: int | None = None,
    num_worst_tokens: int = 0,
    expert_alignment: int = 1,
    layout: str = "rank",
) -> Dispatched:
    """`Buffer.dispatch`, differentiable in `x` and `topk_weights`.

    Padding is filled with zeros: the rows of ``recv_x`` that ``num_worst_tokens`` and `expert_alignment`
    add, and their gradients in the backward pass of `combine`. A row that did not fit has no gradient.

    Args:
        x: [num_tokens, hidden]; gradients need bfloat16, float16 or float32.
        topk_idx: [num_tokens, num_topk], int32 or int64, expert ids; -1 for none.
        topk_weights: float32 [num_tokens, num_topk]; delivered, not applied.
        handle: repeat the routing of an earlier dispatch of the same buffer; give `x` alone then.
        num_experts: of all ranks together; needed without `handle`.
        num_worst_tokens, expert_alignment, layout: as in `Buffer.dispatch`, whose ``num_max_tokens_per_rank``
            is that of `Buffer.for_moe`. Only an eager call may leave out `num_worst_tokens`.

    Returns:
        Dispatched: ``recv_x``, ``recv_topk_idx`` and ``recv_topk_weights`` as from `Buffer.dispatch`, None in
        the same cases, and ``handle``.

    Raises:
        ArrayError, ConfigError, HandleError: when traced; the peers are not told.
        Others as `Buffer.dispatch`; see the module for those of a compiled program.

    Collective, in the backward pass too. Host wait on a GPU: none with `num_worst_tokens`.
    """
    if handle is not None:
        if topk_idx is not None or topk_weights is not None:
            raise ConfigError("with handle= the routing is that of the handle; give x alone")
        if handle.buffer() is not buffer:
            raise HandleError("handle comes from another buffer")
        x = jnp.asarray(x)
        _check_dispatch(buffer, x, handle=_Planned.of(handle.shape), layout=layout)
        recv_x, _ = _again(_Again(handle.buffer, handle.shape, False), x, None, handle)
        return Dispatched(recv_x, None, None, handle)
    if topk_idx is None or num_experts is None:
        raise ConfigError("dispatch needs topk_idx and num_experts=, or a handle")
    x, topk_idx = jnp.asarray(x), jnp.asarray(topk_idx)
    topk_weights = None if topk_weights is None else jnp.asarray(topk_weights)
    request = _check_dispatch(
        buffer,
        x,
        topk_idx,
        topk_weights,
        num_experts=num_experts,
        num_worst_tokens=num_worst_tokens,
        expert_alignment=expert_alignment,
        layout=layout,
    )
    shape = FlatShape(
        HandleShape(x.shape[0], topk_idx.shape[1], num_worst_tokens, layout),
        num_landed_rows=request.num_landed_rows,
        num_local_experts=local_experts(num_experts, buffer.num_ranks),
        expert_alignment=expert_alignment,
    )
    exact = None if num_worst_tokens else _Exact()
    call = _Dispatch(weakref.ref(buffer), shape, num_experts, topk_weights is not None, exact)
    return Dispatched(*_dispatch(call, x, topk_idx, topk_weights))


def combine(
    x: Array,
    handle: Handle,
    topk_weights: Array | None = None,
    bias: Array | tuple[Array, ...] | None = None,
) -> Combined:
    """`Buffer.combine` with the buffer of the handle, differentiable in `x`, `topk_weights` and `bias`.

    Args:
        x: [rows of recv_x, hidden]. With layout "expert" and `topk_weights` that need a gradient, padding
            rows must be finite.
        handle: of the dispatch.
        topk_weights, bias: as in `Buffer.combine`.

    Returns:
        Combined: ``combined_x``, and ``combined_topk_weights`` where `Buffer.combine` has them.

    Raises:
        ArrayError, ConfigError: when traced; the peers are not told.
        Others as `Buffer.combine`; see the module for those of a compiled program.

    Collective, in the backward pass too. Host wait on a GPU: none.
    """
    x = jnp.asarray(x)
    topk_weights = None if topk_weights is None else jnp.asarray(topk_weights)
    given = bias if isinstance(bias, tuple) else (bias,)
    biases = tuple(jnp.asarray(each) for each in given if each is not None)
    CombineRequest.of(
        _seen(x, "x"),
        _Planned.of(handle.shape),
        None if topk_weights is None else _seen(topk_weights, "topk_weights"),
        tuple(_seen(each, f"bias[{number}]") for number, each in enumerate(biases)),
        owner=None,
        place=_TRACED,
    )
    call = _Combine(handle.buffer, handle.shape, topk_weights is not None, len(biases))
    return Combined(*_combine(call, x, topk_weights, biases, handle))


# What is known while a function is traced.


@dataclass(slots=True, eq=False, kw_only=True)
class _Planned(DispatchHandle):
    """A handle as far as checks look at it."""

    @classmethod
    def of(cls, shape: FlatShape) -> _Planned:
        return cls(
            owner=None,
            shape=shape.handle,
            num_recv_tokens_per_expert_list=(),
            psum_num_tokens_per_expert=None,
        )

    @property
    def num_recv_tokens(self) -> int:
        raise NotImplementedError

    @property
    def num_recv_tokens_per_rank(self) -> list[int]:
        raise NotImplementedError

    @property
    def psum_num_recv_tokens_per_local_rank(self) -> Any:
        raise NotImplementedError

    @property
    def psum_num_recv_tokens_per_expert(self) -> Any:
        raise NotImplementedError


def _seen(array: Array, name: str) -> ArrayView:
    """What checks want to know of an array, which may have no memory yet."""
    try:
        dtype = arrays.dtype_name(array.dtype)
    except ArrayError as error:
        raise ArrayError(f"{name}: {error}") from None
    return ArrayView(array.shape, (), dtype, _TRACED.device, 0, "jax", None)


def _check_dispatch(
    buffer: Buffer,
    x: Array,
    topk_idx: Array | None = None,
    topk_weights: Array | None = None,
    *,
    handle: DispatchHandle | None = None,
    num_experts: int | None = None,
    num_worst_tokens: int = 0,
    expert_alignment: int = 1,
    layout: str,
) -> DispatchRequest:
    return DispatchRequest.of(
        _seen(x, "x"),
        handle,
        None,
        None,
        None if topk_idx is None else _seen(topk_idx, "topk_idx"),
        None if topk_weights is None else _seen(topk_weights, "topk_weights"),
        expert_alignment,
        num_worst_tokens,
        num_experts,
        layout,
        num_max_tokens_per_rank=buffer.num_max_tokens_per_rank,
        owner=None,
        num_ranks=buffer.num_ranks,
        place=_TRACED,
    )


# Calls of a buffer, on arrays of any framework: first those that move, last the parts of the handle.


@dataclass(eq=False)
class _Exact:
    """What an eager dispatch finds out about its handle."""

    shape: FlatShape | None = None
    handle: DispatchHandle | None = None


@dataclass(frozen=True)
class _Dispatch:
    """Of x, ids and perhaps weights."""

    buffer: weakref.ref[Buffer]
    shape: FlatShape
    num_experts: int
    has_weights: bool
    exact: _Exact | None

    def run(self, buffer: Buffer, given: Sequence[Any], framework: str) -> list[Any]:
        x, topk_idx, *weights = given
        shape = self.shape
        is_by_expert = shape.handle.layout == "expert"
        sent = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights[0] if weights else None,
            num_experts=self.num_experts,
            num_worst_tokens=shape.handle.num_recv_rows,
            expert_alignment=shape.expert_alignment,
            layout=shape.handle.layout,
            zero_padding=is_by_expert,
        )
        if self.exact is not None:
            shape = shape._replace(
                handle=sent.handle.shape, num_landed_rows=sent.handle.num_recv_tokens, is_exact=True
            )
            self.exact.shape, self.exact.handle = shape, sent.handle
        results = [sent.recv_x, sent.recv_topk_idx, sent.recv_topk_weights]
        parts = buffer.flatten_handle(sent.handle, shape, framework)
        return [each for each in results if each is not None] + parts

    def results(self, x: Any, topk_idx: Any, *weights: Any) -> list[Any]:
        if self.exact is not None:
            raise ConfigError(
                "how many rows a dispatch delivers is not known when it is traced: give num_worst_tokens="
            )
        shape = self.shape
        num_rows = shape.handle.num_recv_rows
        found = [aval((num_rows, x.shape[1]), x.dtype)]
        if shape.handle.layout == "rank":
            found.append(aval((num_rows, shape.handle.num_topk), topk_idx.dtype))
        if weights:
            columns = (shape.handle.num_topk,) if shape.handle.layout == "rank" else ()
            found.append(aval((num_rows, *columns), np.float32))
        sizes = open_buffer(self.buffer).flat_layout(shape).num_bytes
        return found + [aval((size,), np.uint8) for size in sizes]


@dataclass(frozen=True)
class _Again:
    """A dispatch of x, and perhaps of weights, with a handle. Weights travel beside the rows, as scale
    factors would."""

    buffer: weakref.ref[Buffer]
    shape: FlatShape
    has_weights: bool

    def run(self, buffer: Buffer, given: Sequence[Any], framework: str) -> list[Any]:
        x, *weights = given[: 1 + self.has_weights]
        handle = buffer.unflatten_handle(self.shape, given[1 + self.has_weights :])
        sent = buffer.dispatch(
            (x, weights[0]) if weights else x,
            handle=handle,
            zero_padding=self.shape.handle.layout == "expert",
        )
        return list(sent.recv_x) if weights else [sent.recv_x]

    def results(self, *given: Any) -> list[Any]:
        moved = given[: 1 + self.has_weights]
        return [aval((self.shape.handle.num_recv_rows, each.shape[1]), each.dtype) for each in moved]


@dataclass(frozen=True)
class _Combine:
    """Of x, perhaps weights, and biases, with a handle."""

    buffer: weakref.ref[Buffer]
    shape: FlatShape
    has_weights: bool
    num_biases: int

    def run(self, buffer: Buffer, given: Sequence[Any], framework: str) -> list[Any]:
        num_moved = 1 + self.has_weights
        num_read = num_moved + self.num_biases
        x, *weights = given[:num_moved]
        handle = buffer.unflatten_handle(self.shape, given[num_read:])
        done = buffer.combine(
            x, handle, weights[0] if weights else None, tuple(given[num_moved:num_read]) or None
        )
        results = [done.combined_x, done.combined_topk_weights]
        return [each for each in results if each is not None]

    def results(self, *given: Any) -> list[Any]:
        # With layout "expert" weights multiply rows, and do not come back.
        is_back = self.has_weights and self.shape.handle.layout == "rank"
        return [
            aval((self.shape.handle.num_tokens, each.shape[1]), each.dtype) for each in given[: 1 + is_back]
        ]


# Derivatives.


def _field(handle_parts: Sequence[Array], place: FlatField) -> Array:
    """int32 [length], what a flat handle holds there."""
    numbers = handle_parts[place.array][place.offset : place.offset + 4 * place.length]
    return jax.lax.bitcast_convert_type(numbers.reshape(place.length, 4), jnp.int32)


def _new_handle(call: _Dispatch, parts: tuple[Array, ...]) -> Handle:
    shape, exact = call.shape, None
    if call.exact is not None:
        assert call.exact.shape is not None  # the call was made
        shape, exact = call.exact.shape, call.exact.handle
    at = open_buffer(call.buffer).flat_layout(shape)
    counts: Array
    if exact is None:
        num_recv_tokens, num_needed_rows = (
            _field(parts, each)[0] for each in (at.num_recv_tokens, at.num_needed_rows)
        )
        alignment = shape.expert_alignment
        counts = -(-_field(parts, at.expert_counts) // alignment) * alignment
    else:
        num_recv_tokens, num_needed_rows = (
            jnp.int32(each) for each in (exact.num_recv_tokens, exact.num_needed_rows)
        )
        counts = jnp.asarray(list(exact.num_recv_tokens_per_expert_list), jnp.int32)
    psum = _field(parts, at.psum) if shape.handle.layout == "expert" else None
    return Handle(parts, num_recv_tokens, num_needed_rows, counts, psum, call.buffer, shape)


def _cleared(rows: Array, handle: Handle) -> Array:
    """Received rows with zeros behind the last one, whatever bits are there."""
    if handle.shape.is_exact or handle.shape.handle.layout == "expert":
        return rows
    # As bits: XLA may select short floats by way of longer ones, and a NaN would come back as another.
    bits = jax.lax.bitcast_convert_type(rows, np.dtype(f"u{rows.dtype.itemsize}"))
    is_there = jnp.arange(len(rows)) < handle.num_recv_tokens
    kept = jnp.where(is_there[:, None], bits, jnp.zeros((), bits.dtype))
    return jax.lax.bitcast_convert_type(kept, rows.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(
    call: _Dispatch, x: Array, topk_idx: Array, topk_weights: Array | None
) -> tuple[Array, Array | None, Array | None, Handle]:
    weights = () if topk_weights is None else (topk_weights,)
    recv_x, *found = call_p.bind(x, topk_idx, *weights, call=call)
    recv_topk_idx = found.pop(0) if call.shape.handle.layout == "rank" else None
    recv_topk_weights = found.pop(0) if weights else None
    handle = _new_handle(call, tuple(found))
    return _cleared(recv_x, handle), recv_topk_idx, recv_topk_weights, handle


def _dispatch_forward(call: _Dispatch, x: Array, topk_idx: Array, topk_weights: Array | None) -> Any:
    if x.dtype != np.uint8 and arrays.dtype_name(x.dtype) not in SUMMED_DTYPES:
        raise ArrayError(f"x has dtype {x.dtype}; gradients need one of {', '.join(SUMMED_DTYPES)}")
    results = _dispatch(call, x, topk_idx, topk_weights)
    _, recv_topk_idx, _, handle = results
    return results, (recv_topk_idx, handle)


def _dispatch_backward(call: _Dispatch, residuals: Any, grads: Any) -> Any:
    recv_topk_idx, handle = residuals
    grad_x, _, grad_weights, _ = grads
    is_real = grad_x.dtype != jax.dtypes.float0
    if not is_real:
        grad_x = jnp.zeros((grad_x.shape[0], _ROW_ALIGN_BYTES // 4), jnp.float32)
    rows = None
    if call.has_weights and recv_topk_idx is not None:
        rows = jnp.where(recv_topk_idx < 0, 0, grad_weights)  # those for experts of other ranks became 0
    combine = _Combine(handle.buffer, handle.shape, rows is not None, 0)
    back_x, back_weights = _combine(combine, grad_x, rows, (), handle)
    if call.has_weights and rows is None:
        back_weights = _to_columns(grad_weights, handle)
    return back_x if is_real else None, None, back_weights


def _to_columns(grad_weights: Array, handle: Handle) -> Array:
    """What belongs to the weights of expert-major rows, in the columns of ``topk_idx`` they came from."""
    shape = handle.shape
    num_rows, num_topk = shape.handle.num_recv_rows, shape.handle.num_topk
    place = _field(handle.parts, open_buffer(handle.buffer).flat_layout(shape).expert_row)
    place = place.reshape(shape.num_landed_rows, num_topk)
    is_there = (place >= 0) & (jnp.arange(shape.num_landed_rows)[:, None] < handle.num_recv_tokens)
    columns = jnp.broadcast_to(jnp.arange(num_topk), place.shape)
    column = jnp.full(num_rows, -1).at[jnp.where(is_there, place, num_rows)].set(columns, mode="drop")
    num_columns = -(-num_topk // 4) * 4
    rows = jnp.where(column[:, None] == jnp.arange(num_columns), grad_weights[:, None], 0)
    combined, _ = _combine(_Combine(handle.buffer, shape, False, 0), rows, None, (), handle)
    return combined[:, :num_topk]


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _again(call: _Again, x: Array, weights: Array | None, handle: Handle) -> tuple[Array, Array | None]:
    moved = (x,) if weights is None else (x, weights)
    recv_x, *recv_weights = (_cleared(rows, handle) for rows in call_p.bind(*moved, *handle.parts, call=call))
    return recv_x, recv_weights[0] if recv_weights else None


def _again_forward(call: _Again, x: Array, weights: Array | None, handle: Handle) -> Any:
    return _again(call, x, weights, handle), handle


def _again_backward(call: _Again, handle: Handle, grads: Any) -> Any:
    grad_x, grad_weights = grads
    combine = _Combine(call.buffer, call.shape, call.has_weights, 0)
    back_x, back_weights = _combine(combine, grad_x, grad_weights, (), handle)
    return back_x, back_weights, None


_again.defvjp(_again_forward, _again_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(
    call: _Combine, x: Array, topk_weights: Array | None, biases: tuple[Array, ...], handle: Handle
) -> tuple[Array, Array | None]:
    moved = (x,) if topk_weights is None else (x, topk_weights)
    combined_x, *weights = call_p.bind(*moved, *biases, *handle.parts, call=call)
    return combined_x, weights[0] if weights else None


def _combine_forward(
    call: _Combine, x: Array, topk_weights: Array | None, biases: tuple[Array, ...], handle: Handle
) -> Any:
    is_product = call.has_weights and call.shape.handle.layout == "expert"
    factors = (x, topk_weights) if is_product else None
    return _combine(call, x, topk_weights, biases, handle), (factors, handle)


def _combine_backward(call: _Combine, residuals: Any, grads: Any) -> Any:
    factors, handle = residuals
    grad_x, grad_weights = grads
    again = _Again(call.buffer, call.shape, grad_weights is not None)
    rows, row_weights = _again(again, grad_x, grad_weights, handle)
    if factors is not None:
        x, topk_weights = factors
        wide = rows.astype(jnp.float32)
        row_weights = (wide * x.astype(jnp.float32)).sum(axis=1)
        rows = (wide * topk_weights[:, None]).astype(x.dtype)
    return rows, row_weights, (grad_x,) * call.num_biases, None


_combine.defvjp(_combine_forward, _combine_backward)
