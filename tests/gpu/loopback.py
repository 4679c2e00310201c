"""A network for NVSHMEM on a host without one, by ``EP_RT_TEST_TRANSPORT=loopback``; see loopback.cpp."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ep_rt.config import settings

SOURCE = Path(__file__).with_suffix(".cpp")
IS_ASKED_FOR = os.environ.get("EP_RT_TEST_TRANSPORT") == "loopback"
_FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
# By this name NVSHMEM finds what is loaded already. Symmetric memory must be such that CUDA IPC takes it.
_NAME = "nvshmem_transport_ucx.so.3"
_ENVIRONMENT = {
    "NVSHMEM_REMOTE_TRANSPORT": "ucx",
    "NVSHMEM_DISABLE_P2P": "1",
    "NVSHMEM_DISABLE_CUDA_VMM": "1",
}


def build() -> Path:
    """The transport, compiled once; several processes may ask at the same time."""
    key = hashlib.sha256(" ".join([*_FLAGS, SOURCE.read_text()]).encode()).hexdigest()[:16]
    path = settings().cache_dir / f"loopback-{key}" / _NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / _NAME
            command = ["g++", *_FLAGS, f"-Wl,-soname,{_NAME}", "-o", str(made), str(SOURCE), "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made.replace(path)
    return path


def load_if_asked() -> None:
    """Have NVSHMEM, when it starts in this process, reach all peers over it alone."""
    if not IS_ASKED_FOR:
        return
    if shutil.which("g++") is None:
        pytest.skip("the transport needs g++")
    os.environ.update(_ENVIRONMENT)
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
