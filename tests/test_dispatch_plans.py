"""Plans of normal calls: kinds are shared by all numbers of tokens, and numbers are compared all the same.

Launches and result arrays are stand-ins; arrays are NumPy's, which are looked at each time, and torch's, of
which a glance says enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ep_rt.cuda.combine import Combine
from ep_rt.cuda.dispatch_plans import DispatchPlans, Plan
from ep_rt.cuda.handle import CudaDispatchHandle, CudaHandleShape
from ep_rt.errors import ArrayError, HandleError
from ep_rt.handle import HandleShape
from ep_rt.requests import CombineRequest, DispatchRequest, Place, Schedule

NUM_RANKS, NUM_EXPERTS, HIDDEN, NUM_TOPK, NUM_SMS = 2, 8, 16, 2, 4
PLACE = Place("cpu")


class Counted:
    """Stands for `Operations` and `ExpertMajor`, and counts the launches that are bound."""

    def __init__(self) -> None:
        self.bound: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def bind(*_: object, **fields: object) -> Any:
            self.bound.append(name)
            return SimpleNamespace(fields=fields, setter=lambda *names: names)

        return bind


def a_domain() -> Any:
    class Results:
        def __init__(self, columns: Sequence[Any], framework: str) -> None:
            self.facts = columns, framework

        def placed(self, places: Sequence[tuple[int, int]]) -> Any:
            return places

    return SimpleNamespace(
        group=SimpleNamespace(size=NUM_RANKS), results=Results, num_blocks=lambda sms: sms, max_blocks=16
    )


def numpy_array(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def torch_array(*shape: int, dtype: Any = np.float32) -> Any:
    torch = pytest.importorskip("torch")
    return torch.zeros(shape, dtype={np.float32: torch.float32, np.int64: torch.int64}[dtype])


makers = pytest.mark.parametrize("make", [numpy_array, torch_array])


def a_handle(owner: object, *, num_tokens: int, num_rows: int, layout: str = "rank") -> CudaDispatchHandle:
    handle = object.__new__(CudaDispatchHandle)
    handle.owner = owner
    handle.shape = HandleShape(num_tokens, NUM_TOPK, num_rows, layout)
    handle.landed = CudaHandleShape(NUM_RANKS, NUM_EXPERTS // NUM_RANKS, 1, num_rows)
    return handle


class Dispatches:
    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.operations = Counted()
        operations: Any = self.operations
        self.plans = DispatchPlans(a_domain(), operations, operations, owner=self, internode=None)

    def __call__(
        self,
        num_x: int,
        num_ids: int | None = None,
        num_weights: int | None = None,
        *,
        hidden: int = HIDDEN,
        handle: Any = None,
        num_worst_tokens: int = 0,
        layout: str = "rank",
    ) -> Plan:
        ids = weights = None
        if handle is None:
            num_ids = num_x if num_ids is None else num_ids
            num_weights = num_ids if num_weights is None else num_weights
            ids = self.make(num_ids, NUM_TOPK, dtype=np.int64)
            weights = self.make(num_weights, NUM_TOPK)
        given = (self.make(num_x, hidden), handle, None, None, ids, weights)
        options = (1, num_worst_tokens, NUM_EXPERTS, layout, False, None)

        def build(*arguments: Any) -> DispatchRequest:
            return DispatchRequest.of(*arguments, owner=self, num_ranks=NUM_RANKS, place=PLACE)

        found, pointers, objects = self.plans.find(given, options, build, NUM_SMS)
        assert len(pointers) == len(objects) == 5
        assert [each is None for each in objects] == [
            False,
            True,
            handle is not None,
            handle is not None,
            True,
        ]
        return found


@makers
def test_dispatches_of_any_number_of_tokens_share_a_kind(make: Callable[..., Any]) -> None:
    dispatch = Dispatches(make)
    plans = {count: dispatch(count) for count in (7, 9, 300, 2)}
    assert dispatch.operations.bound == ["dispatch"]
    assert len({id(plan.kind) for plan in plans.values()}) == 1
    for count, plan in plans.items():
        assert (plan.num_tokens, plan.num_listed, plan.shape.num_tokens) == (count, count, count)
        assert plan.kind.is_exact
        assert plan.num_rows == 0
    sizes = [plans[count].routing_bytes for count in (2, 7, 9, 300)]
    assert sizes == sorted(set(sizes))
    # Of one row and of none strides say less.
    for count in (1, 0):
        assert dispatch(count).num_tokens == count
    assert dispatch.operations.bound == ["dispatch"] * 3
    dispatch(7, hidden=2 * HIDDEN)
    assert dispatch.operations.bound == ["dispatch"] * 4
    assert dispatch(7, num_worst_tokens=50).num_rows == 50
    assert dispatch(8, num_worst_tokens=50).make[0] == (dispatch(9, num_worst_tokens=50).make[0])  # type: ignore[index]
    assert dispatch.operations.bound == ["dispatch"] * 5
    for num_worst_tokens, layout in ((50, "expert"), (0, "expert")):
        dispatch(7, num_worst_tokens=num_worst_tokens, layout=layout)
        dispatch(9, num_worst_tokens=num_worst_tokens, layout=layout)
    assert dispatch.operations.bound[5:] == ["dispatch", "expand"] * 2


@makers
def test_dispatches_with_handles_share_a_kind(make: Callable[..., Any]) -> None:
    dispatch = Dispatches(make)
    for num_tokens, num_rows in ((7, 20), (7, 30), (9, 30), (5, 2)):
        handle = a_handle(dispatch, num_tokens=num_tokens, num_rows=num_rows)
        plan = dispatch(num_tokens, handle=handle)
        assert (plan.num_tokens, plan.num_rows, plan.kind.is_exact) == (num_tokens, num_rows, False)
        assert plan.num_bytes == plan.kind.row.layout(num_rows).end
        assert plan.num_bytes >= num_rows * 4 * HIDDEN
    assert dispatch.operations.bound == ["dispatch"]
    with pytest.raises(HandleError, match="x has 8 tokens"):
        dispatch(8, handle=handle)
    dispatch(5, handle=handle, num_worst_tokens=2)
    with pytest.raises(HandleError, match="num_worst_tokens=2"):
        dispatch(9, handle=a_handle(dispatch, num_tokens=9, num_rows=30), num_worst_tokens=2)
    with pytest.raises(HandleError, match="another buffer"):
        dispatch(7, handle=a_handle(None, num_tokens=7, num_rows=20))


@makers
def test_numbers_of_tokens_that_differ_are_refused_where_the_kind_is_known(make: Callable[..., Any]) -> None:
    dispatch = Dispatches(make)
    dispatch(7)
    dispatch(9)
    for numbers in ((7, 9, 9), (7, 7, 9), (9, 9, 7)):
        with pytest.raises(ArrayError, match="has shape"):
            dispatch(*numbers)
    assert dispatch.operations.bound == ["dispatch"]


@makers
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_combines_of_any_number_of_rows_share_a_kind(make: Callable[..., Any], layout: str) -> None:
    operations: Any = Counted()
    owner = object()
    combine = Combine(a_domain(), operations, operations, SimpleNamespace(), owner=owner)  # type: ignore[arg-type]
    found: list[Any] = []
    combine._run = lambda plan, *_: found.append(plan)  # type: ignore[method-assign,assignment]

    def call(handle: Any, num_rows: int, num_weights: int, num_bias: int) -> Any:
        weights = make(num_weights, *(() if layout == "expert" else (NUM_TOPK,)))
        given = make(num_rows, HIDDEN), handle, weights, make(num_bias, HIDDEN)

        def build(*arguments: Any) -> CombineRequest:
            return CombineRequest.of(*arguments, owner=owner, place=PLACE)

        combine(given, build, Schedule(num_sms=NUM_SMS))
        return found[-1]

    handles = [
        a_handle(owner, num_tokens=num_tokens, num_rows=num_rows, layout=layout)
        for num_tokens, num_rows in ((7, 20), (7, 30), (9, 30), (300, 5))
    ]
    for handle in handles:
        num_tokens, num_rows = handle.num_tokens, handle.num_recv_rows
        plan = call(handle, num_rows, num_rows, num_tokens)
        assert (plan.num_tokens, plan.num_listed) == (num_tokens, num_tokens)
        assert plan.x.num_bytes == num_rows * 4 * HIDDEN
        assert plan.weights.num_bytes == num_rows * (4 if layout == "expert" else 4 * NUM_TOPK)
        assert plan.make[0] == (0, num_tokens)
        assert plan is call(handle, num_rows, num_rows, num_tokens) or make is numpy_array
    names = ["combine", "collapse"] if layout == "expert" else ["combine"]
    assert operations.bound == names
    for numbers in ((21, 20, 7), (20, 21, 7), (20, 20, 9)):
        with pytest.raises(ArrayError, match="has shape"):
            call(handles[0], *numbers)
    with pytest.raises(HandleError, match="another buffer"):
        call(a_handle(None, num_tokens=7, num_rows=20), 20, 20, 7)
    assert operations.bound == names
