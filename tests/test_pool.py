"""Places inside a slab."""

from __future__ import annotations

import gc
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from ep_rt.cuda.layout import OFFSET_UNIT
from ep_rt.cuda.pool import Lease, Pool

UNIT = OFFSET_UNIT


def taken(pool: Pool, num_bytes: int) -> Lease:
    lease = pool.take(num_bytes)
    assert lease is not None
    return lease


def test_places_are_aligned_and_apart() -> None:
    pool = Pool(10 * UNIT + 7)
    leases = [taken(pool, num_bytes) for num_bytes in (1, UNIT, UNIT + 1)]
    assert [(lease.offset, lease.num_bytes) for lease in leases] == [
        (0, UNIT),
        (UNIT, UNIT),
        (2 * UNIT, 2 * UNIT),
    ]
    assert pool.largest_free() == 6 * UNIT
    assert pool.take(6 * UNIT + 1) is None
    assert pool.stats.num_refused == 1


def test_nothing_is_a_place_too() -> None:
    pool = Pool(0)
    assert pool.largest_free() == 0
    assert taken(pool, 0).num_bytes == 0
    assert pool.take(1) is None


def test_a_dropped_place_is_handed_out_again_and_gaps_join() -> None:
    pool = Pool(8 * UNIT)
    first, second, third = (taken(pool, 2 * UNIT) for _ in range(3))
    del second
    assert pool.largest_free() == 2 * UNIT
    del first
    assert pool.largest_free() == 4 * UNIT
    del third
    assert pool.largest_free() == 8 * UNIT
    assert pool.stats.used_bytes == 0
    assert (pool.stats.num_taken, pool.num_released) == (3, 3)


def test_the_largest_gap_is_taken_and_trimmed() -> None:
    pool = Pool(16 * UNIT)
    first, second, third = (taken(pool, units * UNIT) for units in (3, 1, 5))
    del first
    largest = pool.take_largest()
    assert (largest.offset, largest.num_bytes) == (9 * UNIT, 7 * UNIT)
    assert pool.stats.used_bytes == 13 * UNIT
    assert pool.trim(largest, 2 * UNIT - 1) == 5 * UNIT
    assert (largest.num_bytes, pool.stats.used_bytes) == (2 * UNIT, 8 * UNIT)
    assert pool.trim(largest, 2 * UNIT) == 5 * UNIT
    del third
    assert pool.take_largest().num_bytes == 5 * UNIT
    rest = [pool.take_largest() for _ in range(4)]
    assert [each.num_bytes for each in rest] == [5 * UNIT, 5 * UNIT, 3 * UNIT, 0]
    del second, rest, largest
    assert pool.largest_free() == 16 * UNIT
    assert pool.num_released == pool.stats.num_taken


def test_the_smallest_gap_that_fits_is_taken() -> None:
    pool = Pool(16 * UNIT)
    leases = [taken(pool, units * UNIT) for units in (4, 1, 2, 1)]
    del leases[2], leases[0]  # gaps of 4, 2 and 8
    assert taken(pool, 2 * UNIT).offset == 5 * UNIT


def test_trim_gives_the_end_back() -> None:
    pool = Pool(8 * UNIT)
    lease = taken(pool, pool.largest_free())
    assert pool.largest_free() == 0
    pool.trim(lease, 3 * UNIT - 1)
    assert (lease.offset, lease.num_bytes) == (0, 3 * UNIT)
    assert pool.largest_free() == 5 * UNIT
    pool.trim(lease, 4 * UNIT)  # never grows
    assert lease.num_bytes == 3 * UNIT
    pool.trim(lease, 0)
    assert pool.largest_free() == 8 * UNIT
    del lease
    assert pool.stats.used_bytes == 0


def test_whoever_holds_the_lease_holds_the_place() -> None:
    pool = Pool(4 * UNIT)
    lease = taken(pool, 4 * UNIT)
    array = SimpleNamespace(owner=lease)
    del lease
    assert pool.largest_free() == 0
    del array
    assert pool.largest_free() == 4 * UNIT


def test_what_is_kept_lives_as_long() -> None:
    pool = Pool(4 * UNIT)
    lease = taken(pool, UNIT)
    lease.kept = taken(pool, UNIT)
    assert pool.stats.used_bytes == 2 * UNIT
    del lease
    assert pool.stats.used_bytes == 0


def test_close_waits_for_the_last_place() -> None:
    pool = Pool(4 * UNIT)
    first, second = taken(pool, UNIT), taken(pool, UNIT)
    calls: list[int] = []
    pool.close(lambda: calls.append(1))
    del first
    assert calls == []
    del second
    assert calls == [1]


def test_close_of_an_unused_pool() -> None:
    calls: list[int] = []
    Pool(4 * UNIT).close(lambda: calls.append(1))
    assert calls == [1]


def test_garbage_collection_inside_a_method_gives_back() -> None:
    """A cycle that holds a place dies within `take`, on the thread that holds the lock."""

    class Node:
        def __init__(self, lease: Lease) -> None:
            self.lease = lease
            self.itself = self

    pool = Pool(4096 * UNIT)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(200):
            Node(taken(pool, UNIT))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert pool.largest_free() == 4096 * UNIT


def test_random_use_loses_nothing_and_overlaps_nothing() -> None:
    rng = np.random.default_rng(3)
    pool = Pool(500 * UNIT)
    held: list[Lease] = []
    for _ in range(3000):
        action = rng.integers(3)
        if action == 0 or not held:
            held += filter(None, [pool.take(int(rng.integers(1, 60 * UNIT)))])
        elif action == 1:
            pool.trim(held[int(rng.integers(len(held)))], int(rng.integers(1, 30 * UNIT)))
        else:
            del held[int(rng.integers(len(held)))]
        ends = sorted((lease.offset, lease.offset + lease.num_bytes) for lease in held)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
        assert pool.stats.used_bytes == sum(lease.num_bytes for lease in held)
    held.clear()
    assert pool.largest_free() == 500 * UNIT


def test_threads_share_a_pool() -> None:
    pool = Pool(1000 * UNIT)
    errors: list[BaseException] = []

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            held: list[Lease | None] = [None] * 8
            for _ in range(2000):
                held[int(rng.integers(8))] = pool.take(int(rng.integers(1, 20 * UNIT)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert pool.largest_free() == 1000 * UNIT


@pytest.mark.parametrize("num_bytes", [UNIT, 1 << 40])
def test_counters(num_bytes: int) -> None:
    pool = Pool(num_bytes)
    lease = taken(pool, num_bytes)
    stats = pool.stats
    assert (stats.num_bytes, stats.used_bytes, stats.most_used_bytes) == (num_bytes,) * 3
    assert stats.largest_free_bytes == 0
    del lease
    assert (pool.stats.used_bytes, pool.stats.most_used_bytes) == (0, num_bytes)
