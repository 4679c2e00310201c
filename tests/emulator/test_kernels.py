"""Every kernel of the product under random schedules: seeds that are always run, and new ones each time.

``EP_RT_EMULATOR_SEED`` fixes the new ones, which are printed at the end and with every failure.
"""

from __future__ import annotations

import time

import pytest

from .command import report
from .machine import FoundError
from .scenarios import SCENARIOS, SCHEDULES, Runner
from .support import FIRST_NEW, needs_emulator

pytestmark = needs_emulator

FIXED_PROGRAMS = 3
FIXED_SECONDS = 10.0  # for each scenario; after them no other one is begun
NEW_SECONDS = 1.0


def run(runner: Runner, seed: int) -> None:
    try:
        runner.run(seed)
    except FoundError as found:
        pytest.fail(report(runner.name, seed, found))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str) -> None:
    runner = Runner.of(name)
    until = time.monotonic() + FIXED_SECONDS
    for program in range(FIXED_PROGRAMS):
        for schedule in range(2):
            if time.monotonic() < until:
                run(runner, SCHEDULES * program + schedule)
    until, seed = time.monotonic() + NEW_SECONDS, FIRST_NEW
    while time.monotonic() < until:
        run(runner, seed)
        seed += 1
