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

import ep_rt
from ep_rt import Group, arrays, moe_sizes
from ep_rt.cuda.combine import Combine
from ep_rt.cuda.dispatch_plans import DispatchPlans, Plan
from ep_rt.cuda.handle import CudaDispatchHandle, CudaHandleShape
from ep_rt.cuda.plan import ModelBytes
from ep_rt.cuda.pool import Pool
from ep_rt.errors import ArrayError, ConfigError, HandleError
from ep_rt.handle import HandleShape
from ep_rt.moe_sizes import MoeSizes
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


def a_domain(num_ranks: int = NUM_RANKS) -> Any:
    class Results:
        def __init__(self, columns: Sequence[Any], framework: str) -> None:
            self.facts = columns, framework

        def placed(self, places: Sequence[tuple[int, int]]) -> Any:
            return places

    return SimpleNamespace(
        group=SimpleNamespace(size=num_ranks), results=Results, num_blocks=lambda sms: sms, max_blocks=16
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
        dtype: Any = np.float32,
        num_scales: int = 0,
        handle: Any = None,
        num_worst_tokens: int = 0,
        layout: str = "rank",
        num_max_tokens: int | None = None,
    ) -> Plan:
        ids = weights = None
        if handle is None:
            num_ids = num_x if num_ids is None else num_ids
            num_weights = num_ids if num_weights is None else num_weights
            ids = self.make(num_ids, NUM_TOPK, dtype=np.int64)
            weights = self.make(num_weights, NUM_TOPK)
        x = self.make(num_x, hidden, dtype=dtype)
        if num_scales:
            x = x, self.make(num_x, num_scales)
        given = (x, handle, None, None, ids, weights)
        options = (1, num_worst_tokens, NUM_EXPERTS, layout, False, None, num_max_tokens)

        def build(*arguments: Any) -> DispatchRequest:
            return DispatchRequest.of(*arguments, owner=self, num_ranks=NUM_RANKS, place=PLACE)

        found, pointers, objects, streams = self.plans.find(given, options, build, NUM_SMS)
        assert streams == ()
        assert len(pointers) == len(objects) == 5
        absent = [False, not num_scales, handle is not None, handle is not None, True]
        assert [each is None for each in objects] == absent
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
def test_no_more_lands_than_ranks_may_send(make: Callable[..., Any]) -> None:
    """However many rows it becomes; by rank it becomes no more."""
    dispatch = Dispatches(make)
    for num_tokens in (7, 9, 8):
        for num_worst_tokens, num_landed_rows in ((50, 2 * 9), (11, 11)):
            plan = dispatch(num_tokens, num_worst_tokens=num_worst_tokens, layout="expert", num_max_tokens=9)
            assert plan.shape == HandleShape(num_tokens, NUM_TOPK, num_worst_tokens, "expert")
            assert plan.num_rows == plan.landed.num_landed_rows == num_landed_rows
            assert plan.num_bytes == plan.kind.row.layout(num_landed_rows).end
            assert plan.kind.launch.fields["fill_rows"] == num_landed_rows  # type: ignore[attr-defined]
    assert dispatch(7, num_worst_tokens=50, layout="expert").num_rows == 50
    assert dispatch(7, num_worst_tokens=50, num_max_tokens=9).num_rows == 50
    assert dispatch(7, layout="expert", num_max_tokens=9).num_rows == 0
    handle = a_handle(dispatch, num_tokens=7, num_rows=50, layout="expert")
    handle.landed = handle.landed._replace(num_landed_rows=18)
    for num_max_tokens in (None, 7, 9):
        plan = dispatch(7, handle=handle, layout="expert", num_max_tokens=num_max_tokens)
        assert (plan.num_rows, plan.shape.num_recv_rows) == (18, 50)


@makers
def test_more_tokens_than_was_said_are_refused_where_the_kind_is_known(make: Callable[..., Any]) -> None:
    dispatch = Dispatches(make)
    for num_tokens in (7, 9):
        dispatch(num_tokens, num_max_tokens=9)
        with pytest.raises(ConfigError, match="x has 10 tokens; num_max_tokens_per_rank=9"):
            dispatch(10, num_max_tokens=9)
    assert dispatch(10).num_tokens == 10
    assert dispatch.operations.bound == ["dispatch"] * 2


def has_room(num_bytes: int, found: Plan, *, row_bytes: int, keeps_landing: bool) -> bool:
    """Whether a dispatch, and the combine of such rows and their weights, find places."""
    pool = Pool(num_bytes)
    landing = pool.take(found.num_bytes, found.spare_bytes)
    if landing is None:
        return False
    if not keeps_landing:
        del landing
    num_rows, weights_bytes = found.landed.num_landed_rows, found.kind.row.weights_bytes
    places = [pool.take(num_rows * each) for each in (row_bytes, weights_bytes)]
    return None not in places


@pytest.mark.parametrize("keeps_landing", [False, True])
def test_the_memory_of_a_model_is_enough_for_the_worst_case(keeps_landing: bool) -> None:
    num_tokens, hidden = 4096, 4096
    num_rows, row_bytes = NUM_RANKS * num_tokens, 4 * hidden
    num_bytes = ModelBytes.of(row_bytes, row_bytes, NUM_TOPK, num_rows).slab
    dispatch = Dispatches(numpy_array)
    for num_max_tokens in (num_tokens, None):
        plan = dispatch(
            3,
            hidden=hidden,
            num_worst_tokens=num_rows * NUM_TOPK,
            layout="expert",
            num_max_tokens=num_max_tokens,
        )
        is_enough = has_room(num_bytes, plan, row_bytes=row_bytes, keeps_landing=keeps_landing)
        assert is_enough == (num_max_tokens is not None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn", "uint8"])
def test_the_memory_of_a_model_is_enough_for_experts_that_write_into_it(dtype: str) -> None:
    """A worst-case result, their output, and the next result while those two are there."""
    moe = MoeSizes(4096, 7168, NUM_EXPERTS, NUM_TOPK, dtype)
    num_rows = NUM_RANKS * moe.num_max_tokens_per_rank
    found = Dispatches(numpy_array)(
        3,
        hidden=moe.hidden,
        dtype=arrays.np_dtype(dtype),
        num_scales=moe.hidden // 128 if dtype == "float8_e4m3fn" else 0,
        num_worst_tokens=num_rows,
    )
    pool = Pool(moe_sizes.slab_bytes(moe, NUM_RANKS, 0, 0, low_latency_mode=False))
    held = [
        pool.take(found.num_bytes, found.spare_bytes),
        pool.take(num_rows * moe.answer_bytes, found.spare_bytes),  # as `Buffer.empty` does
        pool.take(found.num_bytes),
    ]
    assert None not in held


class PlannedError(Exception):
    """Ends a call whose plan is known."""

    def __init__(self, found: Plan) -> None:
        self.found = found


@pytest.mark.parametrize(
    ("num_ranks", "num_tokens", "hidden", "num_topk", "num_experts"),
    [(8, 4096, 7168, 8, 256), (8, 8192, 7168, 8, 256), (4, 1024, 2048, 6, 64), (2, 128, 7168, 8, 8)],
)
def test_an_elastic_buffer_of_the_default_size_has_room_for_the_worst_case(
    num_ranks: int, num_tokens: int, hidden: int, num_topk: int, num_experts: int
) -> None:
    torch = pytest.importorskip("torch")
    from ep_rt.compat import deep_ep

    def check(buffer: Any) -> None:
        operations: Any = Counted()
        plans = DispatchPlans(a_domain(num_ranks), operations, operations, owner=buffer, internode=None)

        def find(given: Any, options: Any, build: Any, schedule: Schedule) -> Any:
            raise PlannedError(plans.find(given, options, build, schedule.num_sms)[0])

        buffer._buffer._engine = SimpleNamespace(dispatch=find, place=PLACE)
        bf16, fp8 = (
            torch.empty(num_tokens, hidden, dtype=each) for each in (torch.bfloat16, torch.float8_e4m3fn)
        )
        ids, weights = torch.zeros(num_tokens, num_topk, dtype=torch.int64), torch.ones(num_tokens, num_topk)
        for x in (bf16, (fp8, torch.ones(num_tokens, hidden // 128))):
            for do_expand in (False, True):
                with pytest.raises(PlannedError) as planned:
                    buffer.dispatch(
                        x, ids, weights, num_experts=num_experts, do_expand=do_expand, do_cpu_sync=False
                    )
                found = planned.value.found
                num_recv_rows = num_ranks * num_tokens
                assert found.num_rows == num_recv_rows
                if do_expand:
                    num_recv_rows *= min(num_topk, num_experts // num_ranks)
                assert found.shape.num_recv_rows == num_recv_rows
                # A result by rank stays there. An expanded one needs the place while it is made, and in a
                # CUDA graph as long as it lives.
                for keeps_landing in (True, False):
                    assert has_room(
                        buffer.num_bytes, found, row_bytes=2 * hidden, keeps_landing=keeps_landing
                    )

    def run(group: Group) -> None:
        buffer = deep_ep.ElasticBuffer(
            group, num_max_tokens_per_rank=num_tokens, hidden=hidden, num_topk=num_topk, backend="host"
        )
        engine = buffer._buffer._engine
        if group.rank == 0:
            check(buffer)
        buffer._buffer._engine = engine
        buffer.destroy()

    ep_rt.run_local(run, num_ranks, timeout_s=30)


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
