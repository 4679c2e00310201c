"""Misuse and faults: the same clear error on every rank, and a buffer that survives what it can."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_cases import check_low_latency, check_normal
from numpy.typing import NDArray

import ep_rt
from ep_rt import Buffer, EpError, Group
from ep_rt.groups import thread_groups

NUM_EXPERTS = 8


def rows(num_tokens: int = 4, hidden: int = 32, dtype: Any = np.float32) -> NDArray[Any]:
    return np.ones((num_tokens, hidden), dtype)


def ids(num_tokens: int = 4, num_topk: int = 2) -> NDArray[np.int64]:
    return np.arange(num_tokens * num_topk).reshape(num_tokens, num_topk) % NUM_EXPERTS


def dispatch(buffer: Buffer, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"x": rows(), "topk_idx": ids(), "num_experts": NUM_EXPERTS}
    return buffer.dispatch(**(arguments | changes))


def low_latency_dispatch(buffer: Buffer, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": rows(hidden=128, dtype=ml_dtypes.bfloat16),
        "topk_idx": ids(),
        "num_max_dispatch_tokens_per_rank": 8,
        "num_experts": NUM_EXPERTS,
    }
    return buffer.low_latency_dispatch(**(arguments | changes))


def combine(buffer: Buffer, **changes: Any) -> Any:
    out = dispatch(buffer)
    return buffer.combine(**({"x": out.recv_x, "handle": out.handle} | changes))


def combine_expert_major(buffer: Buffer, **changes: Any) -> Any:
    out = dispatch(buffer, layout="expert")
    return buffer.combine(**({"x": out.recv_x, "handle": out.handle} | changes))


def low_latency_combine(buffer: Buffer, **changes: Any) -> Any:
    out = low_latency_dispatch(buffer, use_fp8=False)
    arguments: dict[str, Any] = {
        "x": out.recv_x,
        "topk_idx": ids(),
        "topk_weights": np.ones((4, 2), np.float32),
        "handle": out.handle,
    }
    return buffer.low_latency_combine(**(arguments | changes))


WRONG_ON_ONE_RANK: list[tuple[str, Callable[..., Any], dict[str, Any], type[EpError], str]] = [
    ("not an array", dispatch, {"x": [[1.0] * 32] * 4}, ep_rt.ArrayError, "x is a list"),
    ("one dimension", dispatch, {"x": np.ones(32, np.float32)}, ep_rt.ArrayError, "shape"),
    ("dtype of x", dispatch, {"x": rows(dtype=np.int64)}, ep_rt.ArrayError, "dtype int64"),
    ("float64", dispatch, {"x": rows(dtype=np.float64)}, ep_rt.ArrayError, "float64"),
    ("row of 12 bytes", dispatch, {"x": rows(hidden=3)}, ep_rt.ArrayError, "16 bytes"),
    ("no hidden", dispatch, {"x": rows(hidden=0)}, ep_rt.ArrayError, "16 bytes"),
    ("ids of other tokens", dispatch, {"topk_idx": ids(5)}, ep_rt.ArrayError, r"\[5, 2\]"),
    ("float ids", dispatch, {"topk_idx": ids().astype(np.float32)}, ep_rt.ArrayError, "float32"),
    ("id too large", dispatch, {"topk_idx": ids() + 1}, ep_rt.ArrayError, "expert id 8"),
    ("id -2", dispatch, {"topk_idx": ids() - 2}, ep_rt.ArrayError, "expert id -2"),
    ("experts per rank", dispatch, {"num_experts": 10}, ep_rt.ConfigError, "num_experts=10"),
    ("no experts", dispatch, {"num_experts": 0}, ep_rt.ConfigError, "num_experts=0"),
    ("num_experts missing", dispatch, {"num_experts": None}, ep_rt.ConfigError, "num_experts="),
    ("no routing", dispatch, {"topk_idx": None}, ep_rt.ConfigError, "needs topk_idx"),
    ("weights", dispatch, {"topk_weights": np.ones((4, 3), np.float32)}, ep_rt.ArrayError, "topk_weights"),
    ("sf", dispatch, {"x": (rows(), np.ones((3, 1), np.float32))}, ep_rt.ArrayError, "sf"),
    ("alignment", dispatch, {"expert_alignment": 0}, ep_rt.ConfigError, "expert_alignment=0"),
    ("worst", dispatch, {"num_worst_tokens": -1}, ep_rt.ConfigError, "num_worst_tokens=-1"),
    ("alignment", dispatch, {"expert_alignment": 2**31}, ep_rt.ConfigError, "from 1 to"),
    ("layout", dispatch, {"layout": "token"}, ep_rt.ConfigError, "layout='token'; one of rank, expert"),
    ("padding", dispatch, {"zero_padding": True}, ep_rt.ConfigError, "zero_padding needs layout='expert'"),
    ("quantize", dispatch, {"quantize": "int8"}, ep_rt.ConfigError, "quantize='int8'"),
    ("float32 to fp8", dispatch, {"quantize": "fp8"}, ep_rt.ArrayError, "float32; accepted: bfloat16"),
    (
        "blocks of 128 to fp8",
        dispatch,
        {"quantize": "fp8", "x": rows(hidden=64, dtype=ml_dtypes.bfloat16)},
        ep_rt.ArrayError,
        "multiple of 128",
    ),
    (
        "sf and fp8",
        dispatch,
        {"quantize": "fp8", "x": (rows(), np.ones((4, 1), np.float32))},
        ep_rt.ConfigError,
        "give x alone",
    ),
    (
        "layout without ids",
        dispatch,
        {
            "layout": "expert",
            "topk_idx": None,
            "is_token_in_rank": np.zeros((4, 4), np.bool_),
            "num_tokens_per_expert": np.zeros(8, np.int32),
        },
        ep_rt.ConfigError,
        "layout='expert' needs topk_idx",
    ),
    ("a tuple as handle", dispatch, {"handle": (1, 2), "topk_idx": None}, ep_rt.HandleError, "tuple"),
    (
        "layout of another topk_idx",
        dispatch,
        {"is_token_in_rank": np.zeros((4, 4), np.bool_)},
        ep_rt.ConfigError,
        "is_token_in_rank is not that of topk_idx",
    ),
    ("rows missing", combine, {"x": rows(1)}, ep_rt.ArrayError, r"shape \[1, 32\]"),
    (
        "weights of another layout",
        combine_expert_major,
        {"topk_weights": np.ones((4, 2), np.float32)},
        ep_rt.ArrayError,
        "topk_weights",
    ),
    ("three biases", combine, {"bias": (rows(),) * 3}, ep_rt.ConfigError, "3 arrays"),
    ("bias dtype", combine, {"bias": rows(dtype=np.float16)}, ep_rt.ArrayError, r"bias\[0\]"),
    (
        "float32 x",
        low_latency_dispatch,
        {"x": rows(hidden=128)},
        ep_rt.ArrayError,
        "x has dtype float32; accepted: bfloat16",
    ),
    (
        "blocks of 128",
        low_latency_dispatch,
        {"x": rows(hidden=64, dtype=ml_dtypes.bfloat16)},
        ep_rt.ArrayError,
        "multiple of 128",
    ),
    (
        "capacity",
        low_latency_dispatch,
        {"num_max_dispatch_tokens_per_rank": 3},
        ep_rt.ConfigError,
        "4 tokens",
    ),
    (
        "event and hook",
        low_latency_dispatch,
        {"async_finish": True, "return_recv_hook": True},
        ep_rt.ConfigError,
        "exclude each other",
    ),
    ("scales", low_latency_dispatch, {"use_ue8m0": True}, ep_rt.ConfigError, "round_scale"),
    (
        "half a token",
        low_latency_dispatch,
        {"num_max_dispatch_tokens_per_rank": 8.5},
        ep_rt.ConfigError,
        "not an integer",
    ),
    ("half a row", dispatch, {"num_worst_tokens": 8.5}, ep_rt.ConfigError, "not an integer"),
    ("half of the most", dispatch, {"num_max_tokens_per_rank": 8.5}, ep_rt.ConfigError, "not an integer"),
    (
        "more than the most",
        dispatch,
        {"num_max_tokens_per_rank": 3},
        ep_rt.ConfigError,
        "x has 4 tokens; num_max_tokens_per_rank=3",
    ),
    (
        "too many rows for one expert",
        low_latency_dispatch,
        {"topk_idx": np.zeros((4, 3), np.int64)},
        ep_rt.ArrayError,
        "12 rows to expert 0",
    ),
    (
        "read-only statistics",
        low_latency_dispatch,
        {"cumulative_local_expert_recv_stats": np.broadcast_to(np.int32(0), (2,))},
        ep_rt.ArrayError,
        "read-only",
    ),
    (
        "another routing",
        low_latency_combine,
        {"topk_idx": ids()[::-1].copy()},
        ep_rt.HandleError,
        "not the one that was dispatched",
    ),
    ("zero_copy alone", low_latency_combine, {"zero_copy": True}, ep_rt.ConfigError, "get_next"),
    (
        "out",
        low_latency_combine,
        {"out": rows(hidden=128)},
        ep_rt.ArrayError,
        "out has dtype float32",
    ),
]


@pytest.mark.parametrize(
    ("call", "changes", "kind", "message"),
    [case[1:] for case in WRONG_ON_ONE_RANK],
    ids=[case[0] for case in WRONG_ON_ONE_RANK],
)
def test_what_is_wrong_on_one_rank_is_raised_on_all(
    call: Callable[..., Any], changes: dict[str, Any], kind: type[EpError], message: str
) -> None:
    def run(group: Group) -> str:
        with Buffer(group, backend="host") as buffer:
            with pytest.raises(kind, match=message) as raised:
                call(buffer, **(changes if group.rank == 2 else {}))
            check_normal(buffer, 1)  # still in step
        return str(raised.value)

    texts = ep_rt.run_local(run, 4, timeout_s=10)
    assert texts[0].partition(": ")[2].startswith("rank 2: ")
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("call", "changes", "fact"),
    [
        (dispatch, {"x": rows(hidden=64)}, "hidden differs between ranks: 32 on rank 0, 1, 3; 64 on rank 2"),
        (dispatch, {"x": rows(dtype=np.float16)}, "dtype of x differs"),
        (dispatch, {"num_experts": 16}, "num_experts differs"),
        (dispatch, {"expert_alignment": 8}, "expert_alignment differs"),
        (dispatch, {"num_max_tokens_per_rank": 4}, "num_max_tokens_per_rank differs"),
        (dispatch, {"topk_idx": ids(num_topk=3)}, "columns of topk_idx differs"),
        (dispatch, {"layout": "expert"}, "layout differs"),
        (dispatch, {"topk_weights": np.ones((4, 2), np.float32)}, "topk_weights differs"),
        (dispatch, {"x": (rows(), np.ones((4, 1), np.float32))}, "sf differs"),
        (combine, {"topk_weights": np.ones((4, 2), np.float32)}, "columns of topk_weights differs"),
        (combine_expert_major, {"topk_weights": np.ones(8, np.float32)}, "columns of topk_weights differs"),
        (low_latency_dispatch, {"use_fp8": False}, "use_fp8 differs"),
        (low_latency_dispatch, {"num_max_dispatch_tokens_per_rank": 9}, "per_rank differs"),
        (low_latency_combine, {"use_logfmt": True}, "use_logfmt differs"),
    ],
)
def test_what_differs_between_ranks_is_named(
    call: Callable[..., Any], changes: dict[str, Any], fact: str
) -> None:
    def run(group: Group) -> str:
        with Buffer(group, backend="host") as buffer:
            with pytest.raises(ep_rt.ConfigError, match=fact) as raised:
                call(buffer, **(changes if group.rank == 2 else {}))
            check_low_latency(buffer, 1)
        return str(raised.value)

    assert len(set(ep_rt.run_local(run, 4, timeout_s=10))) == 1


def test_construction_compares_what_must_agree() -> None:
    def run(group: Group) -> None:
        sizes: dict[str, Any] = {"num_max_tokens_per_rank": 8, "num_experts": 8, "num_topk": 2}
        with pytest.raises(ep_rt.ConfigError, match="model differs between ranks"):
            Buffer.for_moe(group, hidden=128 + 128 * group.rank, **sizes)
        with pytest.raises(ep_rt.ConfigError, match="rank 1: num_experts=9"):
            Buffer.for_moe(group, hidden=128, **(sizes | {"num_experts": 8 + group.rank}))
        with pytest.raises(ep_rt.ConfigError, match="enable_shrink differs"):
            Buffer(group, enable_shrink=group.rank == 0)
        with pytest.raises(ep_rt.ConfigError, match="num_low_latency_sms differs"):
            Buffer(group, num_low_latency_sms=16 + group.rank)
        with pytest.raises(ep_rt.ConfigError, match="num_low_latency_sms=0 must be at least 1"):
            Buffer(group, num_low_latency_sms=0)
        with pytest.raises(ep_rt.ConfigError, match="network differs"):
            Buffer(group, network=ep_rt.NetworkOptions(service_level=group.rank))
        with pytest.raises(ep_rt.ConfigError, match="network differs"):
            Buffer(group, num_qps_per_rank=1 + group.rank)
        with pytest.raises(ep_rt.ConfigError, match="num_qps_per_rank=0 is not within"):
            Buffer(group, num_qps_per_rank=0)
        wins = ep_rt.NetworkOptions(num_qps_per_rank=2)
        Buffer(group, backend="host", network=wins, num_qps_per_rank=1 + group.rank).close()
        with pytest.raises(ep_rt.ConfigError, match="rank 1: backend='gpu'"):
            Buffer(group, backend="gpu" if group.rank else "host")
        with Buffer.for_moe(group, hidden=32, dtype="float32", backend="host", **sizes) as buffer:
            assert buffer.dispatch(rows(), topk_idx=ids()).handle.num_tokens == 4
            with pytest.raises(ep_rt.ConfigError, match="num_max_tokens_per_rank=8"):
                dispatch(buffer, x=rows(9), topk_idx=ids(9))
            with pytest.raises(ep_rt.ConfigError, match="=9; the buffer was made for 8"):
                dispatch(buffer, num_max_tokens_per_rank=9)
            assert dispatch(buffer, num_max_tokens_per_rank=4).handle.num_tokens == 4
            assert buffer.num_max_tokens_per_rank == 8
            with pytest.raises(ep_rt.ConfigError, match="hidden=32"):
                dispatch(buffer, x=rows(hidden=64))

    ep_rt.run_local(run, 2, timeout_s=10)


def test_cuda_backend_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    with pytest.raises(ep_rt.BackendError, match=r"backend='cuda' cannot run here: CuPy"):
        Buffer(backend="cuda")


def test_backend_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_RT_BACKEND", "host")
    with Buffer() as buffer:
        assert buffer.backend == "host"
    monkeypatch.setenv("EP_RT_BACKEND", "abacus")
    with pytest.raises(ep_rt.ConfigError, match="abacus"):
        Buffer()


def test_handles_belong_to_their_buffer() -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host") as one, Buffer(group, backend="host") as other:
            out = dispatch(one)
            with pytest.raises(ep_rt.HandleError, match="another buffer"):
                other.combine(out.recv_x, out.handle)
            with pytest.raises(ep_rt.HandleError, match="another buffer"):
                other.dispatch(rows(), handle=out.handle)
            with pytest.raises(ep_rt.HandleError, match="x has 5 tokens"):
                one.dispatch(rows(5), handle=out.handle)
            with pytest.raises(ep_rt.ConfigError, match="give x alone"):
                one.dispatch(rows(), handle=out.handle, topk_idx=ids())
            with pytest.raises(ep_rt.HandleError, match="the handle's dispatch had layout='rank'"):
                one.dispatch(rows(), handle=out.handle, layout="expert")
            low = low_latency_dispatch(one, use_fp8=False)
            with pytest.raises(ep_rt.HandleError, match="LowLatencyHandle"):
                one.combine(low.recv_x, low.handle)
            check_normal(one, 3)
            check_low_latency(other, 4)

    ep_rt.run_local(run, 2, timeout_s=10)


def test_ranks_in_different_calls_name_each_other() -> None:
    def run(group: Group) -> str:
        with Buffer(group, backend="host") as buffer:
            out = dispatch(buffer)
            with pytest.raises(ep_rt.CollectiveMismatchError) as raised:
                _ = buffer.combine(out.recv_x, out.handle) if group.rank == 1 else dispatch(buffer)
            check_normal(buffer, 2)
        return str(raised.value)

    texts = ep_rt.run_local(run, 4, timeout_s=10)
    assert len(set(texts)) == 1
    assert "dispatch of buffer" in texts[0]
    assert "on ranks 0, 2, 3; combine of buffer" in texts[0]


def test_calls_on_two_buffers_are_told_apart() -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host") as one, Buffer(group, backend="host") as other:
            with pytest.raises(ep_rt.CollectiveMismatchError):
                dispatch(other if group.rank else one)
            check_normal(one, 1)

    ep_rt.run_local(run, 2, timeout_s=10)


def test_closed_buffer() -> None:
    def run(group: Group) -> None:
        buffer = Buffer(group, backend="host")
        buffer.close()
        buffer.close()
        for call in (dispatch, low_latency_dispatch):
            with pytest.raises(ep_rt.ClosedError):
                call(buffer)
        with Buffer(group, backend="host") as again:
            check_normal(again, 1)

    ep_rt.run_local(run, 2, timeout_s=10)


def test_exception_in_the_body_reaches_the_peers_at_once() -> None:
    seen: dict[int, BaseException] = {}

    def run(group: Group) -> None:
        try:
            with Buffer(group, backend="host", timeout_s=30) as buffer:
                dispatch(buffer)
                if group.rank == 1:
                    raise KeyError("my own")
                dispatch(buffer)
        except Exception as error:
            seen[group.rank] = error
            raise

    began = time.monotonic()
    with pytest.raises(KeyError, match="my own"):
        ep_rt.run_local(run, 4)
    assert time.monotonic() - began < 5
    for rank in (0, 2, 3):
        error = seen[rank]
        assert isinstance(error, ep_rt.PeerFailedError)
        assert error.peer == 1
        assert "KeyError" in str(error)
        assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("late", [0, 1, 3])
@pytest.mark.parametrize("call", [dispatch, combine, low_latency_dispatch, low_latency_combine])
def test_rank_that_never_arrives_is_named(call: Callable[..., Any], late: int) -> None:
    groups = thread_groups(4)
    errors: dict[int, ep_rt.PeerTimeoutError] = {}

    def run(group: Group) -> None:
        buffer = Buffer(group, backend="host", timeout_s=1.0)
        if group.rank == late:
            return
        with pytest.raises(ep_rt.PeerTimeoutError) as raised:
            call(buffer)
        errors[group.rank] = raised.value
        with pytest.raises(ep_rt.PeerTimeoutError):  # at once, not after another second
            dispatch(buffer)

    began = time.monotonic()
    threads = [threading.Thread(target=run, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - began < 5
    assert {rank: error.peers for rank, error in errors.items()} == {
        rank: (late,) for rank in range(4) if rank != late
    }
