"""A process that is killed leaves its peer with an error that names it and a CUDA context that works."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import IS_UNDER_MPI, device_count


@pytest.mark.gpu
def test_survivor_of_a_killed_process(tmp_path: Path) -> None:
    if IS_UNDER_MPI or device_count() == 0:
        pytest.skip("starts its own processes, on a GPU")
    program = Path(__file__).with_name("dead_process.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL], "\n".join(outputs)
    assert "stays allocated" in outputs[0]
