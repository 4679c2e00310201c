"""What a kernel is: the shape of its code, its arguments, and the resources it needs.

A `KernelSpec` is an instance of a template of `kernels_cu`; which there are stands in `kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Protocol

from .layout import Struct
from .linker import MAX_REGISTERS


class Cfg(Protocol):
    """A dataclass of ints: what shapes the code of a kernel. Twin of the C++ struct of the same name."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def num_threads(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierCfg:
    max_ranks: int
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IntranodeDispatchCfg:
    num_threads: int
    num_data_warps: int
    num_stages: int
    stage_bytes: int
    scale_bytes: int
    quantizes: int
    segmented: int
    counts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IntranodeCombineCfg:
    num_threads: int
    num_stages: int
    stage_bytes: int
    element: int
    segmented: int
    counts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandCfg:
    num_threads: int
    num_data_warps: int
    num_stages: int
    stage_bytes: int
    scale_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseCfg:
    num_threads: int
    num_stages: int
    stage_bytes: int
    element: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LowLatencyDispatchCfg:
    num_threads: int
    quantizes: int
    over_network: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LowLatencyCombineCfg:
    num_threads: int
    wire: int
    over_network: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLayoutCfg:
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContiguousCfg:
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimitCfg:
    num_threads: int
    num_stages: int
    stage_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NvshmemPingCfg:
    scope: int
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InternodeLayoutCfg:
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InternodeExchangeCfg:
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InternodeSumCfg:
    num_threads: int
    element: int


_SM_REGISTERS: Final = 65536  # of every architecture that is served


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One instance of a kernel template.

    Attributes:
        source: file in `kernels_cu`.
        function: the template in namespace ep; its structs are named after it (BarrierCfg, BarrierArgs).
        cfg: the template argument; all its fields are ints.
        args: the argument struct.
        shared_bytes: dynamic shared memory from Hopper on, where rows pass through it.
        shared_bytes_sm80: before.
        blocks_per_sm: that are to be resident together, which bounds their registers.
        uses_network: it includes network.cuh, is linked with NVSHMEM, and runs once NVSHMEM is initialised.
    """

    source: str
    function: str
    cfg: Cfg
    args: Struct
    shared_bytes: int = 0
    shared_bytes_sm80: int = 0
    blocks_per_sm: int = 1
    uses_network: bool = False

    @property
    def max_registers(self) -> int:
        """Of a thread, so that `blocks_per_sm` are resident."""
        per_thread = _SM_REGISTERS // (self.cfg.num_threads * self.blocks_per_sm)
        return min(MAX_REGISTERS, per_thread // 8 * 8)

    @property
    def name(self) -> str:
        """The symbol, and the stem of the file in the cache: ``barrier_r8_t32``."""
        shape = (
            f"{field.name.split('_')[-1][0]}{getattr(self.cfg, field.name)}" for field in fields(self.cfg)
        )
        return "_".join((self.function, *shape))

    @property
    def struct_prefix(self) -> str:
        """``"IntranodeDispatch"`` of IntranodeDispatchCfg and IntranodeDispatchArgs."""
        return self.function.title().replace("_", "")

    @property
    def cfg_initializer(self) -> str:
        """The configuration as C++ writes it, by name."""
        return ", ".join(f".{field.name} = {getattr(self.cfg, field.name)}" for field in fields(self.cfg))
