"""What is kept from garbage collection, and when it is freed."""

from __future__ import annotations

import sys
import types

import pytest

from ep_rt.cuda import leftovers


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_left", [])
    monkeypatch.setattr(leftovers, "_pinned", {})
    monkeypatch.setattr(leftovers, "_all_pinned", [])


def test_freed_once_and_on_its_own_device() -> None:
    freed = []

    def free(name: str) -> bool:
        freed.append(name)
        return True

    leftovers.leave(0, lambda: free("one"))
    leftovers.leave(1, lambda: free("elsewhere"))
    leftovers.settle(0)
    leftovers.settle(0)
    assert freed == ["one"]
    leftovers.settle(1)
    assert freed == ["one", "elsewhere"]


def test_what_is_still_held_stays_and_more_may_come_meanwhile() -> None:
    held = [True]
    calls: list[int] = []

    def free() -> bool:
        calls.append(len(calls))
        if len(calls) == 1:
            leftovers.leave(0, lambda: True)  # garbage collection may come at any moment
        return not held[0]

    leftovers.leave(0, free)
    leftovers.settle(0)
    held[0] = False
    leftovers.settle(0)
    leftovers.settle(0)
    assert len(calls) == 2


def test_pinned_memory_is_used_again_and_never_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class PinnedMemory:
        def __init__(self, num_bytes: int, flags: int) -> None:
            made.append((num_bytes, flags))

    cuda = types.SimpleNamespace(PinnedMemory=PinnedMemory)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    first = leftovers.take_pinned(64, 3)
    other = leftovers.take_pinned(128, 3)
    leftovers.give_pinned_back(64, first)
    assert leftovers.take_pinned(64, 3) is first
    assert leftovers.take_pinned(64, 3) is not first
    assert made == [(64, 3), (128, 3), (64, 3)]
    assert {id(first), id(other)} <= {id(memory) for memory in leftovers._all_pinned}
