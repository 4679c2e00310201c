"""NVSHMEM's life over a group: who starts it, shares it and ends it, and what is said when it cannot work."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from conftest import MpiRun
from nvshmem_fakes import FakeLibrary, install

from ep_rt import run_local
from ep_rt.cuda import kernels, launch, nvml, nvshmem, nvshmem_files, nvshmem_host
from ep_rt.cuda.nvshmem import Network
from ep_rt.errors import BackendError, ConfigError, TopologyError
from ep_rt.exchange import Group
from ep_rt.network_options import (
    NETWORK_VARIABLES,
    NetworkOptions,
    network_environment,
    set_network_environment,
)

RANKS = Path(__file__).with_name("nvshmem_ranks.py")
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("scenario", ["life", "shared", "mistakes", "started_elsewhere", "failed_start"])
def test_over_processes(mpirun: MpiRun, scenario: str) -> None:
    done = mpirun(2, RANKS, scenario)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" passed") == 2, done.stdout


def test_a_rank_that_is_lost(mpirun: MpiRun) -> None:
    done = mpirun(3, RANKS, "lost")
    assert done.stdout.count(" passed") >= 2, done.stdout
    assert "NVSHMEM is left as it is until the process ends" in done.stdout


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    # What the fakes replace is put back afterwards.
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(nvshmem_files, "find", nvshmem_files.find)
    monkeypatch.setattr(nvshmem_host, "load", nvshmem_host.load)
    monkeypatch.setattr(nvshmem._PROCESS, "lost", None)
    for name in NETWORK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return install(0)


def test_threads_of_one_process_are_refused(library: FakeLibrary) -> None:
    def body(group: Group) -> None:
        with pytest.raises(TopologyError, match="ranks 0 and 1 share a process, which NVSHMEM cannot serve"):
            Network(group, num_bytes=1)
        group.barrier()

    run_local(body, 2)
    assert library.calls == []


def test_processes_on_one_gpu_are_refused() -> None:
    members = [("host", 1, "gpu 0"), ("host", 2, "gpu 1"), ("other", 1, "gpu 0"), ("host", 3, "gpu 1")]
    nvshmem._check_members(members[:3])
    with pytest.raises(TopologyError, match="ranks 1 and 3 share a GPU"):
        nvshmem._check_members(members)


def test_a_transport_is_needed_between_hosts_and_where_gpus_do_not_reach_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        nvml, "links", lambda: {("0:a.0", "0:b.0"): nvml.NO_P2P, ("0:a.0", "0:c.0"): nvml.PCIE}
    )
    mine = ("host", 1, "0:A.0")
    assert not nvshmem._needs_transport(mine, [mine, ("host", 2, "0:C.0"), ("host", 3, "0:D.0")])
    assert nvshmem._needs_transport(mine, [mine, ("host", 2, "0:B.0")])
    assert nvshmem._needs_transport(mine, [mine, ("other", 2, "0:C.0")])


def test_a_start_that_does_not_return_is_an_error(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(library, "start", lambda *args: released.wait(30))

    def body(group: Group) -> None:
        with pytest.raises(BackendError, match=r"rank 0: NVSHMEM did not start within 0\.2 s"):
            Network(group, num_bytes=1, timeout_s=0.2)

    run_local(body, 1)
    released.set()


def test_a_close_without_a_rank_asks_nobody(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even those that are there: NVSHMEM would wait for the lost one. Nobody starts it anew."""
    monkeypatch.setattr(nvshmem._PROCESS, "started", None)

    def body(group: Group) -> None:
        network = Network(group, num_bytes=1000)
        network.allocate(100)
        library.calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(group, "allgather", None)
            network.close((1, 3))
        network.close()
        with pytest.raises(BackendError, match=r"no word from ranks \[1, 3\]"):
            Network(group, num_bytes=1000)

    run_local(body, 1)
    assert library.calls == []
    assert "NVSHMEM is left as it is until the process ends: no word from ranks [1, 3]" in caplog.text


def test_a_kernel_on_the_network_needs_one(library: FakeLibrary) -> None:
    with pytest.raises(BackendError, match="uses NVSHMEM: it can be loaded with a network alone"):
        launch.Kernel(kernels.nvshmem_ping("warp"))


# What NVSHMEM's environment says.


def test_options_win_over_the_environment_and_it_over_defaults() -> None:
    environ = {"NVSHMEM_IB_SL": "1", "NVSHMEM_SYMMETRIC_SIZE": "2G", "NVSHMEM_IB_GID_INDEX": "3", "HOME": "/"}
    options = NetworkOptions(
        service_level=4,
        traffic_class=96,
        hcas="mlx5_0,mlx5_1",
        hca_mapping="mlx5_0:1:4",
        num_qps_per_rank=24,
        qp_depth=1024,
        ibgda=True,
    )
    set_network_environment(options, symmetric_bytes=1 << 30, needs_transport=True, environ=environ)
    assert network_environment(environ) == {
        "NVSHMEM_DISABLE_NCCL": "1",
        "NVSHMEM_DISABLE_NVLS": "1",
        "NVSHMEM_HCA_LIST": "mlx5_0,mlx5_1",
        "NVSHMEM_HCA_PE_MAPPING": "mlx5_0:1:4",
        "NVSHMEM_IBGDA_NUM_RC_PER_PE": "24",
        "NVSHMEM_IB_ENABLE_IBGDA": "1",
        "NVSHMEM_IB_GID_INDEX": "3",
        "NVSHMEM_IB_SL": "4",
        "NVSHMEM_IB_TRAFFIC_CLASS": "96",
        "NVSHMEM_QP_DEPTH": "1024",
        "NVSHMEM_SYMMETRIC_SIZE": "2G",
    }


def test_ibgda_can_be_switched_off_and_a_transport_named() -> None:
    environ = {"NVSHMEM_REMOTE_TRANSPORT": "ibrc"}
    set_network_environment(
        NetworkOptions(ibgda=False), symmetric_bytes=0, needs_transport=False, environ=environ
    )
    assert environ["NVSHMEM_IB_ENABLE_IBGDA"] == "0"
    assert environ["NVSHMEM_REMOTE_TRANSPORT"] == "ibrc"


@pytest.mark.parametrize(
    "wrong", [{"service_level": 16}, {"traffic_class": -1}, {"num_qps_per_rank": 0}, {"qp_depth": 0}]
)
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name}=.* is not within"):
        NetworkOptions(**wrong)  # type: ignore[arg-type]


def test_the_readme_has_every_variable() -> None:
    table = README.read_text().partition("## Settings")[2].partition("## Design")[0]
    missing = [name for name in NETWORK_VARIABLES if f"`{name}`" not in table]
    assert not missing
