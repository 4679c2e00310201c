"""Scores of a gate that favours the experts of one rank, as DeepEP's benchmarks import them.

Numbers are drawn from torch's generator, on the GPU if there is one; they are not those that DeepEP draws.
"""

from __future__ import annotations

from typing import Any

from ep_rt.compat.deep_ep.utils.math import ceil_div
from ep_rt.errors import ConfigError

_NUM_HALVINGS = 20
_MAX_FACTOR = 100.0
_CHOSEN_FROM = 0.9


def get_unbalanced_scores(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float, precise: bool
) -> Any:
    """Scores whose largest `num_topk` send about `ratio` times as many tokens to rank 0 as to another rank.

    A token counts once for each rank that has one of its experts, of which every rank has as many.

    Args:
        precise: let the ratio be met, and the other ranks receive equally many tokens, as closely as whole
            tokens allow; no gate scores like that. Else the scores of rank 0 are larger by a factor, up to
            100, and the ratio is met on average.

    Returns:
        float32 [num_tokens, num_experts], from 0 on.

    Raises:
        ConfigError: `num_experts` is no multiple of `num_ranks`, `num_topk` experts are not there, `ratio` is
            below 1, or, with `precise`, no token can have so few ranks as `ratio` takes.
    """
    if num_ranks < 1 or num_experts % num_ranks or not 1 <= num_topk <= num_experts:
        raise ConfigError(f"{num_topk=} of {num_experts=} on {num_ranks=}")
    if ratio < 1:
        raise ConfigError(f"ratio={ratio} is below 1")
    if precise:
        return _precise_scores(num_tokens, num_experts, num_ranks, num_topk, ratio)
    factor = 1.0
    if ratio > 1:
        factor = map_unbalanced_ratio_to_factor(num_tokens, num_experts, num_ranks, num_topk, ratio)
    return _favouring(_rand(num_tokens, num_experts), num_ranks, factor)


def map_unbalanced_ratio_to_factor(
    num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float
) -> float:
    """How many times larger the scores of rank 0 must be for `ratio`, see `get_unbalanced_scores`.

    Found by halving the range from 1 to 100, over one draw of the scores. The host waits.
    """
    if num_ranks == 1:
        return 1.0
    drawn = _rand(num_tokens, num_experts)
    low, high = 1.0, _MAX_FACTOR
    for _ in range(_NUM_HALVINGS):
        factor = (low + high) / 2
        chosen = _favouring(drawn, num_ranks, factor).topk(num_topk, dim=1).indices
        counts = _ranks_of(chosen, num_experts, num_ranks).float().sum(dim=0)
        if float(counts[0]) > ratio * float(counts[1:].mean()):
            high = factor
        else:
            low = factor
    return low


def _precise_scores(num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float) -> Any:
    """Choose ranks for every token, then experts of them, then scores that choose these experts."""
    num_local_experts = num_experts // num_ranks
    ranks = _precise_ranks(num_tokens, num_experts, num_ranks, num_topk, ratio)
    # The experts of a token are spread over its ranks as evenly as can be, the first ranks having more.
    num_chosen = ranks.sum(dim=1, keepdim=True)
    has_more = ranks.cumsum(dim=1) <= num_topk % num_chosen
    quota = (num_topk // num_chosen + has_more) * ranks
    place = _rand(num_tokens, num_ranks, num_local_experts).argsort(dim=2).argsort(dim=2)
    is_chosen = (place < quota.unsqueeze(2)).view(num_tokens, num_experts)
    scores = _rand(num_tokens, num_experts)
    # Between the two there is a gap, which rounding does not close.
    chosen = _CHOSEN_FROM + (1 - _CHOSEN_FROM) * scores
    return chosen.where(is_chosen, 0.99 * _CHOSEN_FROM * scores)


def _precise_ranks(num_tokens: int, num_experts: int, num_ranks: int, num_topk: int, ratio: float) -> Any:
    """bool [num_tokens, num_ranks]: the ranks of each token, as many as chance gives it where that can be."""
    import torch

    num_others = num_ranks - 1
    # So many ranks for each token, and rank 0 among them, would be the ratio.
    most = min(num_topk, num_ranks, int(num_others / ratio) + 1)
    if most < ceil_div(num_topk, num_experts // num_ranks):
        raise ConfigError(
            f"{ratio=} leaves at most {most} ranks to a token, which have fewer than {num_topk=} experts"
        )
    by_chance = _rand(num_tokens, num_experts).topk(num_topk, dim=1).indices
    sizes = _ranks_of(by_chance, num_experts, num_ranks).sum(dim=1).clamp(max=most)
    has_all = sizes == num_ranks
    num_first = round(int(sizes.sum()) * ratio / (num_others + ratio))
    num_first = max(int(has_all.sum()), min(num_first, num_tokens))
    is_first = torch.zeros_like(has_all)
    is_first[(has_all + _rand(num_tokens)).topk(num_first).indices] = True
    if num_others == 0:
        return is_first.unsqueeze(1)
    # The rest of the places go round the other ranks.
    rest = sizes - is_first.long()
    begin = rest.cumsum(dim=0) - rest
    turn = torch.randperm(num_others, device=sizes.device)
    others = (turn - begin.unsqueeze(1)) % num_others < rest.unsqueeze(1)
    ranks = torch.cat([is_first.unsqueeze(1), others], dim=1)
    return ranks[torch.randperm(num_tokens, device=sizes.device)]


def _ranks_of(experts: Any, num_experts: int, num_ranks: int) -> Any:
    """bool [num_tokens, num_ranks]: whether a token has an expert there."""
    ranks = experts // (num_experts // num_ranks)
    return ranks.new_zeros((len(ranks), num_ranks)).scatter_(1, ranks, 1).bool()


def _favouring(scores: Any, num_ranks: int, factor: float) -> Any:
    """The scores, those of the first rank's experts `factor` times as large."""
    scores = scores.clone()
    scores[:, : scores.shape[1] // num_ranks] *= factor
    return scores


def _rand(*shape: int) -> Any:
    import torch

    return torch.rand(shape, dtype=torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")
