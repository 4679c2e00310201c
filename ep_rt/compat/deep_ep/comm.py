"""What buffers and process groups have in common, as DeepEP names it from version 2.5 on."""

from typing import Any

from ep_rt.compat.deep_ep.utils import envs
from ep_rt.compat.elastic import ElasticBuffer

__all__ = [
    "barrier",
    "destroy_all_managed_nccl_comm",
    "get_comm_stream",
    "get_logical_domain_size",
    "get_physical_domain_size",
]


def barrier(buffer: Any, *args: Any, **options: Any) -> None:
    """`EPBuffer.barrier`. Collective."""
    buffer.barrier(*args, **options)


def get_comm_stream(buffer: Any) -> Any:
    """See `EPBuffer.get_comm_stream`."""
    return buffer.get_comm_stream()


def get_physical_domain_size(group_or_buffer: Any) -> tuple[int, int]:
    """Nodes, and ranks of one. Of a process group: see `utils.envs`, collective."""
    if isinstance(group_or_buffer, ElasticBuffer):
        return group_or_buffer.get_physical_domain_size()
    return envs.get_physical_domain_size(group_or_buffer)


def get_logical_domain_size(group_or_buffer: Any, allow_hybrid_mode: bool | None = None) -> tuple[int, int]:
    """The same; of a process group, without `allow_hybrid_mode`, all ranks are one domain."""
    if isinstance(group_or_buffer, ElasticBuffer):
        return group_or_buffer.get_logical_domain_size()
    return envs.get_logical_domain_size(group_or_buffer, allow_hybrid_mode is not False)


def destroy_all_managed_nccl_comm() -> None:
    """Nothing is kept that would have to be given back."""
