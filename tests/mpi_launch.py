"""Start a script under mpiexec, also so that the other ranks survive one that dies."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

# Run in front of every rank. MPICH's launcher kills the other ranks when its child dies by a signal, and
# sends them SIGUSR1 when one ends: the rank is a grandchild, and the signal is blocked.
_WRAPPER = """
import os, signal, subprocess, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
rank = os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
with open(f"{sys.argv[1]}/out.{rank}", "wb") as out:
    code = subprocess.run([sys.executable, *sys.argv[2:]], stdout=out, stderr=out, close_fds=False).returncode
with open(f"{sys.argv[1]}/code.{rank}", "w") as file:
    file.write(str(code))
os._exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class Launched:
    code: int
    outputs: list[str]
    codes: list[int | None]
    """Exit code of every rank; negative for a signal."""


def launch(num_ranks: int, script: str, folder: Path, *, survive: bool, timeout_s: float = 30) -> Launched:
    """Run `script` on `num_ranks` ranks.

    Args:
        survive: leave the other ranks alone when one dies.

    Raises:
        subprocess.TimeoutExpired: it hung, and was killed.
    """
    (folder / "script.py").write_text(script)
    (folder / "wrapper.py").write_text(_WRAPPER)
    mpiexec, is_mpich = _mpiexec()
    if survive and not is_mpich:
        pytest.skip("only MPICH's launcher lets the other ranks survive")
    flags = ["-disable-auto-cleanup"] if survive else []
    if not is_mpich:
        flags = ["--allow-run-as-root", "--oversubscribe"]
    rank = [sys.executable, str(folder / "wrapper.py"), str(folder), str(folder / "script.py")]
    environ = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]), PYTHONFAULTHANDLER="1")
    process = subprocess.Popen(
        [mpiexec, *flags, "-n", str(num_ranks), *rank],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env=environ,
        start_new_session=True,
    )
    try:
        code = process.wait(timeout_s)
    except BaseException:
        _kill_ranks(folder)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise

    def text(name: str) -> str:
        path = folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    codes = [int(found) if (found := text(f"code.{rank}")) else None for rank in range(num_ranks)]
    return Launched(code, [text(f"out.{rank}") for rank in range(num_ranks)], codes)


@cache
def _mpiexec() -> tuple[str, bool]:
    """The launcher beside this Python, else the system's, and whether it is MPICH's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=path)
    if found is None:
        pytest.skip("no mpiexec beside this Python or on PATH")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    return found, "HYDRA" in version


def _kill_ranks(folder: Path) -> None:
    # The launcher gives each rank a session of its own: find them by their command line.
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if str(folder).encode() in command:
                    os.kill(int(entry.name), signal.SIGKILL)
