"""`Config`, and the settings read from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

DEFAULT_TIMEOUT_S = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment says. Arguments of the API win over it."""

    backend: str | None
    ranks_per_node: int | None
    nvlink: bool | None
    cache_dir: Path
    nvshmem_home: Path | None


def settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read every environment variable of ep_rt.

    ``EP_RT_BACKEND``: backend used when the caller says ``"auto"``.
    ``EP_RT_RANKS_PER_NODE``: split ranks into virtual nodes of this size.
    ``EP_RT_NVLINK``: 0 or 1: whether NVLink joins the GPUs of a host, instead of asking the driver.
    ``EP_RT_CACHE_DIR``: compiled kernels; default ``$XDG_CACHE_HOME/ep_rt`` or ``~/.cache/ep_rt``.
    ``NVSHMEM_HOME``: an NVSHMEM other than that of the wheel. What NVSHMEM itself reads: `network_options`.
    """
    ranks_per_node = environ.get("EP_RT_RANKS_PER_NODE", "")
    if ranks_per_node and not (ranks_per_node.isdigit() and int(ranks_per_node) > 0):
        raise ConfigError(f"EP_RT_RANKS_PER_NODE={ranks_per_node!r} is not a positive integer")
    nvlink = environ.get("EP_RT_NVLINK", "")
    if nvlink not in ("", "0", "1"):
        raise ConfigError(f"EP_RT_NVLINK={nvlink!r} is neither 0 nor 1")
    cache_home = Path(environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return Settings(
        backend=environ.get("EP_RT_BACKEND") or None,
        ranks_per_node=int(ranks_per_node) if ranks_per_node else None,
        nvlink=nvlink == "1" if nvlink else None,
        cache_dir=Path(environ.get("EP_RT_CACHE_DIR") or cache_home / "ep_rt"),
        nvshmem_home=Path(environ["NVSHMEM_HOME"]) if environ.get("NVSHMEM_HOME") else None,
    )


def xla_cpu_threads(environ: Mapping[str, str] = os.environ) -> int:
    """How many threads XLA starts on CPUs: what ``NPROC`` says, else one for each core that it may use."""
    number = environ.get("NPROC", "")
    return int(number) if number.isdigit() else len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Config:
    """Tuning of the normal mode, with DeepEP's names and positional order.

    Args:
        num_sms: streaming multiprocessors a kernel may use. In calls over several nodes two kernels run at
            the same time, the one within the node and the one that crosses the network.
        num_max_nvl_chunked_send_tokens, num_max_rdma_chunked_send_tokens: tokens per progress update.
        num_max_nvl_chunked_recv_tokens, num_max_rdma_chunked_recv_tokens: tokens a ring holds.

    Rows are received straight into the result, so the chunk sizes shape nothing here: they are accepted and
    checked so that programs that tune them run unchanged. The host backend uses none of the values.
    """

    num_sms: int = 16
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to pass as ``num_nvl_bytes`` for rows of `hidden_bytes` among `num_ranks` ranks.

        Results lie in that memory: enough for two of them with 4096 tokens from every rank. Where tokens are
        more, `Buffer.for_moe` knows what they need.
        """
        return _align_up(2 * num_ranks * _HINT_TOKENS * _slot_bytes(hidden_bytes))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to pass as ``num_rdma_bytes``; 0 for ranks of a single node of 8.

        Enough for the usual rings between nodes of 8, and for smaller ones between nodes of fewer,
        for rows of up to 16384 float32.
        """
        if num_ranks <= 8:
            return 0
        return 2 * max(-(-num_ranks // 8) * _RINGS_BYTES, num_ranks * _LEAST_RINGS_BYTES)


_HINT_TOKENS = 4096
# Of the rings to a node, in one direction: of the usual ones, and of those with a single channel.
_RINGS_BYTES = 16 << 20
_LEAST_RINGS_BYTES = _RINGS_BYTES // 32


def _slot_bytes(hidden_bytes: int) -> int:
    """A row with the metadata of up to 64 experts: id, weight, source."""
    return hidden_bytes + 64 * (8 + 4) + 16


def _align_up(num_bytes: int, alignment: int = 1 << 20) -> int:
    return -(-num_bytes // alignment) * alignment
