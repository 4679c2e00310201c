"""`EPHandle`: what a dispatch of DeepEP's elastic buffer returns."""

from __future__ import annotations

from typing import Any

from .. import buffer
from ..events import Event
from ..handle import DispatchHandle


class EPHandle:
    """The routing of a dispatch, for `ElasticBuffer.combine` and for repeated dispatches.

    What is not known at once is made when it is first looked at; on a GPU num_recv_tokens and
    recv_src_metadata wait for the dispatch, which a CUDA graph cannot. The other counts are on the device
    once the dispatch is done.

    Attributes:
        do_expand, num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: of the dispatch.
        topk_idx: as dispatched; a copy, unless ``do_handle_copy`` was False.
        num_recv_tokens: tokens that were sent here; without ``do_cpu_sync`` rows of the result.
        num_expanded_tokens: rows of an expanded result, else 0.
        num_recv_tokens_per_expert_list: counts rounded up to `expert_alignment`; without ``do_cpu_sync``
            empty.
        psum_num_recv_tokens_per_scaleup_rank: int32 [num_scaleup_ranks], inclusive, by source rank; between
            nodes by local rank.
        psum_num_recv_tokens_per_expert: int32 [num_local_experts], inclusive, of the rounded counts; if
            expanded, where the true rows of each expert end.
        num_unaligned_recv_tokens_per_expert: int32 [num_local_experts], true counts; None unless expanded.
        recv_src_metadata: int32 [received tokens, 2 + num_topk]: source rank * num_max_tokens_per_rank +
            source token, ascending; the row; expanded, the row of each column, -1 elsewhere. The first look
            is collective: all ranks, in the same order of calls.
        dst_buffer_slot_idx: int32 [num_tokens, num_topk], the number of a token among those that this rank
            sends to the rank of the expert; -1 where there is no expert.
        token_metadata_at_forward, channel_linked_list: None; nothing here has such.
        handle: what ep_rt's own calls take.
    """

    token_metadata_at_forward = None
    channel_linked_list = None

    def __init__(
        self,
        handle: DispatchHandle,
        owner: buffer.Buffer,
        *,
        topk_idx: Any,
        recv_topk_idx: Any,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        do_cpu_sync: bool,
        event: Event | None,
    ) -> None:
        self.handle = handle
        self._owner = owner
        self._event = event  # None where the current stream has waited
        self.do_expand = handle.layout == "expert"
        self.topk_idx = topk_idx
        self.recv_topk_idx = recv_topk_idx
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.num_recv_tokens_per_expert_list = (
            list(handle.num_recv_tokens_per_expert_list) if do_cpu_sync else []
        )
        self.num_expanded_tokens = handle.num_recv_rows if self.do_expand else 0
        if not do_cpu_sync:
            self.num_recv_tokens = handle.num_recv_rows

    def __getattr__(self, name: str) -> Any:
        """Make what is missing, once."""
        # Not cached_property: until Python 3.12 it has a lock, which ranks that are threads would share.
        make = getattr(type(self), f"_make_{name}", None)
        if make is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = make(self)
        setattr(self, name, value)
        return value

    def _make_num_recv_tokens(self) -> int:
        return self.handle.num_recv_tokens

    def _make_psum_num_recv_tokens_per_scaleup_rank(self) -> Any:
        return self.handle.psum_num_recv_tokens_per_local_rank

    def _make_psum_num_recv_tokens_per_expert(self) -> Any:
        handle = self.handle
        return handle.psum_num_tokens_per_expert if self.do_expand else handle.psum_num_recv_tokens_per_expert

    def _make_num_unaligned_recv_tokens_per_expert(self) -> Any:
        if not self.do_expand:
            return None
        if self._event is not None:
            self._event.wait(None)  # whoever looks need not have waited
        return unaligned(self.psum_num_recv_tokens_per_expert, self.expert_alignment)

    def _make_dst_buffer_slot_idx(self) -> Any:
        import torch

        ids, num_ranks = self.topk_idx.long(), self._owner.num_ranks
        nowhere = ids < 0
        ranks = (ids // (self.num_experts // num_ranks)).masked_fill(nowhere, num_ranks)
        is_sent = torch.zeros((len(ids), num_ranks + 1), dtype=torch.int32, device=ids.device)
        is_sent.scatter_(1, ranks, 1)
        slots = is_sent.cumsum(0, dtype=torch.int32) - 1
        return slots.gather(1, ranks).masked_fill(nowhere, -1)

    def _make_recv_src_metadata(self) -> Any:
        """The tokens say where they come from, and their ids, in one more dispatch."""
        import torch

        num_tokens, num_topk = self.topk_idx.shape
        device, owner = self.topk_idx.device, self._owner
        # Rows are a multiple of 16 bytes. 0 is left for padding.
        sent = torch.zeros((num_tokens, (num_topk + 4) // 4 * 4), dtype=torch.int32, device=device)
        first = owner.rank * self.num_max_tokens_per_rank
        sent[:, 0] = torch.arange(first + 1, first + 1 + num_tokens, device=device)
        sent[:, 1 : 1 + num_topk] = self.topk_idx
        out = owner.dispatch(sent.view(torch.uint8), handle=self.handle, zero_padding=self.do_expand)
        rows = out.recv_x.view(torch.int32)
        rows = rows[rows[:, 0] > 0].unique(dim=0) if self.do_expand else rows[: self.handle.num_recv_tokens]
        made = torch.full((len(rows), 2 + num_topk), -1, dtype=torch.int32, device=device)
        made[:, 0] = rows[:, 0] - 1
        made[:, 1] = torch.arange(len(rows), device=device)
        if self.do_expand:
            # Rows of an expert are in the order of (source rank, source token, column).
            ends = self.psum_num_recv_tokens_per_expert.tolist()
            counts = self.num_unaligned_recv_tokens_per_expert.tolist()
            first_expert = owner.rank * len(ends)
            for expert, (end, count) in enumerate(zip(ends, counts, strict=True)):
                token, column = torch.nonzero(
                    rows[:, 1 : 1 + num_topk] == first_expert + expert, as_tuple=True
                )
                made[token, 2 + column] = torch.arange(end - count, end, dtype=torch.int32, device=device)
        return made


def unaligned(psum: Any, alignment: int) -> Any:
    """True counts of experts whose segments begin at multiples of `alignment` and end at `psum`."""
    begins = (psum + (alignment - 1)) // alignment * alignment
    counts = psum.clone()
    counts[1:] -= begins[:-1]
    return counts
