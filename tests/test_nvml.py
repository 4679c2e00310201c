"""What is made of NVML's answers, without NVML."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from ep_rt.cuda import nvml
from ep_rt.cuda.nvml import NO_P2P, NVLINK, PCIE, links, without_nvlink, without_p2p

A, B, C = "0000:18:00.0", "0000:2a:00.0", "10000:b3:00.0"
OK, NOT_SUPPORTED, UNKNOWN = 0, 5, 6
ERROR = 999
READ, WRITE, OVER_NVLINK = 0, 1, 2


class FakeNvml:
    """Stands for the library.

    Attributes:
        status: what it says of a capability of two GPUs, the same both ways; else that it is not supported.
        lost: GPUs that it cannot ask.
    """

    def __init__(self, status: dict[tuple[str, str, int], int], lost: tuple[str, ...] = ()) -> None:
        self.status = status
        self.lost = lost
        self.num_open = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802 (NVML's names)
        self.num_open += 1
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.num_open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:  # noqa: N802
        device._obj.value = index.value + 1
        return ERROR if (A, B, C)[index.value] in self.lost else 0

    def nvmlDeviceGetPciInfo_v3(self, device: Any, pci: Any) -> int:  # noqa: N802
        domain, bus, _ = (A, B, C)[device.value - 1].split(":")
        pci._obj.domain, pci._obj.bus, pci._obj.device = int(domain, 16), int(bus, 16), 0
        return 0

    def nvmlDeviceGetP2PStatus(self, one: Any, two: Any, capability: Any, status: Any) -> int:  # noqa: N802
        first, second = sorted((one.value, two.value))
        key = ((A, B, C)[first - 1], (A, B, C)[second - 1], capability.value)
        status._obj.value = self.status.get(key, NOT_SUPPORTED)
        return ERROR if status._obj.value == ERROR else 0


def use(monkeypatch: pytest.MonkeyPatch, library: FakeNvml | None) -> None:
    monkeypatch.setattr(nvml, "_load", lambda: library)


def test_kinds_of_links(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml(
        {
            (A, B, OVER_NVLINK): OK,
            (A, C, READ): OK,
            (A, C, WRITE): OK,
            (B, C, WRITE): OK,
        }
    )
    use(monkeypatch, library)
    found = links()
    assert found == {
        **{(A, B): NVLINK, (B, A): NVLINK},
        **{(A, C): PCIE, (C, A): PCIE},
        **{(B, C): NO_P2P, (C, B): NO_P2P},
    }
    assert library.num_open == 0
    assert without_nvlink(found, A) == {C}
    assert without_p2p(found, A) == set()
    assert without_nvlink(found, C) == {A, B}
    assert without_p2p(found, C) == {B}
    assert without_nvlink(found, "elsewhere") == set()


@pytest.mark.parametrize("answer", [UNKNOWN, ERROR])
def test_what_is_not_known_is_left_out(monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    use(monkeypatch, FakeNvml({(A, B, OVER_NVLINK): answer, (A, C, READ): answer, (A, C, WRITE): OK}))
    assert links() == {(A, C): PCIE, (C, A): PCIE, (B, C): NO_P2P, (C, B): NO_P2P}


def test_gpus_that_cannot_be_asked_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml({(A, B, OVER_NVLINK): OK}, lost=(C,)))
    assert set(links()) == {(A, B), (B, A)}


def test_without_nvml_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", absent)
        assert links() == {}
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: object())
        assert links() == {}
    library = FakeNvml({})
    monkeypatch.setattr(library, "nvmlInit_v2", lambda: ERROR)
    use(monkeypatch, library)
    assert links() == {}


def test_addresses_are_those_of_cuda() -> None:
    assert nvml.address("0000:2A:00.0") == B
