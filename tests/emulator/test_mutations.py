"""Proof that the emulator finds bugs: each of those planted in a copy of the sources is found in time."""

from __future__ import annotations

import pytest

from .machine import FoundError
from .mutations import MUTATIONS
from .planting import Mutation, caught, sources_with
from .scenarios import Runner
from .support import needs_emulator

CAUGHT = [mutation for mutation in MUTATIONS if not mutation.uncaught]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_applies(mutation: Mutation) -> None:
    with sources_with(mutation) as sources:
        assert mutation.new in (sources / mutation.file).read_text()


def test_there_are_many() -> None:
    assert len(CAUGHT) >= 30
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@needs_emulator
@pytest.mark.parametrize("mutation", CAUGHT, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation: Mutation) -> None:
    assert caught(mutation) is not None


# Bugs that the emulator has found in the kernels. Planted again, the seed finds them; else it passes.
FOUND = {
    "a chunk is told by lanes that have acquired nothing": 0,
    "rows are read by lanes that have acquired nothing": 0,
    "chunks count that no offer was acquired with": 5,
    "threads of a block leave one by one": 17,
    "`failed` is stored by an ordinary store": 18,
    "the digest of an offer is read by an ordinary load": 83,
    "segments: counts for the handle are read by others than those that have waited for them": 9,
}


@needs_emulator
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_fixed(name: str) -> None:
    mutation = next(mutation for mutation in MUTATIONS if mutation.name == name)
    Runner.of(mutation.scenario).run(FOUND[name])
    with sources_with(mutation) as sources, pytest.raises(FoundError):
        Runner.of(mutation.scenario, sources=sources).run(FOUND[name])
