"""Which backend "auto" means."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import ep_rt
from ep_rt import Buffer, backend
from ep_rt.backend import GpuPlace
from ep_rt.cuda.layout import MAX_LOCAL_RANKS

ONE, TWO = GpuPlace("here", "0000:18:00.0"), GpuPlace("here", "0000:2a:00.0")
ELSEWHERE = GpuPlace("there", "0000:18:00.0")
EIGHT = [GpuPlace("here", f"0000:{number:02x}:00.0") for number in range(8)]


@pytest.mark.parametrize("places", [[ONE], [ONE, TWO], EIGHT])
def test_ranks_with_a_gpu_each_use_them(places: Sequence[GpuPlace]) -> None:
    assert backend.MAX_CUDA_RANKS == MAX_LOCAL_RANKS
    assert backend.choose(places, num_nodes=1) == "cuda"


@pytest.mark.parametrize(
    ("places", "num_nodes", "reason"),
    [
        ([ONE, None], 1, "1 of 2 ranks have no GPU"),
        ([None], 1, "1 of 1 ranks"),
        ([ONE, TWO, ONE], 1, "the same GPU"),
        ([ONE, ELSEWHERE], 2, "2 ranks on 2 nodes"),
        ([ONE, TWO], 2, "2 nodes"),
        ([*EIGHT, ELSEWHERE], 1, "9 ranks"),
    ],
)
def test_others_compute_on_the_host(
    places: Sequence[GpuPlace | None], num_nodes: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "ep_rt"):
        assert backend.choose(places, num_nodes=num_nodes) == "host"
    assert reason in caplog.text


def test_one_rank_without_a_gpu_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter([ONE, None, TWO])
    monkeypatch.delenv("EP_RT_BACKEND", raising=False)
    monkeypatch.setattr(backend, "gpu_place", lambda: next(places))

    def run(group: ep_rt.Group) -> str:
        with Buffer(group) as buffer:
            return buffer.backend

    assert ep_rt.run_local(run, 3, timeout_s=10) == ["host"] * 3
