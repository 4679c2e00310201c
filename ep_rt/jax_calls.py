"""Calls of a buffer as JAX sees them: a primitive with a token between one call and the next.

What a call is stands in `jax.py`, which says how all of this is meant; here is how XLA comes to make it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import jax
import numpy as np
from jax._src import core, effects
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching, mlir

from . import arrays
from .buffer import Buffer
from .config import xla_cpu_threads
from .errors import ClosedError, ConfigError
from .groups import ThreadGroup

_TARGETS = {"cpu": "xla_buffer_python_cpu_callback", "cuda": "xla_buffer_python_gpu_callback"}


class Call(Protocol):
    """A call of a buffer, hashable, with everything but its arrays."""

    @property
    def buffer(self) -> weakref.ref[Buffer]: ...

    def run(self, buffer: Buffer, given: Sequence[Any], framework: str) -> list[Any]:
        """Make the call on arrays of a framework."""

    def results(self, *given: Any) -> list[Any]:
        """What `aval` says of each result."""


def open_buffer(buffer: weakref.ref[Buffer]) -> Buffer:
    """The buffer of a call.

    Raises:
        ClosedError: nobody holds it any more.
    """
    found = buffer()
    if found is None:
        raise ClosedError("the buffer of this call is gone")
    return found


def aval(shape: tuple[int, ...], dtype: Any) -> Any:
    """What JAX knows of an array while it traces."""
    return core.ShapedArray(shape, dtype)


class _CallEffect(effects.Effect):  # type: ignore[misc]  # see pyproject.toml: jax is Any
    def __str__(self) -> str:
        return "ep_rt call"


class _GpuCallEffect(effects.Effect):  # type: ignore[misc]
    def __str__(self) -> str:
        return "ep_rt call on a GPU, which was not tried in a loop or a branch with this JAX"

    __repr__ = __str__


_EFFECT, _GPU_EFFECT = _CallEffect(), _GpuCallEffect()
_LOOPS_ON_GPUS = (0, 11)  # from there on they were tried
for _allowed in (
    "ordered_effects",
    "lowerable_effects",
    "control_flow_allowed_effects",
    "custom_derivatives_allowed_effects",
    "remat_allowed_effects",
    "partial_eval_kept_effects",  # JAX 0.11
):
    if hasattr(effects, _allowed):
        getattr(effects, _allowed).add_type(_CallEffect)
        if _allowed != "control_flow_allowed_effects" or jax.__version_info__ >= _LOOPS_ON_GPUS:
            getattr(effects, _allowed).add_type(_GpuCallEffect)


def _effect(call: Call) -> effects.Effect:
    return _EFFECT if open_buffer(call.buffer).backend == "host" else _GPU_EFFECT


def _results(*given: Any, call: Call) -> tuple[list[Any], set[Any]]:
    return call.results(*given), {_effect(call)}


def _run_now(*given: Any, call: Call) -> list[Any]:
    results: list[Any] = call.run(open_buffer(call.buffer), given, "jax")
    return results


def _refuse_batch(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "dispatch and combine cannot be batched by vmap: make the batch a part of the tokens, or use lax.map"
    )


def _lower(ctx: Any, *operands: Any, call: Call) -> Any:
    """A custom call to `_run_in_program`, between the tokens of the calls before and behind it."""
    platforms = ctx.platforms or ctx.module_context.platforms
    if len(platforms) != 1:
        raise ConfigError(f"a call of a buffer is compiled for one platform, not for {', '.join(platforms)}")
    _check_place(open_buffer(call.buffer), platforms[0])
    num_given, effect = len(operands), _effect(call)

    def callback(context: Any, *memory: Any) -> tuple[()]:
        given, results = memory[1 : 1 + num_given], memory[2 + num_given :]
        _run_in_program(call, context, given, results)
        return ()

    ctx.module_context.add_host_callback(callback)
    number = np.uint64(len(ctx.module_context.host_callbacks) - 1)
    token = core.abstract_token
    on_gpu = platforms[0] == "cuda"
    if on_gpu:
        operands = tuple(_apart(operands))
    lowered = jax.ffi.ffi_lowering(_TARGETS[platforms[0]], has_side_effect=True)(
        ctx.replace(avals_in=[token, *ctx.avals_in], avals_out=[token, *ctx.avals_out]),
        ctx.tokens_in.get(effect),
        *operands,
        index=number,
    )
    ctx.set_tokens_out(ctx.tokens_in.update_tokens(mlir.TokenSet({effect: lowered[0]})))
    return _apart(lowered[1:]) if on_gpu else lowered[1:]


def _apart(values: Sequence[Any]) -> Sequence[Any]:
    """The same values, which XLA does not fuse with what makes or takes them.

    In a loop that is a slice of an array of all rounds. XLA of JAX 0.11.2 makes a fusion of such a slice and
    the call (dynamic-slice-fusion-rewriter-v2), and ends the process when it asks for the size of the token.
    """
    return stablehlo.OptimizationBarrierOp(values).results if values else values


call_p = Primitive("ep_rt_call")
call_p.multiple_results = True
call_p.def_impl(_run_now)
call_p.def_effectful_abstract_eval(_results)
batching.primitive_batchers[call_p] = _refuse_batch
# Not cached: every call has a place of its own between the tokens, and a callback of its own.
mlir.register_lowering(call_p, _lower, cacheable=False)


def _check_place(buffer: Buffer, platform: str) -> None:
    wanted = "cpu" if buffer.backend == "host" else "cuda"
    if platform != wanted:
        raise ConfigError(
            f"the program is for {platform}, and the buffer, with backend {buffer.backend!r}, for {wanted}"
        )
    is_among_threads = isinstance(buffer.group, ThreadGroup) and buffer.num_ranks > 1
    if platform == "cpu" and is_among_threads and xla_cpu_threads() <= buffer.num_ranks:
        raise ConfigError(
            f"{buffer.num_ranks} ranks wait for each other on {xla_cpu_threads()} threads of XLA: set the "
            f"environment variable NPROC to {buffer.num_ranks + 1} or more before JAX starts, or use mpiexec"
        )


def _run_in_program(call: Call, context: Any, given: Sequence[Any], results: Sequence[Any]) -> None:
    """Make a call on XLA's memory. Called by a thread of XLA."""
    buffer = open_buffer(call.buffer)
    if buffer.backend == "host":
        made = call.run(buffer, [arrays.host(each) for each in given], "numpy")
        for result, target in zip(made, results, strict=True):
            arrays.host(target, writable=True)[...] = result
        return
    from .cuda.streams import foreign_stream

    # CuPy's arrays, on XLA's stream: the call runs there, and its memory goes back in that order.
    stream = int(context.stream)
    views = [arrays.view(each, stream=stream) for each in given]
    with foreign_stream(stream, arrays.cuda_index(views[0].device)):
        made = call.run(
            buffer,
            [
                arrays.cuda_to_framework(
                    each.pointer, each.shape, each.dtype, device=each.device, framework="cupy", owner=each
                )
                for each in views
            ],
            "cupy",
        )
        buffer.deliver(made, [arrays.view(target, stream=stream) for target in results])
