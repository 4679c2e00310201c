"""The ping over a simulated network: which bytes arrive, what its order rests on, and who is to blame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ep_rt.cuda import kernels
from ep_rt.cuda.hang import Report, verdict
from ep_rt.cuda.kernel_spec import NvshmemPingCfg
from ep_rt.cuda.layout import HANG_RECORD, MAX_RANKS
from ep_rt.errors import PeerTimeoutError

from .build import KERNELS_CU
from .kernels import ThreadsCfg, bound
from .machine import EmulatedKernel, FoundError, Machine, Memory
from .planting import Mutation, sources_with
from .runtime import Kind
from .support import needs_emulator

pytestmark = needs_emulator

BLOCK_BYTES = 64
NUM_RUNS = 4
EPOCH, FAILED, NUM_WRONG = range(3)


class Pings:
    """`NUM_RUNS` of them, enqueued on every rank."""

    def __init__(
        self, num_ranks: int, scope: str = "warp", *, ranks_per_node: int = 1, sources: Path = KERNELS_CU
    ):
        spec = kernels.nvshmem_ping(scope)
        assert isinstance(spec.cfg, NvshmemPingCfg | ThreadsCfg)
        kernel = EmulatedKernel.load(
            replace(spec, cfg=replace(spec.cfg, num_threads=32)), 900, sources=sources
        )
        streams = [(rank, 1) for rank in range(num_ranks)]
        self.machine = machine = Machine(num_ranks, [kernel], streams, ranks_per_node=ranks_per_node)
        self.words: list[Memory] = []
        self.hangs: list[Memory] = []
        for rank in range(num_ranks):
            blocks_bytes = 2 * num_ranks * BLOCK_BYTES
            outbox = machine.allocate(rank, blocks_bytes, "outbox", Kind.SYMMETRIC)
            inbox = machine.allocate(rank, blocks_bytes, "inbox", Kind.SYMMETRIC)
            signals = machine.allocate(rank, 3 * MAX_RANKS * 8, "signals", Kind.SYMMETRIC)
            self.words.append(machine.allocate(rank, 3 * 8, "words"))
            self.hangs.append(machine.allocate(rank, HANG_RECORD.itemsize, "hang record"))
            fields = {
                "hang": self.hangs[rank].address,
                "outbox": outbox.address,
                "inbox": inbox.address,
                "signals": signals.address,
                "epoch": self.words[rank].address + 8 * EPOCH,
                "failed": self.words[rank].address + 8 * FAILED,
                "num_wrong": self.words[rank].address + 8 * NUM_WRONG,
                "timeout_ns": machine.conditions.timeout_ns,
                "rank": rank,
                "num_ranks": num_ranks,
                "block_bytes": BLOCK_BYTES,
            }
            for _ in range(NUM_RUNS):
                machine.launch(rank, kernel, bound(kernel, fields), 1)

    def results(self) -> list[list[int]]:
        """`EPOCH`, `FAILED` and `NUM_WRONG` of each rank."""
        return [memory.array(np.uint64).tolist() for memory in self.words]

    def reports(self) -> list[Report | None]:
        return [Report.of(rank, memory.array(HANG_RECORD)) for rank, memory in enumerate(self.hangs)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("scope", kernels.SCOPES)
def test_all_blocks_arrive(scope: str, num_ranks: int) -> None:
    pings = Pings(num_ranks, scope)
    for seed in range(40):
        pings.machine.run(seed)
        assert pings.results() == [[NUM_RUNS, 0, 0]] * num_ranks


def test_nothing_but_its_own_signal_orders_a_put() -> None:
    pings = Pings(3, ranks_per_node=2)
    for seed in range(40):
        pings.machine.run(seed, orders_queue_pairs=bool(seed % 2))
        assert pings.results() == [[NUM_RUNS, 0, 0]] * 3


@pytest.mark.parametrize("scope", kernels.SCOPES)
def test_who_loses_a_node_names_its_ranks(scope: str) -> None:
    pings = Pings(4, scope, ranks_per_node=2)
    num_failed = 0
    for seed in range(40):
        pings.machine.run(seed, lost_node=1, lost_step=500 * seed)
        reports = pings.reports()
        if reports[0] is not None:
            error = verdict([*reports[:2], None, None], rank=0, timeout_s=1.0)
            assert isinstance(error, PeerTimeoutError)
            assert set(error.peers) <= {2, 3}
            assert "ping" in error.phase
            num_failed += 1
        for rank, (epoch, failed, num_wrong) in enumerate(pings.results()):
            assert num_wrong == 0
            assert (failed == 0) == (epoch == NUM_RUNS) == (reports[rank] is None)
    assert num_failed > 10


def test_a_rank_that_stops_is_named_by_all_others() -> None:
    pings = Pings(3)
    for seed in range(40):
        pings.machine.run(seed, dead_rank=1, dead_step=100 * seed)
        reports = pings.reports()
        if any(reports):
            error = verdict([reports[0], None, reports[2]], rank=2, timeout_s=1.0)
            assert isinstance(error, PeerTimeoutError)
            assert error.peers == (1,)


MUTATIONS = (
    Mutation(
        "one signal for both sets",
        "nvshmem_ping.cu",
        "return args.signals + (epoch & 1) * kMaxRanks + src;",
        "return args.signals + src;",
        "",
    ),
    Mutation(
        "one set of blocks",
        "nvshmem_ping.cu",
        "static_cast<int64_t>((epoch & 1) * args.num_ranks + peer)",
        "static_cast<int64_t>(peer)",
        "",
    ),
    Mutation(
        "puts before all threads have filled the outbox",
        "nvshmem_ping.cu",
        "    ping::fill_outbox(args, epoch);\n    __syncthreads();\n",
        "    ping::fill_outbox(args, epoch);\n",
        "",
    ),
    Mutation(
        "checks blocks that only another thread has acquired",
        "nvshmem_ping.cu",
        "        network::acquire_signal(signal, word);\n    }\n    __syncthreads();\n",
        "        network::acquire_signal(signal, word);\n    }\n",
        "",
    ),
    Mutation(
        "acquires nothing",
        "nvshmem_ping.cu",
        "        ptx::ld_acquire_sys(signal);\n        network::acquire_signal(signal, word);\n",
        "",
        "",
    ),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_planted_bugs_are_found(mutation: Mutation) -> None:
    with sources_with(mutation) as sources:
        pings = Pings(3, sources=sources)
        with pytest.raises(FoundError, match=r"race|record"):
            _run_all(pings, mutation.max_seeds)


def _run_all(pings: Pings, num_seeds: int) -> None:
    for seed in range(num_seeds):
        pings.machine.run(seed)
        if pings.results() != [[NUM_RUNS, 0, 0]] * len(pings.words):
            raise FoundError("record", "a rank gave up, or got other bytes")
