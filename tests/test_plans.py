"""Plans are found again, and do not pile up."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from ep_rt import arrays
from ep_rt.cuda.plans import MAX_PLANS, Plans, seen
from ep_rt.cuda_arrays import Fact, without_lengths


def test_a_plan_is_found_by_its_key() -> None:
    plans: Plans[str] = Plans()
    assert plans.find(("bfloat16", 3)) is None
    assert plans.keep(("bfloat16", 3), "one") == "one"
    assert plans.find(("bfloat16", 3)) == "one"
    assert plans.find(("bfloat16", 4)) is None


def test_without_a_key_nothing_is_kept() -> None:
    plans: Plans[str] = Plans()
    assert plans.keep(None, "one") == "one"
    assert plans.find(None) is None


def test_plans_that_never_come_again_do_not_pile_up() -> None:
    plans: Plans[int] = Plans()
    for number in range(MAX_PLANS + 1):
        plans.keep(number, number)
    assert [number for number in range(MAX_PLANS + 1) if plans.find(number) is not None] == [MAX_PLANS]


def test_what_is_left_without_lengths() -> None:
    def fact(*shape: int) -> Fact:
        return np.ndarray, shape, (8, 1), 11, "cuda:0"

    def split(*facts: Fact | None) -> tuple[tuple[Hashable, ...], list[int | None]]:
        found = without_lengths(facts)
        assert found is not None
        return found

    left, lengths = split(fact(7, 8), None, fact(7))
    assert lengths == [7, None, 7]
    assert left == split(fact(9, 8), None, fact(9))[0]
    assert left != split(fact(7, 9), None, fact(7))[0]
    few = [split(fact(count, 8)) for count in range(4)]
    assert [lengths for _, lengths in few] == [[0], [1], [2], [3]]
    assert len({left for left, _ in few}) == 3  # strides say less where there is one row, or none
    assert without_lengths([fact()]) is None


def test_what_was_looked_at() -> None:
    array = np.zeros((2, 3), np.float32)
    pointers, owners = seen(arrays.view(array), None)
    assert pointers == [array.ctypes.data, 0]
    assert owners[1] is None
    assert owners[0] is not None
