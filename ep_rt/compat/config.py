"""`Config` with DeepEP's defaults, and hints that fit programs which do not know ep_rt."""

from __future__ import annotations

from typing import Final

from .. import config

_MOST_RANKS: Final = 16


class Config(config.Config):
    """Tuning of the normal mode: only `num_sms` shapes a call, see `ep_rt.Config`."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        super().__init__(
            num_sms,
            num_max_nvl_chunked_send_tokens,
            num_max_nvl_chunked_recv_tokens,
            num_max_rdma_chunked_send_tokens,
            num_max_rdma_chunked_recv_tokens,
        )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to pass as ``num_nvl_bytes``: for two results of 8192 tokens from every rank, at most 16.

        In DeepEP these bytes are rings, whatever the number of tokens; here results lie in them. With more
        ranks that is room for twice what a rank receives on average of tokens with 8 experts.
        """
        return 2 * super().get_nvl_buffer_size_hint(hidden_bytes, min(num_ranks, _MOST_RANKS))
