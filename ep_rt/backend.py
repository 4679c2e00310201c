"""Which engine a buffer runs on."""

from __future__ import annotations

import importlib.util
import logging

from .config import settings
from .errors import BackendError, ConfigError

BACKENDS = ("auto", "cuda", "host")

_log = logging.getLogger("ep_rt")


def choose(requested: str) -> str:
    """ "cuda" or "host" for a requested backend; "auto" asks ``EP_RT_BACKEND`` and then the machine.

    Raises:
        ConfigError: no such backend.
        BackendError: "cuda" was asked for and cannot run here; the message says what is missing.
    """
    if requested == "auto":
        requested = settings().backend or "auto"
    if requested not in BACKENDS:
        raise ConfigError(f"backend={requested!r}; one of {', '.join(BACKENDS)}")
    if requested == "host":
        return "host"
    missing = _missing_for_cuda()
    if requested == "auto":
        _log.info("backend: %s", "cuda" if missing is None else f"host ({missing})")
        return "cuda" if missing is None else "host"
    if missing is not None:
        raise BackendError(f"backend='cuda' cannot run here: {missing}")
    return "cuda"


def _missing_for_cuda() -> str | None:
    """What the CUDA engine lacks on this machine; None if nothing."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; install ep-rt[cuda12] or ep-rt[cuda13]"
    import cupy

    try:
        num_devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no device ({error})"
    if num_devices == 0:
        return "CUDA finds no device"
    return "this version of ep_rt has no CUDA engine yet; use backend='host' with CPU arrays"
