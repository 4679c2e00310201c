"""A rank of `test_network.py`: NVSHMEM's life over processes, with fakes. ``nvshmem_ranks.py SCENARIO``."""

from __future__ import annotations

import logging
import os
import sys
import time
from types import SimpleNamespace

import pytest
from nvshmem_fakes import FakeLibrary, install

from ep_rt.cuda.nvshmem import Network
from ep_rt.errors import BackendError, ClosedError, ConfigError, DeviceError, TopologyError
from ep_rt.exchange import Group
from ep_rt.groups import as_group
from ep_rt.network_options import NetworkOptions

TIMEOUT_S = 10.0


def open_network(group: Group, num_bytes: int = 1000, options: NetworkOptions | None = None) -> Network:
    return Network(group, num_bytes=num_bytes, options=options, timeout_s=TIMEOUT_S)


def life(group: Group, library: FakeLibrary) -> None:
    """Start, memory, modules, end, in order; and again."""
    os.environ["NVSHMEM_IB_SL"] = "1"
    for _ in range(2):
        network = open_network(group, options=NetworkOptions(service_level=3))
        assert os.environ["NVSHMEM_DISABLE_NVLS"] == "1"
        assert os.environ["NVSHMEM_IB_SL"] == "3"
        assert os.environ["NVSHMEM_REMOTE_TRANSPORT"] == "none"
        assert int(os.environ["NVSHMEM_SYMMETRIC_SIZE"]) > 1000
        assert library.calls[-1] == ("start", b"the unique id", group.rank, group.size)
        assert library.names() == (["unique_id", "start"] if group.rank == 0 else ["start"])
        first, second = network.allocate(600), network.allocate(400)
        assert library.calls == [
            ("allocate", 600),
            ("clear", first.pointer, 600),
            ("allocate", 400),
            ("clear", second.pointer, 400),
        ]
        assert network.direct_peers(first) == (group.rank,)
        library.names()
        for pointer in (7, 8, 7):
            network.adopt(SimpleNamespace(ptr=pointer))
        network.free(first)
        network.close()
        network.close()
        assert library.calls == [
            ("initialise_module", 7),
            ("initialise_module", 8),
            ("free", first.pointer),
            ("barrier",),
            ("finalise_module", 7),
            ("finalise_module", 8),
            ("free", second.pointer),
            ("finish",),
        ]
        library.names()
        assert os.environ["NVSHMEM_IB_SL"] == "1"
        assert "NVSHMEM_SYMMETRIC_SIZE" not in os.environ
        with pytest.raises(ClosedError):
            network.allocate(1)


def shared(group: Group, library: FakeLibrary) -> None:
    """Two that are open at the same time use one NVSHMEM, which ends with the last; a subgroup cannot."""
    one = open_network(group)
    two = open_network(group)
    assert library.names().count("start") == 1
    kept = two.allocate(64)
    one.adopt(SimpleNamespace(ptr=7))
    library.names()
    one.close()
    assert library.names() == ["barrier"]
    two.close()
    assert library.calls == [("barrier",), ("finalise_module", 7), ("free", kept.pointer), ("finish",)]
    from mpi4py import MPI

    half = as_group(MPI.COMM_WORLD.Split(group.rank % 2))
    whole = open_network(group)
    with pytest.raises(TopologyError, match="already runs in some of these processes over other ranks"):
        open_network(half)
    whole.close()
    library.names()
    open_network(half).close()
    assert "finish" in library.names()


def mistakes(group: Group, library: FakeLibrary) -> None:
    """What one rank lacks, or does differently, is an error of all."""
    library.version_numbers = (3, 4, 5 + group.rank)
    with pytest.raises(BackendError, match=r"versions of NVSHMEM differ: rank 0: 3\.4\.5, rank 1: 3\.4\.6"):
        open_network(group)
    library.version_numbers = (3, 4, 5)
    with pytest.raises(ConfigError, match="symmetric heaps of different sizes: rank 0: 10, rank 1: 11"):
        open_network(group, 10 + group.rank)
    assert library.calls == []
    network = open_network(group)
    with pytest.raises(ConfigError, match="symmetric memory of different sizes: rank 0: 1, rank 1: 2"):
        network.allocate(1 + group.rank)
    with pytest.raises(ConfigError, match="2097152 bytes of symmetric memory are more than the"):
        network.allocate(2 << 20)
    library.heap_bytes = 10 if group.rank else 1000
    with pytest.raises(
        DeviceError, match="rank 1: allocating symmetric memory: 500 bytes are more than is left"
    ):
        network.allocate(500)
    network.close()
    assert library.names()[-1] == "finish"


def started_elsewhere(group: Group, library: FakeLibrary) -> None:
    """An NVSHMEM that the program started itself is used, if its ranks are the group's, and not ended."""
    library.is_started = True
    library.where = (0, 1)
    with pytest.raises(TopologyError, match="started elsewhere, with other ranks"):
        open_network(group)
    library.where = (group.rank, group.size)
    network = open_network(group)
    network.adopt(SimpleNamespace(ptr=7))
    network.close()
    assert library.names() == ["initialise_module", "barrier", "finalise_module"]


def failed_start(group: Group, library: FakeLibrary) -> None:
    """No transport: all ranks say what one of them found, and nobody tries again."""
    if group.rank == 1:
        library.fails.add("start")
    with pytest.raises(
        BackendError, match=r"rank 1: NVSHMEM: start failed\. Where ranks are on several hosts"
    ):
        open_network(group)
    library.fails.clear()
    assert "NVSHMEM_SYMMETRIC_SIZE" not in os.environ
    with pytest.raises(BackendError, match="rank 0: NVSHMEM cannot be used any more in this process"):
        open_network(group)


def lost(group: Group, library: FakeLibrary) -> None:
    """A rank that does not close: NVSHMEM would wait for it for ever, so nothing of it is called."""
    network = Network(group, num_bytes=1, timeout_s=1.0)
    other = Network(group, num_bytes=1, timeout_s=1.0)
    library.names()
    if group.rank:
        network.close()
        assert library.names() == []
        with pytest.raises(BackendError, match="cannot be used any more"):
            other.allocate(1)
    else:
        time.sleep(4)


def main(scenario: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    group = as_group()
    globals()[scenario](group, install(group.rank))
    print(f"rank {group.rank} passed")


if __name__ == "__main__":
    main(sys.argv[1])
