"""Packed rows through ``jax.lax.ragged_all_to_all``, in programs of `jax.jit` and `jax.shard_map`.

JAX gives no stream to record events on, so times are by the host's clock: the ranks meet in a call, then a
program of N calls runs, and the same again with one of 2 N. What it takes to start a program and to learn
that it has ended is in both, so the difference by N is the time of a call among calls. Each call writes into
the result of the one before, in place, so XLA can neither drop nor merge them. What XLA does on the host in
every call is in the time, as it is in any program: between processes it reads the offsets there.

A rank that fails in a step of its own is an error of all. One that does not come to what XLA does together
leaves the others in waits that Python cannot end: after a while these processes say where they are, and end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from ..cuda.domain import together
from ..errors import BackendError
from ..exchange import Group
from .library import Library, Packed, agreed_port
from .measure import Times
from .places import CudaPlace, preset
from .workload import Array

T = TypeVar("T")

_log = logging.getLogger("ep_rt")
_NUM_CALLS: Final = 20
_START_S: Final = 60
_DEADLINE_S: Final = 120.0
_STDERR: Final = 2
_PLATFORM = "gpu"
# Between processes XLA 0.11 refuses the operation without it; versions before do not know it.
_OPTIONS: Final = {"xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback": True}
_AXIS: Final = "rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Indices:
    """How one rank calls the operation: int32 [R] each, in the order of its arguments.

    Attributes:
        output_offsets: where the rows that this rank sends land on each of the others.
    """

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array

    @classmethod
    def of(cls, counts: Array, rank: int) -> Indices:
        """Of rows by destination that arrive by source.

        Args:
            counts: [R, R], rows from each rank (first index) to each.
        """
        before_dst = np.cumsum(counts, axis=1) - counts
        before_src = np.cumsum(counts, axis=0) - counts
        return cls(
            input_offsets=before_dst[rank].astype(np.int32),
            send_sizes=counts[rank].astype(np.int32),
            output_offsets=before_src[rank].astype(np.int32),
            recv_sizes=counts[:, rank].astype(np.int32),
        )


class Ragged(Library):
    """JAX over the ranks, a process for each. Once in the life of a process: JAX starts once."""

    option = "jax"
    label = "JAX"
    note = (
        f"JAX's op: a program of {2 * _NUM_CALLS} calls less one of {_NUM_CALLS}, by the host's clock; "
        "what XLA does there for each is in it"
    )

    def __init__(self, group: Group, place: CudaPlace, repeat: int) -> None:
        super().__init__(group, place, repeat)
        _preset()
        port = agreed_port(group)
        with _deadline():
            # By itself first: XLA ends the processes that wait for one that does not come.
            self._jax = jax = self._together("import", lambda: importlib.import_module("jax"))
            self._mesh = self._together("start", lambda: self._started(port, place.device))
        self._sharding = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec(_AXIS))
        self.title = (
            f"JAX {jax.__version__} ragged_all_to_all of packed rows; op: by the host's clock, see the note"
        )

    @classmethod
    def _missing(cls) -> str | None:
        if importlib.util.find_spec("jax") is None:
            return "JAX is not installed"
        if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            return "this JAX has no GPU: install jax[cuda12] or jax[cuda13]"
        _preset()
        import jax

        # Which devices there are can only be asked once the processes have met.
        platforms = jax.config.jax_platforms
        if platforms and platforms.split(",")[0] not in ("cuda", "gpu"):
            return f"JAX is told not to use GPUs: JAX_PLATFORMS={platforms}"
        return None

    def measure(self, packed: Packed) -> Times:
        what = packed.operation
        with _deadline():
            arguments = self._together(what, lambda: self._arguments(packed))
            counts = (1, _NUM_CALLS, 2 * _NUM_CALLS)
            once, some, twice = self._together(
                what, lambda: [self._compiled(count, arguments) for count in counts]
            )
            for program in (once, some, twice):
                received = self._together(what, partial(self._received, program, arguments))
                self._check(packed, received[: len(packed.expected)])
        readings = []
        for _ in range(self._repeat):
            some_us, twice_us = (self._elapsed_us(program, once, arguments) for program in (some, twice))
            readings.append((twice_us - some_us) / _NUM_CALLS)
        calls_us = self._returned_us(once, arguments)
        self._group.barrier()
        return Times(kernel_us=None, op_us=tuple(readings), call_us=calls_us)

    def close(self) -> None:
        with _deadline():
            self._together("end", self._jax.distributed.shutdown)

    def _compiled(self, num_calls: int, arguments: tuple[Any, ...]) -> Any:
        program = self.lowered(num_calls, arguments)
        try:
            return program.compile(compiler_options=_OPTIONS)
        except self._jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return program.compile()

    def lowered(self, num_calls: int, arguments: tuple[Any, ...]) -> Any:
        """A program of so many calls, one after the other, before it is compiled."""
        jax = self._jax

        def calls(rows: Any, out: Any, *indices: Any) -> Any:
            for _ in range(num_calls):
                out = jax.lax.ragged_all_to_all(rows, out, *indices, axis_name=_AXIS)
            return out

        spec = self._sharding.spec
        mapped = jax.shard_map(calls, mesh=self._mesh, in_specs=spec, out_specs=spec)
        return jax.jit(mapped).lower(*arguments)

    def _started(self, port: int, device: int) -> Any:
        jax, group = self._jax, self._group
        jax.distributed.initialize(
            coordinator_address=f"127.0.0.1:{port}",
            num_processes=group.size,
            process_id=group.rank,
            local_device_ids=[device],
            initialization_timeout=_START_S,
            shutdown_timeout_seconds=_START_S,
            coordinator_bind_address=f"127.0.0.1:{port}",
        )
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
        found = [(device.platform, device.process_index) for device in devices]
        if found != [(_PLATFORM, rank) for rank in range(group.size)]:
            raise BackendError(f"not one {_PLATFORM} of each process: {found}")
        return jax.sharding.Mesh(np.array(devices), (_AXIS,))

    def _arguments(self, packed: Packed) -> tuple[Any, ...]:
        """Of the programs. Ranks have as many rows as the rank with the most; only sizes say what moves."""
        dtype = packed.element.dtype
        most_sent, most_received = (max(1, packed.counts.sum(axis=axis).max()) for axis in (1, 0))
        rows, out = (
            np.zeros((length, packed.rows.shape[1]), np.uint8).view(dtype)
            for length in (most_sent, most_received)
        )
        rows[: len(packed.rows)] = packed.rows.view(dtype)
        local = (rows, out, *astuple(Indices.of(packed.counts, self._group.rank)))
        return tuple(
            self._jax.make_array_from_process_local_data(
                self._sharding, each, (self._group.size * each.shape[0], *each.shape[1:])
            )
            for each in local
        )

    def _received(self, program: Any, arguments: tuple[Any, ...]) -> Array:
        """uint8, what this rank has after a program."""
        rows: Array = np.asarray(program(*arguments).addressable_data(0))
        return rows.view(np.uint8)

    def _elapsed_us(self, program: Any, meet: Any, arguments: tuple[Any, ...]) -> float:
        with _deadline():
            meet(*arguments).block_until_ready()
            start = time.perf_counter()
            program(*arguments).block_until_ready()
            return (time.perf_counter() - start) * 1e6

    def _returned_us(self, program: Any, arguments: tuple[Any, ...]) -> tuple[float, ...]:
        readings = []
        with _deadline():
            for _ in range(_NUM_CALLS):
                start = time.perf_counter()
                out = program(*arguments)
                readings.append((time.perf_counter() - start) * 1e6)
                out.block_until_ready()
        return tuple(readings)

    def _together(self, what: str, step: Callable[[], T]) -> T:
        """Do a local step; whatever fails on a rank, all of them raise."""

        def stated() -> T:
            try:
                return step()
            except Exception as error:
                text = f"JAX, {what}: {type(error).__name__}: {error}"
                # Now: where the others wait inside XLA, it ends their processes, and the launcher this one.
                _log.error("rank %d: %s", self._group.rank, text)
                raise BackendError(text) from error

        return together(self._group, f"bench with JAX, {what}", stated, timeout_s=_DEADLINE_S)


def _preset() -> None:
    # With memory of CUDA's virtual memory management, NCCL's default, longer messages of JAX 0.11.2 did not
    # arrive between two H200, and the next call hung.
    preset(XLA_PYTHON_CLIENT_PREALLOCATE="false", NCCL_NVLS_ENABLE="0", NCCL_CUMEM_ENABLE="0")


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Say where all threads are and end the process if it takes too long: waits inside XLA have no end."""
    faulthandler.dump_traceback_later(_DEADLINE_S, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
