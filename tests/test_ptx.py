"""What stands in `ptx.cuh`: the emulated twins trust the names, so the names must tell the truth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "kernels_cu"
WRAPPER = re.compile(r"__device__ __forceinline__ \S+ (\w+)\(([^)]*)\) \{\n(.*?)\n\}", re.DOTALL)
WRAPPERS = {name: body for name, _, body in WRAPPER.findall((SOURCES / "ptx.cuh").read_text())}

INSTRUCTIONS = {
    "ld_acquire_sys": "ld.acquire.sys.global.u64",
    "st_release_sys": "st.release.sys.global.u64",
    "st_relaxed_sys": "st.relaxed.sys.global.u64",
    "globaltimer_ns": "mov.u64",
}


def test_every_wrapper_is_listed() -> None:
    assert set(WRAPPERS) == set(INSTRUCTIONS)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_wrapper_is_one_instruction_that_clobbers_memory(name: str) -> None:
    statements = re.findall(r"asm volatile\((.*?)\);", WRAPPERS[name], re.DOTALL)
    assert len(statements) == 1
    assert re.match(r'"(\S+) ', statements[0])[1] == INSTRUCTIONS[name]  # type: ignore[index]
    assert statements[0].count(";") == 1
    assert statements[0].rstrip().endswith(': "memory"') or statements[0].endswith('::"memory"')


def test_inline_assembly_lives_in_one_file() -> None:
    with_assembly = [path.name for path in SOURCES.glob("*.cu*") if re.search(r"\basm\b", path.read_text())]
    assert with_assembly == ["ptx.cuh"]


def test_nothing_traps_and_nothing_polls_by_volatile() -> None:
    for path in SOURCES.glob("*.cu*"):
        code = re.sub(r"asm volatile|//.*", "", path.read_text())
        assert not re.search(r"__trap|\bassert\(|\bvolatile\b", code), path.name
