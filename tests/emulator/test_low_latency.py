"""Proof that the emulator finds bugs of the low-latency kernels, too."""

from __future__ import annotations

import pytest

from .low_latency_mutations import LOW_LATENCY
from .mutations import Mutation, caught, sources_with
from .support import needs_emulator

CAUGHT = [mutation for mutation in LOW_LATENCY if not mutation.uncaught]


@pytest.mark.parametrize("mutation", LOW_LATENCY, ids=lambda mutation: mutation.name)
def test_mutation_applies(mutation: Mutation) -> None:
    with sources_with(mutation) as sources:
        assert mutation.new in (sources / mutation.file).read_text()


def test_there_are_many() -> None:
    assert len(CAUGHT) >= 10
    assert len({mutation.name for mutation in LOW_LATENCY}) == len(LOW_LATENCY)


@needs_emulator
@pytest.mark.parametrize("mutation", CAUGHT, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation: Mutation) -> None:
    assert caught(mutation) is not None
