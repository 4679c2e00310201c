"""Which NVRTC and NVSHMEM the tests find.

``EP_RT_TEST_REQUIRE_NVRTC=12`` or ``13`` turns the absence of NVRTC into a failure, and so does
``EP_RT_TEST_REQUIRE_NVSHMEM=1`` for all that kernels which use NVSHMEM need.
"""

from __future__ import annotations

import os

import pytest

from ep_rt.cuda import jit, linker, nvshmem_files
from ep_rt.errors import BackendError


def require_nvrtc() -> tuple[int, int]:
    """NVRTC's version; skips the test where there is none."""
    required = os.environ.get("EP_RT_TEST_REQUIRE_NVRTC")
    try:
        version = jit.nvrtc_version()
    except BackendError as error:
        if required:
            pytest.fail(f"EP_RT_TEST_REQUIRE_NVRTC={required}, but {error}")
        pytest.skip(str(error))
    if required and version[0] != int(required):
        pytest.fail(f"EP_RT_TEST_REQUIRE_NVRTC={required}, but NVRTC is {version[0]}.{version[1]}")
    return version


def require_nvshmem() -> nvshmem_files.NvshmemFiles:
    """NVSHMEM's files; skips the test where kernels that use it cannot be linked."""
    nvrtc = require_nvrtc()
    try:
        linker.require_reads(nvrtc)
        nvshmem_files.cccl_dir()
        found = nvshmem_files.find()
        found.require_cuda(nvrtc[0])
    except BackendError as error:
        if os.environ.get("EP_RT_TEST_REQUIRE_NVSHMEM"):
            pytest.fail(f"EP_RT_TEST_REQUIRE_NVSHMEM is set, but {error}")
        pytest.skip(str(error))
    return found
