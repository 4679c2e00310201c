"""What the ranks of a call compare."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ep_rt.cuda.digest import along, combine_digest, dispatch_digest, low_latency_digest
from ep_rt.handle import HandleShape, HostDispatchHandle
from ep_rt.requests import CombineRequest, DispatchRequest, LowLatencyDispatchRequest, Place

OWNER = object()
PLACE = Place("cpu")  # shapes and dtypes are the same anywhere
BF16 = ml_dtypes.bfloat16


def dispatch(handle_call: int = 0, **changes: Any) -> int:
    arguments: dict[str, Any] = {
        "x": np.ones((3, 16), np.float32),
        "handle": None,
        "is_token_in_rank": None,
        "num_tokens_per_expert": None,
        "topk_idx": np.zeros((3, 2), np.int64),
        "topk_weights": None,
        "expert_alignment": 1,
        "num_worst_tokens": 0,
        "num_experts": 8,
    }
    names = ("layout", "quantize", "num_max_tokens_per_rank")
    options = {name: changes.pop(name) for name in names if name in changes}
    arguments |= changes
    request = DispatchRequest.of(*arguments.values(), owner=OWNER, num_ranks=2, place=PLACE, **options)
    return along(dispatch_digest(request), handle_call)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": np.ones((3, 32), np.float32)},
        {"x": np.ones((3, 32), np.float16)},
        {"x": (np.ones((3, 16), np.float32), np.ones((3, 1), np.float32))},
        {"topk_idx": np.zeros((3, 2), np.int32)},
        {"topk_idx": np.zeros((3, 1), np.int64)},
        {"topk_weights": np.zeros((3, 2), np.float32)},
        {
            "topk_idx": None,
            "is_token_in_rank": np.zeros((3, 2), np.bool_),
            "num_tokens_per_expert": np.zeros(8, np.int32),
        },
        {"num_experts": 16},
        {"num_worst_tokens": 5},
        {"num_max_tokens_per_rank": 5},
        {"handle_call": 3},
        {"layout": "expert"},
        {"x": np.ones((3, 128), BF16), "quantize": "fp8"},
    ],
    ids=str,
)
def test_what_must_agree_is_in_it(changes: dict[str, Any]) -> None:
    unchanged = {name: value for name, value in changes.items() if name == "x" and len(changes) > 1}
    assert dispatch(**changes) != dispatch(**unchanged)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"x": np.zeros((5, 16), np.float32), "topk_idx": np.ones((5, 2), np.int64)}),
        ({}, {"expert_alignment": 128}),
        ({"num_worst_tokens": 5}, {"num_worst_tokens": 6}),
    ],
)
def test_what_may_differ_is_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert dispatch(**one) == dispatch(**other)


def test_combine_knows_its_dispatch() -> None:
    handle = HostDispatchHandle(
        owner=OWNER,
        shape=HandleShape(num_tokens=4, num_topk=2, num_recv_rows=3, layout="rank"),
        num_recv_tokens_per_expert_list=[3],
        psum_num_tokens_per_expert=None,
        is_token_in_rank=np.zeros((4, 2), np.bool_),
        send_tokens=(),
        recv_counts=(3,),
        local_ranks=(0,),
    )
    x, weights = np.ones((3, 16), np.float32), np.ones((3, 2), np.float32)

    def digest(x: Any, weights: Any, call: int) -> int:
        request = CombineRequest.of(x, handle, weights, None, owner=OWNER, place=PLACE)
        return along(combine_digest(request), call)

    digests = {
        digest(x, None, 1),
        digest(x, weights, 1),
        digest(x, None, 2),
        digest(x.astype(np.float16), None, 1),
    }
    assert len(digests) == 4


def test_processes_agree() -> None:
    program = "import test_digest; print(test_digest.dispatch())"
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=__file__.rpartition("/")[0],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {f"{dispatch()}\n"}


def low_latency_dispatch(zone: int = 0, **changes: Any) -> int:
    arguments: dict[str, Any] = {
        "x": np.ones((3, 128), BF16),
        "topk_idx": np.zeros((3, 2), np.int64),
        "num_max_tokens_per_rank": 4,
        "num_experts": 8,
        "recv_stats": None,
        "wait_stats": None,
        "use_fp8": True,
        "round_scale": True,
        "use_ue8m0": False,
    }
    request = LowLatencyDispatchRequest.of(**(arguments | changes), num_ranks=2, place=PLACE)
    return low_latency_digest(request, zone, max_send_blocks=5)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_fp8": False},
        {"round_scale": False},
        {"use_ue8m0": True},
        {"topk_weights": np.ones((3, 2), np.float32)},
        {"layout": "rank"},  # senders post other flags
        {"zone": 1},
    ],
)
def test_what_must_agree_of_a_low_latency_dispatch(changes: dict[str, Any]) -> None:
    assert low_latency_dispatch(**changes) != low_latency_dispatch()


def test_tokens_of_a_low_latency_dispatch_may_differ() -> None:
    fewer = low_latency_dispatch(x=np.ones((1, 128), BF16), topk_idx=np.zeros((1, 2), np.int64))
    assert fewer == low_latency_dispatch()
