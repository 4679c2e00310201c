"""An operation beside a product of matrices, as a layer that overlaps communication with its experts has it.

The operation runs on a stream of the highest priority, in CUDA graphs, the product on an ordinary one. Each
is timed alone, and while the other one runs all the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

from ..exchange import Group
from .measure import NUM_IN_GRAPH, CudaTimer
from .places import CudaPlace

_NUM_ALONE: Final = 10  # products, or graphs, of a reading
_EXCESS: Final = 3.0  # of what is not timed, so that it ends last


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideTimes:
    """What one rank read, in microseconds: of an operation and of a product, alone and beside the other."""

    op_alone_us: tuple[float, ...]
    op_us: tuple[float, ...]
    product_alone_us: tuple[float, ...]
    product_us: tuple[float, ...]


class Product:
    """A product of two square float16 matrices on the current device, by CuPy, so by cuBLAS.

    Args:
        size: rows and columns.
    """

    def __init__(self, group: Group, place: CudaPlace, timer: CudaTimer, size: int, repeat: int) -> None:
        import cupy

        self._group, self._place, self._timer, self._repeat = group, place, timer, repeat
        rng = np.random.default_rng(group.rank)
        self._factors = [
            place.put(rng.standard_normal((size, size), np.float32).astype(np.float16)) for _ in range(2)
        ]
        self._product = place.put(np.zeros((size, size), np.float16))
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # Below the least, the driver takes that.
        self._urgent = cupy.cuda.Stream(non_blocking=True, priority=-100)
        self._multiply(3)
        self._stream.synchronize()

    def measure(self, run: Callable[[], Any]) -> BesideTimes:
        """Collective; every rank runs the same operation, which can be captured."""
        with self._urgent:
            graph, kept = self._timer.captured(run, self._urgent)
            graph.launch(self._urgent)

            def operations(count: int) -> None:
                for _ in range(count):
                    graph.launch(self._urgent)

            op_alone = self._timed(self._urgent, operations, _NUM_ALONE)
            product_alone = self._timed(self._stream, self._multiply, _NUM_ALONE)
            # All ranks have the same numbers: operations of one wait for the others.
            medians = median(op_alone) * NUM_IN_GRAPH, median(product_alone)
            everyone = self._group.allgather(medians, op="bench product")
            graph_us, product_us = (max(each) for each in zip(*everyone, strict=True))
            num_products = math.ceil(_EXCESS * _NUM_ALONE * graph_us / product_us) + 2
            num_graphs = math.ceil(_EXCESS * num_products * product_us / graph_us) + 2
            op = self._timed(self._urgent, operations, _NUM_ALONE, lambda: self._multiply(num_products))
            product = self._timed(self._stream, self._multiply, num_products, lambda: operations(num_graphs))
        self._group.barrier()
        del kept  # not before all ranks are done
        return BesideTimes(
            op_alone_us=tuple(reading / NUM_IN_GRAPH for reading in op_alone),
            op_us=tuple(reading / NUM_IN_GRAPH for reading in op),
            product_alone_us=product_alone,
            product_us=product,
        )

    def _multiply(self, count: int) -> None:
        import cupy

        with self._stream:
            for _ in range(count):
                cupy.matmul(*self._factors, out=self._product)

    def _timed(
        self,
        stream: Any,
        enqueue: Callable[[int], None],
        count: int,
        beside: Callable[[], None] = lambda: None,
    ) -> tuple[float, ...]:
        """Microseconds for each of `count`; what is enqueued beside them starts first, and must end last."""
        import cupy

        readings = []
        for _ in range(self._repeat):
            first, last = cupy.cuda.Event(), cupy.cuda.Event()
            self._group.barrier()
            beside()
            first.record(stream)
            enqueue(count)
            last.record(stream)
            self._stream.synchronize()
            self._urgent.synchronize()
            readings.append(float(cupy.cuda.get_elapsed_time(first, last)) * 1e3 / count)
        return tuple(readings)
