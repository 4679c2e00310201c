"""Per `.cu` file: what shapes its code, what its arguments are, and which instances there are.

An instance is a `KernelSpec`. Its argument struct is described once, as a NumPy dtype with C alignment: the
host packs by it and the rendered source asserts it, so both sides agree or the kernel does not compile.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from ..errors import TopologyError
from .layout import MAX_RANKS, Struct, align_up


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierCfg:
    """What shapes the code of `barrier.cu`. Twin of its struct of the same name."""

    max_ranks: int
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One instance of a kernel template.

    Attributes:
        source: file in `kernels_cu`.
        function: the template in namespace ep; its structs are named after it (BarrierCfg, BarrierArgs).
        cfg: the template argument; all its fields are ints.
        args: the argument struct.
    """

    source: str
    function: str
    cfg: BarrierCfg
    args: Struct

    @property
    def name(self) -> str:
        """The symbol, and the stem of the file in the cache: ``barrier_r8_t32``."""
        shape = (
            f"{field.name.split('_')[-1][0]}{getattr(self.cfg, field.name)}" for field in fields(self.cfg)
        )
        return "_".join((self.function, *shape))

    @property
    def struct_prefix(self) -> str:
        """``"Barrier"`` of BarrierCfg and BarrierArgs."""
        return self.function.title().replace("_", "")

    @property
    def cfg_initializer(self) -> str:
        """The configuration as C++ writes it, by name."""
        return ", ".join(f".{field.name} = {getattr(self.cfg, field.name)}" for field in fields(self.cfg))


def barrier(num_ranks: int) -> KernelSpec:
    """The barrier's instance for `num_ranks`.

    Raises:
        TopologyError: more ranks than one NVLink domain has.
    """
    if num_ranks > MAX_RANKS:
        raise TopologyError(f"{num_ranks} ranks in one NVLink domain; at most {MAX_RANKS} are supported")
    # Up to 8 ranks the arguments stay within two cache lines and one warp does all.
    max_ranks = 8 if num_ranks <= 8 else MAX_RANKS
    return KernelSpec(
        source="barrier.cu",
        function="barrier",
        cfg=BarrierCfg(max_ranks=max_ranks, num_threads=align_up(max_ranks, 32)),
        args=np.dtype(
            [
                ("hang", "<u8"),
                ("timeout_ns", "<u8"),
                ("rank", "<i4"),
                ("num_ranks", "<i4"),
                ("operation", "<u8"),
                ("slabs", "<u8", (max_ranks,)),
            ],
            align=True,
        ),
    )


def all_specs() -> list[KernelSpec]:
    """Every instance that can be asked for."""
    return [barrier(8), barrier(MAX_RANKS)]
