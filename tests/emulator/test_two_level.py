"""Calls over several nodes from end to end, as a buffer makes them."""

from __future__ import annotations

import numpy as np
import pytest

from .kernels import Kernels
from .support import needs_emulator
from .two_level import TwoLevel

pytestmark = needs_emulator


@pytest.mark.parametrize("architecture", [900, 800])
@pytest.mark.parametrize("is_virtual", [False, True])
@pytest.mark.parametrize(("num_nodes", "num_local_ranks"), [(2, 1), (2, 2), (3, 2), (2, 4), (4, 2)])
def test_layers_equal_the_oracle(
    num_nodes: int, num_local_ranks: int, is_virtual: bool, architecture: int
) -> None:
    for drawing in range(2):
        rng = np.random.default_rng(drawing)
        load = Kernels(architecture=architecture)
        ranks = TwoLevel(num_nodes, num_local_ranks, load, is_virtual=is_virtual)
        for _ in range(2):
            ranks.layer(rng, max_tokens=8)
        ranks.compare_bytes()
        for seed in range(4):
            ranks.machine.run(seed)
