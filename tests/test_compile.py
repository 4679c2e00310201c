"""Every kernel compiles for every architecture, and the layout twins agree. Needs NVRTC, no GPU."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from nvrtc_here import require_nvrtc

from ep_rt import reference
from ep_rt.cuda import jit, kernels
from ep_rt.cuda.kernel_spec import KernelSpec
from ep_rt.errors import CompileError

ARCHITECTURES = ("sm_80", "sm_90", "sm_90a", "sm_100", "sm_100a")


@pytest.fixture(autouse=True, scope="module")
def nvrtc() -> tuple[int, int]:
    return require_nvrtc()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", kernels.all_specs(), ids=lambda spec: spec.name)
def test_compiles(spec: KernelSpec, architecture: str, nvrtc: tuple[int, int]) -> None:
    if architecture.startswith("sm_100") and nvrtc < (12, 8):
        pytest.skip("NVRTC knows Blackwell from 12.8 on")
    image = jit.compile_cubin(jit.render(spec), architecture)
    assert image.startswith(b"\x7fELF")
    assert spec.name.encode() in image


def test_cuda_headers_are_found_without_a_toolkit() -> None:
    text = """
        #include <cuda_bf16.h>
        #include <cuda_fp8.h>
        extern "C" __global__ void convert(const __nv_bfloat16* x, __nv_fp8_e4m3* y) {
            y[threadIdx.x] = __nv_fp8_e4m3(x[threadIdx.x]);
        }
    """
    assert jit.include_dirs()
    image = jit.compile_cubin(jit.Source(name="convert.cu", text=text, headers={}), "sm_90a")
    assert image.startswith(b"\x7fELF")


def test_compile_error_has_the_log() -> None:
    source = jit.Source(name="broken.cu", text="__global__ void f() { undeclared(); }", headers={})
    with pytest.raises(CompileError, match='identifier "undeclared" is undefined') as caught:
        jit.compile_cubin(source, "sm_90a")
    assert caught.value.kernel == "broken"
    assert caught.value.source == source.text
    assert "--gpu-architecture=sm_90a" in caught.value.options


def test_unknown_architecture_is_a_compile_error() -> None:
    with pytest.raises(CompileError, match="sm_1"):
        jit.compile_cubin(jit.render(kernels.barrier(2)), "sm_1")


def test_a_field_in_another_place_does_not_compile() -> None:
    spec = kernels.barrier(8)
    swapped = {"hang": "timeout_ns", "timeout_ns": "hang"}
    fields = [(swapped.get(name, name), spec.args[name]) for name in spec.args.names or ()]
    other = KernelSpec(
        source=spec.source, function=spec.function, cfg=spec.cfg, args=np.dtype(fields, align=True)
    )
    with pytest.raises(CompileError, match="static assertion failed") as caught:
        jit.compile_cubin(jit.render(other), "sm_90a")
    assert len(re.findall("static assertion failed", caught.value.log)) == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("uint64_t epoch;   //", "uint64_t between, epoch;   //"),
        ("kGaveUp = 0xffff", "kGaveUp = 0xfffe"),
        ("constexpr int kMaxRanks = 128;", "constexpr int kMaxRanks = 64;"),
        ("kCombine = 3", "kCombine = 4"),
        ("kDisagreed = 3", "kDisagreed = 5"),
        ("constexpr int kOffsetUnit = 256;", "constexpr int kOffsetUnit = 512;"),
        ("uint64_t offset, capacity;", "uint64_t capacity, offset;"),
        ("uint64_t offset, weights_offset;", "uint64_t weights_offset, offset;"),
        ("int32_t num_recv_tokens;", "int64_t num_recv_tokens;"),
        ("int32_t base[kMaxLocalRanks], limit", "int32_t limit[kMaxLocalRanks], base"),
        ("int32_t segment_base[kMaxNodes]", "int32_t segment_base[kMaxNodes + 1]"),
        ("int32_t num, own;", "int32_t own, num;"),
        ("uint64_t segment_counts[2]", "uint64_t segment_counts[3]"),
        ("uint64_t arrived[2];", "uint64_t arrived[3];"),
        ("at.x + capacity * row_bytes, kOffsetUnit", "at.x + capacity * row_bytes, kOffsetUnit / 2"),
    ],
)
def test_a_change_of_one_layout_twin_does_not_compile(before: str, after: str) -> None:
    source = jit.render(kernels.barrier(2))
    assert before in source.headers["layout.cuh"]
    headers = {**source.headers, "layout.cuh": source.headers["layout.cuh"].replace(before, after)}
    with pytest.raises(CompileError, match="static assertion failed"):
        jit.compile_cubin(jit.Source(name=source.name, text=source.text, headers=headers), "sm_90a")


def test_e4m3_without_an_instruction_is_that_of_the_reference() -> None:
    """Every e4m3 value, the middles between them, and the neighbours of all those; the compiler evaluates."""
    values = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (values[1:] + values[:-1]) / 2
    exact = np.concatenate([values, middles]).view(np.uint32)
    others = np.array([0x00000001, 0x007FFFFF, 0x43E00001, 0x7F800001, 0x7FFFFFFF], np.uint32)
    bits = np.concatenate([exact, exact[1:] - 1, exact + 1, others])
    bits = np.concatenate([bits, bits | np.uint32(0x80000000)])
    # Beside 448 the scale of a block is 1.
    blocks = np.full((len(bits), 128), 448, np.float32)
    blocks[:, 0] = bits.view(np.float32)
    q, _ = reference.quantize_fp8(blocks)
    is_scaled_by_one = ~(np.abs(blocks[:, 0]) > 448)
    text = f"""
        #include "fp8.cuh"
        constexpr unsigned bits[] = {{{_listed(bits[is_scaled_by_one])}}};
        constexpr unsigned q[] = {{{_listed(q.view(np.uint8)[is_scaled_by_one, 0])}}};
        __host__ __device__ constexpr int num_wrong() {{
            int num = 0;
            for (int i = 0; i < sizeof(bits) / sizeof(bits[0]); ++i)
                num += ep::fp8::e4m3_of(bits[i]) != q[i];
            return num;
        }}
        static_assert(num_wrong() == 0);
        static_assert(ep::fp8::e4m3_of(0x43e00001) == 0x7e && ep::fp8::e4m3_of(0xff800000) == 0xfe);
    """
    headers = jit.render(kernels.intranode_dispatch(quantizes=True)).headers
    jit.compile_cubin(jit.Source(name="e4m3.cu", text=text, headers=headers), "sm_80")
    wrong = text.replace("num_wrong() == 0", "num_wrong() == 1")
    with pytest.raises(CompileError, match="static assertion failed"):
        jit.compile_cubin(jit.Source(name="e4m3.cu", text=wrong, headers=headers), "sm_80")


def _listed(numbers: np.ndarray[Any, Any]) -> str:
    return ", ".join(str(number) for number in numbers.tolist())
