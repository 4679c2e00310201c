"""The shim's collectives and atomics against what the CUDA programming guide says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ep_rt.cuda.kernel_spec import KernelSpec

from .kernels import ThreadsCfg, bound
from .machine import Array, EmulatedKernel, Machine
from .support import needs_emulator

pytestmark = needs_emulator

THREADS, WARP = 64, 32


def _source(other: Callable[[int], int], width: int = WARP) -> list[int]:
    """The lane that each lane reads; itself where `other` leaves the group of `width`."""
    sources = []
    for lane in range(WARP):
        first = lane // width * width
        sources.append(other(lane) if first <= other(lane) < first + width else lane)
    return sources


def expected(values: Array) -> list[list[int]]:
    """What every test of collectives.cu gives, by thread."""
    warps = values.reshape(-1, WARP)
    bits = warps.view(np.uint32)

    def shuffled(sources: Iterable[int]) -> list[int]:
        return [int(value) for value in warps[:, list(sources)].reshape(-1)]

    def each(numbers: Any) -> list[int]:
        return [int(number) for number in numbers for _ in range(WARP)]

    remainders = np.fmod(warps, 3)
    matches = [
        sum(1 << other for other in range(WARP) if row[other] == row[lane])
        for row in remainders
        for lane in range(WARP)
    ]
    powers = 1 << np.arange(WARP, dtype=np.int64)
    halves = [int(row[:16].sum() if lane < 16 else row[16:].max()) for row in warps for lane in range(WARP)]
    counts = [
        32
        - int(word).bit_length()
        + 100 * ((int(word) & -int(word)).bit_length())
        + 10000 * int(word).bit_count()
        for word in bits.reshape(-1)
    ]
    return [
        shuffled([3] * WARP),
        shuffled(lane // 8 * 8 + (lane + 1) % 8 for lane in range(WARP)),
        shuffled(_source(lambda lane: lane - 2)),
        shuffled(_source(lambda lane: lane - 2, 8)),
        shuffled(_source(lambda lane: lane + 5, 16)),
        shuffled(_source(lambda lane: lane ^ 9)),
        each(((warps > 0) * powers).sum(axis=1)),
        each((warps == values[0]).any(axis=1)),
        each((warps < 100).all(axis=1)),
        matches,
        each(warps.sum(axis=1)),
        each(warps.min(axis=1)),
        each(warps.max(axis=1)),
        each(bits.max(axis=1)),
        each(np.bitwise_and.reduce(bits, axis=1)),
        each(np.bitwise_or.reduce(bits, axis=1)),
        each(np.bitwise_xor.reduce(bits, axis=1)),
        [int((values > 0).sum())] * THREADS,
        [int((values < 100).all())] * THREADS,
        [int((values == 100).any())] * THREADS,
        halves,
        counts,
    ]


def test_collectives_and_atomics() -> None:
    spec = KernelSpec(
        source="collectives.cu",
        function="collectives",
        cfg=ThreadsCfg(num_threads=THREADS),
        args=np.dtype([("values", "<u8"), ("results", "<u8"), ("words", "<u8")], align=True),
    )
    kernel = EmulatedKernel.load(spec, 900)
    values = np.random.default_rng(1).integers(-50, 50, THREADS).astype(np.int32)
    right = expected(values)
    machine = Machine(1, [kernel], [(0, 1)])
    results = machine.allocate(0, 8 * THREADS * len(right), "results")
    words = machine.allocate(0, 64, "words")
    fields = {
        "values": machine.put(0, values, "values"),
        "results": results.address,
        "words": words.address,
    }
    machine.launch(0, kernel, bound(kernel, fields), 1)
    bits = values.view(np.uint32)
    total = int(bits.sum(dtype=np.uint64)) % 2**32
    for seed in range(20):
        machine.run(seed)
        got = results.array(np.int64, (len(right), THREADS))
        for number, wanted in enumerate(right):
            assert got[number].tolist() == wanted, number
        counters = words.array(np.uint32)[:8].tolist()
        assert counters == [total, int(bits.max()), 2**32 - 1, 5, THREADS, THREADS, 0, 0]
