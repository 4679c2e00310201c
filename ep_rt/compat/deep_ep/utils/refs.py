"""Dispatch and combine in plain torch, as DeepEP's tests import them to compare with.

Ranks are those of torch's default process group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ep_rt.compat.deep_ep.utils.envs import get_global_seed
from ep_rt.errors import ArrayError, ConfigError

_SPREAD = 131071


class Received(NamedTuple):
    """What `dispatch` returns, in the order of source ranks, and of their tokens.

    Attributes:
        x: rows, as they were sent; a tuple if that was one.
        topk_idx: [num_recv_tokens, num_topk], numbered from this rank's first expert; -1 for those of others.
        topk_weights: all weights of the token, or None.
        src_token_idx: int32 [num_recv_tokens], source rank * num_max_tokens_per_rank + token.
        num_tokens_per_rank: int32 [num_ranks], from each rank.
    """

    x: Any
    topk_idx: Any
    topk_weights: Any
    src_token_idx: Any
    num_tokens_per_rank: Any


def dispatch(
    x: Any, topk_idx: Any, topk_weights: Any, num_max_tokens_per_rank: int, num_experts: int
) -> Received:
    """Send every token once to each rank that has one of its experts. The host waits.

    Args:
        x: [num_tokens, hidden] of any dtype, or a tuple of that and [num_tokens, columns].
        topk_idx: integers [num_tokens, num_topk], negative for none.
        topk_weights: [num_tokens, num_topk], or None.
        num_max_tokens_per_rank: the same on all ranks, at least `num_tokens`.
        num_experts: of all ranks, which have equally many.

    Raises:
        ConfigError: `num_experts` is no multiple of the number of ranks.
        ArrayError: arrays have different numbers of tokens. In both cases nothing was sent.

    Collective.
    """
    import torch
    import torch.distributed as dist

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if num_experts % num_ranks:
        raise ConfigError(f"{num_experts=} is no multiple of {num_ranks=}")
    num_local_experts = num_experts // num_ranks
    parts = x if isinstance(x, tuple) else (x,)
    arrays = (*parts, topk_idx, *(() if topk_weights is None else (topk_weights,)))
    if len({len(each) for each in arrays}) > 1:
        raise ArrayError(f"arrays of {[len(each) for each in arrays]} tokens")
    ranks = topk_idx.div(num_local_experts, rounding_mode="floor")
    goes = torch.stack([(ranks == dst_rank).any(dim=1) for dst_rank in range(num_ranks)])
    tokens = goes.nonzero()[:, 1]
    num_sent = goes.sum(dim=1, dtype=torch.int32)
    num_received = torch.empty_like(num_sent)
    dist.all_to_all_single(num_received, num_sent)
    splits = num_received.tolist(), num_sent.tolist()

    src_token_idx = (tokens + rank * num_max_tokens_per_rank).to(torch.int32).unsqueeze(1)
    received = [_exchanged(each, tokens, *splits) for each in arrays]
    first = rank * num_local_experts
    local_idx = received[len(parts)] - first
    local_idx.masked_fill_((local_idx < 0) | (local_idx >= num_local_experts), -1)
    return Received(
        tuple(received[: len(parts)]) if isinstance(x, tuple) else received[0],
        local_idx,
        None if topk_weights is None else received[-1],
        _exchanged(src_token_idx, torch.arange(len(tokens), device=tokens.device), *splits).flatten(),
        num_received,
    )


def combine(
    y: Any,
    topk_idx: Any,
    num_scaleout_ranks: int,
    num_scaleup_ranks: int,
    num_experts: int,
    bias: Any,
    reduce_in_local: bool,
    reduce_in_scaleup: bool,
) -> Any:
    """Sum the rows of a token's experts, with the bits of `ElasticBuffer.combine` on GPUs. Local.

    Sums are taken in float32: of columns in their order, of ranks and of nodes in theirs, and biases come
    last. DeepEP's own begins with the biases, and takes ranks in the order of columns.

    Args:
        y: [num_tokens, num_topk, hidden], the row of each expert of a token; 0 where there is none.
        topk_idx: [num_tokens, num_topk].
        num_scaleout_ranks, num_scaleup_ranks: nodes, and ranks of one.
        bias: [num_tokens, hidden], a tuple of two, or None.
        reduce_in_local: first sum the columns of each rank, and round.
        reduce_in_scaleup: then the ranks of each node, and round.

    Returns:
        [num_tokens, hidden], dtype of `y`.

    Raises:
        ConfigError: `reduce_in_scaleup` without `reduce_in_local`.
    """
    import torch

    if reduce_in_scaleup and not reduce_in_local:
        raise ConfigError("reduce_in_scaleup needs reduce_in_local")
    num_ranks = num_scaleout_ranks * num_scaleup_ranks
    if reduce_in_local:
        ranks = topk_idx.div(num_experts // num_ranks, rounding_mode="floor").unsqueeze(2)
        sums = [ordered_accumulate(y.masked_fill(ranks != rank, 0)) for rank in range(num_ranks)]
        y = torch.stack(sums, dim=1)
    if reduce_in_scaleup:
        y = torch.stack([ordered_accumulate(node) for node in y.split(num_scaleup_ranks, dim=1)], dim=1)
    biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
    return ordered_accumulate(torch.cat([y, *(each.unsqueeze(1) for each in biases)], dim=1))


def ordered_accumulate(data: Any, initial_value: Any = None) -> Any:
    """Sum over the second dimension in its order, in float32.

    Args:
        data: [num_tokens, num_topk, hidden].
        initial_value: [num_tokens, hidden], what the sum begins with; by default 0.

    Returns:
        [num_tokens, hidden], dtype of `data`.
    """
    import torch

    if initial_value is None:
        total = torch.zeros_like(data[:, 0], dtype=torch.float32)
    else:
        total = initial_value.to(torch.float32, copy=True)
    for column in data.unbind(dim=1):
        total += column
    return total.to(data.dtype)


def generate_pre_combine_data(
    src_token_global_idx: Any, num_max_tokens_per_rank: int, num_topk: int, hidden: int
) -> Any:
    """Rows for a combine that any rank can make for any token.

    Element [i, j, k] is sin(s * (k + 1) + sin(`get_global_seed`)), where s is one of the steps in (0, 1] that
    number the columns of all tokens, shuffled: with n steps, and e = src_token_global_idx[i] * num_topk + j,
    it is (131071 * e % n + 1) / n.

    Args:
        src_token_global_idx: integers [num_tokens], see `Received.src_token_idx`.

    Returns:
        bfloat16 [num_tokens, num_topk, hidden].
    """
    import torch
    import torch.distributed as dist

    device = src_token_global_idx.device
    num_steps = dist.get_world_size() * num_max_tokens_per_rank * num_topk
    column = src_token_global_idx.long().unsqueeze(1) * num_topk + torch.arange(num_topk, device=device)
    step = ((column * _SPREAD % num_steps).float() + 1) / num_steps
    places = torch.arange(1, hidden + 1, dtype=torch.float32, device=device)
    angle = step.unsqueeze(2) * places + math.sin(get_global_seed())
    return torch.sin(angle).to(torch.bfloat16)


def _exchanged(rows: Any, index: Any, num_received: Sequence[int], num_sent: Sequence[int]) -> Any:
    """Rows by index to ranks in order, so many to each; as bytes, since no backend knows all dtypes."""
    import torch
    import torch.distributed as dist

    row_bytes = rows.shape[1] * rows.element_size()
    in_bytes = rows.contiguous().view(torch.uint8).view(len(rows), row_bytes)[index]
    received = in_bytes.new_empty((sum(num_received), row_bytes))
    dist.all_to_all_single(received, in_bytes, list(num_received), list(num_sent))
    return received.view(rows.dtype)
