"""Bugs in what all collective calls share: epochs, waits, giving up."""

from __future__ import annotations

from typing import Final

from .planting import Mutation

SYNC: Final = (
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
        "    ptx::st_relaxed_sys(&own->failed, 1);\n",
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
        "    ptx::st_release_sys(&own->hang.reason, reason);\n",
        "    ptx::st_relaxed_sys(&own->hang.reason, 0);\n",
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
