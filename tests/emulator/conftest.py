"""Says which seeds were new in a run."""

from __future__ import annotations

import pytest

from .support import FIRST_NEW


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Without a failure, too: a night's worth of runs can be told apart."""
    terminalreporter.write_line(f"emulator: new seeds from {FIRST_NEW}")
