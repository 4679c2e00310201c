"""`ep_rt.compat.deep_ep` on GPUs: the checks of its tests on CPU tensors, streams, graphs, events, memory."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import (
    IS_UNDER_MPI,
    LOW_LATENCY_OVER_NETWORK,
    PLACES,
    RANKS_PER_NODE,
    device_count,
    num_ranks_of,
)

import ep_rt
from ep_rt import Group
from ep_rt.exchange import PeerGroup

torch = pytest.importorskip("torch")

import compat_cases as cases  # noqa: E402  # which imports torch
from compat_program import run_program  # noqa: E402
from torch_places import Streams, everywhere, meet, settle, slow  # noqa: E402

from ep_rt.compat import deep_ep, elastic  # noqa: E402

if device_count():
    from device_arrays import poison
    from torch_ranks import meeting, points_into_slab, run_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0 or not torch.cuda.is_available(), reason="torch without CUDA"),
]
on_every_place = pytest.mark.parametrize("place", PLACES)
under_mpi = pytest.mark.skipif(not IS_UNDER_MPI, reason="start under mpirun")

# Over nodes the sums of experts' ranks come back.
REDUCE = "rank" if RANKS_PER_NODE else "source"
NUM_BYTES = int(1e9)
TIMEOUT_S = 20
SHORT_S = 2


@contextlib.contextmanager
def deep_ep_buffer(group: Any, *, timeout_s: float = TIMEOUT_S, **options: Any) -> Iterator[Any]:
    buffer = deep_ep.Buffer(
        group, NUM_BYTES, low_latency_mode=True, backend="cuda", timeout_s=timeout_s, **options
    )
    poison(buffer._buffer, 0xA5)
    yield buffer
    buffer.destroy()


@contextlib.contextmanager
def elastic_buffer(group: Any, *, hidden: int = 384, kind: Any = deep_ep.ElasticBuffer) -> Iterator[Any]:
    buffer = kind(
        group,
        num_max_tokens_per_rank=64,
        hidden=hidden,
        num_topk=8,
        backend="cuda",
        num_gpu_timeout_secs=TIMEOUT_S,
    )
    poison(buffer._buffer, 0xA5)
    yield buffer
    buffer.destroy()


def check_normal(buffer: Any, seed: int) -> None:
    cases.check_normal(buffer, seed, ranks_per_node=RANKS_PER_NODE, rounds_nodes=True)


def run(place: str, check: Callable[[Any], None], **options: Any) -> None:
    """``check(buffer)`` with a `deep_ep.Buffer` on every rank."""

    def body(group: Group) -> None:
        with deep_ep_buffer(group, **options) as buffer, meeting(buffer._buffer, place):
            check(buffer)

    run_torch(place, body)


@on_every_place
def test_normal_mode_equals_the_oracle(place: str) -> None:
    def check(buffer: Any) -> None:
        for seed in range(8):
            check_normal(buffer, seed)

    # Over nodes symmetric memory is taken once for all tests.
    run(place, check, num_rdma_bytes=64 << 20 if RANKS_PER_NODE else 0)


@on_every_place
def test_low_latency_mode_equals_the_oracle(place: str) -> None:
    def check(buffer: Any) -> None:
        for seed in range(4):
            cases.check_low_latency(buffer, seed, reduce=REDUCE)

    run(place, check)


@on_every_place
@pytest.mark.parametrize("do_cpu_sync", [True, False])
@pytest.mark.parametrize("kind", [deep_ep.ElasticBuffer, deep_ep.EPBuffer])
def test_elastic_buffer_equals_the_oracle(place: str, kind: Any, do_cpu_sync: bool) -> None:
    def body(group: Group) -> None:
        with elastic_buffer(group, kind=kind) as buffer, meeting(buffer._buffer, place):
            for seed in range(8):
                cases.check_elastic(buffer, seed, do_cpu_sync=do_cpu_sync, summed_ranks=RANKS_PER_NODE)
            buffer.barrier()

    run_torch(place, body)


@on_every_place
def test_elastic_buffer_of_the_default_size_is_enough(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded results of the worst case have up to 8 times the rows that the memory is for."""
    monkeypatch.setattr(elastic, "_MIN_BYTES", 0)  # else small models have room for everything

    def body(group: Group) -> None:
        with elastic_buffer(group, hidden=1024) as buffer, meeting(buffer._buffer, place):
            assert buffer._buffer.memory_report().slab.num_bytes == buffer.num_bytes
            for seed in range(4):
                case = cases.full_case(seed, buffer, hidden=1024)
                cases.check_elastic(buffer, seed, do_cpu_sync=False, summed_ranks=RANKS_PER_NODE, case=case)

    run_torch(place, body)


@on_every_place
def test_tuning(place: str) -> None:
    run(place, cases.check_tuning)


@on_every_place
def test_masks_of_the_caller(place: str) -> None:
    if num_ranks_of(place, 4) < 2:
        pytest.skip("needs a peer")
    run(place, cases.check_masks, enable_shrink=True)


@under_mpi
@pytest.mark.skipif(LOW_LATENCY_OVER_NETWORK, reason="NVSHMEM serves no process that has lost a peer")
def test_ranks_that_stop_at_different_calls() -> None:
    def body(group: Group) -> None:
        if group.size < 2:
            pytest.skip("needs a peer")
        for _ in range(2):
            # Those that stop end it, too, while the others go on.
            with deep_ep_buffer(group, enable_shrink=True, timeout_s=SHORT_S) as buffer:
                cases.check_ranks_that_stop(buffer)
            assert isinstance(group, PeerGroup)
            group.rejoin(op="the end of the test")  # some may have waited in vain for the end of the others

    run_torch("mpi", body)


# First with ranks that meet, which loads all kernels and finds all memory, then without.


@on_every_place
@pytest.mark.parametrize("mode", ["exact", "worst", "low-latency", "hook"])
def test_calls_in_the_order_of_streams(place: str, mode: str) -> None:
    def body(group: Group) -> None:
        streams = Streams()
        with deep_ep_buffer(group) as buffer:
            for meets in (meeting(buffer._buffer, place), contextlib.nullcontext()):
                with meets:
                    cases.check_order(buffer, streams, mode)

    run_torch(place, body, num_virtual_ranks=2)


@on_every_place
@pytest.mark.parametrize("do_cpu_sync", [False, True])
@pytest.mark.parametrize("do_expand", [False, True])
def test_elastic_calls_in_the_order_of_streams(place: str, do_expand: bool, do_cpu_sync: bool) -> None:
    def body(group: Group) -> None:
        streams = Streams()
        with elastic_buffer(group) as buffer:
            for meets in (meeting(buffer._buffer, place), contextlib.nullcontext()):
                with meets:
                    cases.check_elastic_order(buffer, streams, do_expand=do_expand, do_cpu_sync=do_cpu_sync)

    run_torch(place, body, num_virtual_ranks=2)


@on_every_place
def test_graph_of_both_modes(place: str) -> None:
    def body(group: Group) -> None:
        with deep_ep_buffer(group) as buffer:
            first = meeting(buffer._buffer, place)
            cases.check_graph(
                buffer,
                has_threads_beside=place != "mpi",
                first=first,
                reduce=REDUCE,
                summed_ranks=RANKS_PER_NODE,
            )

    run_torch(place, body, num_virtual_ranks=2)


@on_every_place
def test_elastic_graph(place: str) -> None:
    def body(group: Group) -> None:
        with elastic_buffer(group) as buffer:
            first = meeting(buffer._buffer, place)
            cases.check_elastic_graph(buffer, has_threads_beside=place != "mpi", first=first)

    run_torch(place, body, num_virtual_ranks=2)


@on_every_place
def test_counts_of_a_dispatch_on_its_way(place: str) -> None:
    def body(group: Group) -> None:
        streams = Streams()
        with elastic_buffer(group) as buffer:
            for meets in (meeting(buffer._buffer, place), contextlib.nullcontext()):
                with meets:
                    cases.check_elastic_counts_first(buffer, streams)

    run_torch(place, body, num_virtual_ranks=2)


@on_every_place
def test_a_default_device_takes_no_time(place: str) -> None:
    """It is a mode, which torch's functions ask what to do: calls whose plans are made use none of them."""
    from torch.overrides import TorchFunctionMode

    asked: list[str] = []

    class Listening(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(str(func))
            return func(*args, **(kwargs or {}))

    def check(buffer: Any) -> None:
        num_ranks = buffer.group_size
        ids = everywhere(num_ranks)
        weights = torch.ones(ids.shape)
        x = torch.ones((len(ids), 256), dtype=torch.bfloat16)
        y = torch.ones((1, num_ranks * len(ids), 256), dtype=torch.bfloat16)
        routing = {"topk_idx": ids, "topk_weights": weights, "num_experts": num_ranks}
        num_tokens = len(ids)

        def calls() -> None:
            sent = buffer._buffer.dispatch(x, **routing, num_worst_tokens=num_ranks * num_tokens)
            buffer.combine(sent.recv_x, sent.handle, topk_weights=sent.recv_topk_weights)
            few = buffer.low_latency_dispatch(x, ids, num_tokens, num_ranks)
            buffer.low_latency_combine(y, ids, weights, few[2])

        calls()
        meet(buffer._buffer)
        if buffer.rank > 0:
            calls()
        else:  # threads would share the list
            with Listening():
                x.data_ptr()
                assert asked
                asked.clear()
                calls()
            assert asked == []

    run(place, check)


@on_every_place
def test_events(place: str) -> None:
    """They are behind the work of the current stream, not further, and other streams wait for them."""

    def body(group: Group) -> None:
        streams = Streams()
        x = torch.zeros(1000)
        copy = torch.zeros(1000).fill_(3)  # loads the kernel, for which the driver may wait
        settle()
        for make in (deep_ep.EventHandle, deep_ep.Buffer.capture, deep_ep.ElasticBuffer.capture):
            x.zero_()
            settle()
            with streams.current(0):
                slow()
                x.fill_(1)
                event = make()
            assert not event.query()
            with streams.current(1):
                event.current_stream_wait()
                copy.copy_(x)
            event.synchronize()
            assert event.query()
            streams.settle()
            assert (copy == 1).all()
        event = deep_ep.EventOverlap(deep_ep.EventHandle())
        with streams.current(1), event:
            copy.fill_(2)
        streams.settle()
        assert (copy == 2).all()

    run_torch(place, body, num_virtual_ranks=1)


@on_every_place
def test_memory_and_streams_for_the_caller(place: str) -> None:
    def check(buffer: Any) -> None:
        everything = buffer.get_local_buffer_tensor(torch.uint8)
        assert everything.device.type == "cuda"
        assert everything.numel() == NUM_BYTES
        part = buffer.get_local_buffer_tensor(torch.float32, torch.Size((3, 5)), offset=16)
        part.fill_(1.0)
        assert everything[16:76].view(torch.float32).tolist() == [1.0] * 15
        stream = buffer.get_comm_stream()
        assert stream != torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            doubled = 2 * part
        stream.synchronize()
        assert (doubled == 2).all()

    run(place, check)


@on_every_place
def test_rows_are_used_where_they_landed(place: str) -> None:
    """Dispatch hands out what the peers wrote; combine reads it there, and what was written in place."""

    def check(buffer: Any) -> None:
        inner, num_ranks = buffer._buffer, buffer.group_size
        ids = everywhere(num_ranks)
        weights = torch.ones(ids.shape)
        x = torch.full((len(ids), 256), buffer.rank + 1.0, dtype=torch.bfloat16)
        _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, num_ranks)
        for num_worst_tokens in (0, num_ranks * len(ids)):
            recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
                x,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=ids,
                topk_weights=weights,
                num_worst_tokens=num_worst_tokens,
            )
            assert all(points_into_slab(inner, each) for each in (recv_x, recv_idx, recv_weights))
            recv_x *= 2
            num_staged = inner.stats.num_staged_inputs
            combined_x, _, _ = buffer.combine(recv_x, handle)
            assert inner.stats.num_staged_inputs == num_staged
            assert torch.equal(combined_x, 2 * num_ranks * x)
            buffer.combine(recv_x.clone(), handle)
            assert inner.stats.num_staged_inputs == num_staged + 1
        assert inner.stats.num_copied_results == inner.stats.num_copied_inputs == 0

        _, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, len(ids), num_ranks, use_fp8=False)
        given = buffer.get_next_low_latency_combine_buffer(handle)
        assert given.data_ptr() == buffer.get_next_low_latency_combine_buffer(handle).data_ptr()
        given.fill_(3)
        out = torch.empty_like(x)
        not_read = torch.zeros_like(given)
        combined_x, _, _ = buffer.low_latency_combine(not_read, ids, weights, handle, zero_copy=True, out=out)
        assert combined_x is out
        assert (out == 3 * num_ranks).all()

    run(place, check)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@under_mpi
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_torch_process_groups(backend: str) -> None:
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def body(group: Group) -> None:
        port = group.allgather(free_port())[0]
        dist.init_process_group(
            backend, init_method=f"tcp://127.0.0.1:{port}", rank=group.rank, world_size=group.size
        )
        world = dist.group.WORLD
        with deep_ep_buffer(world) as buffer:
            assert (buffer.group, buffer.rank, buffer.group_size) == (world, group.rank, group.size)
            check_normal(buffer, 1)
            cases.check_low_latency(buffer, 1, reduce=REDUCE)
        with elastic_buffer(world) as buffer:
            cases.check_elastic(buffer, 3, summed_ranks=RANKS_PER_NODE)
            for use_fp8, num_biases, do_cpu_sync in ((False, 2, True), (True, 1, False), (False, 0, False)):
                cases.check_elastic_refs(
                    buffer,
                    use_fp8=use_fp8,
                    num_biases=num_biases,
                    do_cpu_sync=do_cpu_sync,
                    rounds_nodes=bool(RANKS_PER_NODE),
                )
        dist.destroy_process_group()

    run_torch("mpi", body)


@under_mpi
def test_mpi_communicator() -> None:
    from mpi4py import MPI

    def body(group: Group) -> None:
        with deep_ep_buffer(None, comm=MPI.COMM_WORLD) as buffer:
            assert buffer.group is MPI.COMM_WORLD
            check_normal(buffer, 2)
        with elastic_buffer(MPI.COMM_WORLD) as buffer:
            cases.check_elastic(buffer, 4, summed_ranks=RANKS_PER_NODE)

    run_torch("mpi", body)


@pytest.mark.skipif(IS_UNDER_MPI, reason="starts ranks of its own")
def test_a_program_for_deep_ep_runs_unchanged(tmp_path: Path) -> None:
    """Not on virtual ranks: processes need a GPU each."""
    num_ranks = min(device_count(), 8)
    if num_ranks < 2:
        pytest.skip("needs two GPUs")
    run_program(tmp_path / "program.py", num_ranks, timeout_s=150, BACKEND="nccl", EP_RT_BACKEND="cuda")


@on_every_place
def test_tensors_of_the_cpu_are_refused(place: str) -> None:
    def check(buffer: Any) -> None:
        x = torch.ones((2, 128), dtype=torch.bfloat16, device="cpu")
        ids = torch.zeros((2, 1), dtype=torch.int64)
        per_expert = torch.zeros(buffer.group_size, dtype=torch.int32)
        with pytest.raises(ep_rt.ArrayError, match="lies on cpu"):
            buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=per_expert)
        check_normal(buffer, 3)

    run(place, check)
