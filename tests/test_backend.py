"""Which backend "auto" means."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace

import pytest

import ep_rt
from ep_rt import Buffer, backend
from ep_rt import buffer as buffer_module
from ep_rt.cuda import nvml, nvshmem_files
from ep_rt.cuda.layout import MAX_LOCAL_RANKS
from ep_rt.topology import GpuPlace, Topology

EIGHT = [GpuPlace("here", number, f"0000:{number:02x}:00.0", has_nvshmem=True) for number in range(8)]
ONE, TWO = EIGHT[:2]
ELSEWHERE = ONE._replace(host="there")


def on_nodes(*node_of_rank: int, lacks_nvlink: bool = False) -> Topology:
    return Topology(rank=0, node_of_rank=node_of_rank, lacks_nvlink=lacks_nvlink)


@pytest.mark.parametrize("places", [[ONE], [ONE, TWO], EIGHT])
def test_ranks_with_a_gpu_each_use_them(places: Sequence[GpuPlace]) -> None:
    assert backend.MAX_CUDA_RANKS == MAX_LOCAL_RANKS
    assert backend.choose(places, on_nodes(*[0] * len(places))) == "cuda"


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_several_nodes_of_one_host_use_them_with_nvshmem(ranks_per_node: int) -> None:
    nodes = on_nodes(*[rank // ranks_per_node for rank in range(8)], lacks_nvlink=True)
    assert backend.choose(EIGHT, nodes) == "cuda"


@pytest.mark.parametrize(
    ("places", "nodes", "reason"),
    [
        ([ONE, None], [0, 0], "1 of 2 ranks have no GPU"),
        ([None], [0], "1 of 1 ranks"),
        ([ONE, TWO, ONE], [0, 0, 0], "the same GPU"),
        ([ONE, TWO, ONE], [0, 1, 2], "the same GPU"),
        ([ONE, ELSEWHERE], [0, 1], "2 ranks on several hosts"),
        ([*EIGHT, EIGHT[0]._replace(bus_id="9")], [0] * 9, "9 ranks on one node"),
        ([ONE, TWO, EIGHT[2]], [0, 0, 1], "same number of ranks on every node"),
        ([ONE, TWO._replace(process=ONE.process)], [0, 1], "a process for each rank: 2 ranks on 2 nodes"),
        ([ONE, TWO._replace(has_nvshmem=False)], [0, 1], "NVSHMEM is not installed for rank 1"),
        (
            [ONE, TWO._replace(without_p2p=frozenset({ONE.bus_id}))],
            [0, 1],
            "GPUs of ranks 1 and 0 have no P2P",
        ),
    ],
)
def test_others_compute_on_the_host(
    places: Sequence[GpuPlace | None], nodes: list[int], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "ep_rt"):
        assert backend.choose(places, on_nodes(*nodes)) == "host"
    assert reason in caplog.text


def test_gpus_that_are_not_used_for_lack_of_nvlink_are_a_warning_with_a_way_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = on_nodes(0, 1, lacks_nvlink=True)
    assert backend.choose([ONE, TWO._replace(has_nvshmem=False)], nodes) == "host"
    assert "NVSHMEM is not installed for rank 1" in caplog.text
    assert "EP_RT_NVLINK=1 makes it one node" in caplog.text


@pytest.fixture
def pcie(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int]]]:
    """``pcie(has_nvshmem=...)`` makes buffers for two GPUs without NVLink; their backends and nodes."""
    for name in ("EP_RT_BACKEND", "EP_RT_RANKS_PER_NODE", "EP_RT_NVLINK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        buffer_module, "CudaEngine", lambda *args, **kwargs: SimpleNamespace(low_latency=None, close=None)
    )

    def make(*, has_nvshmem: bool) -> list[tuple[str, int]]:
        places = iter(
            [
                ONE._replace(without_nvlink=frozenset({TWO.bus_id}), has_nvshmem=has_nvshmem),
                TWO._replace(without_nvlink=frozenset({ONE.bus_id})),
            ]
        )
        monkeypatch.setattr(backend, "gpu_place", lambda: next(places))

        def run(group: ep_rt.Group) -> tuple[str, int]:
            buffer = Buffer(group)
            return buffer.backend, buffer.topology.num_nodes

        return ep_rt.run_local(run, 2, timeout_s=10)

    return make


def test_gpus_without_nvlink_are_nodes_of_their_own(
    pcie: Callable[..., list[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pcie(has_nvshmem=True) == [("cuda", 2)] * 2
    assert pcie(has_nvshmem=False) == [("host", 1)] * 2  # whose nodes are hosts
    monkeypatch.setenv("EP_RT_NVLINK", "1")
    assert pcie(has_nvshmem=False) == [("cuda", 1)] * 2


def test_what_a_rank_says_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(getDevice=lambda: 1, deviceGetPCIBusId=lambda device: f"0000:{device}A:00.0")
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(backend, "_missing_for_cuda", lambda: None)
    links = {("0000:1a:00.0", "b"): nvml.PCIE, ("0000:1a:00.0", "c"): nvml.NO_P2P, ("b", "c"): nvml.NO_P2P}
    monkeypatch.setattr(nvml, "links", lambda: links)
    monkeypatch.setattr(nvshmem_files, "find", lambda: None)
    place = backend.gpu_place()
    assert place is not None
    assert place.bus_id == "0000:1a:00.0"
    assert place.without_nvlink == {"b", "c"}
    assert place.without_p2p == {"c"}
    assert place.has_nvshmem


def test_one_rank_without_a_gpu_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter([ONE, None, TWO])
    monkeypatch.delenv("EP_RT_BACKEND", raising=False)
    monkeypatch.setattr(backend, "gpu_place", lambda: next(places))

    def run(group: ep_rt.Group) -> str:
        with Buffer(group) as buffer:
            return buffer.backend

    assert ep_rt.run_local(run, 3, timeout_s=10) == ["host"] * 3
