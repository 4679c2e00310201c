"""Times of calls and of kernels, as DeepEP's tests and benchmarks import them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ep_rt.errors import ConfigError

_log = logging.getLogger("ep_rt")

_FLUSH_BYTES = 256_000_000
_SLEEP_CYCLES = 20_000_000  # about 10 ms of a GPU, in which the host gets ahead of it


def flush_l2_cache(enabled: bool = True) -> None:
    """Write 256 MB on the current GPU, so that its cache holds nothing else. Without a GPU, do nothing."""
    import torch

    if enabled and torch.cuda.is_available():
        torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()


def bench(
    fn: Callable[[], Any],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], Any] | None = None,
    flush_l2: bool = True,
) -> tuple[float, float, float]:
    """Time calls, by events of the current stream; without a GPU by the host's clock.

    Args:
        fn: what to call.
        num_warmups: calls before, which are not timed.
        num_tests: calls that are timed. The first one does not count.
        post_fn: called after each of these; not timed.
        flush_l2: empty the GPU's cache before each of these.

    Returns:
        The mean, the shortest and the longest time, in seconds.

    Raises:
        ConfigError: `num_tests` is below 2.
    """
    if num_tests < 2:
        raise ConfigError(f"num_tests={num_tests} must be at least 2: the first does not count")
    for _ in range(num_warmups):
        fn()
    marks = []
    for _ in range(num_tests):
        flush_l2_cache(flush_l2)
        begin = _mark()
        fn()
        marks.append((begin, _mark()))
        if post_fn is not None:
            post_fn()
    _synchronize()
    times = [_seconds(begin, end) for begin, end in marks[1:]]
    return fmean(times), min(times), max(times)


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Callable[[], Any] | None = None,
) -> Any:
    """Time the kernels that calls launch, with torch's profiler; without a GPU, torch's operators.

    Of ep_rt's kernels, ``dispatch`` and ``combine`` find the one of a call of the normal or low-latency mode,
    and with a receive hook the two launches of it. Calls between nodes launch others beside that one, for the
    network and for sums, whose time is not in it. The kernel of `get_dispatch_layout` has ``dispatch`` in its
    name, too. DeepEP's other names, such as ``notify`` or ``dispatch_impl``, find nothing, and the host
    backend has no kernels.

    With ``EP_USE_NVIDIA_TOOLS=1``, for other profilers, nothing is called and every time is 1.

    Args:
        fn: what to call: once, then `num_tests` times unobserved, then `num_tests` times observed.
        kernel_names: each a part of the name of one kernel; without a GPU of one operator, or of one
            ``torch.profiler.record_function``.
        suppress_kineto_output: let nothing be written to standard output and error meanwhile.
        trace_path: where to write a trace that Chrome shows.
        flush_l2: empty the GPU's cache before each call.
        barrier_comm_profiling: let ranks begin each call together, so that no kernel waits for a slow host.
            ``EP_DISABLE_BARRIER_PROFILING=1`` prevails.
        num_kernels_per_period: how many launches of a kernel, one after another, are different things.
        barrier: what brings ranks together; by default a reduction among all of torch's ranks.

    Returns:
        The mean time of a launch in seconds, or a list of one for each launch of a period; for a tuple of
        names a list of these. 0.0 for a name that no kernel has, which is logged.

    Raises:
        ConfigError: `kernel_names` is neither a string nor a tuple of strings, a number is not positive, a
            name is part of the names of several kernels, or the launches do not make whole periods.
    """
    names = (kernel_names,) if isinstance(kernel_names, str) else kernel_names
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"kernel_names={kernel_names!r} is neither a string nor a tuple of strings")
    if min(num_tests, num_kernels_per_period) < 1:
        raise ConfigError(f"{num_tests=} and {num_kernels_per_period=} must be at least 1")
    switches = _switches()
    if switches.is_profiled_elsewhere:
        times: list[Any] = [_of_period([1.0] * num_kernels_per_period) for _ in names]
    else:
        fn()
        _synchronize()
        meet = None
        if barrier_comm_profiling and not switches.without_barriers:
            meet = _together(barrier)
        with _silence() if suppress_kineto_output else contextlib.nullcontext():
            launches = _observed(fn, num_tests, meet, flush_l2, trace_path)
        times = [_times(name, launches, num_kernels_per_period) for name in names]
    return times[0] if isinstance(kernel_names, str) else times


class _Switches(NamedTuple):
    is_profiled_elsewhere: bool
    without_barriers: bool


def _switches() -> _Switches:
    """Read the environment variables of `bench_kineto`."""
    return _Switches(
        bool(int(os.getenv("EP_USE_NVIDIA_TOOLS", "0"))),
        bool(int(os.getenv("EP_DISABLE_BARRIER_PROFILING", "0"))),
    )


class _Launch(NamedTuple):
    """Of a kernel, or of an operator."""

    start_us: float
    name: str
    duration_us: float


def _observed(
    fn: Callable[[], Any],
    num_tests: int,
    meet: Callable[[], None] | None,
    flush_l2: bool,
    trace_path: str | None,
) -> list[_Launch]:
    """What the second half of the calls launched, in order: the profiler starts within the first half."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    is_on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if is_on_gpu else ProfilerActivity.CPU
    place = torch.autograd.DeviceType.CUDA if is_on_gpu else torch.autograd.DeviceType.CPU
    launches: list[_Launch] = []

    def keep(profiler: Any) -> None:
        launches.extend(
            _Launch(event.time_range.start, event.name, event.time_range.elapsed_us())
            for event in profiler.events()
            # On a GPU, ranges that the host names span kernels.
            if event.device_type == place and not (is_on_gpu and getattr(event, "is_user_annotation", False))
        )
        if trace_path is not None:
            profiler.export_chrome_trace(trace_path)

    with (
        warnings.catch_warnings(),
        profile(
            activities=[activity],
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=keep,
        ) as profiler,
    ):
        # It says that the first half is not kept.
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        for _ in range(2):
            for _ in range(num_tests):
                flush_l2_cache(flush_l2)
                if meet is not None:
                    meet()
                fn()
            _synchronize()
            profiler.step()
    return sorted(launches)


def _together(barrier: Callable[[], Any] | None) -> Callable[[], None]:
    """What lets ranks begin together."""
    import torch
    import torch.distributed as dist

    is_on_gpu = torch.cuda.is_available()
    one = torch.ones(1, dtype=torch.float32, device="cuda" if is_on_gpu else "cpu")

    def meet() -> None:
        if is_on_gpu:
            torch.cuda._sleep(_SLEEP_CYCLES)
        if barrier is None:
            dist.all_reduce(one)
        else:
            barrier()

    return meet


def _times(name: str, launches: Sequence[_Launch], num_kernels_per_period: int) -> float | list[float]:
    found = [launch for launch in launches if name in launch.name]
    kernels = sorted({launch.name for launch in found})
    if len(kernels) > 1:
        raise ConfigError(f"{name!r} is part of the names of {len(kernels)} kernels: {', '.join(kernels)}")
    if len(found) % num_kernels_per_period:
        raise ConfigError(
            f"{kernels[0]} was launched {len(found)} times, "
            f"which does not make periods of num_kernels_per_period={num_kernels_per_period}"
        )
    if not found:
        seen = ", ".join(sorted({launch.name for launch in launches})) or "none"
        _log.warning("bench_kineto: no kernel has %r in its name; its time is 0.0. Kernels: %s", name, seen)
        return _of_period([0.0] * num_kernels_per_period)
    return _of_period(
        [
            fmean(launch.duration_us * 1e-6 for launch in found[first::num_kernels_per_period])
            for first in range(num_kernels_per_period)
        ]
    )


def _of_period(times: list[float]) -> float | list[float]:
    return times[0] if len(times) == 1 else times


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Let nothing be written to standard output and error, neither by Python nor by libraries."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            for number, _ in kept:
                os.dup2(nowhere.fileno(), number)
            yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)


def _mark() -> Any:
    """A point on the current stream; without a GPU, in the host's time."""
    import torch

    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    return float(end - begin if isinstance(begin, float) else begin.elapsed_time(end) * 1e-3)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
