"""Planting a bug in a copy of the kernels' sources, and looking how soon the emulator finds it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .build import KERNELS_CU
from .machine import FoundError
from .scenarios import SCHEDULES, Runner


@dataclass(frozen=True, slots=True)
class Mutation:
    """A change of one source.

    Attributes:
        old, new: text that stands in the source once, and what takes its place.
        scenario: where it must be found.
        max_seeds: within so many.
        uncaught: why it is not found, for one that is listed nevertheless.
    """

    name: str
    file: str
    old: str
    new: str
    scenario: str
    max_seeds: int = 24
    uncaught: str = ""


@dataclass(frozen=True, slots=True)
class Catch:
    """After how many seeds a mutation was found, by which, and what it said."""

    num_seeds: int
    seed: int
    found: FoundError


def catch(runner: Runner, max_seeds: int, *, first: int = 0, **changes: Any) -> Catch | None:
    """The first seed that finds something; None if none does.

    Args:
        runner: of the scenario with mutated sources.
        changes: to the scenario's conditions.
    """
    for number in range(max_seeds):
        # Another program each time, and another of its schedules.
        seed = first + number * (SCHEDULES + 1)
        try:
            runner.run(seed, **changes)
        except FoundError as found:
            return Catch(number + 1, seed, found)
    return None


def caught(mutation: Mutation) -> Catch | None:
    """Whether a mutation is found within its seeds."""
    with sources_with(mutation) as sources:
        return catch(Runner.of(mutation.scenario, sources=sources), mutation.max_seeds)


@contextmanager
def sources_with(mutation: Mutation) -> Iterator[Path]:
    """A copy of the sources with the bug in it."""
    with TemporaryDirectory(prefix="mutated-") as folder:
        sources = Path(folder) / "kernels_cu"
        shutil.copytree(KERNELS_CU, sources, ignore=shutil.ignore_patterns("__pycache__"))
        path = sources / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            count = text.count(mutation.old)
            raise ValueError(f"{mutation.name}: its text stands {count} times in {mutation.file}, not once")
        path.write_text(text.replace(mutation.old, mutation.new))
        yield sources
