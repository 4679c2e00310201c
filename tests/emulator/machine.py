"""Ranks with memory and streams, what is enqueued on them, and runs of it from seeds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ep_rt.cuda.kernel_spec import KernelSpec

from . import build, runtime
from .runtime import Kind

Array = NDArray[Any]

TIMEOUT_NS: Final = 100_000_000_000


class FoundError(Exception):
    """What a run found.

    Attributes:
        kind: race, proxy, bounds, uninit, hang, collective, align, exit, mbarrier, limit; or oracle, for a
            wrong result, and record, for what a rank that gave up has written.
        places: the accesses, as ``what by whom at file:line < file:line``.
    """

    def __init__(self, kind: str, text: str, places: tuple[str, ...] = (), *, steps: int = 0) -> None:
        super().__init__(kind, text, places)
        self.kind, self.text, self.places, self.steps = kind, text, places, steps

    def __str__(self) -> str:
        return "\n    ".join((f"{self.kind}: {self.text}", *self.places))


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a run is like beside its seed. Twin of ``EmuOptions``.

    Attributes:
        strategy: None to draw it.
        dead_rank: stops at step `dead_step`; 0: it never starts.
        lost_node: cut off from the network from step `lost_step` on.
        max_resident: blocks of a kernel that have a place at a time, the next one when one has ended. 0: all.
    """

    max_steps: int = 30_000_000
    timeout_ns: int = TIMEOUT_NS
    strategy: runtime.Strategy | None = None
    finds_races: bool = True
    is_strict: bool = True
    checks_uninitialised: bool = True
    orders_queue_pairs: bool = False
    dead_rank: int | None = None
    dead_step: int = 0
    lost_node: int | None = None
    lost_step: int = 0
    max_resident: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """A piece of memory of one rank; arrays over it are what the host sees."""

    name: str
    rank: int
    address: int
    num_bytes: int

    def array(self, dtype: DTypeLike, shape: Sequence[int] | None = None, *, offset: int = 0) -> Array:
        """Of the whole piece from `offset` on, or of `shape`."""
        raw = (ctypes.c_uint8 * self.num_bytes).from_address(self.address)
        flat: Array = np.frombuffer(memoryview(raw), np.uint8)[offset:]
        kind = np.dtype(dtype)
        if shape is None:
            return flat[: len(flat) // kind.itemsize * kind.itemsize].view(kind)
        num_bytes = kind.itemsize * int(np.prod(shape, dtype=np.int64))
        return flat[:num_bytes].view(kind).reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class EmulatedKernel:
    """A kernel in a library that is loaded for good."""

    spec: KernelSpec
    path: Path
    library: int
    entry: int
    shared_bytes: int

    @classmethod
    def load(cls, spec: KernelSpec, architecture: int, *, sources: Path = build.KERNELS_CU) -> EmulatedKernel:
        path = build.kernel(spec, architecture, sources=sources)
        emulator = runtime.library()
        library = emulator.emu_load(str(path).encode())
        if library < 0:
            raise RuntimeError(emulator.emu_load_error().decode())
        entry = emulator.emu_entry(library, build.ENTRY.encode())
        _LOADED[library] = path
        return cls(spec, path, library, entry, emulator.emu_shared_bytes(library))


_LOADED: Final[dict[int, Path]] = {}


@dataclass(slots=True, eq=False)
class Machine:
    """An NVLink domain, or several of them on a network. Only the one that was made last works.

    Args:
        kernels: all that will be enqueued.
        streams: the rank of each, and the most blocks that a kernel on it has.
    """

    num_ranks: int
    kernels: Sequence[EmulatedKernel]
    streams: Sequence[tuple[int, int]]
    ranks_per_node: int = 0
    conditions: Conditions = field(default_factory=Conditions)
    checks: list[Callable[[], str | None]] = field(default_factory=list)
    pieces: list[Memory] = field(default_factory=list)
    is_saved: bool = False

    def __post_init__(self) -> None:
        shapes = (runtime.StreamShape * len(self.streams))(
            *(runtime.StreamShape(rank, max_blocks) for rank, max_blocks in self.streams)
        )
        geometry = runtime.Geometry(
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node or self.num_ranks,
            max_threads=max(kernel.spec.cfg.num_threads for kernel in self.kernels),
            num_streams=len(self.streams),
            shared_bytes=max(128, *(kernel.shared_bytes for kernel in self.kernels)),
        )
        runtime.library().emu_open(geometry, shapes)

    def allocate(self, rank: int, num_bytes: int, name: str, kind: Kind = Kind.OWN) -> Memory:
        """Zeroed memory. Its neighbours belong to nobody."""
        address = runtime.library().emu_allocate(rank, max(num_bytes, 1), kind)
        assert address, "the emulated memory is full"
        memory = Memory(name, rank, address, max(num_bytes, 1))
        self.pieces.append(memory)
        return memory

    def put(self, rank: int, array: Array | None, name: str) -> int:
        """The address of a copy of `array`; 0 for None."""
        if array is None:
            return 0
        memory = self.allocate(rank, array.nbytes, name)
        memory.array(np.uint8, (array.nbytes,))[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return memory.address

    def launch(self, stream: int, kernel: EmulatedKernel, args: Array, num_blocks: int) -> None:
        """Enqueue a kernel; `args` is copied."""
        assert num_blocks <= self.streams[stream][1]
        runtime.library().emu_enqueue_kernel(
            stream,
            kernel.library,
            kernel.entry,
            args.ctypes.data,
            args.nbytes,
            num_blocks,
            kernel.spec.cfg.num_threads,
        )

    def copy(self, stream: int, destination: int, source: int, num_bytes: int) -> None:
        """Enqueue a copy between memories of the stream's rank."""
        runtime.library().emu_enqueue_copy(stream, destination, source, num_bytes)

    def record(self, stream: int, event: int) -> None:
        runtime.library().emu_enqueue_record(stream, event)

    def wait(self, stream: int, event: int) -> None:
        runtime.library().emu_enqueue_wait(stream, event)

    def run(self, seed: int, **changes: Any) -> runtime.Result:
        """Run what was enqueued once, from memory as it was at the first run.

        Args:
            changes: to `conditions`.

        Raises:
            FoundError: the run found something, or a check of its results did.
        """
        emulator = runtime.library()
        if not self.is_saved:
            emulator.emu_save()
            self.is_saved = True
        found = runtime.Result()
        emulator.emu_run(_options(seed, replace(self.conditions, **changes)), found)
        if found.kind:
            raise FoundError(
                found.kind.decode(),
                found.text.decode() + self._place(found.address),
                tuple(_described(each) for each in (found.first, found.second) if each.what),
                steps=found.steps,
            )
        for check in self.checks:
            text = check()
            if text is not None:
                raise FoundError("oracle", text, steps=found.steps)
        return found

    def _place(self, address: int) -> str:
        for piece in self.pieces:
            if piece.address <= address < piece.address + piece.num_bytes:
                return f" at {piece.name} of rank {piece.rank} + {address - piece.address}"
        return f" at {address:#x}" if address else ""


def _options(seed: int, conditions: Conditions) -> runtime.Options:
    def number(value: int | None) -> int:
        return -1 if value is None else int(value)

    return runtime.Options(
        seed=seed,
        max_steps=conditions.max_steps,
        timeout_ns=conditions.timeout_ns,
        strategy=number(conditions.strategy),
        finds_races=conditions.finds_races,
        is_strict=conditions.is_strict,
        checks_uninitialised=conditions.checks_uninitialised,
        orders_queue_pairs=conditions.orders_queue_pairs,
        dead_rank=number(conditions.dead_rank),
        dead_step=conditions.dead_step,
        lost_node=number(conditions.lost_node),
        lost_step=conditions.lost_step,
        max_resident=conditions.max_resident,
    )


def _described(access: runtime.Access) -> str:
    chain = build.decode(_LOADED[access.library], access.pc)[:4] if access.pc else ["its stream"]
    thread = f"thread {access.thread}" if access.thread >= 0 else "asynchronously"
    return (
        f"{access.what.decode()} by rank {access.rank} block {access.block} {thread} at {' < '.join(chain)}"
    )
