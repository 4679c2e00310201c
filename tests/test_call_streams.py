"""The streams of a call: those that made its inputs come before it, whoever names them. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ep_rt import dlpack
from ep_rt.arrays import ArrayView
from ep_rt.cuda import domain as domains
from ep_rt.cuda.combine import Combine
from ep_rt.cuda.dispatch_layout import DispatchLayouts
from ep_rt.cuda.dispatch_plans import DispatchPlans
from ep_rt.cuda.domain import Domain
from ep_rt.cuda.low_latency_combine import LowLatencyCombine
from ep_rt.cuda.low_latency_dispatch import LowLatencyDispatch
from ep_rt.cuda.plans import Plans, producers
from ep_rt.cuda.streams import CommStream
from ep_rt.errors import ArrayError
from ep_rt.events import EventOverlap
from ep_rt.requests import (
    CombineRequest,
    DispatchRequest,
    LayoutRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    Place,
    Schedule,
)

COMM, CURRENT, OTHER = 1000, 2000, 3000
PLACE = Place("cuda:0", COMM)
NUM_TOKENS, HIDDEN, NUM_RANKS = 4, 16, 2


class Runtime:
    """Of CUDA, what orders streams: keeps (earlier, later)."""

    def __init__(self, capturing: tuple[int, ...] = ()) -> None:
        self.edges: list[tuple[int, int]] = []
        self._capturing = capturing
        self._recorded: dict[int, int] = {}

    def eventRecord(self, event: int, stream: int) -> None:  # noqa: N802  # as CuPy has it
        self._recorded[event] = stream

    def streamWaitEvent(self, stream: int, event: int) -> None:  # noqa: N802
        self.edges.append((self._recorded[event], stream))

    def streamIsCapturing(self, stream: int) -> bool:  # noqa: N802
        return stream in self._capturing


class Waited:
    """An event that is pending."""

    def __init__(self) -> None:
        self.by: list[int] = []

    def wait(self, stream: int) -> None:
        self.by.append(stream)


def a_domain(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> Any:
    monkeypatch.setattr(domains, "current_stream", lambda framework, device: CURRENT)
    domain: Any = object.__new__(Domain)
    comm: Any = object.__new__(CommStream)
    comm.device, comm.pointer, comm._event, comm._runtime = 0, COMM, SimpleNamespace(ptr=1), runtime
    domain.comm, domain.device = comm, 0
    domain.slab = SimpleNamespace(has_threads_beside=False)
    domain.turns = SimpleNamespace(begin=lambda stream: None)
    domain.pool = domain.heap = SimpleNamespace(num_released=0)
    domain._ordered_releases = 0
    return domain


@pytest.mark.parametrize(
    ("frameworks", "is_async", "named", "edges"),
    [
        (("cupy",), False, (), []),
        (("cupy",), False, (CURRENT,), []),
        (("cupy",), False, (OTHER, CURRENT), [(OTHER, CURRENT)]),
        (("cupy",), False, (COMM,), [(COMM, CURRENT)]),
        (("cupy",), True, (), []),
        (("cupy",), True, (OTHER, COMM), [(OTHER, COMM)]),
        (("cupy", "torch"), False, (OTHER, COMM, CURRENT), [(OTHER, COMM)]),
        (("jax",), False, (COMM,), []),
    ],
)
def test_a_call_comes_after_the_streams_that_its_inputs_name(
    frameworks: tuple[str, ...],
    is_async: bool,
    named: tuple[int, ...],
    edges: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    domain = a_domain(monkeypatch, runtime)
    domain._ordered_releases = -1  # waits for the caller, too
    call = domain.begin(frameworks, (), Schedule(async_finish=is_async), named)
    assert runtime.edges == []  # nothing was enqueued
    domain.order(call)
    if call.stream == COMM:
        edges = edges + [(CURRENT, COMM)] * sum(each != "jax" for each in frameworks)
    assert runtime.edges == edges


def test_an_event_stands_for_the_stream_of_the_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, event = Runtime(), Waited()
    domain = a_domain(monkeypatch, runtime)
    schedule = Schedule(previous_event=EventOverlap(event))  # type: ignore[arg-type]
    domain.order(domain.begin(("cupy",), (), schedule, (OTHER, CURRENT)))
    assert event.by == [COMM]
    assert runtime.edges == [(OTHER, COMM)]


@pytest.mark.parametrize("capturing", [(CURRENT,), (CURRENT, OTHER)])
def test_a_graph_waits_for_what_is_captured_with_it(
    capturing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(capturing)
    domain = a_domain(monkeypatch, runtime)
    domain.order(domain.begin(("cupy",), (), Schedule(), (OTHER, COMM)))
    assert runtime.edges == [(OTHER, CURRENT)] * (OTHER in capturing)


def view(*shape: int, dtype: str = "float32", stream: int | None = None) -> ArrayView:
    strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    return ArrayView(shape, strides, dtype, "cuda:0", 4096, "cupy", None, stream)


def test_streams_of_views() -> None:
    assert producers(view(1), None, view(1, stream=7), view(1, stream=8), view(1, stream=7)) == (7, 8)


class Asked:
    """A producer of DLPack on a GPU; `by` are the streams of its consumers."""

    def __init__(self, *shape: int, dtype: str = "float32") -> None:
        self._shape, self._dtype = shape, dtype
        self.by: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, **_: object) -> object:
        self.by.append(stream)
        itemsize = {"bfloat16": 2, "int64": 8, "bool": 1}.get(self._dtype, 4)
        capsule = np.zeros(self._shape, f"u{itemsize}").__dlpack__()
        dlpack.relabel(capsule, cuda_index=0, dtype=self._dtype)
        return capsule


class Requests:
    """Every request, of exported arrays."""

    def __init__(self) -> None:
        self.made: list[Asked] = []
        self.handle: Any = None

    def _array(self, *shape: int, dtype: str = "float32") -> Asked:
        self.made.append(Asked(*shape, dtype=dtype))
        return self.made[-1]

    def _ids(self) -> Asked:
        return self._array(NUM_TOKENS, 2, dtype="int64")

    def layout(self) -> LayoutRequest:
        return LayoutRequest.of(self._ids(), 4, num_ranks=NUM_RANKS, place=PLACE)

    def dispatch(self) -> DispatchRequest:
        x = self._array(NUM_TOKENS, HIDDEN), self._array(NUM_TOKENS, 3)
        flags, counts = self._array(NUM_TOKENS, NUM_RANKS, dtype="bool"), self._array(4, dtype="int32")
        weights = self._array(NUM_TOKENS, 2)
        given = (x, None, flags, counts, self._ids(), weights, 1, 0, 4)
        return DispatchRequest.of(*given, owner=self, num_ranks=NUM_RANKS, place=PLACE)

    def low_latency_dispatch(self) -> LowLatencyDispatchRequest:
        x, weights = self._array(NUM_TOKENS, HIDDEN, dtype="bfloat16"), self._array(NUM_TOKENS, 2)
        stats, waits = self._array(2, dtype="int32"), self._array(NUM_RANKS, dtype="int64")
        given = (x, self._ids(), NUM_TOKENS, 4, stats, waits, False, False, False, weights)
        return LowLatencyDispatchRequest.of(*given, num_ranks=NUM_RANKS, place=PLACE)


@pytest.mark.parametrize("name", ["layout", "dispatch", "low_latency_dispatch"])
def test_every_export_is_asked_once_for_the_stream_that_reads_it(name: str) -> None:
    requests = Requests()
    getattr(requests, name)()
    assert [each.by for each in requests.made] == [[COMM]] * len(requests.made)


def test_a_dispatch_says_what_its_inputs_name() -> None:
    """The counts of routing by ranks among them, which only the host reads."""
    request: Any = Requests().dispatch()
    request = replace(
        request, x=view(NUM_TOKENS, HIDDEN, stream=OTHER), num_tokens_per_expert=view(4, stream=5)
    )
    plans = a_call(DispatchPlans)
    given = (object(), None, None, object(), None, None)
    *_, streams = plans.find(given, (), lambda *_: request, 16)
    assert streams == (OTHER, COMM, 5)


@pytest.mark.parametrize("shape", [(NUM_TOKENS,), (NUM_TOKENS, 3)])
def test_scale_factors_have_one_axis_or_two(shape: tuple[int, ...]) -> None:
    def request(*shape: int) -> DispatchRequest:
        given = ((Asked(NUM_TOKENS, HIDDEN), Asked(*shape)), None, None, None)
        ids = Asked(NUM_TOKENS, 2, dtype="int64")
        return DispatchRequest.of(*given, ids, None, 1, 0, 4, owner=None, num_ranks=NUM_RANKS, place=PLACE)

    scales = request(*shape).sf
    assert scales is not None
    assert scales.shape == shape
    for wrong in ((NUM_TOKENS + 1,), (NUM_TOKENS + 1, 3), (NUM_TOKENS, 3, 1)):
        with pytest.raises(ArrayError, match=r"sf has shape .*; expected \[4, any\]"):
            request(*wrong)


class ReachedError(Exception):
    """What a call gives to what enqueues it."""

    def __init__(self, *given: Any) -> None:
        self.given = given


def reached(*given: Any) -> Any:
    raise ReachedError(*given)


def a_call(kind: Any, **parts: Any) -> Any:
    call = object.__new__(kind)
    vars(call).update(_plans=Plans(), _kinds=Plans(), _owner=None, _run=reached, **parts)
    call._prepare = call._sized = lambda *_: SimpleNamespace(frameworks=("cupy",))
    return call


def test_calls_say_what_their_inputs_name() -> None:
    """Also those of whom a glance says nothing: what is exported, and what names its stream."""
    rows = view(NUM_TOKENS, HIDDEN, stream=OTHER)
    ids, weights = view(NUM_TOKENS, 2, dtype="int64", stream=CURRENT), view(NUM_TOKENS, 2, stream=COMM)
    handle: Any = SimpleNamespace(lasting_facts=None)
    combined = CombineRequest(x=rows, handle=handle, topk_weights=weights, biases=(view(1, stream=5),))
    low = LowLatencyDispatchRequest(
        x=rows,
        topk_idx=ids,
        num_max_tokens_per_rank=4,
        num_experts=4,
        recv_stats=view(2, stream=5),
        wait_stats=None,
        use_fp8=False,
        round_scale=False,
        use_ue8m0=False,
        topk_weights=weights,
        layout="expert",
    )
    low_back = LowLatencyCombineRequest(
        x=rows,
        topk_idx=ids,
        topk_weights=weights,
        handle=handle,
        use_logfmt=False,
        zero_copy=False,
        out=view(1, stream=5),
        out_array=None,
        wait_stats=None,
        use_fp8=False,
        reduce="rank",
    )
    layout = LayoutRequest(topk_idx=ids, num_experts=4)
    schedule = Schedule()
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]] = [
        (a_call(DispatchLayouts), (object(), 4, lambda *_: layout, schedule), (CURRENT,)),
        (
            a_call(Combine),
            ((object(), handle, None, None), lambda *_: combined, schedule),
            (OTHER, COMM, 5),
        ),
        (
            a_call(LowLatencyDispatch),
            ((object(),), (), lambda *_: low, False, schedule),
            (OTHER, CURRENT, 5, COMM),
        ),
        (
            a_call(LowLatencyCombine),
            ((object(),) * 5, handle, (), lambda *_: low_back, False, schedule),
            (OTHER, CURRENT, COMM, 5),
        ),
    ]
    for call, given, streams in calls:
        with pytest.raises(ReachedError) as caught:
            call(*given)
        assert streams in caught.value.given
