"""The transport for NVSHMEM in GPU tests: it compiles, and refuses what it does not know."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "gpu"))
import loopback

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@needs_compiler
@pytest.mark.parametrize("version", [20700, 40000])
def test_other_interfaces_are_refused(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EP_RT_CACHE_DIR", str(tmp_path))
    path = loopback.build()
    assert loopback.build() == path
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    plugin = ctypes.c_void_p()
    start = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL).nvshmemt_init
    assert start(ctypes.byref(plugin), None, version) == 3
    assert not plugin
    assert f"version {version}" in capfd.readouterr().err
