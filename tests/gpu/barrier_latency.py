"""Times of a barrier: on the device inside a CUDA graph and back to back on a stream, and of the host's call.

Alone it measures threads, virtual ranks on one GPU and one rank per GPU; under mpirun, the processes.
"""

from __future__ import annotations

import time
from statistics import median

import cupy
from ranks import IS_UNDER_MPI, device_count, run_on_devices

from ep_rt.cuda.barrier import Barrier
from ep_rt.cuda.hang import HangWatch
from ep_rt.cuda.memory import Slab
from ep_rt.exchange import Group

TIMEOUT_S = 10.0
NUM_IN_GRAPH = 200
NUM_REPLAYS = 5
NUM_CALLS = 400


def measure(group: Group) -> tuple[float, float, float]:
    """Microseconds per barrier of this rank: in a graph, on a stream, of the host's call."""
    slab = Slab(group, 0)
    barrier = Barrier(slab, HangWatch(slab, timeout_s=TIMEOUT_S), timeout_s=TIMEOUT_S)
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    for _ in range(NUM_IN_GRAPH):
        barrier.run(stream)
    graph = stream.end_capture()
    events = [cupy.cuda.Event() for _ in range(4)]
    group.barrier()

    graph.launch(stream)
    events[0].record(stream)
    for _ in range(NUM_REPLAYS):
        graph.launch(stream)
    events[1].record(stream)
    stream.synchronize()
    group.barrier()

    barrier.run(stream)
    events[2].record(stream)
    calls = []
    for _ in range(NUM_CALLS):
        start = time.perf_counter()
        barrier.run(stream)
        calls.append(time.perf_counter() - start)
    events[3].record(stream)
    stream.synchronize()
    barrier.check()
    in_graph = cupy.cuda.get_elapsed_time(events[0], events[1]) * 1e3 / (NUM_IN_GRAPH * NUM_REPLAYS)
    on_stream = cupy.cuda.get_elapsed_time(events[2], events[3]) * 1e3 / NUM_CALLS
    slab.close()
    return in_graph, on_stream, median(calls) * 1e6


def show(what: str, times: list[tuple[float, float, float]]) -> None:
    """One line of the table: median over ranks."""
    in_graph, on_stream, call = (median(column) for column in zip(*times, strict=True))
    print(f"{what:<34}{in_graph:>10.2f}{on_stream:>12.2f}{call:>12.2f}", flush=True)


def main() -> None:
    num_devices = device_count()
    header = f"{'us per barrier (median of ranks)':<34}{'in a graph':>10}{'on a stream':>12}{'host call':>12}"
    if IS_UNDER_MPI:
        from ep_rt.groups import as_group

        group = as_group()
        with cupy.cuda.Device(group.rank % num_devices):
            times = group.allgather(measure(group))
        if group.rank == 0:
            print(header)
            show(f"{group.size} processes, a GPU each", times)
        return
    print(header)
    for num_ranks in (1, 2, 4, 8):
        show(f"{num_ranks} threads on one GPU", run_on_devices([0] * num_ranks, measure))
    if num_devices > 1:
        show(f"{num_devices} threads, a GPU each", run_on_devices(list(range(num_devices)), measure))


if __name__ == "__main__":
    main()
