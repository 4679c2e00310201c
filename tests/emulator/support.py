"""What the tests of this folder share."""

from __future__ import annotations

import pytest

from . import build

# ``EP_RT_TEST_REQUIRE=emulator`` makes the absence an error of the whole run, see tests/conftest.py.
needs_emulator = pytest.mark.skipif(build.absence() is not None, reason=str(build.absence()))
