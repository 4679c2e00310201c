"""Start the ranks of a torch process group over gloo, as torchrun would, on this host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_ranks(
    args: Sequence[str], num_ranks: int, *, timeout_s: float, **environment: str
) -> tuple[list[int], list[str]]:
    """Run ``python *args`` as every rank, and return exit codes and outputs by rank.

    Args:
        timeout_s: for each rank; none of them outlives this call.
        environment: variables to set besides.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = dict(
        os.environ,
        PYTHONPATH=str(Path(__file__).parents[1]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(num_ranks),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        **environment,
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, *args],
            env=dict(environ, RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], outputs
