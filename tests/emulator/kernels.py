"""The product's kernels with few threads, loaded, and their arguments as the product binds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ep_rt.cuda import kernel_spec, kernels, launch
from ep_rt.cuda.kernel_spec import KernelSpec

from . import build
from .machine import Array, EmulatedKernel


def small(spec: KernelSpec, *, num_data_warps: int = 1, stage_bytes: int = 64) -> KernelSpec:
    """The same kernel with few threads and short stages, so that schedules are cheap and pieces many."""
    cfg: Any = spec.cfg
    if isinstance(cfg, kernel_spec.IntranodeDispatchCfg):
        # What is cast comes in steps of 2 KiB, with a scale for every 256 bytes.
        stage_bytes = 2048 if cfg.quantizes else stage_bytes
        cfg = replace(
            cfg,
            num_threads=32 * (num_data_warps + 2),
            num_data_warps=num_data_warps,
            stage_bytes=stage_bytes,
            scale_bytes=32,
        )
    elif isinstance(cfg, kernel_spec.ExpandCfg):
        cfg = replace(
            cfg,
            num_threads=32 * (num_data_warps + 1),
            num_data_warps=num_data_warps,
            stage_bytes=stage_bytes,
            scale_bytes=32,
        )
    elif isinstance(cfg, kernel_spec.IntranodeCombineCfg | kernel_spec.CollapseCfg):
        cfg = replace(cfg, num_threads=32 * (num_data_warps + 1), num_stages=2, stage_bytes=512)
    elif isinstance(cfg, kernel_spec.WireLimitCfg):
        cfg = replace(cfg, num_threads=64, num_stages=3, stage_bytes=512)
    elif isinstance(
        cfg,
        kernel_spec.LowLatencyDispatchCfg
        | kernel_spec.LowLatencyCombineCfg
        | kernel_spec.DispatchLayoutCfg
        | kernel_spec.ContiguousCfg
        | kernel_spec.InternodeLayoutCfg
        | kernel_spec.InternodeExchangeCfg
        | kernel_spec.InternodeSumCfg,
    ):
        cfg = replace(cfg, num_threads=64)
    return replace(spec, cfg=cfg, shared_bytes=_shared_bytes(spec, cfg))


def _shared_bytes(spec: KernelSpec, cfg: Any) -> int:
    """As `kernels` says it for the shapes of the product."""
    if not spec.shared_bytes:
        return 0
    warps = getattr(cfg, "num_data_warps", cfg.num_threads // 32)
    stages = warps * cfg.num_stages * (cfg.stage_bytes + getattr(cfg, "scale_bytes", 0))
    return max(int(stages), spec.shared_bytes_sm80)


@dataclass(slots=True)
class Kernels:
    """Kernels of one code path, loaded when they are first asked for.

    Args:
        architecture: 900 for bulk copies, 800 for loads and stores.
        num_data_warps: of the small kernels.
        is_small: else all have the product's shapes.
        counts: those of the normal mode add up what they move.
    """

    architecture: int = 900
    num_data_warps: int = 1
    is_small: bool = True
    counts: bool = False
    sources: Path = build.KERNELS_CU
    loaded: dict[str, EmulatedKernel] = field(default_factory=dict)

    def __call__(self, spec: KernelSpec) -> EmulatedKernel:
        if spec.name not in self.loaded:
            self.loaded[spec.name] = EmulatedKernel.load(spec, self.architecture, sources=self.sources)
        return self.loaded[spec.name]

    def small(self, spec: KernelSpec) -> EmulatedKernel:
        return self(small(spec, num_data_warps=self.num_data_warps) if self.is_small else spec)

    def barrier(self, num_ranks: int) -> EmulatedKernel:
        return self(kernels.barrier(num_ranks))

    def dispatch(self, *, quantizes: bool = False, segmented: bool = False) -> EmulatedKernel:
        return self.small(
            kernels.intranode_dispatch(quantizes=quantizes, segmented=segmented, counts=self.counts)
        )

    def combine(self, element: str, *, segmented: bool = False) -> EmulatedKernel:
        return self.small(kernels.intranode_combine(element, segmented=segmented, counts=self.counts))

    def expand(self) -> EmulatedKernel:
        return self.small(kernels.expand())

    def collapse(self, element: str) -> EmulatedKernel:
        return self.small(kernels.collapse(element))

    def normal(self, num_ranks: int, elements: Sequence[str]) -> list[EmulatedKernel]:
        """Dispatch, combine for rows of `elements`, and what stands beside them."""
        beside = [self.barrier(num_ranks), self(host_reads())]
        return [*beside, self.dispatch(), *map(self.combine, elements)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsCfg:
    """Of the kernels that the tests bring."""

    num_threads: int


def host_reads() -> KernelSpec:
    """A host that waits for the result of a dispatch."""
    return KernelSpec(
        source="host_reads.cu",
        function="host_reads",
        cfg=ThreadsCfg(num_threads=32),
        args=np.dtype(
            [("result", "<u8"), ("copy", "<u8"), ("call", "<u8"), ("timeout_ns", "<u8")], align=True
        ),
    )


def bound(kernel: EmulatedKernel, *fields: dict[str, Any]) -> Array:
    """The arguments of a launch, as the product binds them."""
    return cast(Array, launch.bind(cast(launch.Kernel, _Packing(kernel)), 0, *fields))


@dataclass(frozen=True, slots=True)
class _Packing:
    kernel: EmulatedKernel

    @property
    def spec(self) -> KernelSpec:
        return self.kernel.spec

    def bind(self, args: Array, *, num_blocks: int, starts_early: bool = False) -> Array:
        return args
