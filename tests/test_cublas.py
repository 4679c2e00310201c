"""Products that leave SMs: what cuBLAS is told, with a library and frameworks that only note it."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ep_rt import ConfigError, DeviceError, leaving_sms

NUM_SMS = 132
HANDLES = {"torch": 7, "cupy": 8}


class Cublas:
    """Of one handle."""

    def __init__(self, handle: int) -> None:
        self.handle, self.target, self.status = handle, 0, 0
        self.cublasGetSmCountTarget, self.cublasSetSmCountTarget = self._get, self._set

    def _get(self, handle: ctypes.c_void_p, target: Any) -> int:
        assert handle.value == self.handle
        target._obj.value = self.target
        return 0

    def _set(self, handle: ctypes.c_void_p, target: ctypes.c_int) -> int:
        assert handle.value == self.handle
        if not self.status:
            self.target = target.value
        return self.status


def torch_with(*, has_gpu: bool = True) -> Any:
    cuda = SimpleNamespace(
        is_available=lambda: has_gpu,
        current_blas_handle=lambda: HANDLES["torch"],
        get_device_properties=lambda: SimpleNamespace(multi_processor_count=NUM_SMS),
    )
    return SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8"))


def cupy_with() -> Any:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device=SimpleNamespace(get_cublas_handle=lambda: HANDLES["cupy"]),
        Device=lambda: SimpleNamespace(attributes={"MultiProcessorCount": NUM_SMS}),
        runtime=SimpleNamespace(runtimeGetVersion=lambda: 12080),
    )
    return SimpleNamespace(cuda=cuda)


@pytest.fixture(params=["torch", "cupy"])
def framework(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    monkeypatch.setitem(sys.modules, name, torch_with() if name == "torch" else cupy_with())
    return name


@pytest.fixture
def cublas(framework: str, monkeypatch: pytest.MonkeyPatch) -> Cublas:
    library = Cublas(HANDLES[framework])

    def load(name: str) -> Cublas:
        assert name == "libcublas.so.12"
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    return library


def test_products_in_the_body_leave_sms(framework: str, cublas: Cublas) -> None:
    with leaving_sms(16, framework=framework):
        assert cublas.target == NUM_SMS - 16
        with leaving_sms(NUM_SMS - 1, framework=framework):
            assert cublas.target == 1
        with leaving_sms(0, framework=framework):
            assert cublas.target == NUM_SMS
        assert cublas.target == NUM_SMS - 16
    assert cublas.target == 0


def test_an_error_in_the_body_ends_it(framework: str, cublas: Cublas) -> None:
    cublas.target = 100
    with pytest.raises(ZeroDivisionError), leaving_sms(16, framework=framework):
        raise ZeroDivisionError
    assert cublas.target == 100


@pytest.mark.parametrize("num_sms", [-1, NUM_SMS, NUM_SMS + 1])
def test_a_product_keeps_an_sm(framework: str, cublas: Cublas, num_sms: int) -> None:
    with (
        pytest.raises(ConfigError, match=f"{num_sms} of {NUM_SMS}"),
        leaving_sms(num_sms, framework=framework),
    ):
        raise AssertionError
    assert cublas.target == 0


def test_cublas_refuses(framework: str, cublas: Cublas) -> None:
    cublas.status = 7
    with (
        pytest.raises(DeviceError, match="cublasSetSmCountTarget answered 7"),
        leaving_sms(16, framework=framework),
    ):
        raise AssertionError


def test_other_frameworks_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "torch", torch_with(has_gpu=False))
    for framework, problem in (
        ("jax", "'torch' and 'cupy'"),
        ("cupy", "cupy is not installed"),
        ("torch", "no GPU for torch"),
    ):
        with pytest.raises(ConfigError, match=problem), leaving_sms(1, framework=framework):
            raise AssertionError
