"""The shim says what CUDA says: every function of ptx.cuh has a twin, and conversions are bit-exact."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from . import build
from .support import needs_emulator

SIGNATURE = re.compile(r"^(?:template <[^>]*>\n)?__device__ __forceinline__ [^{]*\{", re.MULTILINE)


def signatures(path: Path) -> list[str]:
    """Of all functions of a header, without the spaces that formatting may change."""
    return [" ".join(found.split()) for found in SIGNATURE.findall(path.read_text())]


def test_every_function_of_ptx_has_a_twin_of_the_same_signature() -> None:
    real, emulated = (signatures(folder / "ptx.cuh") for folder in (build.KERNELS_CU, build.SHIM))
    assert real == emulated
    assert len(real) >= 30


def test_every_function_of_network_has_a_twin_of_the_same_signature() -> None:
    real = re.findall(r"^__device__ (\w+ \w+\(.*?\));", _text(build.KERNELS_CU), re.DOTALL | re.MULTILINE)
    twins = re.findall(r"^__device__ inline (\w+ \w+\(.*?\)) \{", _text(build.SHIM), re.DOTALL | re.MULTILINE)
    assert [" ".join(each.split()) for each in real] == [" ".join(each.split()) for each in twins]
    assert len(real) >= 5


def _text(folder: Path) -> str:
    return (folder / "network.cuh").read_text()


def test_twins_are_guarded_alike() -> None:
    guard = re.compile(r"^#(?:if|ifdef|endif|define EP_).*$", re.MULTILINE)
    real, emulated = (
        guard.findall((folder / "ptx.cuh").read_text()) for folder in (build.KERNELS_CU, build.SHIM)
    )
    assert real == emulated


def test_the_emulator_is_not_in_the_kernels() -> None:
    for path in build.KERNELS_CU.glob("*.cu*"):
        assert not re.search(r"emu(?:lat|::|_)", path.read_text(), re.IGNORECASE), path.name


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """numbers.h, and what a kernel decodes by arithmetic, as functions that ctypes can call."""
    folder = tmp_path_factory.mktemp("numbers")
    text = """
        #include "cuda.h"
        #include "fp8.cuh"
        #include "numbers.h"
        extern "C" float f32_of_e4m3(unsigned v) { return ep::fp8::value_of(v); }
        extern "C" unsigned f16_of(float v) { return emu::f16_of(v); }
        extern "C" unsigned bf16_of(float v) { return emu::bf16_of(v); }
        extern "C" unsigned e4m3_of(float v) { return emu::e4m3_of(v); }
        extern "C" float f32_of_f16(unsigned short v) { return emu::f32_of_f16(v); }
    """
    (folder / "numbers.cpp").write_text(text)
    library = folder / "numbers.so"
    command: list[str | Path] = [
        "g++",
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        f"-I{build.SHIM}",
        f"-I{build.KERNELS_CU}",
        "-o",
        library,
    ]
    subprocess.run([*command, folder / "numbers.cpp"], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("f16_of", "bf16_of", "e4m3_of"):
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = [ctypes.c_float], ctypes.c_uint
    loaded.f32_of_f16.argtypes, loaded.f32_of_f16.restype = [ctypes.c_ushort], ctypes.c_float
    loaded.f32_of_e4m3.argtypes, loaded.f32_of_e4m3.restype = [ctypes.c_uint], ctypes.c_float
    return loaded


def _values() -> np.ndarray[Any, Any]:
    """Every exponent with mantissas around the middles, of both signs."""
    exponents = np.arange(0, 255, dtype=np.uint32)[:, None] << 23
    tops = np.arange(0, 1 << 12, 37, dtype=np.uint32) << 11
    mantissas = np.concatenate([tops, tops + 1, tops | 0x7FF, tops | 0x400]) & 0x7FFFFF
    bits = (exponents | mantissas[None]).reshape(-1)[::7]
    return np.concatenate([bits, bits | 0x80000000]).view(np.float32)


@needs_emulator
@pytest.mark.parametrize(
    ("name", "dtype"), [("f16_of", np.float16), ("bf16_of", ml_dtypes.bfloat16)], ids=["f16", "bf16"]
)
def test_rounding_to_16_bits(conversions: Any, name: str, dtype: Any) -> None:
    values = _values()
    convert: Callable[[float], int] = getattr(conversions, name)
    with np.errstate(over="ignore"):
        expected = values.astype(dtype).view(np.uint16)
    got = np.array([convert(float(value)) for value in values], np.uint16)
    assert np.array_equal(got, expected)


@needs_emulator
def test_rounding_to_8_bits_saturates(conversions: Any) -> None:
    values = _values()
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    got = np.array([conversions.e4m3_of(float(value)) for value in values], np.uint8)
    assert np.array_equal(got, expected)
    assert conversions.e4m3_of(float("nan")) == 0x7F


@needs_emulator
@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [("f32_of_f16", np.uint16, np.float16), ("f32_of_e4m3", np.uint8, ml_dtypes.float8_e4m3fn)],
    ids=["f16", "e4m3"],
)
def test_widening_is_exact(conversions: Any, name: str, bits: Any, dtype: Any) -> None:
    every = np.arange(np.iinfo(bits).max + 1).astype(bits)
    expected = every.view(dtype).astype(np.float32)
    convert: Callable[[int], float] = getattr(conversions, name)
    got = np.array([convert(int(each)) for each in every], np.float32)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(expected))
