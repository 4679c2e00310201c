"""Which engine a buffer runs on."""

from __future__ import annotations

import importlib.util
import logging

from .config import settings
from .errors import BackendError, ConfigError

BACKENDS = ("auto", "cuda", "host")

_MIN_CAPABILITY = 80

_log = logging.getLogger("ep_rt")


def choose(requested: str) -> str:
    """ "cuda" or "host" for a requested backend; "auto" asks ``EP_RT_BACKEND``, else it is "host".

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
    if requested == "auto":
        # The CUDA engine has the normal mode alone so far, so only who asks for it gets it.
        _log.info("backend: host")
        return "host"
    missing = _missing_for_cuda()
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
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-python is not installed; install ep-rt[cuda12] or ep-rt[cuda13]"
    capability = cupy.cuda.Device().compute_capability
    if int(capability) < _MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[:-1]}.{capability[-1]}; 8.0 or later is needed"
    return None
