"""What several test files share: what must be installed, and starting programs under MPI.

``EP_RT_TEST_REQUIRE=mpi,torch,jax,emulator`` turns the absence of what is optional, and for which tests would
be skipped, into a failure.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).parents[1]

# Read by XLA when it starts: ranks that are threads wait for each other on its threads.
os.environ.setdefault("NPROC", "16")


class MpiRun(Protocol):
    def __call__(
        self, num_ranks: int, script_or_code: str | Path, *args: str, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]: ...


def pytest_configure() -> None:
    absent = [f"{name}: {reason}" for name in sorted(_required()) if (reason := _absence(name))]
    if absent:
        raise pytest.UsageError(f"EP_RT_TEST_REQUIRE asks for what is not here: {'; '.join(absent)}")


@pytest.fixture(scope="session", autouse=True)
def _no_segments_left() -> Iterator[None]:
    """Ranks killed on purpose leave MPICH's shared memory behind: remove what nobody maps any more."""
    began = time.time()
    yield
    segments = [path for path in Path("/dev/shm").glob("mpich_shm_*") if path.stat().st_ctime >= began]
    if segments:
        mapped = _mapped_files()
        for path in segments:
            if str(path) not in mapped and path.stat().st_uid == os.getuid():
                path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def mpirun() -> MpiRun:
    """``mpirun(num_ranks, script_or_code, *args)`` runs ``python script args`` on every rank.

    `script_or_code` is a path, or the text of a program. The result holds the exit code of ``mpiexec`` and
    what all ranks printed, errors included, in ``stdout``. After `timeout_s` every rank is killed, and
    the test fails with what they had printed.
    """
    absence = _absence("mpi")
    if absence:
        pytest.skip(absence)
    mpiexec = _mpiexec()
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True).stdout
    is_openmpi = "Open" in version
    flags = ["--allow-run-as-root", "--oversubscribe"] if is_openmpi else []

    def run(
        num_ranks: int, script_or_code: str | Path, *args: str, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        program = [str(script_or_code)] if isinstance(script_or_code, Path) else ["-c", script_or_code]
        command = [mpiexec, *flags, "-n", str(num_ranks), sys.executable, *program, *args]
        return _run(command, timeout_s)

    return run


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    # One thread per rank: ranks outnumber the cores here.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environ = {**threads, **os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environ,
        start_new_session=True,
    )
    try:
        stdout, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:
        stdout = _stop(process)
        if isinstance(error, subprocess.TimeoutExpired):
            pytest.fail(f"{' '.join(command)} took longer than {timeout_s} s; it printed:\n{stdout}")
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, "")


def _stop(process: subprocess.Popen[str]) -> str:
    # The launcher gives every rank a session of its own and ends them all when it is asked to end;
    # should it not, its own group is killed and the ranks lose the launcher.
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=5)[0]
        except subprocess.TimeoutExpired:
            continue
    return "(a rank still holds its output open)"


def _mapped_files() -> str:
    """The maps of all processes that may be looked at, as one text."""
    texts = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            texts.append(path.read_text(errors="replace"))
    return "\n".join(texts)


def _required() -> set[str]:
    return set(filter(None, os.environ.get("EP_RT_TEST_REQUIRE", "").replace(" ", "").split(",")))


def _absence(name: str) -> str | None:
    """Why `name` cannot be tested here; None when it can."""
    checks: dict[str, Callable[[], object]] = {"mpi": _mpiexec, "emulator": _compiler}
    try:
        importlib.import_module("mpi4py" if name == "mpi" else name)
        checks.get(name, lambda: None)()
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    return None


def _compiler() -> None:
    from emulator import build

    absence = build.absence()
    if absence is not None:
        raise FileNotFoundError(absence)


def _mpiexec() -> str:
    """The launcher of the MPI beside this Python, else of the system's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=path)
    if found is None:
        raise FileNotFoundError("no mpiexec beside this Python or on PATH")
    return found
