"""Rows for casts by blocks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

CHANNELS = 128  # of a block


def below_one(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    """bfloat16 rows whose blocks LogFMT casts: of every size below 1, subnormals too, some of few values that
    are next to each other, some with zeros."""
    num_blocks = int(np.prod(shape)) // CHANNELS
    top = rng.integers(2, 0x3F80, num_blocks)
    most = np.where(rng.integers(2, size=num_blocks), 0x3F7F, 4)  # values below the largest
    below = np.minimum(top, rng.integers(1, most))[:, None]
    bits = top[:, None] - rng.integers(0, below + 1, (num_blocks, CHANNELS))
    bits[rng.random(bits.shape) < 0.1 * rng.integers(2, size=(num_blocks, 1))] = 0
    bits |= rng.integers(2, size=bits.shape) << 15
    rows: NDArray[Any] = bits.astype(np.uint16).view(ml_dtypes.bfloat16).reshape(shape)
    return rows
