"""Bugs planted in a copy of the kernels' sources: what the emulator must find, and within how many seeds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from .build import KERNELS_CU
from .machine import FoundError
from .scenarios import SCHEDULES, Runner


@dataclass(frozen=True, slots=True)
class Mutation:
    """A change of one source.

    Attributes:
        old, new: text that stands in the source once, and what takes its place.
        scenario: where it must be found.
        max_seeds: within so many.
        uncaught: why it is not found, for one that is listed nevertheless.
    """

    name: str
    file: str
    old: str
    new: str
    scenario: str
    max_seeds: int = 24
    uncaught: str = ""


def seeds_until_found(mutation: Mutation, *, first: int = 0, max_seeds: int | None = None) -> int | None:
    """How many seeds it takes; None for more than `max_seeds`."""
    with sources_with(mutation) as sources:
        runner = Runner.of(mutation.scenario, sources=sources)
        for number in range(max_seeds or mutation.max_seeds):
            try:
                # Another program each time, and another of its schedules.
                runner.run(first + number * (SCHEDULES + 1))
            except FoundError:
                return number + 1
    return None


@contextmanager
def sources_with(mutation: Mutation) -> Iterator[Path]:
    """A copy of the sources with the bug in it."""
    with TemporaryDirectory(prefix="mutated-") as folder:
        sources = Path(folder) / "kernels_cu"
        shutil.copytree(KERNELS_CU, sources, ignore=shutil.ignore_patterns("__pycache__"))
        path = sources / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            count = text.count(mutation.old)
            raise ValueError(f"{mutation.name}: its text stands {count} times in {mutation.file}, not once")
        path.write_text(text.replace(mutation.old, mutation.new))
        yield sources


_SYNC: Final = (
    Mutation(
        "finish: the arrival releases nothing",
        "sync.cuh",
        "ptx::st_release_sys(&call.exchange(peer)->arrivals",
        "ptx::st_relaxed_sys(&call.exchange(peer)->arrivals",
        "normal-r2-sm90",
    ),
    Mutation(
        "finish: blocks are counted without order",
        "sync.cuh",
        "ptx::atom_add_acq_rel_gpu(&call.workspace->finished[call.set], 1)",
        "atomicAdd(&call.workspace->finished[call.set], 1)",
        "normal-r2-sm90",
    ),
    Mutation(
        "finish: no barrier of the block before it counts itself",
        "sync.cuh",
        "    __shared__ bool is_last;\n    __syncthreads();\n",
        "    __shared__ bool is_last;\n",
        "normal-r2-sm90",
        uncaught="redundant: callers end in a barrier of the block, or have told of their chunks",
    ),
    Mutation(
        "finish: by the first block, not the last",
        "sync.cuh",
        "ptx::atom_add_acq_rel_gpu(&call.workspace->finished[call.set], 1) + 1 == gridDim.x;",
        "ptx::atom_add_acq_rel_gpu(&call.workspace->finished[call.set], 1) == 0;",
        "normal-r2-sm90",
    ),
    Mutation(
        "waiting for words acquires nothing",
        "sync.cuh",
        "        if (kAcquires) ptx::ld_acquire_sys(word_at(i));\n",
        "",
        "normal-r2-sm90",
    ),
    Mutation(
        "an arrival of a later epoch does not count",
        "sync.cuh",
        "if (seen == expected || signal_epoch(seen) > signal_epoch(expected)) return Arrival::kArrived;",
        "if (seen == expected) return Arrival::kArrived;",
        "barrier-r2",
        64,
    ),
    Mutation(
        "the counters of this call are cleared, not of the next",
        "sync.cuh",
        "const int32_t idle = call.set ^ 1;",
        "const int32_t idle = call.set;",
        "normal-r2-sm90",
    ),
    Mutation(
        "tickets are never cleared",
        "sync.cuh",
        "            call.workspace->tickets[idle] = 0;\n",
        "",
        "long-r2-sm90",
    ),
    Mutation(
        "words of offers are reused one epoch early",
        "sync.cuh",
        "call.parity = call.epoch & 1;",
        "call.parity = 0;",
        "normal-r3-sm90",
        64,
        uncaught="one set is enough: a call ends when all ranks have read all offers",
    ),
    Mutation(
        "a queued call goes on after one that was given up",
        "sync.cuh",
        "        ptx::st_relaxed_sys(&own->failed, 1);\n",
        "",
        "expiring-r2-sm90",
        64,
    ),
    Mutation(
        "the deadline is ignored",
        "sync.cuh",
        "return ptx::globaltimer_ns() > call.deadline_ns ? kExpired : kNothing;",
        "return kNothing;",
        "dead-r2-sm90",
    ),
    Mutation(
        "threads of a block leave one by one",
        "sync.cuh",
        "if (__syncthreads_or(has_failed)) return false;",
        "if (has_failed) return false;",
        "expiring-r3-sm90",
        400,
    ),
    Mutation(
        "`failed` is stored by an ordinary store",
        "sync.cuh",
        "ptx::st_relaxed_sys(&own->failed, 1);",
        "own->failed = 1;",
        "dead-r2-sm90",
    ),
    Mutation(
        "peers are told before the record is complete",
        "sync.cuh",
        "        ptx::st_release_sys(&own->hang.reason, reason);\n",
        "        ptx::st_relaxed_sys(&own->hang.reason, 0);\n",
        "dead-r2-sm90",
    ),
    Mutation(
        "a rank that gives up does not tell its peers",
        "sync.cuh",
        "        ptx::st_release_sys(peer_signal, signal_word(signal_epoch(expected), kGaveUp));",
        "        return;",
        "dead-r4-sm90",
        uncaught="deadlines of the others pass as well, and the records still name the dead rank",
    ),
)

_DISPATCH: Final = (
    Mutation(
        "the place is offered without a release",
        "intranode_dispatch.cu",
        "    ptx::st_release_sys(word, stamped(call.epoch, value));",
        "    ptx::st_relaxed_sys(word, stamped(call.epoch, value));",
        "normal-r2-sm90",
        64,
    ),
    Mutation(
        "offers are not acquired",
        "intranode_dispatch.cu",
        "        ptx::ld_acquire_sys(word);\n",
        "",
        "normal-r2-sm90",
        64,
    ),
    Mutation(
        "a peer that gave up is not noticed behind its offer",
        "intranode_dispatch.cu",
        "        if (is_contradicted) reason = kContradicted;\n",
        "",
        "dead-r4-sm90",
        uncaught="its memory serves another purpose only after a reset by the host, which is not emulated",
    ),
    Mutation(
        "no proxy fence between the peers' reads and our bulk stores",
        "intranode_dispatch_rows.cuh",
        "    ptx::fence_proxy_async();  // our stores",
        "    // our stores",
        "normal-r2-sm90",
        64,
    ),
    Mutation(
        "the flag goes before the data",
        "intranode_dispatch_rows.cuh",
        "    ptx::bulk_wait_landed();\n",
        "",
        "normal-r2-sm90",
    ),
    Mutation(
        "waits until rows are read, not until they have landed",
        "intranode_dispatch_rows.cuh",
        "    ptx::bulk_wait_landed();\n",
        "    ptx::bulk_wait_read<0>();\n",
        "normal-r2-sm90",
    ),
    Mutation(
        "a slot is refilled while it is read",
        "intranode_dispatch_rows.cuh",
        "        ptx::bulk_wait_read<kStages - 1 - kAhead>();\n",
        "",
        "normal-r2-sm90",
    ),
    Mutation(
        "a slot is refilled one store too early",
        "intranode_dispatch_rows.cuh",
        "bulk_wait_read<kStages - 1 - kAhead>",
        "bulk_wait_read<kStages - kAhead>",
        "normal-r3-sm90",
    ),
    Mutation(
        "a slot is refilled before the other lanes' stores have been read",
        "intranode_dispatch_rows.cuh",
        "        ptx::bulk_wait_read<kStages - 1 - kAhead>();\n        __syncwarp();\n",
        "        ptx::bulk_wait_read<kStages - 1 - kAhead>();\n",
        "normal-r3-sm90",
    ),
    Mutation(
        "the parity of a slot never flips",
        "intranode_dispatch_rows.cuh",
        "            phases ^= 1u << slot;\n",
        "",
        "normal-r2-sm90",
    ),
    Mutation(
        "a load expects too few bytes",
        "intranode_dispatch_rows.cuh",
        "mbarrier_arrive_expect(loaded, num_bytes + (",
        "mbarrier_arrive_expect(loaded, num_bytes - 16 + (",
        "dispatch-r2-sm90",
    ),
    Mutation(
        "the initialisation of the mbarriers is not fenced",
        "intranode_dispatch.cu",
        "    ptx::fence_mbarrier_init();\n",
        "",
        "dispatch-r2-sm90",
    ),
    Mutation(
        "rows begin one source too late",
        "intranode_dispatch.cu",
        "if (src < args.rank) base += count;",
        "if (src <= args.rank) base += count;",
        "dispatch-r2-sm90",
    ),
    Mutation(
        "one row too many fits",
        "intranode_dispatch_block.cuh",
        "position < shared.plan.limit[destination];",
        "position <= shared.plan.limit[destination];",
        "normal-r2-sm90",
        128,
    ),
    Mutation(
        "no fence between the cast and the bulk store",
        "intranode_dispatch_rows.cuh",
        "    ptx::fence_proxy_async_shared();\n",
        "",
        "quantized-r2-sm90",
    ),
    Mutation(
        "lanes overwrite what others still read in the cast",
        "intranode_dispatch_rows.cuh",
        "        __syncwarp();\n        const float scale",
        "        const float scale",
        "quantized-r2-sm90",
    ),
    Mutation(
        "lanes store what others still cast",
        "intranode_dispatch_rows.cuh",
        "    ptx::fence_proxy_async_shared();\n    __syncwarp();\n",
        "    ptx::fence_proxy_async_shared();\n",
        "quantized-r2-sm90",
    ),
    Mutation(
        "shared memory is used before it is cleared",
        "intranode_dispatch.cu",
        "#endif\n    __syncthreads();\n\n    Reason reason",
        "#endif\n\n    Reason reason",
        "staged-r2-sm90",
    ),
    Mutation(
        "the host is told before all is there",
        "intranode_dispatch.cu",
        "    __syncwarp();  // what the other lanes",
        "    // what the other lanes",
        "dispatch-r2-sm90",
    ),
    Mutation(
        "the host is told without a release",
        "intranode_dispatch.cu",
        "ptx::st_release_sys(&args.result->call, args.call)",
        "ptx::st_relaxed_sys(&args.result->call, args.call)",
        "dispatch-r2-sm90",
    ),
    Mutation(
        "positions are counted without order",
        "intranode_dispatch_layout.cuh",
        "ptx::atom_add_acq_rel_gpu(arrived, 1) + 1",
        "atomicAdd(arrived, 1) + 1",
        "normal-r2-sm90",
        64,
    ),
    Mutation(
        "positions of other blocks are not acquired",
        "intranode_dispatch_layout.cuh",
        "sync::wait_for_words<sync::kAcquiring>(",
        "sync::wait_for_words<sync::kStamped>(",
        "normal-r2-sm90",
        64,
    ),
    Mutation(
        "warps do not wait for each other's counts",
        "intranode_dispatch_layout.cuh",
        "    __syncthreads();\n    int32_t before = 0, total = 0;",
        "    int32_t before = 0, total = 0;",
        "normal-r2-sm90",
    ),
    Mutation(
        "counts of blocks are taken without their stamp",
        "intranode_dispatch_layout.cuh",
        "[&](uint64_t seen) { return is_stamped(seen, call.epoch); });",
        "[&](uint64_t seen) { return seen != 0; });",
        "normal-r2-sm90",
        64,
    ),
    Mutation(
        "the last token's metadata is missing",
        "intranode_dispatch_layout.cuh",
        "shared.tokens_until[d] = position[d] + goes;",
        "shared.tokens_until[d] = position[d];",
        "dispatch-r2-sm90",
    ),
    Mutation(
        "the rows without a token begin one too early",
        "intranode_dispatch_metadata.cuh",
        "const int64_t first = num_recv_tokens();",
        "const int64_t first = max(0, num_recv_tokens() - 1);",
        "normal-r2-sm90",
    ),
    Mutation(
        "tickets are taken by an ordinary increment",
        "sync.cuh",
        "return lane == 0 ? ptx::atom_inc_relaxed_gpu(tickets) : 0;",
        "return lane == 0 ? (*tickets)++ : 0;",
        "normal-r2-sm90",
    ),
    Mutation(
        "stores without bulk copies: the last vector is forgotten",
        "intranode_dispatch_rows.cuh",
        "if (v * kWarpSize + block.lane < num_vectors) ptx::st_stream",
        "if (v * kWarpSize + block.lane + 1 < num_vectors) ptx::st_stream",
        "dispatch-r2-sm80",
    ),
)

_COMBINE: Final = (
    Mutation(
        "the offer releases nothing",
        "intranode_combine.cu",
        "    ptx::st_release_sys(word, stamped(call.epoch, value));",
        "    ptx::st_relaxed_sys(word, stamped(call.epoch, value));",
        "normal-r2-sm90",
    ),
    Mutation(
        "no proxy fence before the rows are loaded",
        "intranode_combine.cu",
        "    ptx::fence_proxy_async();\n#endif\n    if (has_weights)",
        "#endif\n    if (has_weights)",
        "normal-r2-sm90",
    ),
    Mutation(
        "a stage is refilled without a proxy fence",
        "intranode_combine.cu",
        "        ptx::fence_proxy_async_shared();\n",
        "",
        "normal-r2-sm90",
    ),
    Mutation(
        "a stage is refilled while other lanes read it",
        "intranode_combine.cu",
        "        ptx::fence_proxy_async_shared();\n        __syncwarp();\n",
        "        ptx::fence_proxy_async_shared();\n",
        "normal-r2-sm90",
    ),
    Mutation(
        "the parity of the ring never flips",
        "intranode_combine.cu",
        "            parity ^= 1;\n",
        "",
        "normal-r2-sm90",
        64,
    ),
    Mutation(
        "a chunk is told without waiting for its copies",
        "intranode_combine_stage.cuh",
        "    ptx::bulk_wait_landed();\n",
        "",
        "staged-r2-sm90",
    ),
    Mutation(
        "a chunk is told without waiting for the other lanes",
        "intranode_combine_stage.cuh",
        "        __syncwarp();\n        uint64_t* counter",
        "        uint64_t* counter",
        "staged-r2-sm90",
    ),
    Mutation(
        "a chunk is told by lanes that have acquired nothing",
        "intranode_combine_stage.cuh",
        "        __syncwarp();  // what lane 0",
        "        // what lane 0",
        "staged-r2-sm90",
    ),
    Mutation(
        "a chunk is told without a release",
        "intranode_combine_stage.cuh",
        "            ptx::st_release_sys(",
        "            ptx::st_relaxed_sys(",
        "staged-r2-sm90",
    ),
    Mutation(
        "a stage of the copy is refilled while it is read",
        "intranode_combine_stage.cuh",
        "            ptx::bulk_wait_read<0>();\n",
        "",
        "staged-r2-sm90",
    ),
    Mutation(
        "rows are read without acquiring their chunk",
        "intranode_combine.cu",
        "            staged = staged_of(ptx::ld_acquire_sys(word()));",
        "            staged = staged_of(ptx::ld_relaxed_sys(word()));",
        "staged-r2-sm90",
    ),
    Mutation(
        "rows are read by lanes that have acquired nothing",
        "intranode_combine.cu",
        "        __syncwarp();  // without bulk loads",
        "        // without bulk loads",
        "staged-r2-sm80",
        64,
    ),
    Mutation(
        "chunks count that no offer was acquired with",
        "intranode_combine.cu",
        "block.lane < block.call.num_ranks ? block.shared.staged[block.lane]",
        "block.lane < block.call.num_ranks ? staged_of(ptx::ld_relaxed_sys(word()))",
        "staged-r2-sm90",
        400,
    ),
    Mutation(
        "the sum of the weights forgets a source",
        "intranode_combine.cu",
        "        for (int32_t src = 0; src < kMaxLocalRanks; ++src) sum += term[src];",
        "        for (int32_t src = 1; src < kMaxLocalRanks; ++src) sum += term[src];",
        "normal-r2-sm90",
        64,
    ),
)

_LOCAL: Final = (
    Mutation(
        "the barrier of the grid orders nothing",
        "local.cuh",
        "        ptx::atom_add_acq_rel_gpu(arrived, 1);",
        "        atomicAdd(arrived, 1);",
        "expert-major-r2-sm90",
    ),
    Mutation(
        "the barrier of the grid is not acquired",
        "local.cuh",
        "        ptx::ld_acquire_gpu(arrived);\n",
        "",
        "expert-major-r2-sm90",
    ),
    Mutation(
        "expand: no proxy fence before the counters' memory is a ring",
        "expand.cu",
        "    ptx::fence_proxy_async();\n#endif\n    __syncthreads();",
        "#endif\n    __syncthreads();",
        "expert-major-r2-sm90",
    ),
    Mutation(
        "expand: a slot is refilled while it is read",
        "expand.cu",
        "        ptx::bulk_wait_read<kStages - 1 - kAhead>();\n",
        "",
        "expert-major-r2-sm90",
        64,
    ),
    Mutation(
        "expand: places are handed out while others are read",
        "expand_positions.cuh",
        "            __syncwarp();\n            if (id[i] >= 0 && lower == 0)",
        "            if (id[i] >= 0 && lower == 0)",
        "expert-major-r2-sm90",
    ),
    Mutation(
        "expand: counts of blocks are taken without their stamp",
        "expand_positions.cuh",
        "const auto is_there = [&](uint64_t seen) { return is_stamped(seen, call.number); };",
        "const auto is_there = [&](uint64_t seen) { return seen != 0; };",
        "expert-major-r2-sm90",
        64,
    ),
    Mutation(
        "collapse: a stage is refilled without a proxy fence",
        "collapse.cu",
        "        ptx::fence_proxy_async_shared();\n",
        "",
        "expert-major-r2-sm90",
        64,
    ),
    Mutation(
        "barrier: what came before is not released",
        "barrier.cu",
        "        ptx::st_release_sys(peer_signal, word);",
        "        ptx::st_relaxed_sys(peer_signal, word);",
        "local-r2-sm90",
    ),
    Mutation(
        "barrier: what came before is not acquired",
        "sync.cuh",
        "            seen = ptx::ld_acquire_sys(word);\n            arrival",
        "            seen = ptx::ld_relaxed_sys(word);\n            arrival",
        "local-r2-sm90",
    ),
    Mutation(
        "wire limit: leaves before its copies have landed",
        "wire_limit.cu",
        "    ptx::bulk_wait_landed();\n",
        "",
        "local-r2-sm90",
    ),
    Mutation(
        "wire limit: the counters are cleared by the first block",
        "wire_limit.cu",
        "ptx::atom_add_acq_rel_gpu(&args.counters[1], 1) + 1 == gridDim.x",
        "ptx::atom_add_acq_rel_gpu(&args.counters[1], 1) == 0",
        "local-r2-sm90",
        64,
    ),
)

MUTATIONS: Final = (*_SYNC, *_DISPATCH, *_COMBINE, *_LOCAL)
