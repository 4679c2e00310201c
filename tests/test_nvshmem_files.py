"""Which NVSHMEM is found, and what is said of one that cannot work. Nothing of it is loaded."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ep_rt.cuda import nvshmem_files
from ep_rt.errors import BackendError

HEADER = """
#define NVSHMEM_VENDOR_MAJOR_VERSION {}
#define NVSHMEM_VENDOR_MINOR_VERSION {}
#define NVSHMEM_VENDOR_PATCH_VERSION {}
"""


def install(root: Path, version: tuple[int, int, int] = (3, 4, 5)) -> Path:
    """What a wheel, or a build of NVSHMEM, puts into its directory."""
    (root / "include" / "non_abi").mkdir(parents=True)
    (root / "include" / "non_abi" / "nvshmem_version.h").write_text(HEADER.format(*version))
    (root / "lib").mkdir()
    for name in ("libnvshmem_device.a", "libnvshmem_host.so.3"):
        (root / "lib" / name).write_bytes(b"")
    return root


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty environment; names put into the list are installed wheels, whose files are in `tmp_path`."""
    installed: list[str] = []

    def distribution(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return name

    monkeypatch.delenv("NVSHMEM_HOME", raising=False)
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(nvshmem_files, "_package_dirs", lambda name: [tmp_path / name])
    return installed


def test_the_wheel_is_found(wheels: list[str], tmp_path: Path) -> None:
    wheels.append("nvidia-nvshmem-cu13")
    found = nvshmem_files.NvshmemFiles(
        root=install(tmp_path / "nvidia" / "nvshmem", (3, 8, 0)), version=(3, 8, 0), cuda_major=13
    )
    assert nvshmem_files.find() == found
    assert found.version_text == "3.8.0"
    found.require_cuda(13)
    with pytest.raises(BackendError, match="for CUDA 13, but NVRTC is of CUDA 12"):
        found.require_cuda(12)


def test_another_installation_may_be_named(
    wheels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels.append("nvidia-nvshmem-cu13")
    install(tmp_path / "nvidia" / "nvshmem")
    monkeypatch.setenv("NVSHMEM_HOME", str(install(tmp_path / "other", (3, 6, 5))))
    found = nvshmem_files.find()
    assert (found.root, found.version, found.cuda_major) == (tmp_path / "other", (3, 6, 5), None)
    found.require_cuda(12)


def test_identity_is_of_version_and_content(tmp_path: Path) -> None:
    files = nvshmem_files.NvshmemFiles(root=install(tmp_path), version=(3, 4, 5), cuda_major=13)
    first = files.identity()
    files.device_library.write_bytes(b"built again")
    assert files.identity() != first
    assert first.startswith("NVSHMEM 3.4.5 ")


def test_none_is_an_error_that_says_what_to_install(wheels: list[str]) -> None:
    with pytest.raises(BackendError, match=r"not installed; install ep-rt\[cuda12\]"):
        nvshmem_files.find()


def test_wheels_of_two_generations_overwrite_each_other(wheels: list[str], tmp_path: Path) -> None:
    wheels += ["nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13"]
    install(tmp_path / "nvidia" / "nvshmem")
    with pytest.raises(BackendError, match="have overwritten each other: uninstall both"):
        nvshmem_files.find()


@pytest.mark.parametrize("name", ["lib/libnvshmem_device.a", "include/non_abi/nvshmem_version.h"])
def test_an_incomplete_one_is_an_error(wheels: list[str], tmp_path: Path, name: str) -> None:
    (install(tmp_path / "nvidia" / "nvshmem") / name).unlink()
    with pytest.raises(BackendError, match=f"not complete.*{Path(name).name}"):
        nvshmem_files.find()


def test_an_old_one_is_an_error(wheels: list[str], tmp_path: Path) -> None:
    install(tmp_path / "nvidia" / "nvshmem", (3, 2, 5))
    with pytest.raises(BackendError, match=r"3\.2\.5 .* is older than 3\.3\.0"):
        nvshmem_files.find()


def test_architectures_that_can_be_linked(caplog: pytest.LogCaptureFixture) -> None:
    of_13 = {
        "sm_80": "sm_80",
        "sm_86": "sm_80",
        "sm_89": "sm_89",
        "sm_90a": "sm_90a",
        "sm_100a": "sm_100a",
        "sm_103a": "sm_100",
        "sm_121a": "sm_120",
    }
    assert {name: nvshmem_files.link_architecture(name, 13) for name in of_13} == of_13
    assert nvshmem_files.link_architecture("sm_103a", 14) == "sm_100"
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, logger="ep_rt"):
        assert nvshmem_files.link_architecture("sm_100a", 12) == "sm_100a"
    assert "linking takes minutes" in caplog.text


def test_a_program_of_one_domain_never_touches_nvshmem() -> None:
    """Neither its import nor its search: a module that is imported by mistake would be found out here."""
    program = (
        "import importlib.abc, sys\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        assert name.partition('.')[0] not in ('nvshmem', 'nvidia'), name\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import numpy as np, ep_rt\n"
        "from ep_rt.cuda import engine\n"
        "def layer(group):\n"
        "    with ep_rt.Buffer(group) as buffer:\n"
        "        ids = np.full((4, 2), group.rank)\n"
        "        out = buffer.dispatch(np.ones((4, 8), np.float32), topk_idx=ids, num_experts=2)\n"
        "        buffer.combine(out.recv_x, out.handle)\n"
        "ep_rt.run_local(layer, 2)\n"
        "print([name for name in sys.modules if name.endswith('nvshmem') or 'nvshmem_host' in name])\n"
        "print(any('nvshmem' in line for line in open('/proc/self/maps')))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.split("\n")[:2] == ["[]", "False"], ran.stdout + ran.stderr
