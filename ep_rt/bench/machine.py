"""What the run took place on, as far as it is cheap to know."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from .. import _version
from .places import CudaPlace, Place

Facts = dict[str, Any]


def facts(place: Place) -> Facts:
    """Of this rank's machine. Values are None where they cannot be found out."""
    found: Facts = {
        "ep_rt": _version.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backend": place.setting.backend,
        "ranks": place.setting.text,
    }
    if not isinstance(place, CudaPlace):
        return {**found, "cpu": _cpu_name()}
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(place.device)
    return {
        **found,
        "gpu": properties["name"].decode(),
        "gpu_memory_bytes": properties["totalGlobalMem"],
        "gpu_sms": place.num_sms,
        "links": None if place.setting.is_shared else links(),
        "driver": _asked(place, "driver_version"),
        "cuda_driver": cuda_version(runtime.driverGetVersion()),
        "cuda_runtime": cuda_version(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
    }


def clock_mhz(place: Place) -> float | None:
    """The clock of the SMs of this rank's GPU, now."""
    text = _asked(place, "clocks.sm") if isinstance(place, CudaPlace) else None
    return float(text.split()[0]) if text and text.split()[0].isdigit() else None


def links_of(topology: str) -> str | None:
    """How GPUs are joined, from the matrix that ``nvidia-smi topo -m`` prints: ``NV18``, or ``NV6, SYS``."""
    kinds: dict[str, None] = {}
    for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines():
        cells = line.split()
        if cells and re.fullmatch(r"GPU\d+", cells[0]):
            kinds.update(
                dict.fromkeys(cell for cell in cells[1:] if re.fullmatch(r"NV\d+|SYS|NODE|PHB|PXB|PIX", cell))
            )
        elif kinds and not cells:
            break
    of_gpus = [kind for kind in kinds if kind.startswith("NV")] or list(kinds)
    return ", ".join(of_gpus) or None


def links() -> str | None:
    """How the GPUs of this host are joined, as `links_of`."""
    return links_of(_output("nvidia-smi", "topo", "-m") or "")


def _asked(place: CudaPlace, what: str) -> str | None:
    import cupy

    bus_id = cupy.cuda.runtime.deviceGetPCIBusId(place.device)
    output = _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "-i", bus_id)
    return output.strip() if output and output.strip() else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def cuda_version(number: int) -> str:
    """As CUDA's own functions give it: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _cpu_name() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else None
