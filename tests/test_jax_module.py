"""`ep_rt.jax`: results and gradients, eager and within compiled programs, the order of calls, errors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MpiRun

import ep_rt

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_cases import (  # noqa: E402
    EXACT,
    HIDDEN,
    NUM_EXPERTS,
    NUM_TOKENS,
    NUM_TOPK,
    ORDER_FORMS,
    STATIC,
    Case,
    Inputs,
    Log,
    check_decided,
    check_deep,
    check_gradients,
    check_oracle,
    check_order,
    dense,
    layer,
    num_copies,
    same,
    with_gradients,
)

import ep_rt.jax as ep  # noqa: E402
from ep_rt import jax_calls  # noqa: E402


def eager(fn: Any) -> Any:
    return fn


EVERY = [pytest.param(options, eager, id=f"{name}-eager") for name, options in {**EXACT, **STATIC}.items()]
EVERY += [pytest.param(options, jax.jit, id=f"{name}-jit") for name, options in STATIC.items()]
ways = pytest.mark.parametrize(("options", "way"), EVERY)
ways_by_rank = pytest.mark.parametrize(
    ("options", "way"), [each for each in EVERY if str(each.id).startswith("rank")]
)
few_ways = pytest.mark.parametrize(("options", "way"), [EVERY[0], EVERY[-1]])
static = pytest.mark.parametrize("options", STATIC.values(), ids=STATIC)

Array = Any
Way = Callable[..., Any]


def run(fn: Callable[[ep_rt.Buffer], Any], num_ranks: int = 4) -> list[Any]:
    """What `fn` returns on each rank, given a buffer."""

    def on_rank(group: ep_rt.Group) -> Any:
        with ep_rt.Buffer(group, backend="host", timeout_s=30) as buffer:
            return fn(buffer)

    return ep_rt.run_local(on_rank, num_ranks)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("seed", [0, 1, 2, 5, 8])
def test_random_layers_equal_the_oracle(seed: int, layout: str, is_exact: bool) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        check_oracle(buffer, seed, layout, eager, is_exact=is_exact)
        if not is_exact:
            check_oracle(buffer, seed, layout, jax.jit, is_exact=is_exact)

    run(check)


@ways
def test_results_and_gradients_are_those_of_a_dense_layer(
    options: dict[str, Any], way: Callable[..., Any]
) -> None:
    run(partial(check_gradients, options=options, way=way))


@few_ways
def test_gradients_are_slopes(options: dict[str, Any], way: Way) -> None:
    """Real numbers, and central differences along a direction in all inputs of all ranks."""

    def check(buffer: ep_rt.Buffer) -> None:
        rng = np.random.default_rng(100 + buffer.rank)
        case = Case.of(buffer.rank)
        inputs = case.inputs._replace(scale=jnp.linspace(0.5, 1.5, HIDDEN))
        along = jax.tree.map(lambda each: jnp.asarray(rng.standard_normal(each.shape), jnp.float32), inputs)
        fn = way(partial(layer, buffer, options, case.topk_idx))

        def value(step: float) -> float:
            moved = jax.tree.map(lambda each, direction: each + step * direction, inputs, along)
            return float((np.asarray(fn(moved), np.float64) * np.asarray(case.grad)).sum())

        step = 2.0**-6
        numerical = sum(buffer.group.allgather((value(step) - value(-step)) / (2 * step)))
        _, slopes = with_gradients(fn, inputs, case.grad)
        slope = sum(
            float((g * d).sum()) for g, d in zip(jax.tree.leaves(slopes), jax.tree.leaves(along), strict=True)
        )
        # The layer is cubic, so differences are off by the square of the step.
        assert numerical == pytest.approx(sum(buffer.group.allgather(slope)), rel=1e-3, abs=0.1)

    run(check)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@ways
def test_short_floats(options: dict[str, Any], way: Way, dtype: Any) -> None:
    """Rows there and back: as many as ranks, or experts, that a token went to."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank, dtype)

        def there_and_back(x: Array) -> Array:
            sent = ep.dispatch(buffer, x, case.topk_idx, num_experts=NUM_EXPERTS, **options)
            assert sent.recv_topk_weights is None
            combined, weights = ep.combine(sent.recv_x, sent.handle)
            assert weights is None
            return combined

        result, pull = jax.vjp(way(there_and_back), case.inputs.x)
        copies = num_copies(case.topk_idx, options).astype(dtype)
        assert same(result, copies * case.inputs.x)
        assert same(pull(case.grad)[0], copies * case.grad)

    run(check)


@ways_by_rank
def test_weights_through_combine(options: dict[str, Any], way: Way) -> None:
    """Weights of layout "rank" come back, squared; two biases are added."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        x, weights, bias, _ = case.inputs
        along = jnp.arange(weights.size).reshape(weights.shape).astype(jnp.float32)

        def loss(weights: Array, bias: Array) -> Any:
            sent = ep.dispatch(buffer, x, case.topk_idx, weights, num_experts=NUM_EXPERTS, **options)
            combined = ep.combine(sent.recv_x, sent.handle, sent.recv_topk_weights**2, (bias, 2 * bias))
            total = (combined.combined_topk_weights * along).sum() + (combined.combined_x * case.grad).sum()
            return total, combined.combined_topk_weights

        (_, back), grads = way(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, bias)
        is_sent = case.topk_idx >= 0
        assert same(back, weights**2 * is_sent)
        assert same(grads[0], 2 * weights * along * is_sent)
        assert same(grads[1], 3 * case.grad)

    run(check)


@ways
def test_a_handle_used_again(options: dict[str, Any], way: Way) -> None:
    """Other rows by the same routing, and three combines; one of them has no part in the loss of any rank."""

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)

        def results(x: Array, other: Array) -> tuple[Array, ...]:
            sent = ep.dispatch(
                buffer, x, case.topk_idx, case.inputs.topk_weights, num_experts=NUM_EXPERTS, **options
            )
            again = ep.dispatch(buffer, other, handle=sent.handle)
            assert again.handle is sent.handle
            assert again.recv_topk_idx is None
            assert again.recv_topk_weights is None
            rows = sent.recv_x * again.recv_x, again.recv_x, sent.recv_x
            return tuple(ep.combine(each, sent.handle).combined_x for each in rows)

        x, other = case.inputs.x, case.inputs.x + 1
        (first, second, unused), pull = jax.vjp(way(results), x, other)
        copies = num_copies(case.topk_idx, options)
        assert same(unused, copies * x)
        assert same(second, copies * other)
        assert same(first, copies * x * other)
        found = pull((case.grad, case.grad, jnp.zeros_like(x)))
        assert same(found[0], copies * other * case.grad)
        assert same(found[1], copies * (x + 1) * case.grad)

    run(check)


@pytest.mark.parametrize("name", ["x", "topk_weights", "bias", "scale"])
@few_ways
def test_one_input_alone_needs_a_gradient(options: dict[str, Any], way: Way, name: str) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)

        def slope(fn: Callable[[Inputs], Array]) -> Any:
            def loss(alone: Array) -> Array:
                return (fn(case.inputs._replace(**{name: alone})) * case.grad).sum()

            return jax.grad(loss)

        given = getattr(case.inputs, name)
        found = way(slope(partial(layer, buffer, options, case.topk_idx)))(given)
        wanted = slope(partial(dense, case.topk_idx))(given)
        if name == "scale":
            found, wanted = (sum(buffer.group.allgather(np.asarray(each))) for each in (found, wanted))
        assert same(found, wanted)

    run(check)


@ways
def test_second_derivatives(options: dict[str, Any], way: Way) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)

        def of(fn: Callable[[Inputs], Array]) -> Any:
            def of_first(inputs: Inputs) -> Array:
                slopes = jax.grad(lambda inputs: (fn(inputs) * case.grad).sum())(inputs)
                return (slopes.x**2).sum() + (slopes.topk_weights**2).sum()

            return jax.grad(of_first)

        found = way(of(partial(layer, buffer, options, case.topk_idx)))(case.inputs)
        wanted = of(partial(dense, case.topk_idx))(case.inputs)
        assert same(found.x, wanted.x)
        assert same(found.topk_weights, wanted.topk_weights)

    run(check)


@pytest.mark.parametrize("way", [eager, jax.jit], ids=["eager", "jit"])
def test_dropped_rows_have_no_gradient(way: Way) -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        x, topk_idx = jnp.ones((4, HIDDEN)), jnp.zeros((4, 1), jnp.int32)  # all to rank 0, which takes 6 of 8

        def loss(x: Array) -> Any:
            sent = ep.dispatch(buffer, x, topk_idx, num_experts=2, num_worst_tokens=6)
            handle = sent.handle
            counts = handle.overflow, handle.num_recv_tokens, handle.num_recv_tokens_per_expert
            return ep.combine(sent.recv_x, handle).combined_x.sum(), counts

        grad, (overflow, num_recv_tokens, per_expert) = way(jax.grad(loss, has_aux=True))(x)
        assert overflow == (buffer.rank == 0)
        assert num_recv_tokens == (8 if buffer.rank == 0 else 0)
        assert per_expert.tolist() == [8 if buffer.rank == 0 else 0]
        assert grad[:, 0].tolist() == ([1, 1, 1, 1] if buffer.rank == 0 else [1, 1, 0, 0])

    run(check, 2)


@pytest.mark.parametrize("way", [eager, jax.jit], ids=["eager", "jit"])
@static
def test_padding_is_zero(options: dict[str, Any], way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows and in their gradients, whatever the buffer leaves there."""
    if options["layout"] == "rank":
        dispatch = ep_rt.Buffer.dispatch

        def dirty(*args: Any, **kwargs: Any) -> Any:
            sent = dispatch(*args, **kwargs)
            rows = [
                np.array(each) for each in (sent.recv_x if isinstance(sent.recv_x, tuple) else [sent.recv_x])
            ]
            for each in rows:
                each[sent.handle.num_recv_tokens :] = np.nan
            return sent._replace(recv_x=tuple(rows) if isinstance(sent.recv_x, tuple) else rows[0])

        monkeypatch.setattr(ep_rt.Buffer, "dispatch", dirty)

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        fn = partial(layer, buffer, options, case.topk_idx)
        for each in jax.tree.leaves(with_gradients(fn, case.inputs, case.grad, way)):
            assert jnp.isfinite(each).all()

        def rows_and_gradients(rows: Array) -> tuple[Array, ...]:
            sent = ep.dispatch(buffer, case.inputs.x, case.topk_idx, num_experts=NUM_EXPERTS, **options)
            _, pull = jax.vjp(lambda rows: ep.combine(rows, sent.handle).combined_x, rows)
            return sent.recv_x, pull(case.grad)[0], sent.handle.num_needed_rows

        rows, grads, num_needed_rows = way(rows_and_gradients)(
            jnp.ones((options["num_worst_tokens"], HIDDEN))
        )
        assert 0 < num_needed_rows < len(rows)
        assert not rows[num_needed_rows:].any()
        assert not grads[num_needed_rows:].any()

    run(check)


# Programs


@pytest.mark.parametrize("form", ["plain", "jit", "checkpoint", "scan", "scan of checkpoints"])
@static
def test_layers_in_a_program(options: dict[str, Any], form: str) -> None:
    run(partial(check_deep, options=options, form=form, way=jax.jit), 2)


@pytest.mark.parametrize("form", ["plain", "checkpoint", "scan"])
def test_layers_in_eager_functions(form: str) -> None:
    run(partial(check_deep, options=STATIC["expert-worst"], form=form, way=eager), 2)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="they are allowed there")
def test_loops_on_gpus_are_refused_by_an_older_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the calls are taken for those of a GPU."""
    monkeypatch.setattr(jax_calls, "_effect", lambda call: jax_calls._GPU_EFFECT)
    options = STATIC["rank-worst"]
    run(partial(check_deep, options=options, form="plain", way=jax.jit), 2)

    def body(buffer: ep_rt.Buffer) -> None:
        with pytest.raises(NotImplementedError, match="not tried in a loop"):
            check_deep(buffer, options, "scan", jax.jit)

    run(body, 2)


@pytest.mark.parametrize("form", ORDER_FORMS)
def test_calls_come_in_the_order_of_the_function(form: str) -> None:
    run(partial(check_order, form=form))


def test_a_program_is_traced_once_and_runs_on_other_numbers() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case, num_traces = Case.of(buffer.rank), []

        def traced(topk_idx: Array, inputs: Inputs) -> Array:
            num_traces.append(1)
            return layer(buffer, STATIC["expert-worst"], topk_idx, inputs)

        program = jax.jit(traced)
        for shift in range(3):
            topk_idx = jnp.where(case.topk_idx < 0, -1, (case.topk_idx + shift) % NUM_EXPERTS)
            inputs = case.inputs._replace(x=case.inputs.x + shift)
            assert same(program(topk_idx, inputs), dense(topk_idx, inputs))
        assert len(num_traces) == 1

    run(check)


def test_a_handle_between_programs_and_eager_calls() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        options = STATIC["rank-worst"]

        def there(x: Array) -> Any:
            return ep.dispatch(buffer, x, case.topk_idx, num_experts=NUM_EXPERTS, **options)

        back = jax.jit(lambda rows, handle: ep.combine(rows, handle).combined_x)
        wanted = num_copies(case.topk_idx, options) * case.inputs.x
        for sent in (there(case.inputs.x), jax.jit(there)(case.inputs.x)):
            assert same(back(sent.recv_x, sent.handle), wanted)
            assert same(ep.combine(sent.recv_x, sent.handle).combined_x, wanted)

    run(check)


@static
def test_branches_and_loops_that_data_decide(options: dict[str, Any]) -> None:
    run(partial(check_decided, options=options))


PROCESSES = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import jax
    import ep_rt
    from jax_cases import STATIC, check_deep, check_gradients, check_oracle

    with ep_rt.Buffer(backend="host", timeout_s=100) as buffer:
        for layout in ("rank", "expert"):
            check_oracle(buffer, 2, layout, jax.jit, is_exact=False)
        for options in STATIC.values():
            check_gradients(buffer, options, jax.jit)
            check_deep(buffer, options, "scan of checkpoints", jax.jit)
    print("all as it should be")
"""


DISTRIBUTED = """
    import socket
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import ep_rt
    import ep_rt.jax

    group = ep_rt.as_group()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = group.allgather(free.getsockname()[1])[0]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=group.size, process_id=group.rank)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (group.size, group.size, 1)
    ids = jnp.tile(jnp.arange(group.size), (4, 1))

    with ep_rt.Buffer(group, backend="host", timeout_s=60) as buffer:
        def layer(x, ids):
            sent = ep_rt.jax.dispatch(buffer, x, ids, num_experts=group.size, num_worst_tokens=4 * group.size)
            return ep_rt.jax.combine(sent.recv_x * 3, sent.handle).combined_x

        x = jnp.full((4, 8), 1.0 + group.rank)
        assert (jax.jit(layer)(x, ids) == 3 * group.size * x).all()
        slope = jax.jit(jax.grad(lambda x: layer(x, ids).sum()))(x)
        assert (slope == 3 * group.size).all()

        mesh = jax.make_mesh((group.size,), ("ranks",))
        spec = PartitionSpec("ranks")
        whole = [jax.make_array_from_process_local_data(NamedSharding(mesh, spec), each) for each in (x, ids)]
        try:
            jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(*whole)
        except ValueError as error:
            assert "ordered effects are not supported for more than 1 device" in str(error), error
            print("all as it should be", flush=True)
"""


def test_processes_of_one_jax_program(mpirun: MpiRun, tmp_path: Path) -> None:
    """Each process compiles calls for its own device; programs over all devices are refused."""
    pytest.importorskip("mpi4py")
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    done = mpirun(2, script, timeout_s=120)
    assert done.stdout.count("all as it should be") == 2, done.stdout


def test_processes(mpirun: MpiRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "1")  # a process needs no thread for each rank
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROCESSES))
    done = mpirun(2, script, str(Path(__file__).parent), timeout_s=240)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("all as it should be") == 2


# Errors, and what lives how long


@pytest.mark.parametrize("way", [eager, jax.jit], ids=["eager", "jit"])
def test_handles_of_a_model_have_room_for_the_tokens_that_can_arrive(way: Way) -> None:
    num_max_tokens, options = max(NUM_TOKENS), STATIC["expert-worst"]

    def check(group: ep_rt.Group) -> None:
        with ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=num_max_tokens,
            hidden=HIDDEN,
            num_experts=NUM_EXPERTS,
            num_topk=NUM_TOPK,
            dtype="float32",
            backend="host",
            timeout_s=30,
        ) as buffer:
            check_gradients(buffer, options, way)
            x, ids = jnp.ones((5, HIDDEN)), jnp.zeros((5, NUM_TOPK), jnp.int32)
            handle = way(lambda x: ep.dispatch(buffer, x, ids, num_experts=NUM_EXPERTS, **options).handle)(x)
            assert handle.shape.num_landed_rows == 4 * num_max_tokens < options["num_worst_tokens"]
            assert [part.size for part in handle.parts] == list(buffer.flat_layout(handle.shape).num_bytes)
            with pytest.raises(ep_rt.ConfigError, match="x has 7 tokens; num_max_tokens_per_rank=6"):
                ep.dispatch(buffer, jnp.ones((7, HIDDEN)), jnp.zeros((7, NUM_TOPK)), num_experts=NUM_EXPERTS)

    ep_rt.run_local(check, 4)


def test_errors_when_a_function_is_traced() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        x, ids, weights = jnp.ones((2, HIDDEN)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))
        sent = ep.dispatch(buffer, x, ids, num_experts=2, num_worst_tokens=4)
        log = Log()
        log.watch(buffer)

        def raises(error: type[Exception], match: str, fn: Callable[..., Any], *args: Any) -> None:
            for way in (eager, jax.jit):
                with pytest.raises(error, match=match):
                    way(lambda: fn(*args))()

        def dispatch(*args: Any, **options: Any) -> Callable[[], Any]:
            return lambda: ep.dispatch(buffer, *args, **{"num_experts": 2, "num_worst_tokens": 4, **options})

        raises(ep_rt.ConfigError, "needs topk_idx and num_experts=", dispatch(x))
        raises(ep_rt.ConfigError, "give x alone", dispatch(x, ids, handle=sent.handle))
        raises(ep_rt.ConfigError, "num_experts=0 is not a positive multiple", dispatch(x, ids, num_experts=0))
        raises(ep_rt.ConfigError, "expert_alignment=0", dispatch(x, ids, expert_alignment=0))
        raises(ep_rt.ConfigError, "layout='row'", dispatch(x, ids, layout="row"))
        raises(ep_rt.ArrayError, "x has shape", dispatch(x[0], ids))
        raises(ep_rt.ArrayError, "pad hidden", dispatch(x[:, :3], ids))
        raises(ep_rt.ArrayError, "x: dtype 'int8'", dispatch(x.astype(jnp.int8), ids))
        raises(ep_rt.ArrayError, "topk_idx has dtype float32", dispatch(x, weights))
        raises(ep_rt.ArrayError, "topk_idx has shape", dispatch(x, ids[:1]))
        raises(ep_rt.ArrayError, "topk_weights has shape", dispatch(x, ids, weights[:1]))
        raises(ep_rt.HandleError, "x has 1 tokens", lambda: ep.dispatch(buffer, x[:1], handle=sent.handle))
        other = ep_rt.Buffer(ep_rt.as_group(), backend="host")
        raises(ep_rt.HandleError, "another buffer", lambda: ep.dispatch(other, x, handle=sent.handle))
        raises(ep_rt.ArrayError, "x has shape", ep.combine, x, sent.handle)
        raises(ep_rt.ArrayError, "topk_weights has shape", ep.combine, sent.recv_x, sent.handle, weights)
        raises(ep_rt.ArrayError, r"bias\[0\] has shape", ep.combine, sent.recv_x, sent.handle, None, x[:1])
        raises(ep_rt.ConfigError, "at most 2", ep.combine, sent.recv_x, sent.handle, None, (x, x, x))
        short = x.astype(jnp.float8_e4m3fn)
        wide = jnp.tile(short, (1, 2))
        raises(
            ep_rt.ArrayError,
            "gradients need",
            jax.grad(lambda x: dispatch(x, ids)().recv_x.astype(jnp.float32).sum()),
            wide,
        )
        with pytest.raises(ep_rt.ConfigError, match="give num_worst_tokens="):
            jax.jit(dispatch(x, ids, num_worst_tokens=0))()
        with pytest.raises(ep_rt.ConfigError, match="cannot be batched"):
            jax.vmap(lambda x: ep.dispatch(buffer, x, ids, num_experts=2, num_worst_tokens=4).recv_x)(x[None])
        assert log == []

    run(check, 1)


def test_threads_of_xla_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "2")

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        with pytest.raises(ep_rt.ConfigError, match=r"2 threads of XLA.*NPROC to 3"):
            jax.jit(partial(layer, buffer, STATIC["rank-worst"], case.topk_idx))(case.inputs)
        assert ep.dispatch(buffer, case.inputs.x, case.topk_idx, num_experts=NUM_EXPERTS)

    run(check, 2)


def test_several_devices_of_one_process_are_refused() -> None:
    program = """
        import jax, jax.numpy as jnp
        import ep_rt, ep_rt.jax
        jax.config.update("jax_num_cpu_devices", 2)
        mesh = jax.make_mesh((2,), ("i",))
        buffer = ep_rt.Buffer(ep_rt.as_group(), backend="host")
        def fn(x):
            ids = jnp.zeros((len(x), 1), jnp.int32)
            return ep_rt.jax.dispatch(buffer, x, ids, num_experts=1, num_worst_tokens=8).recv_x
        spread = jax.shard_map(fn, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"), check_vma=False)
        try:
            jax.jit(spread)(jax.device_put(jnp.ones((4, 8)), jax.NamedSharding(mesh, jax.P("i", None))))
        except Exception as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert "more than 1 device" in done.stdout, done.stderr


def test_an_error_of_one_rank_within_a_program_is_raised_on_all() -> None:
    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        whole = partial(layer, buffer, STATIC["rank-worst"])
        program = jax.jit(whole)
        topk_idx = case.topk_idx.at[0].set(NUM_EXPERTS) if buffer.rank == 2 else case.topk_idx
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"ArrayError.*rank 2.*id {NUM_EXPERTS}"):
            program(topk_idx, case.inputs).block_until_ready()
        for fn in (whole, program):
            assert same(fn(case.topk_idx, case.inputs), dense(case.topk_idx, case.inputs))

    run(check)


def test_a_rank_that_leaves_stops_the_others() -> None:
    failures = []

    def check(buffer: ep_rt.Buffer) -> None:
        case = Case.of(buffer.rank)
        program = jax.jit(partial(layer, buffer, STATIC["rank-worst"], case.topk_idx))
        program(case.inputs).block_until_ready()
        if buffer.rank == 1:
            raise ValueError("no more")
        try:
            program(case.inputs).block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            failures.append(str(error))
            raise

    with pytest.raises(ValueError, match="no more"):
        run(check)
    assert len(failures) == 3
    assert all("PeerFailedError" in each and "no more" in each for each in failures)


def test_programs_keep_no_buffer_and_say_that_it_is_closed_or_gone() -> None:
    buffer = ep_rt.Buffer(ep_rt.as_group(), backend="host")
    alive = weakref.ref(buffer)
    case = Case.of(1)

    def there(x: Array) -> Any:
        found = alive()
        assert found is not None  # when it is traced
        return ep.dispatch(found, x, case.topk_idx, num_experts=NUM_EXPERTS, num_worst_tokens=40)

    program = jax.jit(there)
    sent = program(case.inputs.x)
    buffer.close()
    with pytest.raises(ep_rt.ClosedError, match="closed"):
        ep.combine(sent.recv_x, sent.handle)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ClosedError.*closed"):
        jax.block_until_ready(program(case.inputs.x))
    del buffer
    gc.collect()
    assert alive() is None
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ClosedError.*gone"):
        jax.block_until_ready(program(case.inputs.x))
