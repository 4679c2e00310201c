"""``python -m ep_rt bench`` on GPUs, small: it runs, what it checks is right, and its times are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MpiRun
from ranks import IS_UNDER_MPI, PLACES, RANKS_PER_NODE, device_count

from ep_rt.__main__ import main
from ep_rt.bench.options import LIBRARIES, LOW_LATENCY, ONE_NODE, OPERATIONS, SUMMED_AT_SOURCE
from ep_rt.groups import as_group

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SMALL = ["bench", "--backend=cuda", "--tokens", "8", "96", "--hidden=512", "--experts=64", "--topk=4"]
SMALL += ["--dtype=both", "--sms", "4", "8", "--repeat=2"]
COMPARED = [("dispatch", "bf16"), ("dispatch", "fp8"), ("combine", "bf16")]


def run_bench(place: str, path: Path, *arguments: str) -> None:
    """Run on every rank of a place; the status must be 0."""
    command = [*SMALL, *arguments, "--json", str(path)]
    if device_count() == 0:
        pytest.skip("no GPU")
    if place == "mpi":
        if as_group().size > device_count():
            pytest.skip("more processes than GPUs")
        assert main(command) == 0
        return
    if place == "gpus" and device_count() == 1:
        pytest.skip("one GPU")
    threads = ["--ranks=4", "--virtual"] if place == "virtual" else [f"--ranks={device_count()}"]
    done = subprocess.run(
        [sys.executable, "-m", "ep_rt", *command, *threads],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("place", PLACES)
def test_every_operation_is_checked_and_timed(place: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    run_bench(place, path)
    if IS_UNDER_MPI and as_group().rank != 0:
        return
    read = json.loads(path.read_text())
    assert len(read["results"]) == 2 * 2 * (len(OPERATIONS) + 3)  # tokens, SMs, operations of both dtypes
    for entry in read["results"]:
        assert entry["op_us"]["min"] > 0
        assert entry["call_us"]["min"] > 0
        assert (entry["kernel_us"] is None) == (entry["operation"] == "dispatch-exact")
    assert read["barrier_us"]["median"] > 0
    num_ranks = len(read["barrier_us"]["ranks"])
    is_over_nodes = 0 < (RANKS_PER_NODE or 0) < num_ranks
    for entry in read["results"]:
        for name in ("network_bytes", "nvlink_bytes"):
            moved = entry[name]
            assert (moved is not None) == is_over_nodes
            assert moved is None or moved["counted"] == moved["planned"]
        assert (entry["max_sms"] is None) == is_over_nodes
        is_copied = entry["operation"] == "combine-copied"
        assert is_over_nodes or entry["max_sms"] <= entry["sms"] * (4 if is_copied else 1)
    assert num_ranks == 1 or read["wire_limit_best_gbps"] > 1


@pytest.mark.parametrize("how", [(), ("--masks", "--stats")])
@pytest.mark.parametrize("place", PLACES)
def test_every_operation_of_the_low_latency_mode(place: str, how: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    # Over nodes nothing is summed at the source.
    operations = set(LOW_LATENCY) - ({SUMMED_AT_SOURCE} if RANKS_PER_NODE else set())
    run_bench(place, path, "--operations", *sorted(operations), *how)
    if IS_UNDER_MPI and as_group().rank != 0:
        return
    read = json.loads(path.read_text())
    assert {entry["operation"] for entry in read["results"]} == operations
    assert all(entry["kernel_us"]["min"] > 0 for entry in read["results"])
    for entry in read["results"]:
        phases = entry["phases"]
        assert (phases is not None) == entry["operation"].endswith("-split")
        assert phases is None or min(phases["send_us"]["min"], phases["receive_us"]["min"]) > 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_left_sms", [0, 16])
def test_operations_beside_a_product(place: str, num_left_sms: int, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    operations = ["dispatch", "dispatch-exact", "ll-pair"]
    product = "--beside-product=512", f"--leave-sms={num_left_sms}"
    run_bench(place, path, "--operations", *operations, "--dtype=bf16", *product)
    if IS_UNDER_MPI and as_group().rank != 0:
        return
    read = json.loads(path.read_text())
    for entry in read["results"]:
        beside = entry["beside_product"]
        assert (beside is None) == (place == "virtual" or entry["operation"] == "dispatch-exact")
        for reading in ("op_alone_us", "op_us", "product_alone_us", "product_us") if beside else ():
            assert beside[reading]["min"] > 0
    notes = [note for note in read["notes"] if "beside" in note]
    assert len(notes) == (place == "virtual")


@pytest.mark.skipif(not (IS_UNDER_MPI and RANKS_PER_NODE), reason="needs ranks on virtual nodes")
def test_one_node_beside_several(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    num_ranks = as_group().size
    assert RANKS_PER_NODE is not None
    if num_ranks <= RANKS_PER_NODE:
        pytest.skip("one node")
    run_bench("mpi", path, "--compare", ONE_NODE)
    if as_group().rank != 0:
        return
    for entry in json.loads(path.read_text())["results"]:
        beside = entry["one_node"]
        assert len(beside["op_us"]["ranks"]) == num_ranks
        assert beside["max_sms"] >= entry["sms"]
        assert beside["op_us"]["min"] > 0
        assert (beside["kernel_us"] is None) == (entry["operation"] == "dispatch-exact")
        assert entry["ratio_to_one_node"] > 0


@pytest.mark.skipif(IS_UNDER_MPI, reason="starts ranks of its own")
@pytest.mark.parametrize(
    "library",
    LIBRARIES,
)
def test_other_libraries_are_checked_and_timed(library: str, mpirun: MpiRun, tmp_path: Path) -> None:
    """Each in processes of its own: JAX starts once in the life of one."""
    num_ranks = min(device_count(), 8)
    if num_ranks < 2:
        pytest.skip("needs two GPUs")
    path = tmp_path / "figures.json"
    code = "import sys; from ep_rt.__main__ import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*SMALL, "--operations", "dispatch", "--compare", library, "--json", str(path)]
    done = mpirun(num_ranks, code, *arguments, timeout_s=280)
    assert done.returncode == 0, done.stdout
    read = json.loads(path.read_text())
    absence = [note for note in read["notes"] if note.startswith("not compared with")]
    if absence:
        pytest.skip(absence[0])
    found = [entry for entry in read["results"] if entry["operation"].startswith(f"{library}-")]
    moved = [(f"{library}-{name}", dtype) for name, dtype in COMPARED]
    assert [(entry["tokens"], entry["operation"], entry["dtype"]) for entry in found] == [
        (num_tokens, *each) for num_tokens in (8, 96) for each in moved
    ]
    for entry in found:
        assert len(entry["op_us"]["ranks"]) == num_ranks
        assert entry["op_us"]["median"] > 0
        assert entry["call_us"]["min"] > 0
        assert entry["kernel_us"] is None
        # A program that does not do all of its calls would be faster than the links.
        assert entry["limit_share"] < 1.5
