"""The barrier on GPUs: what it orders, and how it fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from ranks import PLACES, Payload, run_ranks

from ep_rt.cuda.barrier import Barrier
from ep_rt.cuda.hang import HangWatch
from ep_rt.cuda.kernels import barrier as barrier_spec
from ep_rt.cuda.launch import Kernel
from ep_rt.cuda.layout import PAYLOAD_OFFSET
from ep_rt.cuda.memory import Slab
from ep_rt.errors import (
    CollectiveMismatchError,
    ConfigError,
    DeviceError,
    PeerTimeoutError,
)
from ep_rt.exchange import Group

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("place", PLACES)]

TIMEOUT_S = 10.0
SHORT_S = 0.5


class Setup:
    """One rank's slab with everything that the tests put on it."""

    def __init__(self, group: Group, timeout_s: float, operation: int) -> None:
        import cupy

        self.slab = Slab(group, Payload.num_bytes(group.size))
        self.watch = HangWatch(self.slab, timeout_s=timeout_s)
        self.barrier = Barrier(self.slab, self.watch, timeout_s=timeout_s, operation=operation)
        self.payload = Payload(group, self.slab.pointers, PAYLOAD_OFFSET)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        group.barrier()


@contextmanager
def set_up(group: Group, *, timeout_s: float = TIMEOUT_S, operation: int = 1) -> Iterator[Setup]:
    setup = Setup(group, timeout_s, operation)
    yield setup
    setup.stream.synchronize()
    setup.slab.close()


def check_payload(group: Group, setup: Setup, num_rounds: int) -> None:
    before, _ = setup.payload.result()
    for _ in range(num_rounds):
        setup.payload.round(setup.barrier, setup.stream)
    setup.stream.synchronize()
    setup.barrier.check()
    assert setup.payload.result() == (before + num_rounds, 0)


def error_of(call: Callable[[], None]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def test_what_was_stored_before_is_seen_after(place: str) -> None:
    def body(group: Group) -> None:
        with set_up(group) as setup:
            check_payload(group, setup, 500)

    run_ranks(place, body)


def test_more_ranks_than_the_small_kernel_has(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ep_rt.cuda.kernels.barrier", lambda num_ranks: barrier_spec(128))

    def body(group: Group) -> None:
        with set_up(group) as setup:
            check_payload(group, setup, 50)

    run_ranks(place, body)


def test_graph_is_captured_once_and_replayed(place: str) -> None:
    def body(group: Group) -> None:
        with set_up(group) as setup:
            check_payload(group, setup, 1)
            setup.stream.begin_capture()
            for _ in range(10):
                setup.payload.round(setup.barrier, setup.stream)
            graph = setup.stream.end_capture()
            graph.upload(setup.stream)
            setup.stream.synchronize()
            group.barrier()
            for _ in range(20):
                graph.launch(setup.stream)
            setup.stream.synchronize()
            setup.barrier.check()
            assert setup.payload.result() == (201, 0)

    run_ranks(place, body)


def test_missing_rank_is_named_and_reset_helps(place: str) -> None:
    missing = 1

    def body(group: Group) -> None:
        with set_up(group, timeout_s=SHORT_S) as setup:
            check_payload(group, setup, 3)
            group.barrier()
            if group.rank != missing:
                start = time.monotonic()
                for _ in range(4):  # those behind the first must leave at once
                    setup.barrier._launch(setup.stream.ptr)
                setup.stream.synchronize()
                assert SHORT_S * 0.9 < time.monotonic() - start < SHORT_S * 2.5
                for _ in range(2):
                    with pytest.raises(PeerTimeoutError) as caught:
                        setup.barrier.run(setup.stream)
                    assert (caught.value.peers, caught.value.rank) == ((missing,), group.rank)
                    assert (caught.value.seen, caught.value.expected) == (6, 7)
            group.barrier()
            if group.rank == missing:  # too late: it hears so at once
                start = time.monotonic()
                setup.barrier.run(setup.stream)
                setup.stream.synchronize()
                assert time.monotonic() - start < SHORT_S / 2
                assert isinstance(error_of(setup.barrier.check), PeerTimeoutError)
            group.barrier()
            setup.barrier.reset()
            check_payload(group, setup, 20)

    run_ranks(place, body)


def test_graph_replay_after_reset(place: str) -> None:
    def body(group: Group) -> None:
        with set_up(group, timeout_s=SHORT_S) as setup:
            setup.stream.begin_capture()
            setup.payload.round(setup.barrier, setup.stream)
            graph = setup.stream.end_capture()
            graph.launch(setup.stream)
            if group.rank == 0:
                setup.stream.synchronize()
                for _ in range(3):
                    graph.launch(setup.stream)
            setup.stream.synchronize()
            assert (error_of(setup.barrier.check) is not None) == (group.rank == 0)
            group.barrier()
            setup.barrier.reset()
            setup.payload.restart(100, setup.stream)  # the extra replays looked at rows that nobody sent
            group.barrier()
            for _ in range(5):
                graph.launch(setup.stream)
            setup.stream.synchronize()
            setup.barrier.check()
            assert setup.payload.result() == (105, 0)

    run_ranks(place, body)


def test_rank_that_gave_up_first_is_not_blamed(place: str) -> None:
    missing = 1

    def body(group: Group) -> None:
        patience_s = SHORT_S if group.rank == 0 else 10 * SHORT_S
        with set_up(group, timeout_s=patience_s) as setup:
            check_payload(group, setup, 2)
            group.barrier()
            if group.rank != missing:
                start = time.monotonic()
                setup.barrier.run(setup.stream)
                setup.stream.synchronize()
                assert time.monotonic() - start < 3 * SHORT_S  # rank 0 told the others
                with pytest.raises(PeerTimeoutError) as caught:
                    setup.barrier.check()
                assert caught.value.peers == (missing,)
            group.barrier()
            setup.barrier.reset()
            check_payload(group, setup, 2)

    run_ranks(place, body)


def test_ranks_in_different_operations_are_named(place: str) -> None:
    def body(group: Group) -> None:
        with set_up(group, operation=7 if group.rank == 0 else 1) as setup:
            start = time.monotonic()
            setup.barrier.run(setup.stream)
            setup.stream.synchronize()
            assert time.monotonic() - start < TIMEOUT_S / 2
            with pytest.raises(CollectiveMismatchError) as caught:
                setup.barrier.check()
            assert caught.value.operations == ("operation 7", *["barrier"] * (group.size - 1))
            group.barrier()

    run_ranks(place, body)


def test_launch_from_a_thread_that_has_not_used_cuda(place: str) -> None:
    def body(group: Group) -> None:
        with set_up(group) as setup:
            check_payload(group, setup, 1)
            setup.barrier.run(setup.stream)
            errors: list[Exception | None] = []

            def enqueue() -> None:
                import cupy

                cupy.cuda.runtime.setDevice(setup.slab.device)
                errors.append(error_of(lambda: setup.barrier.run(setup.stream)))

            thread = threading.Thread(target=enqueue)
            thread.start()
            thread.join()
            setup.stream.synchronize()
            setup.barrier.check()
            assert errors == [None]

    run_ranks(place, body)


def test_two_slabs_on_two_streams(place: str) -> None:
    def body(group: Group) -> None:
        with set_up(group) as first, set_up(group) as second:
            for round_number in range(50):
                for setup in (first, second) if round_number % 2 else (second, first):
                    setup.payload.round(setup.barrier, setup.stream)
            for setup in (first, second):
                setup.stream.synchronize()
                setup.barrier.check()
                assert setup.payload.result() == (50, 0)

    run_ranks(place, body)


def test_close_twice_and_open_again(place: str) -> None:
    def body(group: Group) -> None:
        for _ in range(3):
            slab = Slab(group, 4 << 20)
            slab.close()
            slab.close()
        with set_up(group) as setup:
            check_payload(group, setup, 3)

    run_ranks(place, body)


def test_sizes_that_differ_are_an_error_on_all(place: str) -> None:
    def body(group: Group) -> None:
        with pytest.raises(ConfigError, match="slab sizes differ"):
            Slab(group, 1024 * (1 + group.rank))
        with pytest.raises(DeviceError, match="rank 0: allocating the slab"):
            Slab(group, 1 << (50 if group.rank == 0 else 20))
        Slab(group, 1024).close()

    run_ranks(place, body)


def test_grid_is_checked_and_never_shrunk(place: str) -> None:
    def body(group: Group) -> None:
        spec = barrier_spec(group.size)
        with pytest.raises(DeviceError, match="1000000 blocks cannot run at once"):
            Kernel(spec).bind(np.zeros(1, spec.args), num_blocks=1_000_000)

    run_ranks(place, body)


def test_close_without_a_peer_keeps_the_memory(place: str, caplog: pytest.LogCaptureFixture) -> None:
    if place == "mpi":
        pytest.skip("would leave the world's group out of step")

    def body(group: Group) -> None:
        slab = Slab(group, 1024)
        if group.rank != 1:
            slab.close(timeout_s=SHORT_S)
            assert slab.pointers == ()

    with caplog.at_level(logging.WARNING, logger="ep_rt"):
        run_ranks(place, body)
    assert "stays allocated" in caplog.text
