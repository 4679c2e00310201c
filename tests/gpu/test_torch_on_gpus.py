"""`ep_rt.torch` on GPUs: the checks of its tests on CPU tensors, streams, graphs, and where rows lie."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ranks import PLACES, device_count, num_ranks_of

import ep_rt
from ep_rt import Group

torch = pytest.importorskip("torch")

import torch_cases as cases  # noqa: E402  # which imports torch
from torch_cases import BY_RANK, HIDDEN, NUM_EXPERTS, OPTIONS, STATIC  # noqa: E402
from torch_places import Streams  # noqa: E402

import ep_rt.torch as ep  # noqa: E402

if device_count():
    from device_arrays import poison
    from torch_ranks import meeting, points_into_slab, run_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0 or not torch.cuda.is_available(), reason="torch without CUDA"),
    pytest.mark.parametrize("place", PLACES),
]
SLAB_BYTES = 64 << 20
TIMEOUT_S = 60.0  # compilers take their time, and ranks wait for each other


@contextlib.contextmanager
def torch_buffer(group: Group) -> Iterator[ep_rt.Buffer]:
    with ep_rt.Buffer(group, SLAB_BYTES, backend="cuda", timeout_s=TIMEOUT_S) as buffer:
        poison(buffer, 0xFF)  # NaN
        yield buffer


def run(
    place: str, check: Callable[..., None], *args: Any, num_virtual_ranks: int = 4, **options: Any
) -> None:
    """``check(buffer, *args, **options)`` on every rank, twice: also in memory that was used before."""
    num_ranks = num_ranks_of(place, num_virtual_ranks)
    if NUM_EXPERTS % num_ranks:
        pytest.skip(f"{NUM_EXPERTS} experts on {num_ranks} ranks")

    def body(group: Group) -> None:
        with torch_buffer(group) as buffer:
            with meeting(buffer, place):
                for _ in range(2):
                    check(buffer, *args, **options)
            assert buffer.stats.num_copied_results == 0

    run_torch(place, body, num_virtual_ranks=num_virtual_ranks)
    gc.collect()
    deadline = time.monotonic() + 5
    while len(ep._handles) and time.monotonic() < deadline:
        time.sleep(0.01)  # threads of autograd's let go a little later
    assert not len(ep._handles)


@pytest.mark.parametrize("options", OPTIONS)
def test_results_and_gradients_are_those_of_a_dense_layer(place: str, options: dict[str, Any]) -> None:
    run(place, cases.check_layer, options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_short_floats(place: str, options: dict[str, Any], dtype: str) -> None:
    run(place, cases.check_short_floats, options, getattr(torch, dtype))


@pytest.mark.parametrize("options", BY_RANK)
def test_weights_through_combine(place: str, options: dict[str, Any]) -> None:
    run(place, cases.check_weights_through_combine, options)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_handle_used_again(place: str, options: dict[str, Any]) -> None:
    run(place, cases.check_handle_used_again, options)


@pytest.mark.parametrize("which", [0, 2, 3])
@pytest.mark.parametrize("options", STATIC)
def test_one_input_alone_needs_a_gradient(place: str, options: dict[str, Any], which: int) -> None:
    run(place, cases.check_one_input_alone, options, which)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_rank_whose_rows_need_no_gradient(place: str, options: dict[str, Any]) -> None:
    run(place, cases.check_rows_without_gradient, options)


@pytest.mark.parametrize("options", STATIC)
def test_second_derivatives(place: str, options: dict[str, Any]) -> None:
    run(place, cases.check_second_derivatives, options)


def test_dropped_rows_have_no_gradient(place: str) -> None:
    if place != "virtual":
        pytest.skip("for two ranks")
    run(place, cases.check_dropped_rows, num_virtual_ranks=2)


@pytest.mark.parametrize("options", STATIC)
def test_padding_is_zero(place: str, options: dict[str, Any]) -> None:
    run(place, cases.check_padding, options)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", OPTIONS[1:3])
def test_checkpoints(place: str, options: dict[str, Any], use_reentrant: bool) -> None:
    run(place, cases.check_checkpoint, options, use_reentrant=use_reentrant)


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_calls_in_the_order_of_streams(place: str, layout: str, is_static: bool, is_backward: bool) -> None:
    """First with ranks that meet, which loads all kernels and finds all memory, then without."""

    def body(group: Group) -> None:
        streams = Streams()
        with torch_buffer(group) as buffer:
            for meets in (meeting(buffer, place), contextlib.nullcontext()):
                with meets:
                    cases.check_streams(buffer, streams, layout, is_static=is_static, is_backward=is_backward)

    run_torch(place, body, num_virtual_ranks=2)


@pytest.mark.parametrize("options", STATIC)
def test_graph_of_a_layer(place: str, options: dict[str, Any]) -> None:
    def body(group: Group) -> None:
        with torch_buffer(group) as buffer:
            first = meeting(buffer, place)  # loads all kernels
            cases.check_graph(buffer, options, has_threads_beside=place != "mpi", first=first)

    run_torch(place, body, num_virtual_ranks=2)


@pytest.mark.parametrize("options", STATIC)
def test_operators_are_what_torch_expects(place: str, options: dict[str, Any]) -> None:
    if place != "virtual":
        pytest.skip("for one rank")
    run(place, cases.check_operators, options, num_virtual_ranks=1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", STATIC)
def test_compiled_is_as_eager(place: str, options: dict[str, Any], backend: str) -> None:
    if place == "gpus":
        pytest.skip("one thread of a process compiles at a time, and the others would wait")
    # Inductor writes Triton for GPUs, and Triton writes C for what launches it.
    if backend == "inductor" and not (importlib.util.find_spec("triton") and shutil.which("gcc")):
        pytest.skip("no Triton, or no gcc for it")
    run(place, cases.check_compiled, backend, options, num_virtual_ranks=1)
    torch._dynamo.reset()


def test_one_graph_gives_its_handle_to_another(place: str) -> None:
    if place != "virtual":
        pytest.skip("for one rank")
    run(place, cases.check_one_graph_after_another, num_virtual_ranks=1)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", BY_RANK)
def test_rows_are_used_where_they_landed(place: str, options: dict[str, Any]) -> None:
    """Dispatch hands out what the peers wrote, with gradients or without; combine reads it there."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = cases.Case.of(buffer.rank + 1)  # so that rank 0 has tokens
        weights = case.topk_weights.detach()  # gradients of weights lie elsewhere
        sent = ep.dispatch(buffer, case.x, case.topk_idx, weights, num_experts=NUM_EXPERTS, **options)
        for each in (sent.recv_x, sent.recv_topk_idx, sent.recv_topk_weights):
            assert len(each) == 0 or points_into_slab(buffer, each)
        num_staged = buffer.stats.num_staged_inputs
        combined = ep.combine(sent.recv_x, sent.handle, sent.recv_topk_weights).combined_x
        assert buffer.stats.num_staged_inputs == num_staged
        copies = cases.num_copies(case.topk_idx, options, buffer.num_ranks)
        assert torch.equal(combined, copies * case.x)
        [grad] = cases.gradients(combined, case, case.x)
        assert buffer.stats.num_staged_inputs == num_staged  # what backward of combine received
        assert torch.equal(grad, copies * case.grad)
        with torch.no_grad():
            y = buffer.empty((len(sent.recv_x), HIDDEN), torch.float32)
            assert len(y) == 0 or points_into_slab(buffer, y)
            torch.mul(sent.recv_x, 2, out=y)
            assert torch.equal(ep.combine(y, sent.handle).combined_x, 2 * copies * case.x)
            assert buffer.stats.num_staged_inputs == num_staged
            ep.combine(sent.recv_x * 2, sent.handle)
            assert buffer.stats.num_staged_inputs == num_staged + (len(y) > 0)

    run(place, check)
