"""Kernels that use NVSHMEM link for every architecture. Needs NVRTC, nvJitLink and NVSHMEM, and no GPU."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from nvrtc_here import require_nvrtc, require_nvshmem

from ep_rt.cuda import jit, kernels, linker
from ep_rt.cuda.kernel_spec import KernelSpec
from ep_rt.cuda.nvshmem_files import NvshmemFiles
from ep_rt.errors import CompileError

ARCHITECTURES = ("sm_80", "sm_90", "sm_90a", "sm_100a", "sm_103a", "sm_120a")
# What the driver defines when it loads a cubin.
OF_THE_DRIVER = ("vprintf", "__assertfail", "malloc", "free", "__cuda_syscall")
_SYMBOL_TABLE = 2
_SYMBOL_BYTES = 24


def symbols(image: bytes) -> dict[str, bool]:
    """Names in the symbol table of a cubin, which is an ELF file, and whether each is defined there."""
    (sections_at,) = struct.unpack_from("<Q", image, 0x28)
    entry_bytes, num_sections = struct.unpack_from("<HH", image, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", image, sections_at + number * entry_bytes)
        for number in range(num_sections)
    ]
    found = {}
    for _, kind, _, _, start, num_bytes, link, *_ in sections:
        if kind == _SYMBOL_TABLE:
            names_at = sections[link][4]
            for at in range(start, start + num_bytes, _SYMBOL_BYTES):
                name_at, _, _, section = struct.unpack_from("<IBBH", image, at)
                begin = names_at + name_at
                found[image[begin : image.index(b"\0", begin)].decode()] = section != 0
    return found


@pytest.fixture(scope="module")
def nvshmem() -> NvshmemFiles:
    return require_nvshmem()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", kernels.network_specs(), ids=lambda spec: spec.name)
def test_links(spec: KernelSpec, architecture: str, nvshmem: NvshmemFiles, cache: Path) -> None:
    if architecture.startswith("sm_1") and require_nvrtc()[0] == 12:
        pytest.skip("NVSHMEM for CUDA 12 has PTX alone for Blackwell: see the next test")
    check(jit.cubin(spec, architecture, cache_dir=cache), spec)


@pytest.mark.timeout(1200)  # the linker compiles the whole device library
def test_links_for_blackwell_with_cuda_12(nvshmem: NvshmemFiles, cache: Path) -> None:
    if require_nvrtc()[0] != 12 or require_nvrtc() < (12, 8):
        pytest.skip("for CUDA 12.8 and 12.9")
    spec = kernels.nvshmem_ping("warp")
    check(jit.cubin(spec, "sm_100a", cache_dir=cache), spec)


def check(path: Path, spec: KernelSpec) -> None:
    """Nothing is missing, and NVSHMEM will find the state that it fills when it initialises the module."""
    found = symbols(path.read_bytes())
    missing = [name for name, is_defined in found.items() if name and not is_defined]
    assert [name for name in missing if not name.startswith((".", *OF_THE_DRIVER))] == []
    assert found[spec.name]
    assert found["nvshmemi_device_state_d"]
    assert found["nvshmemi_device_lib_version_d"]


def test_what_nobody_defines_is_an_error_with_the_name(nvshmem: NvshmemFiles) -> None:
    text = 'extern "C" __device__ void absent();\nextern "C" __global__ void f() { absent(); }'
    image = jit.compile_ltoir(jit.Source(name="lonely.cu", text=text, headers={}), "sm_90a")
    with pytest.raises(CompileError, match="absent") as caught:
        linker.link("lonely", {"lonely": image}, nvshmem.device_library, "sm_90a")
    assert caught.value.kernel == "lonely"
    assert "-arch=sm_90a" in caught.value.options


def test_garbage_and_unknown_architectures_are_errors(nvshmem: NvshmemFiles) -> None:
    with pytest.raises(CompileError):
        linker.link("garbage", {"garbage": b"no code"}, nvshmem.device_library, "sm_90a")
    with pytest.raises(CompileError, match="sm_1"):
        jit.cubin(kernels.nvshmem_ping("warp"), "sm_1")


def test_kernels_share_the_bridge(nvshmem: NvshmemFiles, tmp_path: Path) -> None:
    for scope in kernels.SCOPES:
        jit.cubin(kernels.nvshmem_ping(scope), "sm_90a", cache_dir=tmp_path)
    names = sorted(path.suffix for path in (tmp_path / "kernels").iterdir())
    assert names == [".cubin"] * 3 + [".ltoir"]
