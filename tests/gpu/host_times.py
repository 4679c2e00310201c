"""Host time until calls return, with the same numbers of tokens and rows in every call, and with other ones.

``mpirun -n 2 python tests/gpu/host_times.py``: a process for each GPU. The stream is idle before each call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import cupy
import numpy as np
from ranks import device_count

import ep_rt
from ep_rt.groups import as_group

MAX_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 4095, 1024, 256, 8
SAME = 1000
NUM_CALLS, NUM_WARM = 230, 30
OPERATIONS = ("dispatch, num_worst_tokens", "dispatch, exact", "with a handle", "combine")


def measure(buffer: ep_rt.Buffer, stream: Any, layout: str, counts: list[int]) -> list[float]:
    """Microseconds of this rank for each of `OPERATIONS`, medians over calls with these numbers of tokens."""
    rng = np.random.default_rng(buffer.rank)
    x = cupy.asarray(rng.standard_normal((MAX_TOKENS, HIDDEN)).astype(np.float16))
    drawn = np.argsort(rng.random((MAX_TOKENS, NUM_EXPERTS)), axis=1)[:, :NUM_TOPK]
    ids = cupy.asarray(np.ascontiguousarray(drawn.astype(np.int64)))
    weights = cupy.asarray(rng.random((MAX_TOKENS, NUM_TOPK), np.float32))
    most = buffer.num_ranks * MAX_TOKENS * (NUM_TOPK if layout == "expert" else 1)

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        stream.synchronize()
        start = time.perf_counter()
        result = call()
        return (time.perf_counter() - start) * 1e6, result

    def one_round(count: int) -> tuple[float, ...]:
        rows, columns = x[:count], {"topk_idx": ids[:count], "topk_weights": weights[:count]}

        def dispatch(**options: Any) -> Any:
            return buffer.dispatch(rows, **columns, num_experts=NUM_EXPERTS, layout=layout, **options)

        worst_us, _ = timed(lambda: dispatch(num_worst_tokens=most))
        exact_us, out = timed(dispatch)
        cached_us, _ = timed(lambda: buffer.dispatch(rows, handle=out.handle))
        combine_us, _ = timed(lambda: buffer.combine(out.recv_x, out.handle))
        return worst_us, exact_us, cached_us, combine_us

    readings = [one_round(count) for count in counts]
    stream.synchronize()
    return [median(column) for column in zip(*readings[NUM_WARM:], strict=True)]


def main() -> None:
    group = as_group()
    rng = np.random.default_rng(0)
    others = rng.integers(64, MAX_TOKENS + 1, NUM_CALLS).tolist()
    with (
        cupy.cuda.Device(group.rank % device_count()),
        cupy.cuda.Stream(non_blocking=True) as stream,
        ep_rt.Buffer(group, 2 << 30, backend="cuda") as buffer,
    ):
        if group.rank == 0:
            print(f"{'host us, median of ranks':<34}" + "".join(f"{name:>28}" for name in OPERATIONS))
        for layout in ("rank", "expert"):
            for what, counts in (("one number of tokens", [SAME] * NUM_CALLS), ("another each time", others)):
                ranks = group.allgather(measure(buffer, stream, layout, counts))
                columns = [f"{median(each):>28.1f}" for each in zip(*ranks, strict=True)]
                if group.rank == 0:
                    print(f"{f'{layout}, {what}':<34}" + "".join(columns), flush=True)


if __name__ == "__main__":
    main()
