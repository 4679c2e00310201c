"""What the oracle refuses, and with which error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ArrayError, ConfigError
from .numerics import Array


def check_array(
    array: Array,
    name: str,
    *,
    dtypes: Sequence[np.dtype[np.generic]],
    shape: Sequence[int | None] | None = None,
) -> None:
    """Raise ArrayError unless `array` has one of `dtypes` and matches `shape` (None: any)."""
    if not isinstance(array, np.ndarray):
        raise ArrayError(f"{name} is a {type(array).__name__}, not a NumPy array")
    if shape is not None:
        matches = array.ndim == len(shape) and all(
            want in (None, have) for want, have in zip(shape, array.shape, strict=True)
        )
        if not matches:
            wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
            raise ArrayError(f"{name} has shape {array.shape}, expected [{wanted}]")
    if array.dtype not in dtypes:
        raise ArrayError(f"{name} is {array.dtype}, expected {' or '.join(map(str, dtypes))}")


def check_topk_idx(topk_idx: Array, name: str, *, num_experts: int, num_tokens: int | None = None) -> None:
    """Raise ArrayError unless `topk_idx` is [num_tokens, K], int64 or int32, ids in -1 .. num_experts - 1."""
    check_array(topk_idx, name, dtypes=(np.dtype(np.int64), np.dtype(np.int32)), shape=(num_tokens, None))
    wrong = (topk_idx < -1) | (topk_idx >= num_experts)
    if wrong.any():
        token, k = np.argwhere(wrong)[0]
        raise ArrayError(
            f"{name}[{token}, {k}] = {topk_idx[token, k]} is neither -1 nor an expert of {num_experts}"
        )


def check_positive(**values: int) -> None:
    """Raise ConfigError for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name}={value} is not positive")


def local_experts(num_experts: int, num_ranks: int) -> int:
    """Experts per rank; ConfigError if they do not divide."""
    check_positive(num_experts=num_experts, num_ranks=num_ranks)
    if num_experts % num_ranks:
        raise ConfigError(f"num_experts={num_experts} is not divisible by num_ranks={num_ranks}")
    return num_experts // num_ranks


def check_same_length(num_ranks: int, **lists: Sequence[object] | None) -> None:
    """Raise ConfigError unless every list that is given has one entry per rank."""
    check_positive(num_ranks=num_ranks)
    for name, entries in lists.items():
        if entries is not None and len(entries) != num_ranks:
            raise ConfigError(f"{name} has {len(entries)} entries for {num_ranks} ranks")


def check_agreement(arrays: Sequence[Array], name: str) -> None:
    """Raise ConfigError unless dtype and all extents but the first are equal on every rank."""
    first = arrays[0]
    for rank, array in enumerate(arrays):
        if (array.dtype, array.shape[1:]) != (first.dtype, first.shape[1:]):
            raise ConfigError(
                f"{name} differs between ranks: {first.dtype} rows of {first.shape[1:]} on rank 0, "
                f"{array.dtype} rows of {array.shape[1:]} on rank {rank}"
            )
