"""What a user gets from ``pip install``: every module, the kernels, the type marker and the licence."""

from __future__ import annotations

import email.parser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ep_rt

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that leftovers of earlier builds in the checkout cannot get into it."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    for name in ("ep_rt", "kernels_cu", "tests", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    built = subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def contents(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.parser.Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    wanted = {
        str(path.relative_to(ROOT))
        for package in ("ep_rt", "kernels_cu")
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".cu", ".cuh"} or path.name == "py.typed"
    }
    assert contents(wheel) == wanted


def test_wheel_holds_the_kernels_and_the_type_marker(wheel: zipfile.ZipFile) -> None:
    assert {"kernels_cu/barrier.cu", "kernels_cu/base.cuh", "ep_rt/py.typed"} <= contents(wheel)


def test_wheel_is_for_any_machine(wheel: zipfile.ZipFile) -> None:
    assert str(wheel.filename).endswith("-py3-none-any.whl")


def test_metadata(wheel: zipfile.ZipFile) -> None:
    found = metadata(wheel)
    assert found["Name"] == "ep-rt"
    assert found["Version"] == ep_rt.__version__
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "MIT"
    assert found["License-File"] == "LICENSE"
    extras = set(found.get_all("Provides-Extra") or [])
    assert extras >= {"cuda12", "cuda13", "mpi", "examples", "test", "dev"}


def test_numpy_and_ml_dtypes_are_all_it_needs(wheel: zipfile.ZipFile) -> None:
    always = [line for line in metadata(wheel).get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in always) == ["ml_dtypes", "numpy"]


def test_installed_wheel_imports_and_finds_its_kernels(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import ep_rt, kernels_cu; from importlib.resources import files; "
        "print(ep_rt.__file__, (files(kernels_cu) / 'barrier.cu').is_file())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ran.stdout.split() == [str(tmp_path / "ep_rt/__init__.py"), "True"]
