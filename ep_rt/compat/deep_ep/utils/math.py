"""Numbers, casts, differences and hashes, as DeepEP's tests and benchmarks import them.

Nothing is kept here: that Python loads the module a second time, as ``deep_ep.utils.math``, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ep_rt.errors import ArrayError

_BLOCK = 128
_E4M3_MAX = 448.0
_MIN_AMAX = 1e-4


def ceil_div(x: int, y: int) -> int:
    """`x` / `y`, rounded up. `y` is positive."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """The first multiple of `y` that is not below `x`."""
    return ceil_div(x, y) * y


def safe_div(a: float, b: float) -> float:
    """`a` / `b`, where 0 / 0 is 0.

    Raises:
        ZeroDivisionError: `b` is 0 and `a` is not.
    """
    return 0.0 if a == 0 and b == 0 else a / b


def count_bytes(*tensors: Any) -> int:
    """Bytes of all elements of tensors, of tuples and lists of them; None has none."""
    return sum(each.numel() * each.element_size() for each in _flat(tensors))


def calc_diff(x: Any, y: Any) -> float:
    """How far two tensors are apart: 0 if they are equal, 1 at most where all elements are above -1.

    With a = `x` + 1 and b = `y` + 1 in float64, the sum of (a - b)**2 over that of a**2 + b**2. Two empty
    tensors do not differ. The host waits.
    """
    import torch

    a, b = (each.to(torch.float64) + 1 for each in (x, y))
    squares = (a - b).square()
    return float(squares.sum() / (a.square() + b.square()).sum()) if squares.numel() else 0.0


def per_token_cast_to_fp8(x: Any) -> tuple[Any, Any]:
    """Cast rows to float8_e4m3fn, with a scale factor for each 128 columns of a row.

    With amax the largest absolute value of a block, 1e-4 at least, its elements are times 448 / amax. Rows
    and factors of finite values have the bits that `low_latency_dispatch` gives them with ``use_fp8``.

    Args:
        x: [num_tokens, hidden], bfloat16, float16 or float32; the last block may have fewer columns.

    Returns:
        float8_e4m3fn [num_tokens, hidden], and float32 [num_tokens, ceil(hidden / 128)]: amax * (1 / 448).

    Raises:
        ArrayError: `x` does not have two dimensions.
    """
    import torch

    num_columns = _num_columns("x", x)
    blocks = _blocks(x.float())
    amax = blocks.abs().amax(dim=2).clamp(min=_MIN_AMAX)
    # A number over a tensor would be the tensor's reciprocal times the number, which rounds twice.
    scale = torch.full_like(amax, _E4M3_MAX) / amax
    rows = (blocks * scale.unsqueeze(2)).to(torch.float8_e4m3fn).flatten(1)
    return rows[:, :num_columns].contiguous(), amax * (1 / _E4M3_MAX)


def per_token_cast_back(x_fp8: Any, x_scales: Any) -> Any:
    """What `per_token_cast_to_fp8` was given, as far as float8 keeps it.

    Args:
        x_fp8: float8_e4m3fn [num_tokens, hidden].
        x_scales: float32 [num_tokens, ceil(hidden / 128)]; or int32 [num_tokens, ceil(hidden / 512)], whose
            bytes are exponents (UE8M0): e is the factor 2**(e - 127), and 0 the factor 0.

    Returns:
        bfloat16 [num_tokens, hidden].

    Raises:
        ArrayError: `x_fp8` does not have two dimensions, or `x_scales` has not one factor for each block.
    """
    import torch

    if x_fp8.numel() == 0:
        return x_fp8.to(torch.bfloat16)
    num_columns = _num_columns("x_fp8", x_fp8)
    blocks = _blocks(x_fp8.float())
    num_rows, num_blocks, _ = blocks.shape
    factors = x_scales
    if factors.dtype == torch.int32:
        exponents = factors.contiguous().view(torch.uint8).view(num_rows, -1)[:, :num_blocks]
        factors = (exponents.to(torch.int32) << 23).view(torch.float32)
    if factors.numel() != num_rows * num_blocks:
        raise ArrayError(
            f"x_scales is {x_scales.dtype} {list(x_scales.shape)}; "
            f"{num_blocks} scale factors are needed for each of {num_rows} rows"
        )
    rows = (blocks * factors.reshape(num_rows, num_blocks, 1)).to(torch.bfloat16).flatten(1)
    return rows[:, :num_columns].contiguous()


def hash_tensor(t: Any) -> int:
    """A sum over the memory of a tensor that is the same for the same elements in any order.

    Of its 32-bit words, as signed numbers; where the bytes do not make whole words, of its bytes. The host
    waits.
    """
    import torch

    rows = t.contiguous()
    if rows.storage_offset() * rows.element_size() % 4:  # no view of it has 32-bit words
        rows = rows.clone()
    in_bytes = rows.flatten().view(torch.uint8)
    return int((in_bytes if in_bytes.numel() % 4 else in_bytes.view(torch.int32)).sum())


def hash_tensors(*tensors: Any) -> int:
    """The hashes of tensors, of tuples and lists of them, combined by exclusive or; None counts as 0."""
    combined = 0
    for each in _flat(tensors):
        combined ^= hash_tensor(each)
    return combined


def inplace_unique(x: Any, num_slots: int) -> None:
    """Leave in each row every number once, the largest first, and -1 behind them. In place.

    Args:
        x: integers [num_rows, num_columns], below `num_slots`; negative ones count as none.

    Raises:
        ArrayError: `x` does not have two dimensions, or has larger numbers.
    """
    import torch

    _num_columns("x", x)
    if x.numel() == 0:
        return
    if int(x.max()) >= num_slots:
        raise ArrayError(f"x holds {int(x.max())}; num_slots={num_slots}")
    ordered = torch.sort(x, dim=1, descending=True).values
    is_repeated = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:].masked_fill_(is_repeated, -1)
    x.copy_(torch.sort(ordered.clamp(min=-1), dim=1, descending=True).values)


def create_grouped_scores(scores: Any, group_idx: Any, num_groups: int) -> Any:
    """The scores of experts in the groups that a token chose; 0 for the others.

    Args:
        scores: [num_tokens, num_experts]; each group has num_experts / `num_groups` consecutive experts.
        group_idx: int64 [num_tokens, number of chosen groups].

    Returns:
        As `scores`.
    """
    is_chosen = scores.new_zeros((len(scores), num_groups)).scatter_(1, group_idx, 1).bool()
    is_chosen = is_chosen.repeat_interleave(scores.shape[1] // num_groups, dim=1)
    return scores.masked_fill(~is_chosen, 0)


def _flat(tensors: Any) -> Iterator[Any]:
    """The tensors of nested tuples and lists."""
    for each in tensors:
        if isinstance(each, (tuple, list)):
            yield from _flat(each)
        elif each is not None:
            yield each


def _num_columns(name: str, rows: Any) -> int:
    if rows.dim() != 2:
        raise ArrayError(f"{name} is {list(rows.shape)}; expected two dimensions")
    return int(rows.shape[1])


def _blocks(rows: Any) -> Any:
    """[num_rows, num_blocks, 128], the last block filled up with zeros."""
    import torch

    num_rows, num_columns = rows.shape
    num_blocks = ceil_div(num_columns, _BLOCK)
    padded = torch.nn.functional.pad(rows, (0, num_blocks * _BLOCK - num_columns))
    return padded.reshape(num_rows, num_blocks, _BLOCK)
