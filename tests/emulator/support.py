"""What the tests of this folder share."""

from __future__ import annotations

import os
import secrets
from typing import Final

import pytest

from . import build

FIRST_NEW: Final = int(os.environ.get("EP_RT_EMULATOR_SEED") or secrets.randbelow(1 << 40))
"""The first of the seeds that are new in this run."""

# ``EP_RT_TEST_REQUIRE=emulator`` makes the absence an error of the whole run, see tests/conftest.py.
needs_emulator = pytest.mark.skipif(build.absence() is not None, reason=str(build.absence()))
