"""``bench --compare jax`` without a GPU: its indices, its programs, and how it ends."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MpiRun
from numpy.typing import NDArray
from test_bench_library import cuda_place, packed_rows, setting_of

from ep_rt.bench import ragged
from ep_rt.bench.library import Packed
from ep_rt.bench.ragged import Indices, Ragged

PROGRAM = Path(__file__).parent / "ragged_program.py"

Array = NDArray[np.generic]


def ragged_all_to_all(operands: list[Array], outputs: list[Array], indices: list[Indices]) -> list[Array]:
    """All ranks' results, as the documentation of `jax.lax.ragged_all_to_all` says.

    Sizes must agree. A slice that would end outside is moved inside: a wrong offset gives wrong rows here.
    """
    results = [output.copy() for output in outputs]
    for src, (operand, mine) in enumerate(zip(operands, indices, strict=True)):
        for dst, result in enumerate(results):
            size = mine.send_sizes[dst]
            assert size == indices[dst].recv_sizes[src]
            first = min(mine.input_offsets[dst], len(operand) - size)
            at = min(mine.output_offsets[dst], len(result) - size)
            result[at : at + size] = operand[first : first + size]
    return results


def test_the_model_gives_what_the_example_of_the_documentation_does() -> None:
    def indices(*rows: list[int]) -> Indices:
        inputs, sends, outputs, recvs = (np.array(row, np.int32) for row in rows)
        return Indices(input_offsets=inputs, send_sizes=sends, output_offsets=outputs, recv_sizes=recvs)

    found = ragged_all_to_all(
        [np.array([1, 2, 2]), np.array([3, 4, 0])],
        [np.zeros(4, int), np.zeros(4, int)],
        [indices([0, 1], [1, 2], [0, 0], [1, 1]), indices([0, 1], [1, 1], [1, 2], [2, 1])],
    )
    assert [result.tolist() for result in found] == [[1, 3, 0, 0], [2, 2, 4, 0]]


def is_right(of_ranks: list[Packed], indices: list[Indices]) -> bool:
    empty = [np.zeros_like(packed.expected) for packed in of_ranks]
    results = ragged_all_to_all([packed.rows for packed in of_ranks], empty, indices)
    return all(map(np.array_equal, results, [packed.expected for packed in of_ranks]))


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_indices_bring_what_is_expected_and_others_do_not(num_ranks: int) -> None:
    for of_ranks in packed_rows(num_ranks):
        indices = [Indices.of(packed.counts, rank) for rank, packed in enumerate(of_ranks)]
        assert is_right(of_ranks, indices)
        # Where the rows that a rank receives land, in place of those that it sends.
        before_src = np.cumsum(of_ranks[0].counts, axis=0) - of_ranks[0].counts
        own = [replace(each, output_offsets=before_src[:, rank]) for rank, each in enumerate(indices)]
        assert not is_right(of_ranks, own)
        # Every offset that says where rows are.
        for rank, each in enumerate(indices):
            for field in ("input_offsets", "output_offsets"):
                for peer in np.flatnonzero(each.send_sizes):
                    changed = getattr(each, field).copy()
                    changed[peer] += 1 if changed[peer] == 0 else -1
                    others = [*indices[:rank], replace(each, **{field: changed}), *indices[rank + 1 :]]
                    assert not is_right(of_ranks, others), (rank, field, peer)


def test_calls_of_a_program_depend_on_each_other() -> None:
    jax = pytest.importorskip("jax")
    library = Ragged.__new__(Ragged)
    library._jax = jax
    library._mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (ragged._AXIS,))
    library._sharding = jax.sharding.NamedSharding(library._mesh, jax.sharding.PartitionSpec(ragged._AXIS))
    rows, out, index = np.zeros((6, 16), np.uint8), np.zeros((7, 16), np.uint8), np.zeros(1, np.int32)
    arguments = (rows, out, index, index, index, index)
    text = library.lowered(5, tuple(jax.device_put(each, library._sharding) for each in arguments)).as_text()
    calls = re.findall(r"(%\w+) = stablehlo\.custom_call @ragged_all_to_all\((%\w+), (%\w+),", text)
    assert len(calls) == 5
    results, operands, outputs = zip(*calls, strict=True)
    assert len(set(operands)) == 1
    assert outputs[1:] == results[:-1]


def test_jax_without_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(ragged, "_preset", lambda: None)
    installed = {"jax"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    place = cuda_place(setting_of())
    assert Ragged.absence(place) == "this JAX has no GPU: install jax[cuda12] or jax[cuda13]"
    installed.add("jax_cuda13_plugin")
    for platforms, is_used in {
        None: True,
        "cuda": True,
        "cuda,cpu": True,
        "cpu": False,
        "cpu,cuda": False,
    }.items():
        monkeypatch.setattr(type(jax.config), "jax_platforms", platforms)
        said = None if is_used else f"JAX is told not to use GPUs: JAX_PLATFORMS={platforms}"
        assert Ragged.absence(place) == said
    installed.clear()
    assert Ragged.absence(place) == "JAX is not installed"


def test_processes_check_and_time_and_fail_together(mpirun: MpiRun) -> None:
    pytest.importorskip("jax")
    done = mpirun(3, PROGRAM, "whole", "60", "60", timeout_s=120)
    assert done.returncode == 0, done.stdout


def test_a_rank_that_does_not_come_ends_the_run(mpirun: MpiRun) -> None:
    pytest.importorskip("jax")
    done = mpirun(2, PROGRAM, "absent", "3", "60", timeout_s=120)
    assert done.returncode != 0
    assert "JAX, start: RuntimeError: did not come" in done.stdout


def test_a_wait_inside_xla_has_an_end(mpirun: MpiRun) -> None:
    pytest.importorskip("jax")
    done = mpirun(2, PROGRAM, "stuck", "60", "12", timeout_s=120)
    assert done.returncode != 0
    assert "Timeout (0:00:12)!" in done.stdout
