"""What the examples that train come to, and whether many ranks come to the same as one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Arithmetic on a rank is float64, for the choice of experts is not continuous; what travels is float32.
# Runs on different numbers of ranks add the same numbers in another order, so they begin 1e-16 apart. Where
# that moves a value across a rounding boundary, it travels one float32 step away from its twin, 6e-8 of the
# value; a few of those leave the runs about 1e-8 apart, a larger learning rate a little more. To lose one
# token of one batch moves some parameter by 1e-4, even in the last step.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Trained:
    losses: NDArray[np.float64]
    parameters: dict[str, NDArray[np.float64]]


def ranks_in_words(num_ranks: int) -> str:
    return "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"


def is_equal(many: Trained, alone: Trained, label: str) -> bool:
    """Compare the two runs, and say how far they are apart."""
    in_losses = np.abs(many.losses - alone.losses).max()
    in_parameters = np.max([np.abs(p - alone.parameters[name]).max() for name, p in many.parameters.items()])
    passed = bool(in_losses <= TOLERANCE and in_parameters <= TOLERANCE)
    print(
        f"equality check {'passed' if passed else 'FAILED'}: {label} and 1 rank differ by at most "
        f"{in_losses:.1e} in the losses, {in_parameters:.1e} in the parameters (allowed: {TOLERANCE:.0e})"
    )
    return passed
