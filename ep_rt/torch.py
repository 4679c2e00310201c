"""Dispatch and combine for PyTorch: differentiable, and opaque operators to ``torch.compile``.

    import ep_rt.torch

    key = ep_rt.torch.key_of(buffer)
    sent = ep_rt.torch.dispatch(key, x, topk_idx, topk_weights, num_experts=16)
    y = ep_rt.torch.combine(experts(sent), sent.handle).combined_x

Every call is one of `ep_rt.Buffer`, on the stream that is current, and so is every step of a backward pass:

    forward               backward
    dispatch              combine of the gradients of rows and weights
    dispatch, handle=     the same
    combine               dispatch of the gradient, with the handle
    layout "expert", gradient of topk_weights: besides, one dispatch and one combine of narrow rows

What passes through a graph, and how long it lives:

    buffer    a `BufferKey`, which is two integers, constants of a graph. Keys do not keep buffers alive: once
              a buffer is gone, a dispatch with its key raises `ClosedError`.
    handle    a `Handle`, whose contents stay outside the graph. `Handle.token`, a float64 of CPU memory, says
              which they are; they live, and their buffer with them, as long as that memory does, that is as
              long as the handle, a view of its token, or a graph that will need it for its backward pass. A
              copy of the token keeps nothing alive: what moves saved tensors elsewhere must leave it alone.

A closed buffer raises `ClosedError` in all calls, also in a backward pass that was recorded before. Handles
may be used again, in any order.

A backward pass is collective like its forward pass. Its calls are the same on every rank if the forward's
were, and if the same arguments required gradients: a rank that received nothing computes with its 0 rows like
the others. To that end the token takes part in autograd: a combine is recorded if the dispatch of its handle
was, even if a rank's rows need no gradient. Calls of a compiled graph that do not depend on each other, as of
two layers side by side, are made in the compiler's order, which may differ between ranks with other numbers
of tokens: compile such layers apart.

In a CUDA graph every result of these calls must be held as long as the graph is replayed, also what a
backward pass captures and drops by itself: replays write there, and later calls could be given the same
memory.

Gradients have gradients, but not those of weights of layout "expert". Needs PyTorch 2.4, is tested with 2.13.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .buffer import Buffer
from .errors import ClosedError, ConfigError, HandleError
from .handle import DispatchHandle

Tensor = Any  # torch.Tensor; in results also None, where the docstring says so

_ROW_ALIGN_BYTES = 16  # of what a buffer moves


class BufferKey(NamedTuple):
    """A buffer's name within its process, see `key_of`.

    Attributes:
        number: no other buffer of the process has or had it.
        num_ranks: of the buffer.
    """

    number: int
    num_ranks: int


class Handle(NamedTuple):
    """The routing of a dispatch, for `combine` and for a repeated `dispatch`.

    Attributes:
        token: see the module.
        num_tokens: tokens this rank sent from.
        num_recv_rows: rows of ``recv_x``.
        psum_num_tokens_per_expert: as `DispatchHandle.psum_num_tokens_per_expert`.
    """

    token: Tensor
    num_tokens: int
    num_recv_rows: int
    psum_num_tokens_per_expert: Tensor

    def unwrap(self) -> DispatchHandle:
        """The handle that the buffer made: its counts, its overflow flag. Not within a compiled function."""
        return _contents(self.token).handle


class Dispatched(NamedTuple):
    """See `dispatch`."""

    recv_x: Tensor
    recv_topk_idx: Tensor
    recv_topk_weights: Tensor
    handle: Handle


class Combined(NamedTuple):
    """See `combine`."""

    combined_x: Tensor
    combined_topk_weights: Tensor


# Operators of a compiled graph take tensors and constants, so they have to find the objects behind them in
# module variables. Neither table keeps anything alive.
_keys: weakref.WeakKeyDictionary[Buffer, BufferKey] = weakref.WeakKeyDictionary()
_buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
_handles: weakref.WeakValueDictionary[int, _Contents] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class _Contents:
    """What a token stands for.

    Attributes:
        num_experts, expert_alignment: as given to the dispatch.
        is_padding: bool [num_recv_rows], with ``num_worst_tokens`` and layout "rank".
    """

    buffer: Buffer
    handle: DispatchHandle
    num_experts: int
    expert_alignment: int
    is_padding: Tensor | None


class _Memory(np.ndarray[Any, np.dtype[np.float64]]):
    """The memory of a token. Torch frees it with the last tensor over it, and with it `contents`."""

    contents: _Contents


def key_of(buffer: Buffer) -> BufferKey:
    """The key of a buffer, always the same. Local.

    Raises:
        ConfigError: within a compiled function, which can hold a key and not a buffer.
    """
    if torch.compiler.is_compiling():
        raise ConfigError("make the key outside of the compiled function: ep_rt.torch.key_of(buffer)")
    key = _keys.get(buffer)
    if key is None:
        key = BufferKey(next(_numbers), buffer.num_ranks)
        _keys[buffer] = key
        _buffers[key.number] = buffer
    return key


def dispatch(
    buffer: Buffer | BufferKey,
    x: Tensor,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
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
        buffer: its key within a compiled function.
        x: [num_tokens, hidden]; gradients need bfloat16, float16 or float32.
        topk_idx: [num_tokens, num_topk], int64 or int32, expert ids; -1 for none.
        topk_weights: float32 [num_tokens, num_topk]; delivered, not applied.
        handle: repeat the routing of an earlier dispatch of the same buffer; give `x` alone then.
        num_experts: of all ranks together; needed without `handle`.
        num_worst_tokens, expert_alignment, layout: as in `Buffer.dispatch`, whose ``num_max_tokens_per_rank``
            is that of `Buffer.for_moe`. Without `num_worst_tokens` a compiled graph has a size that only the
            call tells; ``fullgraph=True`` then needs
            ``torch._dynamo.config.capture_dynamic_output_shape_ops``.

    Returns:
        Dispatched: ``recv_x``, ``recv_topk_idx`` and ``recv_topk_weights`` as from `Buffer.dispatch`, None in
        the same cases, and ``handle``.

    Raises: as `Buffer.dispatch`; ClosedError and HandleError if what a key or a handle stands for is gone.

    Collective, in the backward pass too.
    """
    key = buffer if isinstance(buffer, BufferKey) else key_of(buffer)
    if handle is not None:
        if topk_idx is not None or topk_weights is not None:
            raise ConfigError("with handle= the routing is that of the handle; give x alone")
        if not torch.compiler.is_compiling() and _buffer(key.number) is not _contents(handle.token).buffer:
            raise HandleError("handle comes from another buffer")
        recv_x, _ = torch.ops.ep_rt.dispatch_again(x, handle.token, None, handle.num_recv_rows)
        return Dispatched(recv_x, None, None, handle)
    if topk_idx is None or num_experts is None:
        raise ConfigError("dispatch needs topk_idx and num_experts=, or a handle")
    recv_x, recv_topk_idx, recv_topk_weights, psum, token = torch.ops.ep_rt.dispatch(
        x,
        topk_idx,
        topk_weights,
        key.number,
        num_experts,
        num_experts // key.num_ranks,
        num_worst_tokens,
        expert_alignment,
        layout,
    )
    is_by_expert = layout == "expert"
    return Dispatched(
        recv_x,
        None if is_by_expert else recv_topk_idx,
        None if topk_weights is None else recv_topk_weights,
        Handle(token, x.shape[0], recv_x.shape[0], psum if is_by_expert else None),
    )


def combine(
    x: Tensor,
    handle: Handle,
    topk_weights: Tensor | None = None,
    bias: Tensor | tuple[Tensor, ...] | None = None,
) -> Combined:
    """`Buffer.combine` with the buffer of the handle, differentiable in `x`, `topk_weights` and `bias`.

    Args:
        x: [rows of recv_x, hidden]. With layout "expert" and `topk_weights` that need a gradient, padding
            rows must be finite.
        handle: of the dispatch.
        topk_weights, bias: as in `Buffer.combine`.

    Returns:
        Combined: ``combined_x``, and ``combined_topk_weights`` where `Buffer.combine` has them.

    Raises: as `Buffer.combine`; HandleError if the contents of the handle are gone.

    Collective, in the backward pass too.
    """
    biases = bias if isinstance(bias, tuple) else (bias,)
    if len(biases) > 2:
        raise ConfigError(f"bias has {len(biases)} arrays; at most 2")
    first, second = (*biases, None, None)[:2]
    combined_x, combined_topk_weights = torch.ops.ep_rt.combine(
        x, handle.token, topk_weights, first, second, handle.num_tokens
    )
    has_weights = topk_weights is not None and topk_weights.dim() == 2
    return Combined(combined_x, combined_topk_weights if has_weights else None)


# Operators: what they do, their shapes, their gradients. A tensor that is not there has no elements.


def _buffer(number: int) -> Buffer:
    buffer = _buffers.get(number)
    if buffer is None:
        raise ClosedError("the buffer of this key is gone; a key does not keep it")
    return buffer


def _contents(token: Tensor) -> _Contents:
    contents = _handles.get(int(token.item()))
    if contents is None:
        raise HandleError("the handle is gone: the memory of its token was freed, and a copy keeps nothing")
    return contents


def _new_token(contents: _Contents) -> Tensor:
    number = next(_numbers)
    memory = np.full(1, number, np.float64).view(_Memory)
    memory.contents = contents
    _handles[number] = contents
    return torch.from_numpy(memory)


def _none(like: Tensor, dtype: Any = None) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer: int,
    num_experts: int,
    num_local_experts: int,
    num_worst_tokens: int,
    expert_alignment: int,
    layout: str,
) -> tuple[Tensor, ...]:
    found = _buffer(buffer)
    sent = found.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_experts=num_experts,
        num_worst_tokens=num_worst_tokens,
        expert_alignment=expert_alignment,
        layout=layout,
        zero_padding=layout == "expert",
    )
    is_padding = None
    if num_worst_tokens and layout == "rank":
        is_padding = (sent.recv_topk_idx < 0).all(dim=1)
        _clear(sent.recv_x, is_padding)
    contents = _Contents(found, sent.handle, num_experts, expert_alignment, is_padding)
    psum = sent.handle.psum_num_tokens_per_expert
    return (
        sent.recv_x,
        _none(topk_idx) if sent.recv_topk_idx is None else sent.recv_topk_idx,
        _none(x, torch.float32) if sent.recv_topk_weights is None else sent.recv_topk_weights,
        _none(topk_idx, torch.int32) if psum is None else psum,
        _new_token(contents),
    )


def _clear(rows: Tensor, is_padding: Tensor) -> None:
    rows.view(torch.uint8).masked_fill_(is_padding[:, None], 0)  # whatever bits they hold, NaN too


def _dispatch_shapes(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer: int,
    num_experts: int,
    num_local_experts: int,
    num_worst_tokens: int,
    expert_alignment: int,
    layout: str,
) -> tuple[Tensor, ...]:
    num_rows = num_worst_tokens or torch.library.get_ctx().new_dynamic_size()
    is_by_expert = layout == "expert"
    num_topk = topk_idx.shape[1]
    weights_shape = (0,) if topk_weights is None else (num_rows,) if is_by_expert else (num_rows, num_topk)
    return (
        x.new_empty(num_rows, x.shape[1]),
        topk_idx.new_empty((0,) if is_by_expert else (num_rows, num_topk)),
        x.new_empty(weights_shape, dtype=torch.float32),
        topk_idx.new_empty(num_local_experts if is_by_expert else 0, dtype=torch.int32),
        torch.empty(1, dtype=torch.float64, device="cpu"),
    )


def _dispatch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, topk_idx = inputs[:2]
    ctx.num_tokens = x.shape[0]
    ctx.is_by_expert = inputs[-1] == "expert"
    ctx.save_for_backward(output[4], topk_idx if ctx.is_by_expert else output[1])


def _dispatch_backward(
    ctx: Any, grad_x: Tensor, _idx: Tensor, grad_weights: Tensor, _psum: Tensor, _token: Tensor
) -> tuple[Tensor | None, ...]:
    token, topk_idx = ctx.saved_tensors
    needs_x, _, needs_weights, *others = ctx.needs_input_grad
    back_x = back_weights = None
    if not needs_x:
        grad_x = grad_x.new_zeros(grad_x.shape[0], _ROW_ALIGN_BYTES // grad_x.element_size())
    if ctx.is_by_expert:
        if needs_x:
            back_x, _ = torch.ops.ep_rt.combine(grad_x, token, None, None, None, ctx.num_tokens)
        if needs_weights:
            back_weights = torch.ops.ep_rt.combine_expert_weights(grad_weights, topk_idx, token, back_x)
    else:
        # Weights for experts of other ranks were replaced by 0.
        rows = grad_weights.masked_fill(topk_idx < 0, 0) if needs_weights else None
        back_x, back_weights = torch.ops.ep_rt.combine(grad_x, token, rows, None, None, ctx.num_tokens)
    return (
        back_x if needs_x else None,
        None,
        back_weights if needs_weights else None,
        *[None for _ in others],
    )


def _dispatch_again(
    x: Tensor, token: Tensor, weights: Tensor | None, num_recv_rows: int
) -> tuple[Tensor, Tensor]:
    contents = _contents(token)
    # The weights of layout "rank" travel beside the rows, as scale factors would.
    sent = contents.buffer.dispatch(
        x if weights is None else (x, weights),
        handle=contents.handle,
        zero_padding=contents.handle.layout == "expert",
    )
    recv_x, recv_weights = (sent.recv_x, None) if weights is None else sent.recv_x
    if contents.is_padding is not None:
        for rows in (recv_x, recv_weights):
            if rows is not None:
                _clear(rows, contents.is_padding)
    return recv_x, _none(x, torch.float32) if recv_weights is None else recv_weights


def _dispatch_again_shapes(
    x: Tensor, token: Tensor, weights: Tensor | None, num_recv_rows: int
) -> tuple[Tensor, Tensor]:
    recv_weights = _none(x, torch.float32)
    if weights is not None:
        recv_weights = weights.new_empty(num_recv_rows, weights.shape[1])
    return x.new_empty(num_recv_rows, x.shape[1]), recv_weights


def _dispatch_again_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, token, weights, _ = inputs
    ctx.num_tokens = x.shape[0]
    ctx.has_weights = weights is not None
    ctx.save_for_backward(token)


def _dispatch_again_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    [token] = ctx.saved_tensors
    rows = grad_weights if ctx.has_weights else None
    back_x, back_weights = torch.ops.ep_rt.combine(grad_x, token, rows, None, None, ctx.num_tokens)
    return back_x, None, back_weights if ctx.has_weights else None, None


def _combine(
    x: Tensor,
    token: Tensor,
    topk_weights: Tensor | None,
    bias: Tensor | None,
    second_bias: Tensor | None,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    contents = _contents(token)
    done = contents.buffer.combine(x, contents.handle, topk_weights, (bias, second_bias))
    weights = done.combined_topk_weights
    return done.combined_x, _none(x, torch.float32) if weights is None else weights


def _combine_shapes(
    x: Tensor,
    token: Tensor,
    topk_weights: Tensor | None,
    bias: Tensor | None,
    second_bias: Tensor | None,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    weights = _none(x, torch.float32)
    if topk_weights is not None and topk_weights.dim() == 2:
        weights = topk_weights.new_empty(num_tokens, topk_weights.shape[1])
    return x.new_empty(num_tokens, x.shape[1]), weights


def _combine_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, token, topk_weights = inputs[:3]
    ctx.num_rows = x.shape[0]
    ctx.weight_dims = 0 if topk_weights is None else topk_weights.dim()
    factors = (x, topk_weights) if ctx.weight_dims == 1 else ()  # of the products of layout "expert"
    ctx.save_for_backward(token, *factors)


def _combine_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    token, *factors = ctx.saved_tensors
    needs_x, needs_token, needs_weights, needs_bias, needs_second_bias, _ = ctx.needs_input_grad
    rows = row_weights = None
    # A call of all ranks, so it may not depend on whether this rank's rows need it: see the module.
    if needs_x or needs_token or needs_weights:
        sent = grad_weights if ctx.weight_dims == 2 else None
        rows, row_weights = torch.ops.ep_rt.dispatch_again(grad_x, token, sent, ctx.num_rows)
        if factors:
            x, topk_weights = factors
            wide = rows.float()
            row_weights = (wide * x.float()).sum(dim=1)
            rows = (wide * topk_weights[:, None]).to(x.dtype)
    return (
        rows if needs_x else None,
        None,
        row_weights if needs_weights else None,
        grad_x if needs_bias else None,
        grad_x if needs_second_bias else None,
        None,
    )


def _combine_expert_weights(
    grad_weights: Tensor, topk_idx: Tensor, token: Tensor, after: Tensor | None
) -> Tensor:
    """Bring what belongs to the weights of expert-major rows back to the columns they came from.

    The rows do not tell their columns, so the same dispatch is made once more, of 16 bytes a token, with the
    numbers of the columns for weights. A combine of rows with a number in that column does the rest.
    `after` is not read: it orders the calls behind the one that makes it.
    """
    contents = _contents(token)
    num_tokens, num_topk = topk_idx.shape
    num_rows = len(grad_weights)
    numbers = torch.arange(1, num_topk + 1, dtype=torch.float32, device=topk_idx.device)
    sent = contents.buffer.dispatch(
        topk_idx.new_zeros((num_tokens, _ROW_ALIGN_BYTES), dtype=torch.uint8),
        topk_idx=topk_idx,
        topk_weights=numbers.expand(num_tokens, num_topk).contiguous(),
        num_experts=contents.num_experts,
        num_worst_tokens=max(num_rows, 1),  # known, so that the host waits for nothing
        expert_alignment=contents.expert_alignment,
        layout="expert",
    )
    column = sent.recv_topk_weights[:num_rows].long()  # 0 in padding
    num_columns = -(-num_topk // 4) * 4
    rows = grad_weights.new_zeros(num_rows, 1 + num_columns)
    rows.scatter_(1, column[:, None], grad_weights[:, None])
    combined = contents.buffer.combine(rows[:, 1:].contiguous(), contents.handle).combined_x
    return combined[:, :num_topk].contiguous()


def _combine_expert_weights_shapes(
    grad_weights: Tensor, topk_idx: Tensor, token: Tensor, after: Tensor | None
) -> Tensor:
    return grad_weights.new_empty(topk_idx.shape)


def _define(name: str, schema: str, run: Any, shapes: Any, context: Any = None, backward: Any = None) -> None:
    op = torch.library.custom_op(f"ep_rt::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(shapes)
    if backward is not None:
        op.register_autograd(backward, setup_context=context)


_define(
    "dispatch",
    "(Tensor x, Tensor topk_idx, Tensor? topk_weights, SymInt buffer, SymInt num_experts, "
    "SymInt num_local_experts, SymInt num_worst_tokens, SymInt expert_alignment, str layout) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    _dispatch_shapes,
    _dispatch_context,
    _dispatch_backward,
)
_define(
    "dispatch_again",
    "(Tensor x, Tensor token, Tensor? weights, SymInt num_recv_rows) -> (Tensor, Tensor)",
    _dispatch_again,
    _dispatch_again_shapes,
    _dispatch_again_context,
    _dispatch_again_backward,
)
_define(
    "combine",
    "(Tensor x, Tensor token, Tensor? topk_weights, Tensor? bias, Tensor? second_bias, SymInt num_tokens) "
    "-> (Tensor, Tensor)",
    _combine,
    _combine_shapes,
    _combine_context,
    _combine_backward,
)
_define(
    "combine_expert_weights",
    "(Tensor grad_weights, Tensor topk_idx, Tensor token, Tensor? after) -> Tensor",
    _combine_expert_weights,
    _combine_expert_weights_shapes,
)
