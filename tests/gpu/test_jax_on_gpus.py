"""`ep_rt.jax` on GPUs: one process for each under mpirun, else a single rank.

With ``EP_RT_RANKS_PER_NODE=1 mpirun -n 2 pytest ...`` all of it goes over the network of virtual nodes.

What these tests share with those of the host backend is in jax_cases.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ranks import IS_UNDER_MPI, RANKS_PER_NODE, device_count, run_on_devices, run_ranks

# Read when JAX first uses the GPU, of which it would take most of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_cases import (  # noqa: E402
    EXACT,
    HIDDEN,
    NUM_EXPERTS,
    ORDER_FORMS,
    STATIC,
    Case,
    check_decided,
    check_deep,
    check_gradients,
    check_oracle,
    check_order,
    num_copies,
    same,
)

import ep_rt  # noqa: E402
import ep_rt.jax as ep  # noqa: E402

if device_count():
    import cupy
    from device_arrays import cuda_buffer


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device_count() == 0, reason="no GPU")]

SLOW_ROUNDS = 300
static = pytest.mark.parametrize("options", STATIC.values(), ids=STATIC)

Array = Any


@pytest.fixture(autouse=True)
def _with_cuda() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("JAX without CUDA")


def eager(fn: Any) -> Any:
    return fn


def run(fn: Callable[[ep_rt.Buffer], Any]) -> list[Any]:
    """What `fn` returns on the ranks of this process, given a buffer; JAX uses the rank's GPU."""

    def on_rank(group: ep_rt.Group) -> Any:
        device = cupy.cuda.runtime.getDevice()
        # Ranks compile for themselves, and wait for the others meanwhile.
        with (
            jax.default_device(jax.local_devices(backend="gpu")[device]),
            cuda_buffer(group, timeout_s=100.0, num_nvl_bytes=1 << 30) as buffer,
        ):
            return fn(buffer)

    return run_ranks("mpi", on_rank) if IS_UNDER_MPI else run_on_devices([0], on_rank)


def slow(x: Array) -> Array:
    """The same rows after some milliseconds of work on XLA's stream."""
    wide = jnp.ones((2048, 2048)) * (1 + 0 * x.sum())
    wide = jax.lax.fori_loop(0, SLOW_ROUNDS, lambda _, y: (wide @ y) / len(wide), wide)
    return x + jnp.round(wide[0, 0] - 1)


@pytest.mark.parametrize("way", [eager, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("seed", [0, 1, 2, 5, 8, 9])
def test_random_layers_equal_the_oracle(seed: int, layout: str, way: Any) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        for is_exact in (False, True) if way is eager else (False,):
            check_oracle(buffer, seed, layout, way, is_exact=is_exact, ranks_per_node=RANKS_PER_NODE)

    run(check)


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_gradients_of_eager_calls(options: dict[str, Any]) -> None:
    run(lambda buffer: check_gradients(buffer, options, eager))


@static
def test_gradients_in_a_program(options: dict[str, Any]) -> None:
    run(lambda buffer: check_gradients(buffer, options, jax.jit))


@pytest.mark.parametrize("form", ["plain", "jit", "checkpoint", "scan", "scan of checkpoints"])
@static
def test_layers_in_a_program(options: dict[str, Any], form: str) -> None:
    with jax.default_matmul_precision("highest"):
        run(lambda buffer: check_deep(buffer, options, form, jax.jit))


@pytest.mark.parametrize("form", ["plain", "scan", "scan of checkpoints"])
def test_layers_in_eager_functions(form: str) -> None:
    with jax.default_matmul_precision("highest"):
        run(lambda buffer: check_deep(buffer, STATIC["expert-worst"], form, eager))


@static
def test_branches_and_loops_that_data_decide(options: dict[str, Any]) -> None:
    run(lambda buffer: check_decided(buffer, options))


@pytest.mark.parametrize("form", ORDER_FORMS)
def test_calls_come_in_the_order_of_the_function(form: str) -> None:
    run(lambda buffer: check_order(buffer, form))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_calls_come_after_slow_work_and_before_what_reads_them(is_compiled: bool) -> None:
    """Work in front on XLA's stream, on this rank's and on the peers'; the host does not wait for it."""

    def check(buffer: ep_rt.Buffer) -> None:
        case, options = Case.of(buffer.rank), STATIC["rank-worst"]

        def after(x: Array) -> Array:
            sent = ep.dispatch(buffer, x, case.topk_idx, num_experts=NUM_EXPERTS, **options)
            return ep.combine(sent.recv_x * 3, sent.handle).combined_x + 1

        first, then = jax.jit(slow), (jax.jit(after) if is_compiled else after)
        whole = jax.jit(lambda x: after(slow(x)))
        copies = num_copies(case.topk_idx, options, buffer.num_ranks)
        for program in (lambda x: then(first(x)), whole):
            program(case.inputs.x).block_until_ready()  # compiled now
            jax.effects_barrier()
            buffer.group.barrier()
            for number in range(10):
                x = case.inputs.x + number
                x.block_until_ready()
                result = program(x)
                was_pending = not result.is_ready()
                assert same(result, 3 * copies * x + 1)
                if len(x):  # an array without elements is ready at once
                    assert was_pending

    run(check)


def test_many_rounds_on_memory_that_is_used_again() -> None:
    """Results are dropped at once; XLA's memory, and the buffer's, go from call to call."""

    def check(buffer: ep_rt.Buffer) -> None:
        case, options = Case.of(buffer.rank), STATIC["expert-worst"]
        copies = num_copies(case.topk_idx, options, buffer.num_ranks)

        def there_and_back(x: Array) -> Array:
            sent = ep.dispatch(buffer, x, case.topk_idx, num_experts=NUM_EXPERTS, **options)
            return ep.combine(sent.recv_x, sent.handle).combined_x

        program = jax.jit(there_and_back)
        results = []
        for number in range(200):
            x = case.inputs.x + number
            # Eager calls are on another stream.
            results.append((number, (there_and_back if number % 7 == 0 else program)(x)))
        for number, result in results:
            assert same(result, copies * (case.inputs.x + number))

    run(check)


def test_a_large_layer() -> None:
    """Rows as models have them, many enough to fill the kernels."""

    def check(buffer: ep_rt.Buffer) -> None:
        num_tokens, hidden, num_experts, num_topk = 2048, 2048, 8 * buffer.num_ranks, 4
        rng = np.random.default_rng(buffer.rank)
        x = jnp.asarray(rng.integers(-8, 9, (num_tokens, hidden)), jnp.bfloat16)
        ids = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :num_topk]
        topk_idx = jnp.asarray(ids, jnp.int32)

        def there_and_back(x: Array) -> tuple[Array, Array]:
            sent = ep.dispatch(
                buffer,
                x,
                topk_idx,
                num_experts=num_experts,
                layout="expert",
                expert_alignment=8,
                num_worst_tokens=num_tokens * num_topk * buffer.num_ranks + 64,
            )
            return ep.combine(sent.recv_x, sent.handle).combined_x, sent.handle.overflow

        program = jax.jit(there_and_back)
        for _ in range(5):
            result, overflow = program(x)
            assert not overflow
            assert same(result, num_topk * x)

    run(check)


@pytest.mark.skipif(not RANKS_PER_NODE, reason="one node")
def test_too_many_tokens_over_nodes_are_refused_when_a_program_is_traced() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        x, topk_idx = jnp.ones((9000, HIDDEN)), jnp.zeros((9000, 1), jnp.int32)

        def there(x: Array, topk_idx: Array) -> Array:
            return ep.dispatch(buffer, x, topk_idx, num_experts=NUM_EXPERTS, num_worst_tokens=40).recv_x

        with pytest.raises(ep_rt.ConfigError, match="num_max_tokens_per_rank"):
            jax.jit(there)(x, topk_idx)
        check_gradients(buffer, STATIC["rank-worst"], jax.jit)

    run(check)


def test_a_program_for_the_wrong_place_is_refused() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(1)
        cpu = jax.local_devices(backend="cpu")[0]
        x, topk_idx = (jax.device_put(each, cpu) for each in (case.inputs.x, case.topk_idx))

        def there(x: Array, topk_idx: Array) -> Array:
            return ep.dispatch(buffer, x, topk_idx, num_experts=NUM_EXPERTS, num_worst_tokens=40).recv_x

        with pytest.raises(ep_rt.ConfigError, match="the program is for cpu"):
            jax.jit(there)(x, topk_idx)
        assert x.shape[1] == HIDDEN

    run(check)
