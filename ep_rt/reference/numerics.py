"""Float32 sums in a fixed order, and the one rounding at their end."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
UINT8 = np.dtype(np.uint8)

SUMMED_DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
MOVED_DTYPES = (*SUMMED_DTYPES, FLOAT8_E4M3, UINT8)


class RowSum:
    """One float32 sum per element of [num_rows, width], terms added in the order of the calls.

    The first term of a row is taken as it is; a row without a term is +0.0.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self._sum = np.zeros((num_rows, width), np.float32)
        self._has_term = np.zeros(num_rows, np.bool_)

    def add(self, rows: Array, terms: Array) -> None:
        """Add terms[i] to row rows[i]. `rows` holds no row twice; `terms` is exact in float32."""
        terms = terms.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            total = self._sum[rows] + terms
        self._sum[rows] = np.where(self._has_term[rows, None], total, terms)
        self._has_term[rows] = True

    def rounded(self, dtype: DTypeLike) -> Array:
        """The sums in `dtype`: to nearest, ties to even, beyond the largest finite value to infinity."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._sum.astype(dtype)


def multiply(weights: Array, rows: Array) -> Array:
    """weights[i] * rows[i] in float32, rounded; weights [N] float32, rows [N, H]."""
    with np.errstate(over="ignore", invalid="ignore"):
        product: Array = weights[:, None] * rows.astype(np.float32)
    return product


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
