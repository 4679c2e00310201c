"""Which NVRTC the tests find. ``EP_RT_TEST_REQUIRE_NVRTC=12`` or ``13`` turns its absence into a failure."""

from __future__ import annotations

import os

import pytest

from ep_rt.cuda import jit
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
