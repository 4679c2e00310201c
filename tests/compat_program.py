"""A user's whole program for DeepEP: nothing in it but DeepEP's and torch's own names."""

from __future__ import annotations

from pathlib import Path

from gloo_launch import run_ranks

PROGRAM = """
import os
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

def elastic(buffer, rank, num_ranks, is_deferred):
    num_tokens, hidden, num_topk, num_experts = 16 - rank, 256, 4, 4 * num_ranks
    x = torch.randn((num_tokens, hidden)).bfloat16()
    weights, idx = torch.topk(torch.rand((num_tokens, num_experts)), num_topk, dim=-1)
    options = dict(allocate_on_comm_stream=True, async_with_compute_stream=True)
    if is_deferred:
        options["defer_epilogue"] = True
    out = buffer.dispatch(x, idx, weights, num_experts=num_experts, expert_alignment=8, do_expand=True,
                          previous_event=buffer.capture(), **options)
    if is_deferred:
        out = *out.current_stream_wait(), out
    recv_x, recv_idx, recv_weights, handle, event = out
    event.current_stream_wait()
    assert recv_idx is None and len(recv_x) == sum(handle.num_recv_tokens_per_expert_list)
    begin = 0
    y = torch.zeros_like(recv_x)
    for end in handle.psum_num_recv_tokens_per_expert.tolist():
        y[begin:end] = recv_x[begin:end] * recv_weights[begin:end].view(-1, 1)
        begin = (end + 7) // 8 * 8
    out = buffer.combine(y, handle, topk_weights=recv_weights, **(options if is_deferred else {}))
    combined_x, combined_weights, *_ = out.current_stream_wait() if is_deferred else out
    assert torch.equal(combined_weights, weights)
    assert difference(combined_x, x * weights.sum(dim=1, keepdim=True)) < 1e-4

def main():
    dist.init_process_group(os.environ.get("BACKEND", "gloo"))
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
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
    elastic(buffer, rank, num_ranks, is_deferred=False)
    buffer.destroy()
    buffer = deep_ep.EPBuffer(group, num_max_tokens_per_rank=16, hidden=256, num_topk=4,
                              explicitly_destroy=True)
    elastic(buffer, rank, num_ranks, is_deferred=True)
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


def run_program(path: Path, num_ranks: int, *, timeout_s: float, **environment: str) -> None:
    """Run it as every rank, unchanged, with ep_rt in place of DeepEP.

    Args:
        path: where to write it.
    """
    path.write_text(PROGRAM)
    codes, outputs = run_ranks(["-c", LAUNCHER, str(path)], num_ranks, timeout_s=timeout_s, **environment)
    assert codes == [0] * num_ranks, outputs
    assert all("passed" in output for output in outputs), outputs
