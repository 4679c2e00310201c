"""Arithmetic on rows: gather them for a peer, sum the ones that came back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# The accumulators of one block. Smaller ones stay in the second-level cache, but the threads of one process
# then spend more time on handing the interpreter lock around than on adding.
_BLOCK_BYTES = 3 << 19


@dataclass(frozen=True, slots=True)
class Term:
    """One addend of some tokens: row ``rows[index[i]]`` (``rows[i]`` without index) belongs to ``tokens[i]``.

    `tokens` ascends strictly. With `weights`, float32, row i is multiplied by ``weights[i]`` in float32.
    """

    rows: Array
    tokens: Array
    index: Array | None = None
    weights: Array | None = None


def as_bytes(rows: Array) -> NDArray[np.uint8]:
    """[N, ...] as uint8 [N, bytes of a row]; a copy only if the rows are not contiguous."""
    rows = np.ascontiguousarray(rows)
    row_bytes = rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    return rows.reshape(-1).view(np.uint8).reshape(len(rows), row_bytes)


def sum_terms(terms: Sequence[Term], biases: Sequence[Array], out: Array) -> None:
    """[num_tokens, *row_shape]: each token's terms in order, then the biases, in float32, rounded once.

    The sum starts from the first term, so that -0.0 stays -0.0; a token without any is +0.0.
    Source: reference.combine and reference.low_latency_combine.
    """
    num_tokens = len(out)
    width = int(np.prod(out.shape[1:], dtype=np.int64))
    flat = out.reshape(num_tokens, width)
    block = max(1, _BLOCK_BYTES // max(1, 4 * width))
    starts = np.arange(0, num_tokens + block, block)
    bounds = [np.searchsorted(term.tokens, starts) for term in terms]
    has_term = np.full(num_tokens, bool(biases))
    for term in terms:
        has_term[term.tokens] = True
    totals = np.empty((min(block, num_tokens), width), np.float32)
    addend = np.empty_like(totals)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaNs travel like other values
        for number, start in enumerate(starts[:-1]):
            stop = min(start + block, num_tokens)
            total = totals[: stop - start]
            # -0.0 is the identity of addition: -0.0 + v is v for every v, signed zeros included.
            total.fill(-0.0)
            for place, (term, bound) in enumerate(zip(terms, bounds, strict=True)):
                rows = _rows(term, bound[number], bound[number + 1], addend)
                if len(rows) == len(total):
                    total += rows
                    continue
                tokens = term.tokens[bound[number] : bound[number + 1]] - start
                if place == 0:
                    total[tokens] = rows  # on -0.0, the same as to add them
                else:
                    total[tokens] += rows
            for bias in biases:
                np.copyto(addend[: len(total)], bias[start:stop].reshape(total.shape))
                total += addend[: len(total)]
            if not has_term[start:stop].all():
                total[~has_term[start:stop]] = 0.0
            np.copyto(flat[start:stop], total, casting="unsafe")


def _rows(term: Term, first: int, last: int, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows first .. last-1 of `term`, weighted, at the start of `out`."""
    rows = term.rows[first:last] if term.index is None else term.rows[term.index[first:last]]
    out = out[: last - first]
    np.copyto(out, rows.reshape(out.shape))
    if term.weights is not None:
        out *= term.weights[first:last, None]
    return out
