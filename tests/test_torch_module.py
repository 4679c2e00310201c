"""`ep_rt.torch`: gradients, compiled graphs, and what lives how long; on CPU tensors."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MpiRun

import ep_rt

torch = pytest.importorskip("torch")

import torch_cases as cases  # noqa: E402  # which imports torch
from torch_cases import BY_RANK, HIDDEN, NUM_EXPERTS, OPTIONS, STATIC, Case, gradients, layer  # noqa: E402
from torch_places import Streams  # noqa: E402

import ep_rt.torch as ep  # noqa: E402

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


def run(fn: Callable[..., Any], num_ranks: int = 4, *args: Any, **options: Any) -> list[Any]:
    """What ``fn(buffer, *args, **options)`` returns on each rank."""

    def on_rank(group: ep_rt.Group) -> Any:
        with ep_rt.Buffer(group, backend="host", timeout_s=30) as buffer:
            return fn(buffer, *args, **options)

    return ep_rt.run_local(on_rank, num_ranks)


@pytest.mark.parametrize("options", OPTIONS)
def test_results_and_gradients_are_those_of_a_dense_layer(options: dict[str, Any]) -> None:
    run(cases.check_layer, 4, options)


def test_a_layer_of_a_model() -> None:
    """Whose tokens are known, and with them what can arrive."""

    def check(group: ep_rt.Group) -> None:
        with ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=max(cases.NUM_TOKENS),
            hidden=HIDDEN,
            num_experts=NUM_EXPERTS,
            num_topk=cases.NUM_TOPK,
            dtype="float32",
            backend="host",
            timeout_s=30,
        ) as buffer:
            cases.check_layer(buffer, {"layout": "expert", "num_worst_tokens": 64})

    ep_rt.run_local(check, 4)


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
    run(cases.check_short_floats, 4, options, dtype)


@pytest.mark.parametrize("options", BY_RANK)
def test_weights_through_combine(options: dict[str, Any]) -> None:
    run(cases.check_weights_through_combine, 4, options)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_handle_used_again(options: dict[str, Any]) -> None:
    run(cases.check_handle_used_again, 4, options)


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
    run(cases.check_one_input_alone, 4, options, which)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_rank_whose_rows_need_no_gradient(options: dict[str, Any]) -> None:
    run(cases.check_rows_without_gradient, 4, options)


@pytest.mark.parametrize("options", OPTIONS)
def test_second_derivatives(options: dict[str, Any]) -> None:
    run(cases.check_second_derivatives, 4, options)


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
    run(cases.check_dropped_rows, 2)


@pytest.mark.parametrize("options", STATIC)
def test_padding_is_zero(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if options["layout"] == "rank":
        dispatch = ep_rt.Buffer.dispatch

        def dirty(*args: Any, **kwargs: Any) -> Any:
            sent = dispatch(*args, **kwargs)
            rows = sent.recv_x if isinstance(sent.recv_x, tuple) else (sent.recv_x,)
            for each in rows:
                each[sent.handle.num_recv_tokens :] = torch.nan
            return sent

        monkeypatch.setattr(ep_rt.Buffer, "dispatch", dirty)
    run(cases.check_padding, 4, options)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_checkpoints(options: dict[str, Any], use_reentrant: bool) -> None:
    run(cases.check_checkpoint, 4, options, use_reentrant=use_reentrant)


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


@pytest.mark.parametrize("options", STATIC)
def test_operators_are_what_torch_expects(options: dict[str, Any]) -> None:
    run(cases.check_operators, 1, options)


COMPILED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import ep_rt, ep_rt.torch, torch_cases as cases

torch.set_num_threads(1)
with ep_rt.Buffer(backend="host", timeout_s=200) as buffer:
    for backend in sys.argv[2:]:
        for each in (*cases.STATIC, *cases.OPTIONS[: backend == "aot_eager"]):
            cases.check_compiled(buffer, backend, each.values[0])
        print(f"{backend} as eager")
assert not len(ep_rt.torch._handles)
"""


def test_compiled_is_as_eager(mpirun: MpiRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = ["aot_eager"]
    if shutil.which("g++"):
        backends.append("inductor")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    done = mpirun(2, COMPILED, str(Path(__file__).parent), *backends, timeout_s=240)
    assert done.returncode == 0, done.stdout
    for backend in backends:
        assert done.stdout.count(f"{backend} as eager") == 2


def test_one_graph_gives_its_handle_to_another() -> None:
    run(cases.check_one_graph_after_another, 1)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", STATIC)
def test_calls_again_and_again_as_a_graph_makes_them(options: dict[str, Any]) -> None:
    run(cases.check_graph, 4, options, has_threads_beside=True)


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_calls_in_the_order_of_streams(layout: str, is_static: bool, is_backward: bool) -> None:
    run(cases.check_streams, 2, Streams(), layout, is_static=is_static, is_backward=is_backward)
