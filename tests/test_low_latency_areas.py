"""Areas of low-latency calls on the hosts of ranks of which some are lost. No GPU: memory is the host's."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ep_rt.cuda.layout import OFFSET_UNIT, PAYLOAD_OFFSET
from ep_rt.cuda.low_latency_areas import Areas
from ep_rt.cuda.low_latency_places import SlabPlaces, SymmetricPlaces
from ep_rt.cuda.low_latency_plan import AreaLayout, AreaShape, max_send_blocks
from ep_rt.cuda.pool import Pool
from ep_rt.errors import ConfigError, HandleError
from ep_rt.exchange import Group, PeerGroup
from ep_rt.groups import run_local

NUM_RANKS, LOST = 3, 1
TIMEOUT_S = 1.0
CALL: Any = SimpleNamespace(is_capturing=False)


def shape(num_max_tokens: int) -> AreaShape:
    return AreaShape(
        num_ranks=NUM_RANKS,
        num_max_tokens=num_max_tokens,
        hidden=64,
        num_experts=6,
        num_topk=2,
        has_columns=True,
    )


class Memory:
    """Some bytes at an address."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = ctypes.create_string_buffer(num_bytes + OFFSET_UNIT)
        self.ptr = -(-ctypes.addressof(self._bytes) // OFFSET_UNIT) * OFFSET_UNIT


class Runtime:
    memcpyHostToDevice = 1  # noqa: N815  # as CuPy has it

    @staticmethod
    def memsetAsync(pointer: int, value: int, num_bytes: int, _stream: int) -> None:  # noqa: N802
        ctypes.memset(pointer, value, num_bytes)

    @staticmethod
    def memcpyAsync(to: int, source: int, num_bytes: int, *_: int) -> None:  # noqa: N802
        ctypes.memmove(to, source, num_bytes)


@pytest.fixture(autouse=True)
def _with_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(CUDARuntimeError=RuntimeError)
    cuda = SimpleNamespace(alloc=Memory, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)


def domain_of(group: Group, slabs: list[Memory], num_bytes: int) -> Any:
    pool = Pool(num_bytes)

    def fetch(pointer: int, array: Any) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def take(num_bytes: int, what: str) -> Any:
        lease = pool.take(num_bytes)
        if lease is None:
            raise ConfigError(f"no room for {what}")
        return lease

    return SimpleNamespace(
        group=group,
        timeout_s=TIMEOUT_S,
        max_blocks=8,
        num_blocks=lambda num_sms: min(num_sms, 8),
        gpu=("host", group.rank),
        runtime=Runtime,
        comm=SimpleNamespace(pointer=0, synchronize=lambda: None),
        turns=SimpleNamespace(begin=lambda stream: None),
        slab=SimpleNamespace(pointers=tuple(each.ptr for each in slabs)),
        on_device=lambda call, *args: call(*args),
        fetch=fetch,
        pool=pool,
        take=take,
    )


def run(body: Callable[[Areas, PeerGroup, Any], None], num_sms: int | None = None) -> None:
    """``body(areas, group, domain)`` on every rank; `num_sms` for its areas."""
    num_bytes = 4 * AreaLayout.of(shape(9)).num_bytes
    slabs = [Memory(PAYLOAD_OFFSET + num_bytes) for _ in range(NUM_RANKS)]

    def on_rank(group: Group) -> None:
        domain = domain_of(group, slabs, num_bytes)
        assert isinstance(group, PeerGroup)
        body(Areas(domain, SlabPlaces(domain), enable_shrink=True, num_sms=num_sms), group, domain)

    run_local(on_rank, NUM_RANKS, timeout_s=20)


def masked(areas: Areas) -> list[int]:
    return np.flatnonzero(areas.masked()).tolist()


def test_a_rank_that_does_not_come_is_masked_until_all_begin_anew() -> None:
    found: dict[int, tuple[int, ...]] = {}

    def body(areas: Areas, group: PeerGroup, domain: Any) -> None:
        areas.get(shape(3), CALL)  # of all
        # Ranks hold other memory besides, so their areas lie at different places.
        held = domain.pool.take(OFFSET_UNIT * (1 + 5 * group.rank))
        old = None
        if group.rank == LOST:
            time.sleep(2 * TIMEOUT_S)
        else:
            old = areas.get(shape(5), CALL)
            assert masked(areas) == [LOST]
            assert list(old.absent) == [LOST]
            began = time.monotonic()
            assert list(areas.get(shape(7), CALL).absent) == [LOST]  # nobody waits any more
            assert time.monotonic() - began < TIMEOUT_S / 2
            areas.unmask()
            with pytest.raises(ConfigError, match="rank 1 was not there"):
                areas.mask(LOST, False)
            assert masked(areas) == [LOST]
        group.rejoin(op="reset", timeout_s=10)
        assert areas.reset() == (group.rank != LOST)
        areas.unmask()
        assert masked(areas) == []
        if old is not None:
            with pytest.raises(HandleError, match="reset"):
                old.check_there()
        whole = areas.get(shape(5), CALL)
        assert list(whole.absent) == []
        found[group.rank] = whole.pointers
        assert areas.part()[0] == ()
        assert held.num_bytes

    run(body)
    # Everybody knows where everybody has it, and that is where each has its own.
    assert len(set(found.values())) == 1


def test_a_late_rank_loses_the_others_as_they_lose_it() -> None:
    """It finds what they said of their memory, and waits in vain for them to be ready."""
    made = threading.Barrier(NUM_RANKS)

    def body(areas: Areas, group: PeerGroup, domain: Any) -> None:
        if group.rank == LOST:
            time.sleep(1.5 * TIMEOUT_S)
        area = areas.get(shape(5), CALL)
        assert list(area.absent) == ([0, 2] if group.rank == LOST else [LOST])
        assert masked(areas) == list(area.absent)
        made.wait(10)
        group.rejoin(op="reset", timeout_s=10)
        assert areas.reset()
        areas.unmask()
        assert list(areas.get(shape(5), CALL).absent) == []

    run(body)


def test_who_is_lost_may_close_while_others_go_on() -> None:
    def body(areas: Areas, group: PeerGroup, domain: Any) -> None:
        areas.get(shape(3), CALL)
        if group.rank != LOST:
            began = time.monotonic()
            assert list(areas.get(shape(5), CALL).absent) == [LOST]  # it has said so
            assert time.monotonic() - began < TIMEOUT_S / 2
        absent, confirm = areas.part()
        assert confirm is not None
        assert absent == ()
        if group.rank != LOST:
            # They do not wait for whom they have lost, who says so once more meanwhile.
            time.sleep(TIMEOUT_S / 4)
        assert confirm() == []

    run(body)


@pytest.mark.parametrize(("num_sms", "most"), [(None, 8), (6, 6), (9, 8)])
def test_calls_keep_to_the_sms_that_they_may_take(num_sms: int | None, most: int) -> None:
    """Beside others no block may wait until another one is done, though the rank has its GPU to itself."""

    def body(areas: Areas, group: PeerGroup, domain: Any) -> None:
        area = areas.get(shape(9), CALL)
        assert areas.max_blocks == most
        assert area.max_send_blocks == max_send_blocks(area.shape, max_blocks=most)
        assert area.is_alone == (num_sms is None)
        assert areas.part()[0] == ()

    run(body, num_sms)


@pytest.mark.parametrize(("gpus", "is_alone"), [((0, 1, 2), True), ((0, 1, 0), False), ((0, 0, 0), False)])
def test_all_ranks_know_whether_some_share_a_gpu(gpus: tuple[int, ...], is_alone: bool) -> None:
    """Also those of another node, whom the domain of a rank does not have."""

    def body(areas: Areas, group: PeerGroup, domain: Any) -> None:
        domain.gpu = "host", gpus[group.rank]
        assert areas.get(shape(3), CALL).is_alone == is_alone
        assert areas.part()[0] == ()

    run(body)


def test_memory_of_areas_that_are_given_up_is_used_again_over_a_network() -> None:
    places: Any = object.__new__(SymmetricPlaces)
    places._memory, places._end = SimpleNamespace(num_bytes=4 * OFFSET_UNIT), 0
    first, second = places.take(OFFSET_UNIT), places.take(OFFSET_UNIT + 1)
    with pytest.raises(ConfigError, match="num_rdma_bytes"):
        places.take(2 * OFFSET_UNIT)
    places.keep([first])
    assert places.take(3 * OFFSET_UNIT).offset == second.offset == OFFSET_UNIT
    places.keep([])
    assert places.take(4 * OFFSET_UNIT).offset == 0
