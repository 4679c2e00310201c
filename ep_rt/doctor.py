"""``python -m ep_rt doctor``: what this machine has, what is missing, which network settings are in force."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from . import _version
from .bench import machine
from .bench.console import say
from .config import settings
from .cuda import jit, kernels, launch, linker, nvml, nvshmem_files, nvshmem_host
from .cuda.nvshmem import Network
from .cuda.ping import Ping
from .errors import EpError
from .exchange import Group
from .groups import as_group
from .network_options import NETWORK_VARIABLES, default_variables, network_environment
from .topology import GpuPlace, ranks_joined

OK, ABSENT, BROKEN = "ok", "absent", "broken"

PARTS: Final = ("mpi", "cuda", "network")
"""What can be required. A part that is absent is no fault unless it is."""

# What kernels are linked for where there is no GPU to ask.
_ANY_ARCHITECTURE: Final = "sm_90a"
_NETWORK_CARDS: Final = Path("/sys/class/infiniband")
_NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia/version")
_PING_BYTES: Final = 4096
_PING_RUNS: Final = 100

_EPILOG: Final = """\
The status is 1 if something that is here is broken, or something that is required is absent, else 0.
What is absent and not required is no fault: the host backend needs NumPy alone. Network cards are required
where the ranks are on several hosts: GPUs of one reach each other without.

examples:
  python -m ep_rt doctor --require cuda --require network
  mpirun -n 16 --bind-to none python -m ep_rt doctor --ping    between all ranks, through NVSHMEM
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        part: one of `PARTS`, or "" for what none of them decides: everybody needs it, or nobody here.
        state: `OK`, `ABSENT` or `BROKEN`.
        detail: versions and places; else what to do.
    """

    part: str
    name: str
    state: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to look at, and how to say it."""

    requires: tuple[str, ...] = ()
    is_json: bool = False
    pings: bool = False


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the subparsers of a program."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine has, what is missing, and which network settings are in force",
        description="What this machine has, what is missing, and which network settings are in force.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--require", action="append", choices=PARTS, default=[], help="its absence is a fault; repeatable"
    )
    parser.add_argument("--ping", action="store_true", help="start NVSHMEM over all ranks and try all pairs")
    parser.add_argument("--json", action="store_true", help="for programs")


def options_of(parsed: argparse.Namespace) -> Options:
    """From the command line."""
    return Options(requires=tuple(dict.fromkeys(parsed.require)), is_json=parsed.json, pings=parsed.ping)


def main(options: Options) -> int:
    """Look, and say it on rank 0; the exit status."""
    try:
        group = as_group()
    except EpError as error:
        findings = [Finding(part="mpi", name="ranks", state=BROKEN, detail=str(error)), *examine(None)]
        return _conclude(findings, options)
    num_hosts = len(set(group.allgather(platform.node(), op="doctor hosts")))
    if options.pings:
        pinged = _ping(group)
    if group.rank:
        return 0 if not options.pings or pinged.state == OK else 1
    findings = list(examine(group, num_hosts=num_hosts))
    if options.pings:
        findings.append(pinged)
    return _conclude(findings, options)


def examine(group: Group | None, *, num_hosts: int = 1) -> Iterator[Finding]:
    """Everything about this machine, in the order in which it is read. Starts nothing that runs on.

    Args:
        group: the ranks of the launcher; None where that failed.
        num_hosts: that these are on.
    """
    yield _finding("", "ep_rt", lambda: f"{_version.__version__}, Python {platform.python_version()}")
    yield _finding("", "kernel cache", _cache)
    if group is not None:
        yield from _mpi(group)
    yield from _cuda()
    yield from _network(num_hosts)


def report(findings: list[Finding], requires: tuple[str, ...]) -> str:
    """For people: the findings, the settings of the network, and the conclusion."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{finding.state:<8}{finding.name:<{width}}  {finding.detail}" for finding in findings]
    lines += ["", "network settings (NVSHMEM reads them when it starts):"]
    in_force = network_settings()
    width = max(map(len, in_force))
    lines += [f"  {name:<{width}}  {text}" for name, text in in_force.items()]
    wrong = faults(findings, requires)
    lines += ["", f"broken: {', '.join(wrong)}" if wrong else "nothing that is needed is broken"]
    return "\n".join(lines)


def network_settings() -> dict[str, str]:
    """By name, what NVSHMEM is told; all that decide over the network, and others where they are set."""
    told = network_environment()
    defaults = default_variables(symmetric_bytes=0, needs_transport=True)
    described = {}
    for name, meaning in NETWORK_VARIABLES.items():
        if name in told:
            value = told[name]
        elif name == "NVSHMEM_SYMMETRIC_SIZE":
            value = "set by ep_rt from what is needed"
        else:
            value = f"{defaults[name]}, set by ep_rt" if name in defaults else "not set"
        described[name] = f"{value}  ({meaning})"
    return {**described, **{name: value for name, value in told.items() if name not in NETWORK_VARIABLES}}


def faults(findings: list[Finding], requires: tuple[str, ...]) -> list[str]:
    """Names of what is broken, or absent although it is required."""
    return [
        finding.name
        for finding in findings
        if finding.state == BROKEN or (finding.state == ABSENT and finding.part in requires)
    ]


def _conclude(findings: list[Finding], options: Options) -> int:
    wrong = faults(findings, options.requires)
    if options.is_json:
        content = {
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "network_settings": network_environment(),
            "faults": wrong,
        }
        say(json.dumps(content, indent=1), sys.stdout)
    else:
        say(report(findings, options.requires), sys.stdout)
    return 1 if wrong else 0


# What is looked at.


def _finding(part: str, name: str, look: Callable[[], str]) -> Finding:
    """`OK` with what `look` returns, or `BROKEN` with what it raises."""
    try:
        return Finding(part=part, name=name, state=OK, detail=look())
    except Exception as error:  # of any library, which is what this is for
        reason = str(error).partition("\n")[0] or type(error).__name__
        return Finding(part=part, name=name, state=BROKEN, detail=reason)


def _absent(part: str, name: str, detail: str) -> Finding:
    return Finding(part=part, name=name, state=ABSENT, detail=detail)


def _cache() -> str:
    directory = settings().cache_dir
    present = next(path for path in (directory, *directory.parents) if path.exists())
    if not os.access(present, os.W_OK):
        raise PermissionError(f"{present} cannot be written; set EP_RT_CACHE_DIR")
    return str(directory)


def _mpi(group: Group) -> Iterator[Finding]:
    if not _is_installed("mpi4py"):
        yield _absent("mpi", "mpi4py", "install ep-rt[mpi]")
        return
    if "mpi4py.MPI" in sys.modules:  # started by a launcher, whose MPI works
        yield _finding("mpi", "mpi4py", lambda: f"{_installed('mpi4py')}; {group.size} ranks of a launcher")
    else:
        # In a process of its own: where an MPI is half installed, its start ends the process.
        yield _finding("mpi", "mpi4py", lambda: f"{_installed('mpi4py')}; {_mpi_library()}")


def _mpi_library() -> str:
    command = [sys.executable, "-m", "mpi4py", "--mpi-lib-version"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = (ran.stdout or ran.stderr).strip().splitlines() or ["it says nothing"]
    if ran.returncode:
        raise OSError(lines[-1])
    return " ".join(lines[0].split())


def _cuda() -> Iterator[Finding]:
    if not _is_installed("cupy"):
        yield _absent("cuda", "CuPy", "install ep-rt[cuda12] or ep-rt[cuda13]")
    else:
        yield _finding("cuda", "CuPy", _cupy)
        try:
            num_gpus = _num_gpus()
        except Exception as error:
            reason = f"CUDA finds none ({error})"
            has_driver = _NVIDIA_DRIVER.exists()
            yield Finding(part="cuda", name="GPUs", state=BROKEN if has_driver else ABSENT, detail=reason)
        else:
            yield _finding("cuda", "GPUs", lambda: f"{num_gpus}: {_gpus(num_gpus)}")
            yield _finding("cuda", "links", lambda: _links(num_gpus))
            yield _finding("cuda", "nodes", lambda: described_nodes(_bus_ids(num_gpus), nvml.links()))
    if not _is_installed("cuda") or not _is_installed("cuda.bindings"):
        yield _absent("cuda", "cuda-bindings", "install ep-rt[cuda12] or ep-rt[cuda13]")
        return
    yield _finding("cuda", "cuda-bindings", lambda: _installed("cuda-bindings"))
    yield _tool("cuda", "NVRTC", jit.nvrtc_version)
    if jit.include_dirs():
        yield _finding("cuda", "CUDA headers", lambda: ", ".join(map(str, jit.include_dirs())))
    else:
        yield _absent("cuda", "CUDA headers", "install ep-rt[cuda12] or ep-rt[cuda13]")


def _network(num_hosts: int) -> Iterator[Finding]:
    yield _cards(num_hosts)
    if _is_installed("cuda"):
        yield _tool("network", "nvJitLink", linker.version)
    try:
        files = nvshmem_files.find()
    except EpError as error:
        state = ABSENT if "not installed" in str(error) else BROKEN
        yield Finding(part="network", name="NVSHMEM", state=state, detail=str(error))
        return
    built = f" for CUDA {files.cuda_major}" if files.cuda_major else ""
    yield _finding("network", "NVSHMEM", lambda: f"{files.version_text}{built} in {files.root}")
    yield _finding("network", "NVSHMEM host library", lambda: _host_library(files))
    try:
        jit.nvrtc_version()
        linker.version()
    except EpError:  # said above
        return
    yield _finding("network", "NVSHMEM device library", _link)


def _tool(part: str, name: str, version: Callable[[], tuple[int, int]]) -> Finding:
    """A library that is loaded when it is asked for its version."""
    try:
        return Finding(part=part, name=name, state=OK, detail="{}.{}".format(*version()))
    except EpError as error:
        return _absent(part, name, str(error))


def _cupy() -> str:
    import cupy

    return f"{cupy.__version__}, runtime {machine.cuda_version(cupy.cuda.runtime.runtimeGetVersion())}"


def _num_gpus() -> int:
    import cupy

    num_gpus = int(cupy.cuda.runtime.getDeviceCount())
    if not num_gpus:
        raise OSError("no device")
    return num_gpus


def _gpus(num_gpus: int) -> str:
    from cupy.cuda import runtime

    names: dict[str, int] = {}
    for device in range(num_gpus):
        properties = runtime.getDeviceProperties(device)
        capability = f"{properties['major']}.{properties['minor']}"
        memory = properties["totalGlobalMem"] >> 30
        name = f"{properties['name'].decode()} ({capability}, {memory} GiB)"
        names[name] = names.get(name, 0) + 1
    listing = ", ".join(f"{count} x {name}" for name, count in names.items())
    return f"{listing}; driver for CUDA {machine.cuda_version(runtime.driverGetVersion())}"


def _bus_ids(num_gpus: int) -> list[str]:
    from cupy.cuda import runtime

    return [nvml.address(runtime.deviceGetPCIBusId(device)) for device in range(num_gpus)]


def _links(num_gpus: int) -> str:
    counted = machine.links()
    return described_links(_bus_ids(num_gpus), nvml.links()) + (f" ({counted})" if counted else "")


def described_links(bus_ids: Sequence[str], links: nvml.Links) -> str:
    """How GPUs reach each other, by CUDA's numbers of two."""
    if len(bus_ids) == 1:
        return "one GPU"
    pairs: dict[str, list[str]] = {}
    for (one, first), (two, second) in combinations(enumerate(bus_ids), 2):
        kind = links.get((first, second), "not known, counts as NVLink")
        pairs.setdefault(kind, []).append(f"{one}-{two}")
    if len(pairs) == 1:
        return f"{next(iter(pairs))} between all {len(bus_ids)} GPUs"
    return "; ".join(f"{kind}: {', '.join(those)}" for kind, those in pairs.items())


def described_nodes(bus_ids: Sequence[str], links: nvml.Links) -> str:
    """What follows for a process on each GPU, in this order."""
    told = settings()
    size, by = told.ranks_per_node, "EP_RT_RANKS_PER_NODE"
    if size is None:
        places = [
            GpuPlace("", number, bus_id, without_nvlink=nvml.without_nvlink(links, bus_id))
            for number, bus_id in enumerate(bus_ids)
        ]
        size = ranks_joined(places, nvlink=told.nvlink)
        by = "links" if told.nvlink is None else "EP_RT_NVLINK"
    if size is None or size >= len(bus_ids):
        return f"one, for all GPUs here: loads and stores (by {by})"
    num_nodes = -(-len(bus_ids) // size)
    gpus = "1 GPU" if size == 1 else f"{size} GPUs"
    way_out = "" if by == "EP_RT_RANKS_PER_NODE" else "; EP_RT_NVLINK=1 makes it one"
    return f"{num_nodes}, of {gpus} each: NVSHMEM between them (by {by}{way_out})"


def _cards(num_hosts: int) -> Finding:
    cards = sorted(path.name for path in _NETWORK_CARDS.glob("*"))
    modules = [name for name in ("nvidia_peermem", "gdrdrv") if Path("/sys/module", name).exists()]
    found = ", ".join(cards) or "none: only GPUs of one host reach each other"
    if not cards and num_hosts > 1:
        found += f", and the ranks are on {num_hosts}"
    return Finding(
        part="network" if cards or num_hosts > 1 else "",
        name="network cards",
        state=OK if cards else ABSENT,
        detail=f"{found}; kernel modules: {', '.join(modules)}" if modules else found,
    )


def _host_library(files: nvshmem_files.NvshmemFiles) -> str:
    library = nvshmem_host.load(files)
    return f"{'.'.join(map(str, library.version()))} through {library.name}"


def _link() -> str:
    """Link a kernel for the GPU that is current, or for any."""
    try:
        architecture = launch.current_architecture()
    except Exception:  # no CuPy, or no GPU: said above
        architecture = _ANY_ARCHITECTURE
    start = time.monotonic()
    jit.cubin(kernels.nvshmem_ping("warp"), architecture)
    return f"links for {architecture}, {time.monotonic() - start:.1f} s with the cache as it was"


def _ping(group: Group) -> Finding:
    """On all ranks."""
    return _finding("network", "ping", lambda: _pinged(group))


def _pinged(group: Group) -> str:
    import cupy

    hosts = group.allgather(platform.node(), op="doctor")
    local_rank = hosts[: group.rank].count(hosts[group.rank])
    with cupy.cuda.Device(local_rank % _num_gpus()):
        network = Network(group, num_bytes=Ping.num_bytes(group.size, _PING_BYTES))
        try:
            ping = Ping(network, block_bytes=_PING_BYTES)
            stream = cupy.cuda.Stream(non_blocking=True)
            ping.run(stream)
            ping.check(stream)
            start = time.monotonic()
            for _ in range(_PING_RUNS):
                ping.run(stream)
            num_runs = ping.check(stream)
            each_us = (time.monotonic() - start) / _PING_RUNS * 1e6
            direct = group.allgather(len(network.direct_peers(ping.memory)), op="doctor peers")
        finally:
            network.close()
    return (
        f"{group.size} ranks on {len(set(hosts))} hosts, {num_runs} times {_PING_BYTES} bytes between all "
        f"pairs, {each_us:.0f} us each; a rank reaches {min(direct)} to {max(direct)} by loads and stores, "
        "itself included"
    )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _installed(name: str) -> str:
    """The version of a distribution."""
    return importlib.metadata.version(name)
