"""Dispatch and combine over several nodes: what crosses the network, and that every sum is right.

    EP_RT_RANKS_PER_NODE=2 mpiexec -n 4 python examples/two_nodes.py     two virtual nodes of this machine
    EP_RT_RANKS_PER_NODE=2 python examples/two_nodes.py --ranks 4        ranks are threads (host backend)

On real nodes the launcher says where ranks run; start them node by node, one for each GPU, and leave
EP_RT_RANKS_PER_NODE alone (``python -m ep_rt doctor`` shows network cards and settings):

    mpirun --hostfile hosts --map-by ppr:8:node --bind-to none python examples/two_nodes.py --backend cuda
    srun --nodes=2 --ntasks-per-node=8 --distribution=block python examples/two_nodes.py --backend cuda

GPUs of one host that NVLink does not join are nodes of their own, and so are all with EP_RT_NVLINK=0:

    EP_RT_NVLINK=0 mpirun -n 4 --bind-to none python examples/two_nodes.py --backend cuda

On GPUs (``--backend cuda``) every token crosses the network at most once for each node that has an expert of
it, by NVSHMEM, to the rank of the same place there; NVLink does the rest. A combine brings one row per node
back. On the host backend the same calls go through MPI or threads, and the nodes matter for the counts only.

Some tokens also go through the low-latency calls of decoding: straight to each rank that has an expert of
them, by stores where these reach, and else by NVSHMEM.

Every rank sends numbers that are exact in bfloat16, so the sums do not depend on their order: each token must
come back as itself times the number of ranks that it went to, and of experts in the low-latency calls.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from frameworks import BF16, Library
from launch import FRAMEWORKS, add_sizes, example_parser, launch, place_of

import ep_rt


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    if options.topk > options.num_experts:
        raise ep_rt.ConfigError(f"--topk {options.topk} of --num-experts {options.num_experts} is impossible")
    num_decoded = min(options.decode_tokens, options.tokens)
    rng = np.random.default_rng([options.seed, group.rank])
    x = rng.integers(-8, 9, (options.tokens, options.hidden)).astype(BF16)
    scores = rng.random((options.tokens, options.num_experts))
    topk_idx = np.argsort(scores, axis=1)[:, : options.topk]
    with (
        place_of(group, options) as place,
        ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=options.tokens,
            hidden=options.hidden,
            num_experts=options.num_experts,
            num_topk=options.topk,
            low_latency_mode=True,
            backend=place.backend,
        ) as buffer,
    ):
        lib = Library.of(buffer, place)
        topology = buffer.topology
        layout = buffer.get_dispatch_layout(lib.put(topk_idx))
        out = buffer.dispatch(lib.put(x), topk_idx=lib.put(topk_idx))
        back = lib.fetch(buffer.combine(out.recv_x, out.handle).combined_x)
        goes = lib.fetch(layout.is_token_in_rank).astype(bool)
        to_node = [
            int(goes[:, list(topology.ranks_of(n))].any(axis=1).sum()) for n in range(topology.num_nodes)
        ]
        if topology.num_nodes > 1 and lib.fetch(layout.num_tokens_per_rdma_rank).tolist() != to_node:
            sys.exit("num_tokens_per_rdma_rank is wrong")
        is_right = np.array_equal(
            back.astype(np.float32), x.astype(np.float32) * goes.sum(axis=1, keepdims=True)
        )
        rows, ids = lib.put(x[:num_decoded]), lib.put(topk_idx[:num_decoded])
        sent = buffer.low_latency_dispatch(rows, ids, use_fp8=False)
        ones = lib.put(np.ones((num_decoded, options.topk), np.float32))
        decoded = lib.fetch(buffer.low_latency_combine(sent.recv_x, ids, ones, sent.handle).combined_x)
        is_right &= np.array_equal(
            decoded.astype(np.float32), x[:num_decoded].astype(np.float32) * options.topk
        )
        elsewhere = [rank for rank in range(group.size) if rank not in topology.local_ranks]
        num_rows = int(goes[:, elsewhere].sum())
        num_crossing = sum(count for node, count in enumerate(to_node) if node != topology.node)
        described = f"{buffer.backend} backend, {lib.name} arrays"
    everyone = group.allgather((is_right, topology.node, num_crossing, num_rows))
    if group.rank > 0:
        return
    print(f"{group.size} ranks on {topology.num_nodes} nodes, {described}, {options.tokens} tokens per rank")
    for rank, (_, node, crossing, rows) in enumerate(everyone):
        print(f"rank {rank} on node {node}: {crossing} tokens for other nodes stand for {rows} rows there")
    wrong = [rank for rank, (right, *_) in enumerate(everyone) if not right]
    print(f"check {f'FAILED on ranks {wrong}' if wrong else 'passed: every token came back right'}")
    if wrong:
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    parser = example_parser(__doc__, frameworks=FRAMEWORKS)
    sizes = {
        "tokens": (256, "tokens per rank"),
        "hidden": (1024, "numbers per token"),
        "num-experts": (32, "experts, of all ranks together"),
        "topk": (4, "experts per token"),
        "decode-tokens": (64, "as many of them also go through the low-latency calls"),
    }
    add_sizes(parser, sizes)
    return parser


if __name__ == "__main__":
    launch(parser(), main)
