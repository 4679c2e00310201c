"""NVSHMEM between processes with a GPU each: ``mpirun -n 2 python -m pytest tests/gpu/test_nvshmem.py``.

With ``EP_RT_TEST_TRANSPORT=loopback`` they keep off NVLink, see loopback.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import loopback
import pytest
from ranks import IS_UNDER_MPI, device_count, run_ranks

from ep_rt.cuda import kernels, nvshmem_files
from ep_rt.cuda.nvshmem import Network
from ep_rt.cuda.ping import Ping
from ep_rt.errors import BackendError, ConfigError, PeerTimeoutError
from ep_rt.exchange import Group
from ep_rt.groups import as_group

pytestmark = pytest.mark.gpu

HEAP_BYTES = 64 << 20
TIMEOUT_S = 20.0
SHORT_S = 1.0


def _absence() -> str | None:
    if not IS_UNDER_MPI:
        return "NVSHMEM needs a process for each GPU: start under mpirun"
    if device_count() < as_group().size:
        return f"{as_group().size} processes on {device_count()} GPUs"
    try:
        nvshmem_files.find()
    except BackendError as error:
        return str(error)
    return None


def open_network(group: Group) -> Network:
    return Network(group, num_bytes=HEAP_BYTES, timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Open for all tests of this file, so that most of them do not depend on its end."""
    absence = _absence()
    if absence is not None:
        pytest.skip(absence)
    loopback.load_if_asked()
    opened: list[Network] = run_ranks("mpi", open_network)
    print(opened[0].library)
    yield opened[0]
    opened[0].close()


def on_ranks(body: Callable[[Group], None]) -> None:
    run_ranks("mpi", body)


@pytest.mark.parametrize("block_bytes", [8, 4096, 1 << 20])
@pytest.mark.parametrize("scope", kernels.SCOPES)
def test_all_blocks_arrive(network: Network, scope: str, block_bytes: int) -> None:
    import cupy

    def body(group: Group) -> None:
        ping = Ping(network, block_bytes=block_bytes, scope=scope)
        print(f"rank {group.rank}: on NVLink {network.direct_peers(ping.memory)}")
        stream = cupy.cuda.Stream(non_blocking=True)
        num_runs = 200 if block_bytes < 1 << 20 else 20
        for _ in range(num_runs):
            ping.run(stream)
        assert ping.check(stream) == num_runs
        network.free(ping.memory)

    on_ranks(body)


@pytest.mark.skipif(not (IS_UNDER_MPI and loopback.IS_ASKED_FOR), reason="of the test transport")
def test_loopback_reaches_no_peer_directly() -> None:
    """Also where ranks share a GPU, as long as they are on nodes."""
    loopback.load_if_asked()

    def body(group: Group) -> None:
        network = open_network(group)
        assert network.direct_peers(network.allocate(1 << 20)) == (group.rank,)
        network.close()

    on_ranks(body)


def test_a_graph_is_replayed(network: Network) -> None:
    import cupy

    def body(group: Group) -> None:
        ping = Ping(network)
        stream = cupy.cuda.Stream(non_blocking=True)
        stream.begin_capture()
        for _ in range(10):
            ping.run(stream)
        graph = stream.end_capture()
        graph.launch(stream)
        assert ping.check(stream) == 10
        start = time.perf_counter()
        for _ in range(20):
            graph.launch(stream)
        assert ping.check(stream) == 210
        microseconds = (time.perf_counter() - start) / 200 * 1e6
        print(f"rank {group.rank}: {microseconds:.1f} us for each ping of {group.size} ranks, 4096 bytes")
        network.free(ping.memory)

    on_ranks(body)


def test_two_users_share_one_nvshmem(network: Network) -> None:
    import cupy

    def body(group: Group) -> None:
        other = open_network(group)
        pings = [Ping(user) for user in (network, other)]
        stream = cupy.cuda.Stream(non_blocking=True)
        for ping in pings * 3:
            ping.run(stream)
        assert [ping.check(stream) for ping in pings] == [3, 3]
        network.free(pings[0].memory)
        other.close()

    on_ranks(body)


def test_too_much_memory_is_an_error_on_all(network: Network) -> None:
    def body(group: Group) -> None:
        with pytest.raises(ConfigError, match="more than the"):
            network.allocate(1 << 45)
        network.free(network.allocate(1 << 20))

    on_ranks(body)


def test_a_missing_rank_is_named(network: Network) -> None:
    import cupy

    def body(group: Group) -> None:
        missing = group.size - 1
        ping = Ping(network, timeout_s=SHORT_S)
        stream = cupy.cuda.Stream(non_blocking=True)
        ping.run(stream)
        assert ping.check(stream) == 1
        start = time.monotonic()
        if group.rank != missing:
            for _ in range(3):  # those behind the first leave at once
                ping.run(stream)
        stream.synchronize()
        assert time.monotonic() - start < 2.5 * SHORT_S
        with pytest.raises(PeerTimeoutError) as caught:
            ping.check(stream)
        assert caught.value.peers == (missing,)
        assert int(cupy.arange(1000).sum()) == 499500
        network.free(ping.memory)

    on_ranks(body)


def test_close_and_open_again(network: Network) -> None:
    """The last one: ends NVSHMEM for all tests."""
    import cupy

    def body(group: Group) -> None:
        network.close()
        for _ in range(2):
            again = open_network(group)
            ping = Ping(again)
            stream = cupy.cuda.Stream(non_blocking=True)
            for _ in range(10):
                ping.run(stream)
            assert ping.check(stream) == 10
            again.close()
            again.close()

    on_ranks(body)
