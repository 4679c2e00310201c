"""``bench --compare`` without a GPU: what other libraries are given, and where there is none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ep_rt import __main__ as program
from ep_rt.bench.library import Packed
from ep_rt.bench.options import LIBRARIES
from ep_rt.bench.places import CudaPlace, HostPlace, Setting
from ep_rt.bench.run import LIBRARY_TYPES
from ep_rt.bench.workload import BF16, FP8, Routing

HIDDEN = 256


def routing_of(num_ranks: int) -> Routing:
    """Experts that differ in popularity; of more than two ranks the second sends nothing."""
    drawn = Routing.draw(
        num_ranks=num_ranks,
        num_tokens=23,
        num_experts=4 * num_ranks,
        num_topk=3,
        zipf_exponent=1.0,
    )
    if num_ranks > 2:
        drawn.topk_idx[1][:] = -1
    return Routing(drawn.topk_idx, drawn.num_experts)


def packed_rows(num_ranks: int) -> list[list[Packed]]:
    """By what is moved: of every rank."""
    routing, ranks = routing_of(num_ranks), range(num_ranks)
    return [
        [Packed.dispatch(BF16, HIDDEN, routing, rank) for rank in ranks],
        [Packed.dispatch(FP8, HIDDEN, routing, rank) for rank in ranks],
        [Packed.combine(HIDDEN, routing, rank) for rank in ranks],
    ]


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_what_is_packed_arrives_as_expected(num_ranks: int) -> None:
    for of_ranks in packed_rows(num_ranks):
        parts = []
        for rank, packed in enumerate(of_ranks):
            assert np.array_equal(packed.counts, of_ranks[0].counts)
            assert len(packed.rows) == packed.counts[rank].sum()
            parts.append(np.split(packed.rows, np.cumsum(packed.counts[rank])[:-1]))
        for rank, packed in enumerate(of_ranks):
            assert np.array_equal(np.concatenate([sent[rank] for sent in parts]), packed.expected)
    dispatch, fp8, combine = (of_ranks[0] for of_ranks in packed_rows(num_ranks))
    assert np.array_equal(dispatch.counts, combine.counts.T)
    assert (dispatch.counts.sum(axis=1) == 0).sum() == (num_ranks > 2)
    assert (dispatch.rows.shape[1], fp8.rows.shape[1]) == (2 * HIDDEN, HIDDEN + 4 * 2)


def cuda_place(setting: Setting) -> CudaPlace:
    """One that says where it is, and no more."""
    place = CudaPlace.__new__(CudaPlace)
    place.setting = setting
    return place


def setting_of(**changes: Any) -> Setting:
    facts = {"backend": "cuda", "num_ranks": 2, "ranks_are": "processes", "is_shared": False, **changes}
    return Setting(**facts)


@pytest.mark.parametrize("library", LIBRARY_TYPES.values(), ids=LIBRARY_TYPES)
def test_where_there_is_nothing_to_compare_with(library: Any) -> None:
    assert library.absence(HostPlace(setting_of(backend="host"))) == f"{library.label} needs GPUs"
    in_threads = library.absence(cuda_place(setting_of(ranks_are="threads")))
    assert f"needs processes: mpirun -n N python -m ep_rt bench --compare {library.option}" in in_threads
    assert "more than one GPU" in library.absence(cuda_place(setting_of(num_ranks=1)))


def test_a_run_without_gpus_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        "--backend=host",
        "--ranks=2",
        "--tokens=5",
        "--hidden=64",
        "--experts=4",
        "--topk=2",
    ]
    arguments += ["--repeat=1", "--operations=dispatch", "--json=-", "--compare", *LIBRARIES]
    assert program.main(arguments) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["config"]["compare"] == list(LIBRARIES) == list(LIBRARY_TYPES)
    labels = [library.label for library in LIBRARY_TYPES.values()]
    assert read["notes"] == [f"not compared with {label}: {label} needs GPUs" for label in labels]
    assert {entry["operation"] for entry in read["results"]} == {"dispatch"}
