"""Proof that the emulator finds bugs: each of those planted in a copy of the sources is found in time."""

from __future__ import annotations

import pytest

from .mutations import MUTATIONS, Mutation, seeds_until_found, sources_with
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
    assert seeds_until_found(mutation) is not None
