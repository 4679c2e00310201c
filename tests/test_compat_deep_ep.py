"""Programs written for DeepEP run on ep_rt: the names, the calls beside the oracle, what callers look at."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gloo_launch import run_ranks

torch: Any = pytest.importorskip("torch")

import compat_cases  # noqa: E402  # which imports torch

import ep_rt  # noqa: E402
from ep_rt import Group  # noqa: E402
from ep_rt.compat import deep_ep  # noqa: E402

TESTS = Path(__file__).parent


@pytest.mark.parametrize("seed", range(8))
def test_normal_mode_equals_the_oracle(seed: int) -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, int(1e9), backend="host")
        compat_cases.check_normal(buffer, seed)
        buffer.destroy()

    ep_rt.run_local(run, 2 + seed % 3, timeout_s=20)


@pytest.mark.parametrize("seed", range(2))
def test_several_nodes_equal_the_oracle(seed: int) -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, int(1e9), int(1e9), backend="host", ranks_per_node=2)
        compat_cases.check_normal(buffer, seed, ranks_per_node=2)
        buffer.destroy()

    ep_rt.run_local(run, 4, timeout_s=20)


@pytest.mark.parametrize("seed", range(4))
def test_low_latency_mode_equals_the_oracle(seed: int) -> None:
    def run(group: Group) -> None:
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(8, 512, group.size, 8 * group.size)
        buffer = deep_ep.Buffer(
            group, num_rdma_bytes=hint, low_latency_mode=True, num_qps_per_rank=8, backend="host"
        )
        compat_cases.check_low_latency(buffer, seed)
        buffer.destroy()

    ep_rt.run_local(run, 2 + seed % 2, timeout_s=20)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("do_cpu_sync", [True, False])
def test_elastic_buffer_equals_the_oracle(seed: int, do_cpu_sync: bool) -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.ElasticBuffer(
            group, num_max_tokens_per_rank=64, hidden=384, num_topk=8, backend="host"
        )
        compat_cases.check_elastic(buffer, seed, do_cpu_sync=do_cpu_sync)
        buffer.destroy()

    ep_rt.run_local(run, 2 + seed % 3, timeout_s=20)


# A user's whole program: nothing in it but DeepEP's and torch's own names.
PROGRAM = """
import torch, torch.distributed as dist
import deep_ep
from deep_ep import Buffer, Config, EventOverlap
from deep_ep.utils import EventHandle

def cast(x):
    blocks = x.view(len(x), -1, 128)
    scale = blocks.abs().float().amax(dim=2).clamp(1e-4) / 448
    return (blocks / scale.unsqueeze(2)).to(torch.float8_e4m3fn).view(x.shape), scale

def cast_back(x, scale):
    if scale.dtype == torch.int:
        scale = (scale.view(torch.uint8).to(torch.int) << 23).view(torch.float)
    return (x.float().view(len(x), -1, 128) * scale.view(len(x), -1, 1)).view(x.shape).bfloat16()

def difference(a, b):
    a, b = a.double() + 1, b.double() + 1
    return 0.0 if a.numel() == 0 else (1 - 2 * (a * b).sum() / (a * a + b * b).sum()).item()

def normal(buffer, group, rank, num_ranks):
    num_tokens, hidden, num_topk, num_experts = 32, 256, 4, 8 * num_ranks
    constant = torch.full((num_tokens, hidden), float(rank), dtype=torch.bfloat16)
    random = torch.randn((num_tokens, hidden)).bfloat16()
    idx = torch.topk(torch.rand((num_tokens, num_experts)), num_topk, dim=-1, sorted=False)[1]
    assert idx.dtype == deep_ep.topk_idx_t
    weights = torch.randn((num_tokens, num_topk))
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts)
    assert per_node is None
    arriving, arriving_by_expert = per_rank.clone(), per_expert.clone()
    dist.all_reduce(arriving, group=group)
    dist.all_reduce(arriving_by_expert, group=group)

    def is_by_source(rows, matrix):
        begin = 0
        for src in range(num_ranks):
            end = matrix[src][rank].item()
            assert (rows[begin:end].float() == src).all()
            begin = end

    config = Config(24, 8, 256)
    for x in (constant, random, cast(constant)):
        for with_topk in (False, True):
            for is_async in (False, True):
                args = dict(x=x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                            num_tokens_per_expert=per_expert, config=config, async_finish=is_async)
                if with_topk:
                    args |= dict(topk_idx=idx, topk_weights=weights)
                if is_async:
                    args |= dict(previous_event=EventOverlap(EventHandle()), allocate_on_comm_stream=True)
                recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(**args)
                event.current_stream_wait() if is_async else ()
                recv_x = cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x
                assert len(recv_x) == arriving[rank].item()
                assert counts == arriving_by_expert.view(num_ranks, -1)[rank].tolist()
                if x is not random:
                    is_by_source(recv_x, handle[0])
                if with_topk:
                    assert [recv_idx.eq(i).sum().item() for i in range(8)] == counts
                    worst = buffer.dispatch(**args, num_worst_tokens=num_tokens * num_ranks)
                    assert len(worst[3]) == 0 and len(worst[1]) == len(worst[2]) == num_tokens * num_ranks
                    assert torch.equal(worst[1][: len(recv_x)], recv_idx)
                    assert (worst[1][len(recv_x) :] == -1).all()
                else:
                    again, _, _, _, _, event = buffer.dispatch(x=x, handle=handle, config=config)
                    again = cast_back(*again) if isinstance(again, tuple) else again
                    assert torch.equal(again, recv_x)
                combined_x, combined_weights, event = buffer.combine(
                    recv_x, handle, topk_weights=recv_weights, config=config, async_finish=is_async)
                event.current_stream_wait() if is_async else ()
                mean = combined_x.float() / in_rank.sum(dim=1, keepdim=True)
                assert difference(mean, random if x is random else constant) < 5e-6
                if with_topk:
                    assert difference(combined_weights, weights) < 1e-9

    for chunk in (*range(4, 33, 4), 0):  # tune
        Buffer.set_num_sms(24)
        config = Config(24, chunk, 256) if chunk else Buffer.get_dispatch_config(num_ranks)
        recv_x, *_ = buffer.dispatch(x=constant, handle=handle, config=config)
        config = Config(24, 1 + chunk // 4, 256) if chunk else Buffer.get_combine_config(num_ranks)
        buffer.combine(x=recv_x, handle=handle, config=config)

def low_latency(buffer, group, rank, num_ranks, use_logfmt):
    num_tokens, hidden, num_topk, num_experts = 16, 1024, 4, 4 * num_ranks
    x = torch.full((num_tokens, hidden), rank - 128.0).bfloat16()
    x[:, -128:] = torch.arange(num_tokens).view(-1, 1)
    idx = torch.topk(torch.rand((num_tokens, num_experts)), num_topk, dim=-1)[1]
    for _ in range(10):
        idx[torch.randint(num_tokens, ()), torch.randint(num_topk, ())] = -1
    weights = torch.rand((num_tokens, num_topk))
    everyone = torch.empty((num_ranks, num_tokens, num_topk), dtype=idx.dtype)
    dist.all_gather_into_tensor(everyone.view(-1, num_topk), idx, group=group)
    for with_hook in (False, True):
        for use_fp8, round_scale, use_ue8m0 in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
            stats = torch.zeros(4, dtype=torch.int)
            recv_x, recv_count, handle, event, hook = buffer.low_latency_dispatch(
                x, idx, num_tokens, num_experts, cumulative_local_expert_recv_stats=stats,
                use_fp8=bool(use_fp8), round_scale=bool(round_scale), use_ue8m0=bool(use_ue8m0),
                async_finish=not with_hook, return_recv_hook=with_hook)
            hook() if with_hook else event.current_stream_wait()
            y = recv_x
            if use_fp8:
                packed = recv_x[1].contiguous()
                assert packed.dtype == (torch.int if use_ue8m0 else torch.float)
                y = cast_back(recv_x[0].view(-1, hidden), packed.view(-1, packed.size(2)))
                y = y.view(recv_x[0].shape)
            for i in range(4):
                count, src, ranges = recv_count[i].item(), handle[0][i], handle[1][i]
                assert count == stats[i].item() == (ranges & 0xFFFFFFFF).sum().item()
                assert count == (everyone == 4 * rank + i).sum().item()
                rows, src = y[i, :count], src[:count]
                if not round_scale:
                    assert (rows[:, -128:] == src.view(-1, 1)).all()
                    for j in range(num_ranks):
                        begin, length = (ranges[j] >> 32).item(), (ranges[j] & 0xFFFFFFFF).item()
                        assert (rows[begin : begin + length, :-128] == j - 128).all()
                y[i, count:] = 0
            for zero_copy in (False,) if use_logfmt else (False, True):
                if zero_copy:
                    buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = y
                out = torch.empty_like(x)
                combined_x, event, hook = buffer.low_latency_combine(
                    y, idx, weights, handle, use_logfmt=use_logfmt, zero_copy=zero_copy, out=out,
                    async_finish=not with_hook, return_recv_hook=with_hook)
                hook() if with_hook else event.current_stream_wait()
                assert combined_x is out
                expected = x * weights.masked_fill(idx == -1, 0).sum(dim=1, keepdim=True)
                assert difference(expected, combined_x) < (9e-4 if use_fp8 or use_logfmt else 1e-5)

def elastic(buffer, rank, num_ranks):
    num_tokens, hidden, num_topk, num_experts = 16 - rank, 256, 4, 4 * num_ranks
    x = torch.randn((num_tokens, hidden)).bfloat16()
    weights, idx = torch.topk(torch.rand((num_tokens, num_experts)), num_topk, dim=-1)
    recv_x, recv_idx, recv_weights, handle, event = buffer.dispatch(
        x, idx, weights, num_experts=num_experts, expert_alignment=8, do_expand=True,
        previous_event=buffer.capture(), allocate_on_comm_stream=True, async_with_compute_stream=True)
    event.current_stream_wait()
    assert recv_idx is None and len(recv_x) == sum(handle.num_recv_tokens_per_expert_list)
    begin = 0
    y = torch.zeros_like(recv_x)
    for end in handle.psum_num_recv_tokens_per_expert.tolist():
        y[begin:end] = recv_x[begin:end] * recv_weights[begin:end].view(-1, 1)
        begin = (end + 7) // 8 * 8
    combined_x, combined_weights, _ = buffer.combine(y, handle, topk_weights=recv_weights)
    assert torch.equal(combined_weights, weights)
    assert difference(combined_x, x * weights.sum(dim=1, keepdim=True)) < 1e-4

def main():
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(num_ranks)))
    torch.manual_seed(rank)
    num_nvl_bytes = Buffer.get_dispatch_config(num_ranks).get_nvl_buffer_size_hint(512, num_ranks)
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(16, 1024, num_ranks, 4 * num_ranks)
    buffer = Buffer(group, num_nvl_bytes, num_rdma_bytes, low_latency_mode=True, num_qps_per_rank=4,
                    explicitly_destroy=True)
    assert (buffer.group, buffer.rank, buffer.group_size) == (group, rank, num_ranks)
    normal(buffer, group, rank, num_ranks)
    buffer.clean_low_latency_buffer(16, 1024, 4 * num_ranks)
    low_latency(buffer, group, rank, num_ranks, use_logfmt=False)
    low_latency(buffer, group, rank, num_ranks, use_logfmt=True)
    buffer.destroy()
    buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=16, hidden=256, num_topk=4,
                                   explicitly_destroy=True)
    elastic(buffer, rank, num_ranks)
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()
    print("passed", flush=True)

main()
"""

LAUNCHER = """
import sys
from ep_rt.compat import deep_ep
sys.modules["deep_ep"] = deep_ep
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"))
"""


def test_a_program_for_deep_ep_runs_unchanged(tmp_path: Path) -> None:
    num_ranks = 2
    (tmp_path / "program.py").write_text(PROGRAM)
    codes, outputs = run_ranks(
        ["-c", LAUNCHER, str(tmp_path / "program.py")], num_ranks, timeout_s=120, EP_RT_BACKEND="host"
    )
    assert codes == [0] * num_ranks, outputs
    assert all("passed" in output for output in outputs), outputs


def test_the_names_are_the_same_objects_by_either_module() -> None:
    program = (
        "import sys\n"
        "from ep_rt.compat import deep_ep as here\n"
        "sys.modules['deep_ep'] = here\n"
        "print('torch' in sys.modules)\n"
        "import deep_ep, deep_ep.buffer, deep_ep.utils\n"
        "from deep_ep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t\n"
        "assert deep_ep.utils.EventOverlap is EventOverlap and deep_ep.utils.EventHandle is EventHandle\n"
        "assert deep_ep.buffer.Buffer is Buffer and deep_ep.buffer.Config is Config\n"
        "print(topk_idx_t)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, PYTHONPATH=str(TESTS.parent)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "torch.int64"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deep_ep.nothing  # noqa: B018
    for name in deep_ep.__all__:
        assert getattr(deep_ep, name) is not None
    for kind in (deep_ep.Buffer, deep_ep.ElasticBuffer):
        for name, member in vars(kind).items():
            if callable(member) and not name.startswith("_"):
                assert member.__doc__, f"{kind.__name__}.{name}"


def test_positional_arguments_are_those_of_deep_ep() -> None:
    def parameters(function: Any) -> list[str]:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds][1:]

    schedule = ["config", "previous_event", "async_finish", "allocate_on_comm_stream"]
    assert parameters(deep_ep.Buffer.__init__)[:3] == ["group", "num_nvl_bytes", "num_rdma_bytes"]
    assert parameters(deep_ep.Buffer.__init__)[3:] == [
        "low_latency_mode",
        "num_qps_per_rank",
        "allow_nvlink_for_low_latency_mode",
        "allow_mnnvl",
        "use_fabric",
        "explicitly_destroy",
        "enable_shrink",
        "comm",
    ]
    assert parameters(deep_ep.Buffer.dispatch) == [
        "x",
        "handle",
        "num_tokens_per_rank",
        "num_tokens_per_rdma_rank",
        "is_token_in_rank",
        "num_tokens_per_expert",
        "topk_idx",
        "topk_weights",
        "expert_alignment",
        "num_worst_tokens",
        *schedule,
    ]
    assert parameters(deep_ep.Buffer.combine) == ["x", "handle", "topk_weights", "bias", *schedule]
    assert parameters(deep_ep.Buffer.low_latency_combine) == [
        "x",
        "topk_idx",
        "topk_weights",
        "handle",
        "use_logfmt",
        "zero_copy",
        "async_finish",
        "return_recv_hook",
        "out",
        "combine_wait_recv_cost_stats",
    ]


def test_config_and_hints() -> None:
    config = deep_ep.Config()
    assert config.num_sms == 20
    assert deep_ep.Config(24, 8, 256, 16, 128).num_max_rdma_chunked_send_tokens == 16
    with pytest.raises(ep_rt.ConfigError, match="num_sms=0"):
        deep_ep.Config(0)
    assert config.get_nvl_buffer_size_hint(14336, 8) >= 2 * 8 * 8192 * 14336
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0
    plain = ep_rt.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) > plain
    before, of_ep_rt = deep_ep.Buffer.num_sms, ep_rt.Buffer.num_sms
    deep_ep.Buffer.set_num_sms(12)
    try:
        for num_ranks in (2, 6, 160):
            assert deep_ep.Buffer.get_dispatch_config(num_ranks).num_sms == 12
            assert deep_ep.Buffer.get_combine_config(num_ranks).num_sms == 12
    finally:
        deep_ep.Buffer.set_num_sms(before)
    assert ep_rt.Buffer.num_sms == of_ep_rt
    with pytest.raises(ep_rt.ConfigError, match="new_num_sms=0"):
        deep_ep.Buffer.set_num_sms(0)
    assert deep_ep.Buffer.is_sm90_compiled()


def test_events() -> None:
    for event in (deep_ep.Buffer.capture(), deep_ep.EventOverlap(deep_ep.EventHandle())):
        event.current_stream_wait()
        event.event.current_stream_wait() if isinstance(event.event, deep_ep.EventHandle) else None
        event.synchronize()
        assert event.query()
        with event:
            pass
    kept = torch.zeros(1)
    assert deep_ep.EventOverlap(deep_ep.EventHandle(), (kept,)).extra_tensors == (kept,)


def one_rank(**options: Any) -> Any:
    return deep_ep.Buffer(ep_rt.groups.thread_groups(1)[0], backend="host", **options)


def test_raw_memory() -> None:
    buffer = one_rank(num_nvl_bytes=1000, num_rdma_bytes=64)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1000, 64)
    everything = buffer.get_local_buffer_tensor(torch.uint8)
    assert everything.numel() == 1000
    part = buffer.get_local_buffer_tensor(torch.float32, torch.Size((3, 5)), offset=16)
    part.fill_(1.0)
    assert everything[16:76].view(torch.float32).tolist() == [1.0] * 15
    assert buffer.get_local_buffer_tensor(torch.bfloat16, use_rdma_buffer=True).shape == (32,)
    with pytest.raises(ep_rt.ConfigError, match="16 elements are there"):
        buffer.get_local_buffer_tensor(torch.float32, torch.Size((17,)), use_rdma_buffer=True)
    with pytest.raises(ep_rt.BackendError, match="host backend has no streams"):
        buffer.get_comm_stream()
    buffer.destroy()
    buffer.destroy()


def test_errors_are_those_of_ep_rt() -> None:
    with pytest.raises(ep_rt.ConfigError, match=r"give group=.* or comm="):
        deep_ep.Buffer(None)
    buffer = one_rank()
    x, ids = torch.ones(3, 128, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.int64)
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 1)
    with pytest.raises(ep_rt.ConfigError, match="num_tokens_per_expert"):
        buffer.dispatch(x, topk_idx=ids)
    *_, handle, _ = buffer.dispatch(x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)
    with pytest.raises(ep_rt.ConfigError, match="give x alone"):
        buffer.dispatch(x, handle, topk_idx=ids)
    for wrong in (tuple(handle), None):
        with pytest.raises(ep_rt.HandleError, match="expected a DispatchHandle"):
            buffer.combine(x, wrong)
    low = buffer.low_latency_dispatch(x, ids, 4, 1, use_fp8=False)
    with pytest.raises(ep_rt.HandleError, match="expected a DispatchHandle"):
        buffer.combine(x, low[2])
    with pytest.raises(ep_rt.ConfigError, match="exclude each other"):
        buffer.low_latency_dispatch(x, ids, 4, 1, async_finish=True, return_recv_hook=True)
    with pytest.raises(ep_rt.ConfigError, match="num_max_dispatch_tokens_per_rank=2"):
        buffer.low_latency_dispatch(x, ids, 2, 1)
    with pytest.raises(ep_rt.ConfigError, match="enable_shrink"):
        buffer.low_latency_clean_mask_buffer()
    buffer.destroy()
    with pytest.raises(ep_rt.ClosedError):
        buffer.get_dispatch_layout(ids, 1)


def test_sums_on_the_ranks_of_the_experts_when_asked() -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, backend="host")
        x = torch.ones(2, 128, dtype=torch.bfloat16)
        ids, weights = torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5)
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 4, 4, use_fp8=False)
        for reduce in ("rank", "source"):
            combined_x, _, _ = buffer.low_latency_combine(recv_x, ids, weights, handle, reduce=reduce)
            assert torch.equal(combined_x, x)
        buffer.destroy()

    ep_rt.run_local(run, 2, timeout_s=20)


def test_what_an_elastic_buffer_tells() -> None:
    def run(group: Group) -> None:
        hint = deep_ep.ElasticBuffer.get_buffer_size_hint(group, 128, 7168, num_topk=8)
        assert hint % (2 << 20) == 0
        assert hint > 2 * 4 * 128 * 2 * 7168
        buffer = deep_ep.ElasticBuffer(group, hint, backend="host", ranks_per_node=2)
        assert (buffer.num_bytes, buffer.rank_idx, buffer.num_ranks) == (hint, group.rank, 4)
        assert buffer.get_logical_domain_size() == buffer.get_physical_domain_size() == (2, 2)
        assert (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == divmod(group.rank, 2)
        num_sms = buffer.get_theoretical_num_sms(256, 8)
        assert 1 <= buffer.get_theoretical_num_qps(num_sms) <= buffer.num_allocated_qps
        buffer.barrier(with_cpu_sync=True)
        ids = torch.arange(4).view(4, 1)
        x = torch.full((4, 128), 1.0 + group.rank, dtype=torch.bfloat16)
        with pytest.raises(ep_rt.ConfigError, match="num_max_tokens_per_rank=0"):
            buffer.dispatch(x, ids, num_experts=4)
        with pytest.raises(ep_rt.ConfigError, match="needs topk_idx and num_experts"):
            buffer.dispatch(x, ids)
        recv_x, *_, handle, _ = buffer.dispatch(x, ids, num_experts=4, num_max_tokens_per_rank=4)
        assert recv_x[:, 0].tolist() == [1, 2, 3, 4]
        assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == [2, 4]
        with pytest.raises(ep_rt.HandleError, match="do_expand=True"):
            buffer.dispatch(x, handle=handle, do_expand=True)
        with pytest.raises(ep_rt.ConfigError, match="those of the handle"):
            buffer.dispatch(x, ids, handle=handle)
        no_handle: Any = None
        with pytest.raises(ep_rt.HandleError, match="expected an EPHandle"):
            buffer.combine(recv_x, no_handle)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            handle.nothing  # noqa: B018
        with pytest.raises(ep_rt.BackendError, match="host backend has no streams"):
            buffer.get_comm_stream()
        buffer.destroy()

    ep_rt.run_local(run, 4, timeout_s=20)


def test_masked_ranks_are_left_out() -> None:
    def run(group: Group) -> None:
        num_ranks, num_local_experts, rank = 3, 2, group.rank
        buffer = deep_ep.Buffer(group, enable_shrink=True, backend="host", timeout_s=0.7)
        ids = torch.tensor([[0, 2], [4, 1], [3, 5]])
        x = torch.full((3, 128), rank + 1.0, dtype=torch.bfloat16)
        weights = torch.ones(3, 2)
        status = torch.full((num_ranks,), 7, dtype=torch.int)

        def layer(gone: set[int]) -> None:
            recv_x, recv_count, handle, _, _ = buffer.low_latency_dispatch(x, ids, 3, 6, use_fp8=False)
            assert recv_count.tolist() == [num_ranks - len(gone)] * num_local_experts
            combined_x, _, _ = buffer.low_latency_combine(recv_x, ids, weights, handle)
            is_here = torch.tensor([owner not in gone for owner in range(num_ranks)])
            terms = is_here[ids // num_local_experts].sum(dim=1, keepdim=True)
            assert torch.equal(combined_x, x * terms)
            buffer.low_latency_query_mask_buffer(status)
            assert set(status.nonzero().view(-1).tolist()) == gone

        layer(set())
        if rank == 2:
            return  # lost, for the others
        layer({2})  # noticed by the deadline
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 0, 0]
        buffer.low_latency_update_mask_buffer(2, True)
        layer({2})  # told
        buffer.destroy()

    ep_rt.run_local(run, 3, timeout_s=20)


def test_ranks_that_stop_at_different_calls() -> None:
    failing = {"dispatch": 1, "combine": 2, "clean": 3}

    def run(group: Group) -> None:
        rank, num_ranks = group.rank, 4
        buffer = deep_ep.Buffer(
            group, low_latency_mode=True, enable_shrink=True, backend="host", timeout_s=0.5
        )
        ids, weights = torch.tensor([[0, 2], [7, 5], [-1, 3]]), torch.ones(3, 2)
        x = torch.ones(3, 128, dtype=torch.bfloat16)
        masked: set[int] = set()
        status = torch.zeros(num_ranks, dtype=torch.int)

        def stops(call: str) -> bool:
            masked.add(failing[call])
            return rank == failing[call]

        def check() -> None:
            buffer.low_latency_query_mask_buffer(status)
            assert set(status.nonzero().view(-1).tolist()) == masked

        for with_hook in (False, True):
            if stops("dispatch"):
                break
            recv_x, _, handle, _, hook = buffer.low_latency_dispatch(
                x, ids, 3, 8, use_fp8=False, return_recv_hook=with_hook
            )
            hook() if hook else None
            check()
            if stops("combine"):
                break
            combined_x, _, hook = buffer.low_latency_combine(
                recv_x, ids, weights, handle, return_recv_hook=with_hook
            )
            hook() if hook else None
            check()
            is_here = torch.tensor([owner not in masked for owner in range(num_ranks)])
            assert torch.equal(combined_x, x * ((ids >= 0) & is_here[ids // 2]).sum(dim=1, keepdim=True))
            if stops("clean"):
                break
            buffer.clean_low_latency_buffer(3, 128, 8)
            check()
        if rank == 0:
            buffer.destroy()

    ep_rt.run_local(run, 4, timeout_s=20)


def test_over_an_mpi_communicator(mpirun: Any) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from mpi4py import MPI
import torch
from ep_rt.compat import deep_ep
import compat_cases
buffer = deep_ep.Buffer(None, int(1e9), comm=MPI.COMM_WORLD, backend="host", timeout_s=20)
assert buffer.group is MPI.COMM_WORLD and buffer.group_size == 2
for seed in range(2):
    compat_cases.check_normal(buffer, seed)
compat_cases.check_low_latency(buffer, 0)
buffer.destroy()
buffer = deep_ep.ElasticBuffer(MPI.COMM_WORLD, 1 << 21, backend="host", num_gpu_timeout_secs=20)
compat_cases.check_elastic(buffer, 1)
buffer.destroy()
print("equal")
"""
    done = mpirun(2, program)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("equal") == 2
