"""The stand-in for NVSHMEM: what it orders, what it does not, and what the loss of a node leaves."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import pytest

from ep_rt.cuda.kernel_spec import KernelSpec

from .kernels import ThreadsCfg, bound
from .machine import EmulatedKernel, FoundError, Machine, Memory
from .runtime import Kind
from .support import needs_emulator

pytestmark = needs_emulator

ROUNDS, ROW_BYTES = 3, 64
SPEC = KernelSpec(
    source="network.cu",
    function="network",
    cfg=ThreadsCfg(num_threads=32),
    args=np.dtype(
        [
            ("landing", "<u8"),
            ("row", "<u8"),
            ("signal", "<u8"),
            ("sums", "<u8"),
            ("timeout_ns", "<u8"),
            ("variant", "<i4"),
            ("num_rounds", "<i4"),
            ("row_bytes", "<i4"),
        ],
        align=True,
    ),
)


class Variant(IntEnum):
    """Twin of ``Variant`` in network.cu."""

    PUT_SIGNAL = 0
    FENCE = 1
    NO_FENCE = 2
    ONE_QUEUE_PAIR = 3
    SOURCE_REUSED = 4
    NOT_ACQUIRED = 5


def ring(variant: Variant, num_pes: int, *, ranks_per_node: int) -> tuple[Machine, list[Memory]]:
    kernel = EmulatedKernel.load(SPEC, 900)
    machine = Machine(num_pes, [kernel], [(pe, 1) for pe in range(num_pes)], ranks_per_node=ranks_per_node)
    sums = []
    for pe in range(num_pes):
        landing = machine.allocate(pe, ROUNDS * ROW_BYTES, "landing", Kind.SYMMETRIC)
        signal = machine.allocate(pe, 8, "signal", Kind.SYMMETRIC)
        sums.append(machine.allocate(pe, 8 * ROUNDS, "sums"))
        fields = {
            "landing": landing.address,
            "row": machine.allocate(pe, ROW_BYTES, "row").address,
            "signal": signal.address,
            "sums": sums[pe].address,
            "timeout_ns": machine.conditions.timeout_ns,
            "variant": variant,
            "num_rounds": ROUNDS,
            "row_bytes": ROW_BYTES,
        }
        machine.launch(pe, kernel, bound(kernel, fields), 1)
    return machine, sums


def check(sums: list[Memory]) -> None:
    for pe, memory in enumerate(sums):
        before = (pe - 1) % len(sums)
        for number, got in enumerate(memory.array(np.uint64)):
            row = [(before + 10 * number + i) % 256 for i in range(ROW_BYTES)]
            assert got == sum(row), (pe, number)


@pytest.mark.parametrize("variant", [Variant.PUT_SIGNAL, Variant.FENCE], ids=lambda each: each.name)
@pytest.mark.parametrize("num_pes", [2, 5])
def test_what_is_ordered_arrives_in_order(variant: Variant, num_pes: int) -> None:
    machine, sums = ring(variant, num_pes, ranks_per_node=1)
    for seed in range(60):
        result = machine.run(seed)
        check(sums)
        assert result.puts >= num_pes * ROUNDS


def _run_all(machine: Machine, num_seeds: int) -> None:
    for seed in range(num_seeds):
        machine.run(seed)


@pytest.mark.parametrize(
    ("variant", "max_seeds"),
    [
        (Variant.NO_FENCE, 10),
        (Variant.ONE_QUEUE_PAIR, 10),
        (Variant.SOURCE_REUSED, 10),
        (Variant.NOT_ACQUIRED, 10),
    ],
    ids=lambda each: each.name if isinstance(each, Variant) else "",
)
def test_what_is_not_ordered_is_found(variant: Variant, max_seeds: int) -> None:
    machine, _ = ring(variant, 3, ranks_per_node=1)
    with pytest.raises(FoundError, match="race") as caught:
        _run_all(machine, max_seeds)
    assert any("network.cu:" in place for place in caught.value.places)


def test_a_network_may_keep_the_order_of_a_queue_pair() -> None:
    machine, sums = ring(Variant.ONE_QUEUE_PAIR, 3, ranks_per_node=1)
    for seed in range(60):
        machine.run(seed, orders_queue_pairs=True)
        check(sums)


def test_who_waits_for_a_lost_node_leaves_at_its_deadline() -> None:
    machine, sums = ring(Variant.PUT_SIGNAL, 4, ranks_per_node=2)
    with pytest.raises(FoundError, match=r"hang.*waiting for puts"):
        # A quiet has no deadline: a kernel that must survive the loss of a node cannot call it.
        machine.run(1, lost_node=1)
    machine, sums = ring(Variant.SOURCE_REUSED, 4, ranks_per_node=2)
    machine.run(1, lost_node=1, finds_races=False)
    # 0 -> 1 within node 0 still works; 1 -> 2 and 3 -> 0 cross.
    assert sums[1].array(np.uint64)[0] > 0
    assert not sums[2].array(np.uint64).any()
    assert not sums[0].array(np.uint64).any()


def test_memory_of_another_node_cannot_be_touched() -> None:
    machine, _ = ring(Variant.PUT_SIGNAL, 2, ranks_per_node=1)
    own = machine.pieces[0]
    foreign = next(piece for piece in machine.pieces if piece.rank == 1 and piece.name == "landing")
    kernel = machine.kernels[0]
    fields = {
        "landing": own.address,
        "row": foreign.address,
        "signal": machine.pieces[1].address,
        "sums": own.address,
        "timeout_ns": 1,
        "num_rounds": 1,
        "row_bytes": ROW_BYTES,
    }
    machine.launch(0, kernel, bound(kernel, fields), 1)
    with pytest.raises(FoundError, match="bounds: memory of another rank at landing of rank 1"):
        machine.run(0)
