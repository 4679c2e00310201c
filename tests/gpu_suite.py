"""The whole GPU suite on this machine: ``python tests/gpu_suite.py``. Every part has a time limit.

Threads first (virtual ranks on one GPU, then one per GPU), then the same tests under mpirun with one
process per GPU, then processes that share GPUs, as nodes and over a test transport, then small cases under
compute-sanitizer, then figures. Ends with a table and a status that says whether all passed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Every kernel.
SANITIZED = (
    "tests/gpu/test_normal.py::test_random_layers_equal_the_oracle[16-mpi]",
    "tests/gpu/test_normal.py::test_worst_case_capacity_equals_the_oracle[2-mpi]",
    "tests/gpu/test_normal.py::test_layout_and_dispatch_from_a_layout[mpi]",
    "tests/gpu/test_normal.py::test_any_strides[mpi]",
    "tests/gpu/test_normal.py::test_quantized_rows_equal_the_oracle[128-1-mpi]",
    "tests/gpu/test_expert_major.py::test_random_layers_equal_the_oracle[True-2-mpi]",
    "tests/gpu/test_low_latency.py::test_random_layers_equal_the_oracle[False-mpi]",
    "tests/gpu/test_low_latency.py::test_random_layers_equal_the_oracle[True-mpi]",
)
# Ranks on one GPU: calls that take longer under a sanitizer block each other in the driver elsewhere.
SANITIZED_ON_ONE_GPU = (
    "tests/gpu/test_normal.py::test_any_number_of_ranks[1-virtual]",
    "tests/gpu/test_normal.py::test_any_number_of_ranks[2-virtual]",
    "tests/gpu/test_normal.py::test_layout_and_dispatch_from_a_layout[virtual]",
    "tests/gpu/test_low_latency.py::test_any_number_of_ranks[1-virtual]",
    "tests/gpu/test_low_latency.py::test_any_number_of_ranks[2-virtual]",
)
OVER_NODES = (
    *(f"tests/gpu/test_{name}.py" for name in ("internode", "normal", "expert_major", "low_latency")),
    "tests/gpu/test_compat_on_gpus.py",
    *(
        f"tests/gpu/test_bench_on_gpus.py::test_{name}"
        for name in (
            "every_operation_is_checked_and_timed",
            "every_operation_of_the_low_latency_mode",
            "one_node_beside_several",
        )
    ),
)
WITHOUT_NVLINK = (
    "tests/gpu/test_internode.py::test_nodes_are_chosen_and_so_are_gpus",
    "tests/gpu/test_internode.py::test_counts_by_node",
    "tests/gpu/test_normal.py::test_random_layers_equal_the_oracle",
    "tests/gpu/test_normal.py::test_worst_case_capacity_equals_the_oracle",
)
# Nodes of more ranks than there may be GPUs, which ranks share then: (ranks, ranks of a node).
NODES = ((8, 4), (8, 2), (8, 1), (6, 2))
NODES_ON_ONE_GPU = ((2, 1), (4, 2))
OVER_MANY_NODES = (
    "tests/gpu/test_internode.py",
    "tests/gpu/test_normal.py::test_random_layers_equal_the_oracle",
    "tests/gpu/test_expert_major.py::test_random_layers_equal_the_oracle",
    "tests/gpu/test_low_latency.py::test_random_layers_equal_the_oracle",
)
OVER_LOOPBACK = ("tests/gpu/test_nvshmem.py", *OVER_MANY_NODES)
NORMAL_MODE = ("dispatch", "dispatch-cached", "combine")
LOW_LATENCY = (
    *("ll-dispatch", "ll-dispatch-packed", "ll-dispatch-split"),
    *("ll-combine", "ll-combine-split", "ll-combine-fp8", "ll-combine-logfmt", "ll-pair", "ll-pair-packed"),
)
SUMMARY = re.compile(r"((?:\d+ (?:passed|failed|skipped|errors?|deselected|warnings?)(?:, )?)+) in [\d.]+s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=0, help="processes under mpirun; default one per GPU")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for each part")
    parser.add_argument("--only", choices=("threads", "mpi", "sanitizer", "figures"), help="some parts")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    num_ranks = options.ranks or _num_gpus()
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--color=no"]
    pytest += ["-o", "faulthandler_timeout=60"]
    barrier = [sys.executable, "tests/gpu/barrier_latency.py"]
    bench = [sys.executable, "-m", "ep_rt", "bench", "--dtype", "both", "--repeat", "3", "--tokens"]
    low_latency = [*bench, "8", "128", "--operations", *LOW_LATENCY]
    parts = {"threads": [*pytest, "tests"]}
    if num_ranks > 1:  # names of files count, too
        parts = {
            "threads on one GPU": [*pytest, "tests", "-k", "virtual or not gpus"],
            "threads with a GPU each": [*pytest, "tests", "-k", "gpus and not virtual"],
        }
    if shutil.which("mpirun") and num_ranks > 1:
        mpirun = _mpirun(num_ranks)
        parts[f"mpirun -n {num_ranks}"] = [*mpirun, *pytest, "tests/gpu"]
        for ranks_per_node in sorted({1, num_ranks // 2}):
            nodes = ["env", f"EP_RT_RANKS_PER_NODE={ranks_per_node}", *mpirun]
            named = f"mpirun -n {num_ranks}, {num_ranks // ranks_per_node} nodes"
            parts[named] = [*nodes, *pytest, *OVER_NODES]
            parts[f"torch, {named}"] = [*nodes, *pytest, "tests/gpu/test_torch_on_gpus.py"]
            parts[f"JAX, {named}"] = [*nodes, *pytest, "tests/gpu/test_jax_on_gpus.py"]
            normal_mode = [*bench, "128", "4096", "--operations", *NORMAL_MODE, "--compare", "one-node"]
            parts[f"figures, {named}"] = [*nodes, *normal_mode]
            parts[f"low-latency figures, {named}"] = [*nodes, *low_latency]
        puts = ["env", "EP_RT_TEST_LOW_LATENCY=puts", *mpirun, *pytest, "tests/gpu/test_low_latency.py"]
        parts[f"mpirun -n {num_ranks}, puts alone"] = puts
        without_nvlink = ["env", "EP_RT_NVLINK=0", *mpirun, *pytest, *WITHOUT_NVLINK]
        parts[f"mpirun -n {num_ranks}, as without NVLink"] = without_nvlink
        nodes = ["env", f"EP_RT_RANKS_PER_NODE={num_ranks // 2}", *mpirun]
        parts["example, 2 nodes"] = [*nodes, sys.executable, "examples/two_nodes.py", "--backend", "cuda"]
        parts["doctor"] = [*mpirun, sys.executable, "-m", "ep_rt", "doctor", "--ping", "--require", "cuda"]
        parts[f"barrier figures, mpirun -n {num_ranks}"] = [*mpirun, *barrier]
        parts[f"figures, mpirun -n {num_ranks}"] = [*mpirun, *bench, "128", "4096"]
        parts[f"low-latency figures, mpirun -n {num_ranks}"] = [*mpirun, *low_latency, "ll-combine-source"]
        parts[f"low-latency figures, mpirun -n {num_ranks}, puts"] = [*mpirun, *low_latency, "--puts"]
    if shutil.which("mpirun"):
        for many_ranks, ranks_per_node in NODES if num_ranks > 1 else NODES_ON_ONE_GPU:
            named, nodes = _nodes(many_ranks, ranks_per_node)
            parts[named] = [*nodes, *pytest, *OVER_MANY_NODES]
        for many_ranks, ranks_per_node in ((max(2, num_ranks), 1), (4, 2)):
            named, nodes = _nodes(many_ranks, ranks_per_node)
            loopback = ["env", "EP_RT_TEST_TRANSPORT=loopback", *nodes]
            parts[f"{named}, loopback"] = [*loopback, *pytest, *OVER_LOOPBACK]
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            # CUDA's own search for optional entry points is not an error of ours. Host backtraces hold the
            # frames of Python's main thread, and with them all results.
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            sanitizer += ["--show-backtrace", "device"]
            sanitizer += ["--report-api-errors", "no"] if tool == "memcheck" else []
            sanitizer += [*pytest, *(SANITIZED_ON_ONE_GPU if num_ranks == 1 else SANITIZED)]
            if num_ranks == 1:
                parts[f"sanitizer, {tool}"] = sanitizer
            elif shutil.which("mpirun"):
                parts[f"sanitizer, {tool}, mpirun -n 2"] = [*_mpirun(2), *sanitizer]
    parts["barrier figures"] = barrier
    parts["figures, one GPU"] = [*bench, "128", "--virtual"]
    if options.only:
        parts = {name: command for name, command in parts.items() if options.only in name}

    lines = [_run(name, command, options.timeout) for name, command in parts.items()]
    print("\n".join(["", *(line for line, _ in lines)]))
    return 0 if all(passed for _, passed in lines) else 1


def _run(name: str, command: list[str], timeout_s: float) -> tuple[str, bool]:
    """Run one part and show its output; its line of the table, and whether it passed."""
    print(f"--- {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            timeout=timeout_s,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        output, status = done.stdout, str(done.returncode)
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        status = "time limit"
    print(output, flush=True)
    # Under mpirun every process prints its own closing line.
    closings = [match[1] for match in SUMMARY.finditer(output)]
    passed = status == "0" and not any("failed" in closing or "error" in closing for closing in closings)
    verdict = "; ".join(f"{closings.count(closing)} x ({closing})" for closing in dict.fromkeys(closings))
    word = "passed" if passed else f"FAILED (status {status})"
    return f"{name:<36}{word:<24}{time.monotonic() - start:>6.1f} s  {verdict}", passed


def _num_gpus() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def _nodes(num_ranks: int, ranks_per_node: int) -> tuple[str, list[str]]:
    """A name for processes on virtual nodes that share the GPUs there are, and how they are started."""
    ranks_per_gpu = -(-num_ranks // _num_gpus())
    start = ["env", f"EP_RT_RANKS_PER_NODE={ranks_per_node}", "EP_RT_BACKEND=cuda"]
    start += [f"EP_RT_TEST_RANKS_PER_GPU={ranks_per_gpu}", *_mpirun(num_ranks)]
    return f"mpirun -n {num_ranks}, {num_ranks // ranks_per_node} nodes, {ranks_per_gpu} on a GPU", start


def _mpirun(num_ranks: int) -> list[str]:
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
    os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    binding = ["--bind-to", "none"] if "Open MPI" in version else []
    return ["mpirun", "-n", str(num_ranks), *binding]


if __name__ == "__main__":
    sys.exit(main())
