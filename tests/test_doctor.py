"""What the doctor says, and its exit status, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from conftest import MpiRun

from ep_rt import doctor
from ep_rt.__main__ import main
from ep_rt.bench import machine
from ep_rt.cuda import jit, linker, nvml, nvshmem_files, nvshmem_host
from ep_rt.doctor import ABSENT, BROKEN, OK, Finding
from ep_rt.errors import BackendError
from ep_rt.groups import thread_groups

FILES = nvshmem_files.NvshmemFiles(root=Path("/nvshmem"), version=(3, 8, 0), cuda_major=13)


def look() -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(thread_groups(1)[0])}


def missing(reason: str) -> Any:
    def call(*args: object) -> Any:
        raise BackendError(reason)

    return call


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has nothing that is optional."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(nvshmem_files, "find", missing("NVSHMEM is not installed"))
    return monkeypatch


def test_a_bare_machine_is_not_broken(bare: pytest.MonkeyPatch) -> None:
    findings = list(look().values())
    assert {finding.state for finding in findings} == {OK, ABSENT}
    assert doctor.faults(findings, ()) == []
    assert doctor.faults(findings, ("mpi", "network")) == ["mpi4py", "NVSHMEM"]
    assert doctor.faults(findings, ("cuda",)) == ["CuPy", "cuda-bindings"]
    text = doctor.report(findings, ("cuda",))
    assert "install ep-rt[mpi]" in text
    assert "broken: CuPy, cuda-bindings" in text
    assert "nothing that is needed is broken" in doctor.report(findings, ())


def test_all_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem_files, "find", lambda: FILES)
    monkeypatch.setattr(nvshmem_host, "load", lambda files: _Library())
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (13, 5))
    monkeypatch.setattr(linker, "version", lambda: (13, 5))
    linked: list[str] = []
    monkeypatch.setattr(jit, "cubin", lambda spec, architecture: linked.append(architecture))
    found = look()
    assert found["NVSHMEM"].detail == "3.8.0 for CUDA 13 in /nvshmem"
    assert found["NVSHMEM host library"].detail == "3.8.0 through nvshmem4py"
    assert found["NVSHMEM device library"].detail.startswith(f"links for {linked[0]}")


@pytest.fixture
def no_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where cards would be."""
    monkeypatch.setattr(doctor, "_NETWORK_CARDS", tmp_path)
    return tmp_path


def test_cards_are_needed_by_several_hosts(no_cards: Path) -> None:
    def cards(num_hosts: int) -> Finding:
        findings = doctor.examine(None, num_hosts=num_hosts)
        return next(finding for finding in findings if finding.name == "network cards")

    alone, several = cards(1), cards(2)
    assert (alone.state, several.state) == (ABSENT, ABSENT)
    assert alone.detail.startswith("none: only GPUs of one host reach each other")
    assert "the ranks are on 2" in several.detail
    assert doctor.faults([alone], doctor.PARTS) == []
    assert doctor.faults([several], ("mpi", "cuda")) == []
    assert doctor.faults([several], ("network",)) == ["network cards"]
    for name in ("mlx5_1", "mlx5_0"):
        (no_cards / name).mkdir()
    assert (cards(2).state, cards(2).part) == (OK, "network")
    assert cards(2).detail.startswith("mlx5_0, mlx5_1")


@pytest.mark.parametrize("hosts", ["aa", "ab"])
def test_ranks_tell_each_other_their_hosts(
    hosts: str,
    no_cards: Path,
    bare: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, local = thread_groups(2), threading.local()
    bare.setattr(doctor, "as_group", lambda: here[local.rank])
    bare.setattr("platform.node", lambda: hosts[getattr(local, "rank", 0)])

    def look_as(rank: int) -> int:
        local.rank = rank
        return main(["doctor", "--json", "--require", "network"])

    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(look_as, range(2))) == [1, 0]
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert faults == (["NVSHMEM"] if hosts == "aa" else ["network cards", "NVSHMEM"])


class _Library:
    name = "nvshmem4py"

    def version(self) -> tuple[int, int, int]:
        return 3, 8, 0


def test_what_is_there_and_cannot_work_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem_files, "find", lambda: FILES)
    monkeypatch.setattr(nvshmem_host, "load", missing("another one was loaded before\nsecond line"))
    monkeypatch.setattr(jit, "nvrtc_version", lambda: (13, 5))
    monkeypatch.setattr(linker, "version", lambda: (12, 9))
    found = look()
    assert found["NVSHMEM host library"].state == BROKEN
    assert found["NVSHMEM host library"].detail == "another one was loaded before"
    assert "nvJitLink 12.9 cannot link what NVRTC 13.5 compiles" in found["NVSHMEM device library"].detail
    assert doctor.faults(list(found.values()), ()) == ["NVSHMEM host library", "NVSHMEM device library"]
    monkeypatch.setattr(nvshmem_files, "find", missing("NVSHMEM in /x is not complete"))
    assert look()["NVSHMEM"].state == BROKEN


def links(*joined: str, otherwise: str | None = nvml.PCIE) -> dict[tuple[str, str], str]:
    """Of GPUs a to d: NVLink where they are named together, else what is said; None: nothing is known."""
    kinds = {
        (one, two): nvml.NVLINK if any({one, two} <= set(group) for group in joined) else otherwise
        for one, two in permutations("abcd", 2)
    }
    return {pair: kind for pair, kind in kinds.items() if kind is not None}


@pytest.mark.parametrize(
    ("found", "described", "nodes"),
    [
        (links("abcd"), "NVLink between all 4 GPUs", "one, for all GPUs here: loads and stores (by links)"),
        (links(), "PCIe between all 4 GPUs", "4, of 1 GPU each: NVSHMEM between them"),
        (links(otherwise=nvml.NO_P2P), "no P2P between all 4 GPUs", "4, of 1 GPU each"),
        (
            links("ab", "cd"),
            "NVLink: 0-1, 2-3; PCIe: 0-2, 0-3, 1-2, 1-3",
            "2, of 2 GPUs each: NVSHMEM between them (by links; EP_RT_NVLINK=1 makes",
        ),
        (links(otherwise=None), "not known, counts as NVLink between all 4 GPUs", "one, for all"),
    ],
)
def test_links_and_the_nodes_that_follow(
    found: nvml.Links, described: str, nodes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EP_RT_RANKS_PER_NODE", "EP_RT_NVLINK"):
        monkeypatch.delenv(name, raising=False)
    assert doctor.described_links("abcd", found) == described
    assert doctor.described_nodes("abcd", found).startswith(nodes)
    monkeypatch.setenv("EP_RT_NVLINK", "0")
    assert doctor.described_nodes("abcd", found).startswith("4, of 1 GPU each")
    monkeypatch.setenv("EP_RT_NVLINK", "1")
    assert doctor.described_nodes("abcd", found).endswith("loads and stores (by EP_RT_NVLINK)")
    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", "3")
    assert doctor.described_nodes("abcd", found).endswith("(by EP_RT_RANKS_PER_NODE)")


def test_links_are_among_the_findings(bare: pytest.MonkeyPatch) -> None:
    for name in ("EP_RT_RANKS_PER_NODE", "EP_RT_NVLINK"):
        bare.delenv(name, raising=False)
    bare.setattr(doctor, "_is_installed", lambda name: name == "cupy")
    bare.setattr(doctor, "_num_gpus", lambda: 4)
    bare.setattr(doctor, "_bus_ids", lambda num_gpus: list("abcd"[:num_gpus]))
    bare.setattr(nvml, "links", lambda: links("abcd"))
    bare.setattr(machine, "links", lambda: "NV18")
    found = look()
    assert found["links"].detail == "NVLink between all 4 GPUs (NV18)"
    assert found["nodes"].detail == "one, for all GPUs here: loads and stores (by links)"


def test_one_gpu_has_no_links() -> None:
    assert doctor.described_links("a", {}) == "one GPU"
    assert "one, for all GPUs here" in doctor.described_nodes("a", {})


def test_a_cache_that_cannot_be_written_is_broken(
    bare: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EP_RT_CACHE_DIR", str(tmp_path / "cache"))
    assert look()["kernel cache"].detail == str(tmp_path / "cache")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert look()["kernel cache"].state == BROKEN


def test_settings_are_shown_with_who_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_IB_SL", "5")
    monkeypatch.setenv("NVSHMEM_DEBUG", "INFO")
    monkeypatch.delenv("NVSHMEM_DISABLE_NVLS", raising=False)
    monkeypatch.delenv("NVSHMEM_QP_DEPTH", raising=False)
    shown = doctor.network_settings()
    assert shown["NVSHMEM_IB_SL"].startswith("5  (InfiniBand service level")
    assert shown["NVSHMEM_DISABLE_NVLS"].startswith("1, set by ep_rt")
    assert shown["NVSHMEM_QP_DEPTH"].startswith("not set")
    assert shown["NVSHMEM_DEBUG"] == "INFO"


def test_status_and_json(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVSHMEM_IB_SL", "5")
    assert main(["doctor"]) == 0
    assert "network settings" in capsys.readouterr().out
    assert main(["doctor", "--json", "--require", "network"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["faults"] == ["NVSHMEM"]
    assert content["network_settings"]["NVSHMEM_IB_SL"] == "5"
    assert {"part", "name", "state", "detail"} == set(content["findings"][0])


def test_a_ping_without_gpus_is_a_fault(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["doctor", "--ping"]) == 1
    assert "broken: ping" in capsys.readouterr().out


def test_as_a_program() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "ep_rt", "doctor", "--json"], capture_output=True, text=True, timeout=200
    )
    content = json.loads(ran.stdout)
    assert ran.returncode == (1 if content["faults"] else 0), ran.stderr
    assert content["findings"][0]["name"] == "ep_rt"


def test_under_mpi_one_rank_speaks(mpirun: MpiRun) -> None:
    program = "import sys; from ep_rt.__main__ import main; sys.exit(main(['doctor']))"
    done = mpirun(2, program, timeout_s=200)
    assert done.stdout.count("network settings") == 1
    assert "2 ranks of a launcher" in done.stdout
