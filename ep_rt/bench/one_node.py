"""Calls over nodes beside the same on one node of all ranks: where NVLink joins the ranks that were split."""

from __future__ import annotations

from ..backend import MAX_CUDA_RANKS, gpu_place
from ..config import settings
from ..exchange import Group
from ..topology import ranks_joined
from .places import Place


def problem(group: Group, place: Place) -> str | None:
    """Why there is nothing to compare; None if there is. The same on every rank. Collective."""
    setting = place.setting
    if setting.backend != "cuda":
        return "the host backend has one level, whatever the nodes"
    if setting.num_nodes == 1:
        return "all ranks are on one node already; EP_RT_RANKS_PER_NODE splits them"
    if setting.num_ranks > MAX_CUDA_RANKS:
        return f"{setting.num_ranks} ranks; one node serves {MAX_CUDA_RANKS} at most"
    places = group.allgather(gpu_place(), op="bench places")
    known = [each for each in places if each is not None]
    is_joined = (
        len(known) == len(places)
        and len({each.host for each in known}) == 1
        # What splits the ranks may be EP_RT_NVLINK=0, so that is not asked.
        and ranks_joined(known, nvlink=settings().nvlink or None) is None
    )
    return None if is_joined else "NVLink does not join all GPUs"
