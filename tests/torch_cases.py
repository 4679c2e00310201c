"""Layers through `ep_rt.torch` beside the same layers on one rank, on torch's default device.

Numbers are small integers, so that every sum is exact and results are equal whatever the order of additions.
Every check takes a buffer of 1, 2, 4 or 8 ranks, and is collective.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
import torch_places
from torch_places import Streams

import ep_rt
import ep_rt.torch as ep

NUM_TOKENS = (0, 5, 3, 6)  # of the ranks, again and again
HIDDEN, NUM_EXPERTS, NUM_TOPK = 8, 8, 3
OPTIONS = [
    pytest.param({"layout": "rank"}, id="rank"),
    pytest.param({"layout": "rank", "num_worst_tokens": 40}, id="rank-worst"),
    pytest.param({"layout": "expert"}, id="expert"),
    pytest.param({"layout": "expert", "expert_alignment": 4}, id="expert-aligned"),
    pytest.param({"layout": "expert", "expert_alignment": 4, "num_worst_tokens": 64}, id="expert-worst"),
]
BY_RANK = OPTIONS[:2]
STATIC = [OPTIONS[1], OPTIONS[4]]

Tensor = Any


class Case(NamedTuple):
    """What a rank knows."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    bias: Tensor
    grad: Tensor  # of the result

    @classmethod
    def of(cls, rank: int, dtype: Any = torch.float32) -> Case:
        rng = torch.Generator(device="cpu").manual_seed(rank)
        num_tokens = NUM_TOKENS[rank % len(NUM_TOKENS)]

        def integers(low: int, high: int, *shape: int) -> Tensor:
            drawn = torch.randint(low, high, (num_tokens, *shape), generator=rng, device="cpu")
            return drawn.to(torch.get_default_device())

        return cls(
            x=integers(-3, 4, HIDDEN).to(dtype).requires_grad_(),
            topk_idx=integers(-1, NUM_EXPERTS, NUM_TOPK),
            topk_weights=integers(1, 4, NUM_TOPK).float().requires_grad_(),
            bias=integers(-3, 4, HIDDEN).to(dtype).requires_grad_(),
            grad=integers(-1, 2, HIDDEN).to(dtype),
        )


def layer(buffer: Any, case: Case, scale: Tensor, options: dict[str, Any]) -> Tensor:
    """Experts that square: not linear, so that a wrong row shows in the gradients."""
    sent = ep.dispatch(buffer, case.x, case.topk_idx, case.topk_weights, num_experts=NUM_EXPERTS, **options)
    y = (sent.recv_x * scale) ** 2
    if options["layout"] == "expert":
        return ep.combine(y, sent.handle, sent.recv_topk_weights, case.bias).combined_x
    return ep.combine(y * sent.recv_topk_weights.sum(1, keepdim=True), sent.handle, bias=case.bias).combined_x


def dense(case: Case, scale: Tensor) -> Tensor:
    weight = (case.topk_weights * (case.topk_idx >= 0)).sum(dim=1, keepdim=True)
    return (case.x * scale) ** 2 * weight + case.bias


def num_copies(topk_idx: Tensor, options: dict[str, Any], num_ranks: int) -> Tensor:
    """[num_tokens, 1], the rows of all ranks, or of all experts, that a token becomes."""
    if options["layout"] == "expert":
        return (topk_idx >= 0).sum(dim=1, keepdim=True).float()
    ranks = [
        {expert * num_ranks // NUM_EXPERTS for expert in row if expert >= 0} for row in topk_idx.tolist()
    ]
    return torch.tensor([len(each) for each in ranks]).reshape(-1, 1).float()


def gradients(result: Tensor, case: Case, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, inputs, case.grad))


def check_layer(buffer: ep_rt.Buffer, options: dict[str, Any]) -> None:
    """Results and gradients are those of a dense layer."""
    case = Case.of(buffer.rank)
    scale = torch.full((HIDDEN,), 2.0, requires_grad=True)
    inputs = (case.x, case.topk_weights, case.bias, scale)
    result, wanted = layer(buffer, case, scale, options), dense(case, scale)
    assert torch.equal(result, wanted)
    found, expected = (gradients(each, case, *inputs) for each in (result, wanted))
    for name, a, b in zip(("x", "topk_weights", "bias"), found, expected, strict=False):
        assert torch.equal(a, b), name
    # Each rank has a part of the experts' gradient: that of the rows that it received.
    everywhere = buffer.group.allgather((found[3].cpu().numpy(), expected[3].cpu().numpy()))
    assert np.array_equal(*np.sum(everywhere, axis=0))


def check_short_floats(buffer: ep_rt.Buffer, options: dict[str, Any], dtype: Any) -> None:
    """Rows there and back: as many as ranks, or experts, that a token went to."""
    case = Case.of(buffer.rank, dtype)
    sent = ep.dispatch(buffer, case.x, case.topk_idx, num_experts=NUM_EXPERTS, **options)
    assert sent.recv_topk_weights is None
    combined, weights = ep.combine(sent.recv_x, sent.handle)
    assert weights is None
    copies = num_copies(case.topk_idx, options, buffer.num_ranks).to(dtype)
    assert torch.equal(combined, copies * case.x)
    [grad] = gradients(combined, case, case.x)
    assert grad.dtype == dtype
    assert torch.equal(grad, copies * case.grad)


def check_weights_through_combine(buffer: ep_rt.Buffer, options: dict[str, Any]) -> None:
    """Weights of layout "rank" come back, squared; two biases are added."""
    case = Case.of(buffer.rank)
    sent = ep.dispatch(buffer, case.x, case.topk_idx, case.topk_weights, num_experts=NUM_EXPERTS, **options)
    combined_x, weights = ep.combine(
        sent.recv_x, sent.handle, sent.recv_topk_weights**2, (case.bias, 2 * case.bias)
    )
    is_sent = case.topk_idx >= 0
    assert torch.equal(weights, case.topk_weights**2 * is_sent)
    along = torch.arange(weights.numel()).reshape(weights.shape).float()
    loss = (weights * along).sum() + (combined_x * case.grad).sum()
    grad_weights, grad_bias = torch.autograd.grad(loss, (case.topk_weights, case.bias))
    assert torch.equal(grad_weights, 2 * case.topk_weights * along * is_sent)
    assert torch.equal(grad_bias, 3 * case.grad)


def check_handle_used_again(buffer: ep_rt.Buffer, options: dict[str, Any]) -> None:
    """Other rows by the same routing, and two combines; one of them has no part in the loss of any rank."""
    case = Case.of(buffer.rank)
    other = (case.x + 1).detach().requires_grad_()
    sent = ep.dispatch(buffer, case.x, case.topk_idx, case.topk_weights, num_experts=NUM_EXPERTS, **options)
    again = ep.dispatch(buffer, other, handle=sent.handle)
    assert again.handle is sent.handle
    assert again.recv_topk_idx is None
    assert again.recv_topk_weights is None
    first, second, unused = (
        ep.combine(rows, sent.handle).combined_x
        for rows in (sent.recv_x * again.recv_x, again.recv_x, sent.recv_x)
    )
    copies = num_copies(case.topk_idx, options, buffer.num_ranks)
    assert torch.equal(unused, copies * case.x)
    assert torch.equal(second, copies * other)
    assert torch.equal(first, copies * case.x * other)
    found = gradients(first + second, case, case.x, other)
    assert torch.equal(found[0], copies * other * case.grad)
    assert torch.equal(found[1], copies * (case.x + 1) * case.grad)


def check_one_input_alone(buffer: ep_rt.Buffer, options: dict[str, Any], which: int) -> None:
    """Only the input with this number needs a gradient."""
    case = Case.of(buffer.rank)
    alone = Case(*(each if n == which else each.detach() for n, each in enumerate(case)))
    scale = torch.ones(HIDDEN)
    found, wanted = (
        gradients(result, case, alone[which])
        for result in (layer(buffer, alone, scale, options), dense(alone, scale))
    )
    assert torch.equal(found[0], wanted[0])


def check_rows_without_gradient(buffer: ep_rt.Buffer, options: dict[str, Any]) -> None:
    """A rank whose rows need none takes part in the backward pass all the same, because the token does."""
    case = Case.of(buffer.rank)
    last = buffer.num_ranks - 1
    most = NUM_EXPERTS * last // buffer.num_ranks - 1 if last else NUM_EXPERTS - 1
    topk_idx = case.topk_idx.clamp(max=most)  # the last rank of several receives nothing
    sent = ep.dispatch(buffer, case.x, topk_idx, num_experts=NUM_EXPERTS, **options)
    rows = sent.recv_x.detach() if 0 < buffer.rank == last else sent.recv_x
    combined = ep.combine(rows, sent.handle).combined_x
    copies = num_copies(topk_idx, options, buffer.num_ranks)
    assert torch.equal(combined, copies * case.x)
    [grad] = gradients(combined, case, case.x)
    assert torch.equal(grad, copies * case.grad)


def check_second_derivatives(buffer: ep_rt.Buffer, options: dict[str, Any]) -> None:
    case = Case.of(buffer.rank)
    is_by_expert = options["layout"] == "expert"
    if is_by_expert:
        case = case._replace(topk_weights=case.topk_weights.detach())
    scale = torch.full((HIDDEN,), 2.0)
    inputs = (case.x,) if is_by_expert else (case.x, case.topk_weights)
    found, wanted = (
        torch.autograd.grad(
            (torch.autograd.grad(result, case.x, case.grad, create_graph=True)[0] ** 2).sum(), inputs
        )
        for result in (layer(buffer, case, scale, options), dense(case, scale))
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def check_padding(buffer: ep_rt.Buffer, options: dict[str, Any]) -> None:
    """It is zero, in rows and in their gradients, whatever the buffer leaves there."""
    case = Case.of(buffer.rank)
    scale = torch.full((HIDDEN,), 2.0, requires_grad=True)
    found = gradients(layer(buffer, case, scale, options), case, case.x, case.topk_weights, scale)
    assert all(each.isfinite().all() for each in found)
    sent = ep.dispatch(buffer, case.x, case.topk_idx, num_experts=NUM_EXPERTS, **options)
    num_rows = int((sent.recv_x != 0).any(dim=1).sum())
    assert num_rows <= sent.handle.unwrap().num_needed_rows < len(sent.recv_x)
    rows = torch.ones_like(sent.recv_x, requires_grad=True)
    [grad] = gradients(ep.combine(rows, sent.handle).combined_x, case, rows)
    assert not grad[sent.handle.unwrap().num_needed_rows :].any()


def check_checkpoint(buffer: ep_rt.Buffer, options: dict[str, Any], *, use_reentrant: bool) -> None:
    """The recomputed layer has a handle of its own, and the first one's contents go before."""
    case = Case.of(buffer.rank)
    scale = torch.full((HIDDEN,), 2.0, requires_grad=True)
    inputs = (case.x, case.topk_weights, case.bias, scale)
    calls = []

    def forward(x: Tensor, topk_weights: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        calls.append(1)
        return layer(buffer, Case(x, case.topk_idx, topk_weights, bias, case.grad), scale, options)

    result = torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=use_reentrant)
    wanted = layer(buffer, case, scale, options)
    assert torch.equal(result, wanted)
    expected = gradients(wanted, case, *inputs)
    result.backward(case.grad)
    found = [each.grad for each in inputs]
    assert len(calls) == 2
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def check_dropped_rows(buffer: ep_rt.Buffer) -> None:
    """They have no gradient. Of 2 ranks."""
    x = torch.ones(4, HIDDEN, requires_grad=True)
    topk_idx = torch.zeros(4, 1, dtype=torch.int64)  # all to rank 0, which takes 6 of 8
    sent = ep.dispatch(buffer, x, topk_idx, num_experts=2, num_worst_tokens=6)
    assert sent.handle.unwrap().overflow == (buffer.rank == 0)
    assert sent.handle.unwrap().num_recv_tokens == (8 if buffer.rank == 0 else 0)
    ep.combine(sent.recv_x, sent.handle).combined_x.sum().backward()
    assert x.grad[:, 0].tolist() == ([1, 1, 1, 1] if buffer.rank == 0 else [1, 1, 0, 0])


def check_operators(buffer: ep_rt.Buffer, options: dict[str, Any]) -> None:
    """Schemas, shapes and gradients, eager and traced, by torch's own checks. Of 1 rank; static shapes."""
    x = torch.randn(5, HIDDEN, requires_grad=True)
    topk_idx = torch.randint(-1, 4, (5, 2))
    weights = torch.rand(5, 2, requires_grad=True)
    number = ep.key_of(buffer).number
    alignment = options.get("expert_alignment", 1)
    num_rows, layout = options["num_worst_tokens"], options["layout"]
    sent = ep.dispatch(buffer, x.detach(), topk_idx, weights.detach(), num_experts=4, **options)
    recv_x, recv_weights = (each.requires_grad_() for each in (sent.recv_x, sent.recv_topk_weights))
    token, bias = sent.handle.token, torch.randn(5, HIDDEN, requires_grad=True)
    ops = torch.ops.ep_rt
    # A token is another number in every call, so what is compared is what it leads to.
    shapes_and_gradients = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (x, topk_idx, weights, number, 4, 4, num_rows, alignment, layout)
    torch.library.opcheck(ops.dispatch, args, test_utils=shapes_and_gradients)
    torch.library.opcheck(ops.dispatch_again, (x, token, None, num_rows))
    torch.library.opcheck(ops.combine, (recv_x, token, recv_weights, bias, None, 5))
    if layout == "rank":
        torch.library.opcheck(ops.dispatch_again, (x, token, weights, num_rows))
    else:
        given = (recv_weights.detach(), topk_idx, token, None)
        torch.library.opcheck(ops.combine_expert_weights, given)


def check_compiled(buffer: ep_rt.Buffer, backend: str, options: dict[str, Any]) -> None:
    """A compiled layer is as the eager one, as one graph, checkpointed or not."""
    key = ep.key_of(buffer)
    is_static = "num_worst_tokens" in options
    torch._dynamo.reset()
    torch._dynamo.config.capture_dynamic_output_shape_ops = not is_static
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    checkpointed = torch.compile(
        lambda *args: torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False),
        backend=backend,
        fullgraph=True,
    )
    for number in range(2):  # the second time with another number of tokens
        case = Case.of(buffer.rank + 1 + number)
        scale = torch.full((HIDDEN,), 2.0 + number, requires_grad=True)
        inputs = (case.x, case.topk_weights, case.bias, scale)
        eager = layer(buffer, case, scale, options)
        expected = gradients(eager, case, *inputs)
        assert torch.equal(eager, dense(case, scale))
        for fn in (compiled, checkpointed) if is_static else (compiled,):
            result = fn(key, case, scale, options)
            assert torch.equal(result, eager)
            for a, b in zip(gradients(result, case, *inputs), expected, strict=True):
                assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(key, case, scale, options), eager)


def check_one_graph_after_another(buffer: ep_rt.Buffer) -> None:
    """Dispatch and combine compiled apart: a handle leaves one graph and enters the next."""
    key, case = ep.key_of(buffer), Case.of(1)
    there = torch.compile(ep.dispatch, backend="aot_eager", fullgraph=True)
    back = torch.compile(ep.combine, backend="aot_eager", fullgraph=True)
    sent = there(key, case.x, case.topk_idx, num_experts=NUM_EXPERTS, num_worst_tokens=9)
    combined = back(sent.recv_x * sent.recv_x, sent.handle).combined_x
    is_sent = (case.topk_idx >= 0).any(dim=1, keepdim=True)
    assert torch.equal(combined, case.x**2 * is_sent)
    [grad] = gradients(combined, case, case.x)
    assert torch.equal(grad, 2 * case.x * case.grad * is_sent)


def check_streams(
    buffer: ep_rt.Buffer, streams: Streams, layout: str, *, is_static: bool, is_backward: bool
) -> None:
    """Calls, or those of a backward pass, run on the stream that is current, in order with it."""
    num_ranks = buffer.num_ranks
    topk_idx = torch_places.everywhere(num_ranks)
    options: dict[str, Any] = {"layout": layout, "num_worst_tokens": is_static * len(topk_idx) * num_ranks}

    def there_and_back(x: Tensor, *, is_async: bool, previous: Any) -> tuple[Tensor, Tensor]:
        if previous is not None:
            previous.current_stream_wait()
        given = torch.ones_like(x, requires_grad=True) if is_backward else x
        sent = ep.dispatch(buffer, given, topk_idx, num_experts=num_ranks, **options)
        y = 2 * sent.recv_x
        combined = ep.combine(y, sent.handle).combined_x
        if not is_backward:
            return sent.recv_x, combined
        # Backward, the three do to a gradient what they do to rows forward.
        rows, back = torch.autograd.grad(combined, (y, given), x)
        return rows, back

    torch_places.check_order(buffer, streams, there_and_back, dtype=torch.float32)


def check_graph(
    buffer: ep_rt.Buffer,
    options: dict[str, Any],
    *,
    has_threads_beside: bool,
    first: contextlib.AbstractContextManager[None] | None = None,
) -> None:
    """A captured layer, replayed with other tokens and other routing.

    Args:
        first: around the calls before the capture.
    """
    case = Case(*(each.detach() for each in Case.of(buffer.rank)))
    scale = torch.full((HIDDEN,), 2.0)

    def forward() -> Any:
        """All that the graph writes is kept: nobody else may have its memory."""
        sent = ep.dispatch(
            buffer, case.x, case.topk_idx, case.topk_weights, num_experts=NUM_EXPERTS, **options
        )
        y = (sent.recv_x * scale) ** 2
        if options["layout"] == "expert":
            return sent, y, ep.combine(y, sent.handle, sent.recv_topk_weights, case.bias)
        y = y * sent.recv_topk_weights.sum(1, keepdim=True)
        return sent, y, ep.combine(y, sent.handle, bias=case.bias)

    with first or contextlib.nullcontext():
        forward()
    torch_places.meet(buffer)
    replay = torch_places.Replay(buffer.group, forward, has_threads_beside=has_threads_beside)
    for number in range(4):
        case.x.add_(number)
        case.topk_idx.copy_(case.topk_idx.roll(number, 0).roll(1, 1))
        wanted = dense(case, scale)
        torch_places.meet(buffer)
        replay()
        torch_places.meet(buffer)
        sent, _, combined = replay.results
        assert torch.equal(combined.combined_x, wanted)
        assert not sent.handle.unwrap().overflow
