"""The emulator itself: what the memory model lets happen, and that nothing of it is lost or repeated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from ep_rt.cuda.kernel_spec import KernelSpec

from .kernels import ThreadsCfg, bound
from .machine import Conditions, EmulatedKernel, FoundError, Machine
from .runtime import Kind
from .scenarios import Runner
from .support import needs_emulator

pytestmark = needs_emulator

# name, roles, outcome, whether PTX allows it.
LITMUS = (
    ("message passing, relaxed", 2, "10", True),
    ("message passing, release and relaxed", 2, "10", True),
    ("message passing, release and acquire", 2, "10", False),
    ("message passing of ordinary data, relaxed", 2, "10", True),
    ("store buffering, relaxed", 2, "00", True),
    ("store buffering, sequentially consistent fences", 2, "00", False),
    ("a chain of releases and acquires", 3, "110", False),
    ("two loads of one word", 2, "21", False),
    ("independent reads of independent writes", 4, "1010", True),
    ("two writes each", 2, "final 1 1", True),
    ("increments", 3, "final 0 3", True),
    ("a fence of the GPU's scope alone", 2, "10", True),
)
LITMUS_SPEC = KernelSpec(
    source="litmus.cu",
    function="litmus",
    cfg=ThreadsCfg(num_threads=1),
    args=np.dtype(
        [("x", "<u8"), ("y", "<u8"), ("z", "<u8"), ("out", "<u8"), ("test", "<i4"), ("role", "<i4")],
        align=True,
    ),
)


def outcomes(test: int, num_roles: int, outcome: str, num_seeds: int) -> Counter[str]:
    kernel = EmulatedKernel.load(LITMUS_SPEC, 900)
    machine = Machine(
        num_roles,
        [kernel],
        [(role, 1) for role in range(num_roles)],
        conditions=Conditions(finds_races=False),
    )
    words = machine.allocate(0, 512, "words", Kind.SLAB)
    out = machine.allocate(0, 64, "out", Kind.SLAB)
    x, y, z = (words.address + 128 * i for i in range(3))
    for role in range(num_roles):
        fields = {"x": x, "y": y, "z": z, "out": out.address, "test": test, "role": role}
        machine.launch(role, kernel, bound(kernel, fields), 1)
    seen: Counter[str] = Counter()
    for seed in range(num_seeds):
        machine.run(seed)
        if outcome.startswith("final"):
            seen[f"final {words.array(np.uint64)[0]} {words.array(np.uint64)[16]}"] += 1
        else:
            seen["".join(str(value) for value in out.array(np.uint64)[: len(outcome)])] += 1
    return seen


@pytest.mark.parametrize("number", range(len(LITMUS)), ids=lambda number: LITMUS[number][0])
def test_litmus(number: int) -> None:
    _, num_roles, outcome, is_allowed = LITMUS[number]
    seen = outcomes(number, num_roles, outcome, 1500)
    assert (outcome in seen) == is_allowed, seen
    assert len(seen) > 1 or outcome.startswith("final"), seen


def test_a_race_needs_no_wrong_value() -> None:
    """Ordinary data behind a relaxed flag is reported by the first seed that runs it."""
    kernel = EmulatedKernel.load(LITMUS_SPEC, 900)
    machine = Machine(2, [kernel], [(0, 1), (1, 1)])
    words = machine.allocate(0, 512, "words", Kind.SLAB)
    for role in range(2):
        fields = {"x": words.address, "y": words.address + 128, "out": words.address + 256}
        machine.launch(role, kernel, bound(kernel, {**fields, "test": 3, "role": role}), 1)
    with pytest.raises(FoundError, match=r"race: race at words of rank 0 \+ 0") as caught:
        machine.run(1)
    assert all("litmus.cu:" in place for place in caught.value.places)
    assert len(caught.value.places) == 2


def test_ordinary_stores_are_delayed_and_none_is_lost() -> None:
    num_threads = 64
    spec = KernelSpec(
        source="stores.cu",
        function="stores",
        cfg=ThreadsCfg(num_threads=num_threads),
        args=np.dtype(
            [
                ("flags", "<u8", (2,)),
                ("stored", "<u8", (2,)),
                ("num_wrong", "<u8"),
                ("source", "<u8"),
                ("rank", "<i4"),
            ],
            align=True,
        ),
    )
    kernel = EmulatedKernel.load(spec, 900)
    machine = Machine(2, [kernel], [(0, 1), (1, 1)])
    flags = [machine.allocate(rank, 8, "flag", Kind.SLAB).address for rank in range(2)]
    stored = [machine.allocate(rank, num_threads * 80, "stored", Kind.SLAB).address for rank in range(2)]
    wrong = [machine.allocate(rank, 8 * num_threads, "wrong") for rank in range(2)]
    for rank in range(2):
        fields = {
            "flags": flags,
            "stored": stored,
            "num_wrong": wrong[rank].address,
            "source": machine.allocate(rank, 40 * num_threads, "source").address,
            "rank": rank,
        }
        machine.launch(rank, kernel, bound(kernel, fields), 1)
    for seed in range(60):
        result = machine.run(seed)
        assert not any(each.array(np.uint64).any() for each in wrong), seed
        # Structs of 40 bytes are not: two ranks, rounds and kinds of sums, and five other kinds.
        assert result.delayed_stores > 0.9 * 2 * 2 * 7 * num_threads


def test_streams_are_ordered_by_events_alone() -> None:
    kernel = EmulatedKernel.load(LITMUS_SPEC, 900)

    def copies(*, with_event: bool) -> tuple[Machine, int]:
        machine = Machine(1, [kernel], [(0, 1), (0, 1)])
        first, second, third = (machine.allocate(0, 64, name) for name in ("first", "second", "third"))
        first.array(np.uint8)[:] = 7
        if with_event:
            machine.wait(0, 0)
        machine.copy(0, third.address, second.address, 64)
        machine.copy(1, second.address, first.address, 64)
        if with_event:
            machine.record(1, 0)
        machine.run(0)
        return machine, int(third.array(np.uint8).sum())

    assert copies(with_event=True)[1] == 7 * 64
    with pytest.raises(FoundError, match="race: race at second of rank 0"):
        copies(with_event=False)


def test_a_seed_gives_the_same_run() -> None:
    runner = Runner.of("normal-r2-sm90")
    seen = []
    for seed in (3, 70, 3, 70):
        runner.steps = 0
        runner.run(seed)
        seen.append(runner.steps)
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


def _without_deadline(runner: Runner) -> None:
    runner.run(1, dead_rank=0, max_steps=2_000_000, timeout_ns=1)


def test_a_wait_that_never_ends_is_a_hang() -> None:
    """With a clock that hardly moves no deadline passes."""
    runner: Runner = Runner.of("barrier-r2")
    check: Callable[[Runner], None] = _without_deadline
    with pytest.raises(FoundError, match="hang") as caught:
        check(runner)
    assert any("sync.cuh:" in place for place in caught.value.places)
