"""A process that dies leaves its peers with an error that names it, or without it, and a CUDA that works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import IS_UNDER_MPI, device_count

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_UNDER_MPI, reason="starts processes of its own"),
    pytest.mark.skipif(device_count() == 0, reason="no GPU"),
]


def run(program: str, num_ranks: int, directory: Path, *args: str, timeout_s: float) -> list[tuple[int, str]]:
    """Status and output of every rank; a negative status is a signal."""
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / program), str(directory), str(rank), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_survivor_of_a_killed_process(tmp_path: Path) -> None:
    done = run("dead_process.py", 2, tmp_path, timeout_s=90)
    assert [status for status, _ in done] == [0, -signal.SIGKILL], "\n".join(output for _, output in done)
    assert "stays allocated" in done[0][1]


@pytest.mark.parametrize("mode", ["normal", "low-latency"])
@pytest.mark.parametrize(("how", "status"), [("killed", -signal.SIGKILL), ("left", 0)])
def test_survivors_among_the_calls_of_a_buffer(tmp_path: Path, mode: str, how: str, status: int) -> None:
    done = run("lost_process.py", 3, tmp_path, mode, how, timeout_s=150)
    assert [code for code, _ in done] == [0, status, 0], "\n".join(output for _, output in done)
    for rank in (0, 2):
        assert "stays allocated" in done[rank][1]
