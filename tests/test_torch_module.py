"""`ep_rt.torch`: gradients, compiled graphs, and what lives how long.

Numbers are small integers, so that every sum is exact and results equal those of a layer on one rank whatever
the order of additions.
"""

from __future__ import annotations

import gc
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import MpiRun

import ep_rt

torch = pytest.importorskip("torch")

import ep_rt.torch as ep  # noqa: E402

NUM_TOKENS = (0, 5, 3, 6)  # of the ranks
HIDDEN, NUM_EXPERTS, NUM_TOPK = 8, 8, 3
OPTIONS = [
    pytest.param({"layout": "rank"}, id="rank"),
    pytest.param({"layout": "rank", "num_worst_tokens": 40}, id="rank-worst"),
    pytest.param({"layout": "expert"}, id="expert"),
    pytest.param({"layout": "expert", "expert_alignment": 4}, id="expert-aligned"),
    pytest.param({"layout": "expert", "expert_alignment": 4, "num_worst_tokens": 64}, id="expert-worst"),
]
BY_RANK = OPTIONS[:2]

Tensor = Any


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Ranks are the parallelism, and no test leaves handles to the next one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    gc.collect()
    assert not len(ep._handles)


class Case(NamedTuple):
    """What a rank knows."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    bias: Tensor
    grad: Tensor  # of the result

    @classmethod
    def of(cls, rank: int, dtype: Any = torch.float32) -> Case:
        rng = torch.Generator().manual_seed(rank)
        num_tokens = NUM_TOKENS[rank]

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, (num_tokens, *shape), generator=rng)

        return cls(
            x=integers(-3, 4, HIDDEN).to(dtype).requires_grad_(),
            topk_idx=integers(-1, NUM_EXPERTS, NUM_TOPK),
            topk_weights=integers(1, 4, NUM_TOPK).float().requires_grad_(),
            bias=integers(-3, 4, HIDDEN).to(dtype).requires_grad_(),
            grad=integers(-1, 2, HIDDEN).to(dtype),
        )


def run(fn: Callable[[ep_rt.Buffer], Any], num_ranks: int = 4) -> list[Any]:
    """What `fn` returns on each rank, given a buffer."""

    def on_rank(group: ep_rt.Group) -> Any:
        with ep_rt.Buffer(group, backend="host", timeout_s=30) as buffer:
            return fn(buffer)

    return ep_rt.run_local(on_rank, num_ranks)


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


def num_copies(topk_idx: Tensor, options: dict[str, Any]) -> Tensor:
    """[num_tokens, 1], the rows of 4 ranks, or of all experts, that a token becomes."""
    if options["layout"] == "expert":
        return (topk_idx >= 0).sum(dim=1, keepdim=True).float()
    ranks = [{expert * 4 // NUM_EXPERTS for expert in row if expert >= 0} for row in topk_idx.tolist()]
    return torch.tensor([len(each) for each in ranks]).reshape(-1, 1).float()


def gradients(result: Tensor, case: Case, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, inputs, case.grad))


@pytest.mark.parametrize("options", OPTIONS)
def test_results_and_gradients_are_those_of_a_dense_layer(options: dict[str, Any]) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        scale = torch.full((HIDDEN,), 2.0, requires_grad=True)
        inputs = (case.x, case.topk_weights, case.bias, scale)
        result, wanted = layer(buffer, case, scale, options), dense(case, scale)
        assert torch.equal(result, wanted)
        found, expected = (gradients(each, case, *inputs) for each in (result, wanted))
        for name, a, b in zip(("x", "topk_weights", "bias"), found, expected, strict=False):
            assert torch.equal(a, b), name
        # Each rank has a part of the experts' gradient: that of the rows that it received.
        everywhere = buffer.group.allgather((found[3].numpy(), expected[3].numpy()))
        assert np.array_equal(*np.sum(everywhere, axis=0))

    run(check)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_slopes(options: dict[str, Any]) -> None:
    """Real numbers, and central differences along a direction in all inputs of all ranks."""

    def check(buffer: ep_rt.Buffer) -> None:
        rng = torch.Generator().manual_seed(100 + buffer.rank)
        case = Case.of(buffer.rank)
        inputs = (case.x, case.topk_weights, case.bias)
        directions = [torch.randn(each.shape, generator=rng) for each in inputs]
        scale = torch.linspace(0.5, 1.5, HIDDEN)

        def loss(step: float) -> tuple[Tensor, Case]:
            moved = [
                (each + step * along).detach().requires_grad_()
                for each, along in zip(inputs, directions, strict=True)
            ]
            there = Case(moved[0], case.topk_idx, moved[1], moved[2], case.grad)
            return layer(buffer, there, scale, options), there

        step = 2.0**-6
        ahead, behind = (float((loss(s)[0].detach().double() * case.grad).sum()) for s in (step, -step))
        here, there = loss(0)
        slopes = gradients(here, case, there.x, there.topk_weights, there.bias)
        slope = sum(float((g * along).sum()) for g, along in zip(slopes, directions, strict=True))
        numerical = sum(buffer.group.allgather((ahead - behind) / (2 * step)))
        # The layer is cubic, so differences are off by the square of the step.
        assert numerical == pytest.approx(sum(buffer.group.allgather(slope)), rel=1e-3, abs=0.05)

    run(check)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_short_floats(options: dict[str, Any], dtype: Any) -> None:
    """Rows there and back: as many as ranks, or experts, that a token went to."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank, dtype)
        sent = ep.dispatch(buffer, case.x, case.topk_idx, num_experts=NUM_EXPERTS, **options)
        assert sent.recv_topk_weights is None
        combined, weights = ep.combine(sent.recv_x, sent.handle)
        assert weights is None
        copies = num_copies(case.topk_idx, options).to(dtype)
        assert torch.equal(combined, copies * case.x)
        [grad] = gradients(combined, case, case.x)
        assert grad.dtype == dtype
        assert torch.equal(grad, copies * case.grad)

    run(check)


@pytest.mark.parametrize("options", BY_RANK)
def test_weights_through_combine(options: dict[str, Any]) -> None:
    """Weights of layout "rank" come back, squared; two biases are added."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        sent = ep.dispatch(
            buffer, case.x, case.topk_idx, case.topk_weights, num_experts=NUM_EXPERTS, **options
        )
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

    run(check)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_handle_used_again(options: dict[str, Any]) -> None:
    """Other rows by the same routing, and two combines; one of them has no part in the loss of any rank."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        other = (case.x + 1).detach().requires_grad_()
        sent = ep.dispatch(
            buffer, case.x, case.topk_idx, case.topk_weights, num_experts=NUM_EXPERTS, **options
        )
        again = ep.dispatch(buffer, other, handle=sent.handle)
        assert again.handle is sent.handle
        assert again.recv_topk_idx is None
        assert again.recv_topk_weights is None
        first, second, unused = (
            ep.combine(rows, sent.handle).combined_x
            for rows in (sent.recv_x * again.recv_x, again.recv_x, sent.recv_x)
        )
        copies = num_copies(case.topk_idx, options)
        assert torch.equal(unused, copies * case.x)
        assert torch.equal(second, copies * other)
        assert torch.equal(first, copies * case.x * other)
        found = gradients(first + second, case, case.x, other)
        assert torch.equal(found[0], copies * other * case.grad)
        assert torch.equal(found[1], copies * (case.x + 1) * case.grad)

    run(check)


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_is_recorded_without_need(options: dict[str, Any]) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        plain = Case(*(each.detach() for each in case))
        result = layer(buffer, plain, torch.ones(HIDDEN), options)
        assert not result.requires_grad
        with torch.no_grad():
            sent = ep.dispatch(buffer, case.x, case.topk_idx, num_experts=NUM_EXPERTS, **options)
            assert not sent.handle.token.requires_grad
            assert not ep.combine(sent.recv_x, sent.handle).combined_x.requires_grad

    run(check)


@pytest.mark.parametrize("which", [0, 2, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_one_input_alone_needs_a_gradient(options: dict[str, Any], which: int) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        alone = Case(*(each if n == which else each.detach() for n, each in enumerate(case)))
        scale = torch.ones(HIDDEN)
        found, wanted = (
            gradients(result, case, alone[which])
            for result in (layer(buffer, alone, scale, options), dense(alone, scale))
        )
        assert torch.equal(found[0], wanted[0])

    run(check)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_rank_whose_rows_need_no_gradient(options: dict[str, Any]) -> None:
    """It takes part in the backward pass all the same, because the token does."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        topk_idx = case.topk_idx.clamp(max=5)  # rank 3 receives nothing
        sent = ep.dispatch(buffer, case.x, topk_idx, num_experts=NUM_EXPERTS, **options)
        rows = sent.recv_x.detach() if buffer.rank == 3 else sent.recv_x
        combined = ep.combine(rows, sent.handle).combined_x
        assert torch.equal(combined, num_copies(topk_idx, options) * case.x)
        [grad] = gradients(combined, case, case.x)
        assert torch.equal(grad, num_copies(topk_idx, options) * case.grad)

    run(check)


@pytest.mark.parametrize("options", OPTIONS)
def test_second_derivatives(options: dict[str, Any]) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
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

    run(check)


def test_second_derivatives_that_are_not_there() -> None:
    """Those of weights of layout "expert": an error, not a wrong number."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(1)
        result = layer(buffer, case, torch.ones(HIDDEN), {"layout": "expert"})
        [first] = torch.autograd.grad(result, case.topk_weights, case.grad, create_graph=True)
        with pytest.raises(RuntimeError, match="combine_expert_weights"):
            torch.autograd.grad(first.sum(), case.x)

    run(check, 1)


def test_dropped_rows_have_no_gradient() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        x = torch.ones(4, HIDDEN, requires_grad=True)
        topk_idx = torch.zeros(4, 1, dtype=torch.int64)  # all to rank 0, which takes 6 of 8
        sent = ep.dispatch(buffer, x, topk_idx, num_experts=2, num_worst_tokens=6)
        assert sent.handle.unwrap().overflow == (buffer.rank == 0)
        assert sent.handle.unwrap().num_recv_tokens == (8 if buffer.rank == 0 else 0)
        ep.combine(sent.recv_x, sent.handle).combined_x.sum().backward()
        assert x.grad[:, 0].tolist() == ([1, 1, 1, 1] if buffer.rank == 0 else [1, 1, 0, 0])

    run(check, 2)


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[4]])
def test_padding_is_zero(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows and in their gradients, whatever the buffer leaves there."""
    if options["layout"] == "rank":
        dispatch = ep_rt.Buffer.dispatch

        def dirty(*args: Any, **kwargs: Any) -> Any:
            sent = dispatch(*args, **kwargs)
            rows = sent.recv_x if isinstance(sent.recv_x, tuple) else (sent.recv_x,)
            for each in rows:
                each[sent.handle.num_recv_tokens :] = torch.nan
            return sent

        monkeypatch.setattr(ep_rt.Buffer, "dispatch", dirty)

    def check(buffer: ep_rt.Buffer) -> None:
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

    run(check)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_checkpoints(options: dict[str, Any], use_reentrant: bool) -> None:
    """The recomputed layer has a handle of its own, and the first one's contents go before."""

    def check(buffer: ep_rt.Buffer) -> None:
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

    run(check)


# What lives how long


def test_contents_live_as_long_as_the_token() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        x = torch.ones(2, HIDDEN, requires_grad=True)
        topk_idx = torch.zeros(2, 1, dtype=torch.int64)
        sent = ep.dispatch(buffer, x, topk_idx, num_experts=1)
        number = int(sent.handle.token.item())
        copy = sent.handle._replace(token=sent.handle.token.detach().clone())
        assert torch.equal(ep.combine(sent.recv_x, copy).combined_x, x)
        combined = ep.combine(sent.recv_x, sent.handle).combined_x
        del sent
        assert number in ep._handles  # for the backward pass
        combined.sum().backward()
        del combined
        assert number not in ep._handles
        with pytest.raises(ep_rt.HandleError, match="a copy keeps nothing"):
            ep.combine(x.detach(), copy)
        with pytest.raises(ep_rt.HandleError, match="a copy keeps nothing"):
            copy.unwrap()

    run(check, 1)


def test_keys() -> None:
    def check(buffer: ep_rt.Buffer) -> ep.BufferKey:
        key = ep.key_of(buffer)
        assert ep.key_of(buffer) == key
        assert key.num_ranks == 1
        return key

    [key], [other] = run(check, 1), run(check, 1)
    assert key != other
    gc.collect()
    x, topk_idx = torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ep_rt.ClosedError, match="the buffer of this key is gone"):
        ep.dispatch(key, x, topk_idx, num_experts=1)


def test_a_handle_keeps_its_buffer_and_a_closed_one_says_so() -> None:
    x, topk_idx = torch.ones(2, HIDDEN, requires_grad=True), torch.zeros(2, 1, dtype=torch.int64)

    def make() -> Tensor:
        buffer = ep_rt.Buffer(ep_rt.as_group(), backend="host")
        sent = ep.dispatch(buffer, x, topk_idx, num_experts=1)
        return ep.combine(sent.recv_x, sent.handle).combined_x

    make().sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))

    def leave(buffer: ep_rt.Buffer) -> Any:
        sent = ep.dispatch(buffer, x, topk_idx, num_experts=1)
        return sent, ep.combine(sent.recv_x, sent.handle).combined_x

    [(sent, combined)] = run(leave, 1)
    with pytest.raises(ep_rt.ClosedError, match="closed"):
        combined.sum().backward()
    with pytest.raises(ep_rt.ClosedError, match="closed"):
        ep.combine(x, sent.handle)


def test_arguments_that_do_not_go_together() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        x, topk_idx = torch.ones(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(ep_rt.ConfigError, match="needs topk_idx and num_experts="):
            ep.dispatch(buffer, x, topk_idx)
        sent = ep.dispatch(buffer, x, topk_idx, num_experts=1)
        with pytest.raises(ep_rt.ConfigError, match="give x alone"):
            ep.dispatch(buffer, x, topk_idx, handle=sent.handle)
        other = ep_rt.Buffer(ep_rt.as_group(), backend="host")
        with pytest.raises(ep_rt.HandleError, match="from another buffer"):
            ep.dispatch(other, x, handle=sent.handle)
        with pytest.raises(ep_rt.ConfigError, match="at most 2"):
            ep.combine(x, sent.handle, bias=(x, x, x))
        compiled = torch.compile(ep.dispatch, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="make the key outside"):
            compiled(buffer, x, topk_idx, num_experts=1, num_worst_tokens=2)
        with pytest.raises(ep_rt.ArrayError, match="float64"):
            ep.dispatch(buffer, x.double(), topk_idx, num_experts=1)

    run(check, 1)


# Compiled graphs


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[4]])
def test_operators_are_what_torch_expects(options: dict[str, Any]) -> None:
    """Schemas, shapes and gradients, eager and traced, by torch's own checks."""

    def check(buffer: ep_rt.Buffer) -> None:
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

    run(check, 1)


COMPILED = """
    import sys
    sys.path[:0] = sys.argv[1:2]
    backends = sys.argv[2:]
    import torch
    import ep_rt.torch as ep
    from test_torch_module import OPTIONS, HIDDEN, Case, dense, gradients, layer

    torch.set_num_threads(1)
    with ep_rt.Buffer(backend="host", timeout_s=200) as buffer:
        key = ep.key_of(buffer)
        for backend in backends:
            for options in (OPTIONS[1].values[0], OPTIONS[4].values[0], OPTIONS[0].values[0]):
                is_static = "num_worst_tokens" in options
                if not is_static and backend == "inductor":
                    continue
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
            print(f"{backend} as eager")
    assert not len(ep._handles)
"""


def test_compiled_is_as_eager(mpirun: MpiRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = ["aot_eager"]
    if shutil.which("g++"):
        backends.append("inductor")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    script = tmp_path / "compiled.py"
    script.write_text("import ep_rt\n" + textwrap.dedent(COMPILED))
    done = mpirun(2, script, str(Path(__file__).parent), *backends, timeout_s=240)
    assert done.returncode == 0, done.stdout
    for backend in backends:
        assert done.stdout.count(f"{backend} as eager") == 2


def test_one_graph_gives_its_handle_to_another() -> None:
    """Dispatch and combine compiled apart: a handle leaves one graph and enters the next."""

    def check(buffer: ep_rt.Buffer) -> None:
        key, case = ep.key_of(buffer), Case.of(1)
        there = torch.compile(ep.dispatch, backend="aot_eager", fullgraph=True)
        back = torch.compile(ep.combine, backend="aot_eager", fullgraph=True)
        sent = there(key, case.x, case.topk_idx, num_experts=NUM_EXPERTS, num_worst_tokens=9)
        combined = back(sent.recv_x * sent.recv_x, sent.handle).combined_x
        is_sent = (case.topk_idx >= 0).any(dim=1, keepdim=True)
        assert torch.equal(combined, case.x**2 * is_sent)
        [grad] = gradients(combined, case, case.x)
        assert torch.equal(grad, 2 * case.x * case.grad * is_sent)

    run(check, 1)
    torch._dynamo.reset()
