"""An operation beside a product of matrices, as a layer that overlaps communication with its experts has it.

The operation runs on a stream of the highest priority, in CUDA graphs, the product on an ordinary one. Each
is timed alone, and while the other one runs all the time; then the product may leave some SMs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

from ..cublas import leaving_sms
from ..exchange import Group
from .measure import NUM_IN_GRAPH, CudaTimer
from .places import CudaPlace

_NUM_GRAPHS: Final = 10  # of a reading
_NUM_PRODUCTS: Final = 100
_EXCESS: Final = 4.0  # of what is not timed, so that it ends last


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
        num_left_sms: that the product leaves to an operation beside it.
    """

    def __init__(
        self, group: Group, place: CudaPlace, timer: CudaTimer, size: int, *, num_left_sms: int, repeat: int
    ) -> None:
        import cupy

        self._group, self._timer, self._repeat = group, timer, repeat
        self._num_left_sms = num_left_sms
        rng = np.random.default_rng(group.rank)
        self._factors = [
            place.put(rng.standard_normal((size, size), np.float32).astype(np.float16)) for _ in range(2)
        ]
        self._product = place.put(np.zeros((size, size), np.float16))
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # Below the least, the driver takes that.
        self._urgent = cupy.cuda.Stream(non_blocking=True, priority=-100)
        for multiply in (self._multiply, self._multiply_beside):
            multiply(3)
        self._stream.synchronize()

    def measure(self, run: Callable[[], Any]) -> BesideTimes:
        """Collective; every rank runs the same operation, which can be captured."""
        with self._urgent:
            graph, kept = self._timer.captured(run, self._urgent)
            graph.launch(self._urgent)

            def operations(count: int) -> None:
                for _ in range(count):
                    graph.launch(self._urgent)

            def most(readings: tuple[float, ...]) -> float:
                """Of all ranks: numbers must be the same for them, whose operations wait for each other."""
                return float(max(self._group.allgather(median(readings), op="bench product")))

            op_alone = self._timed(self._urgent, operations, _NUM_GRAPHS)
            product_alone = self._timed(self._stream, self._multiply, _NUM_PRODUCTS)
            product_us = most(product_alone)
            # An operation may wait for a product that fills the device, besides its own time.
            op_beside_us = most(op_alone) + NUM_IN_GRAPH * product_us
            num_products = math.ceil(_EXCESS * _NUM_GRAPHS * op_beside_us / product_us)
            op = self._timed(
                self._urgent, operations, _NUM_GRAPHS, lambda: self._multiply_beside(num_products)
            )
            num_graphs = math.ceil(_EXCESS * _NUM_PRODUCTS * product_us / most(op))
            product = self._timed(
                self._stream, self._multiply_beside, _NUM_PRODUCTS, lambda: operations(num_graphs)
            )
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

    def _multiply_beside(self, count: int) -> None:
        with leaving_sms(self._num_left_sms, framework="cupy"):
            self._multiply(count)

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
