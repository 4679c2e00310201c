"""Programs written for DeepEP run on ep_rt: the names, the calls beside the oracle, what callers look at."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

import compat_cases  # noqa: E402  # which imports torch
from compat_program import run_program  # noqa: E402
from torch_places import Streams  # noqa: E402

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
@pytest.mark.parametrize("kind", [deep_ep.ElasticBuffer, deep_ep.EPBuffer])
def test_elastic_buffer_equals_the_oracle(kind: Any, seed: int, do_cpu_sync: bool) -> None:
    def run(group: Group) -> None:
        buffer = kind(group, num_max_tokens_per_rank=64, hidden=384, num_topk=8, backend="host")
        compat_cases.check_elastic(buffer, seed, do_cpu_sync=do_cpu_sync)
        buffer.destroy()

    ep_rt.run_local(run, 2 + seed % 3, timeout_s=20)


def test_elastic_buffer_takes_all_tokens_that_it_was_made_for() -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.ElasticBuffer(
            group, num_max_tokens_per_rank=24, hidden=256, num_topk=8, backend="host"
        )
        for seed in range(4):
            case = compat_cases.full_case(seed, buffer, hidden=256)
            compat_cases.check_elastic(buffer, seed, do_cpu_sync=False, case=case)
        buffer.destroy()

    ep_rt.run_local(run, 3, timeout_s=20)


def test_elastic_buffer_of_several_nodes_equals_the_oracle() -> None:
    def run(group: Group) -> None:
        for seed in range(2):
            buffer = deep_ep.ElasticBuffer(group, 1 << 21, backend="host", ranks_per_node=2)
            assert buffer.get_logical_domain_size() == (2, 2)
            compat_cases.check_elastic(buffer, seed)
            buffer.destroy()

    ep_rt.run_local(run, 4, timeout_s=20)


def test_tuning() -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, int(1e9), backend="host")
        compat_cases.check_tuning(buffer)
        buffer.destroy()

    ep_rt.run_local(run, 2, timeout_s=20)


def test_masks_of_the_caller() -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True, backend="host")
        compat_cases.check_masks(buffer)
        buffer.destroy()

    ep_rt.run_local(run, 3, timeout_s=20)


@pytest.mark.parametrize("mode", ["exact", "worst", "low-latency", "hook"])
def test_calls_in_the_order_of_streams(mode: str) -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, int(1e9), low_latency_mode=True, backend="host")
        compat_cases.check_order(buffer, Streams(), mode)
        buffer.destroy()

    ep_rt.run_local(run, 2, timeout_s=20)


@pytest.mark.parametrize("do_cpu_sync", [False, True])
@pytest.mark.parametrize("do_expand", [False, True])
@pytest.mark.parametrize("kind", [deep_ep.ElasticBuffer, deep_ep.EPBuffer])
def test_elastic_calls_in_the_order_of_streams(kind: Any, do_expand: bool, do_cpu_sync: bool) -> None:
    def run(group: Group) -> None:
        buffer = kind(group, 1 << 21, backend="host")
        compat_cases.check_elastic_order(buffer, Streams(), do_expand=do_expand, do_cpu_sync=do_cpu_sync)
        buffer.destroy()

    ep_rt.run_local(run, 2, timeout_s=20)


def test_calls_again_and_again_as_a_graph_makes_them() -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, int(1e9), low_latency_mode=True, backend="host")
        compat_cases.check_graph(buffer, has_threads_beside=True)
        buffer.destroy()

    ep_rt.run_local(run, 3, timeout_s=20)


def test_elastic_calls_again_and_again_as_a_graph_makes_them() -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.ElasticBuffer(group, 1 << 21, backend="host", ranks_per_node=2)
        compat_cases.check_elastic_graph(buffer, has_threads_beside=True)
        compat_cases.check_elastic_counts_first(buffer, Streams())
        buffer.destroy()

    ep_rt.run_local(run, 4, timeout_s=20)


def test_a_program_for_deep_ep_runs_unchanged(tmp_path: Path) -> None:
    environment = {"EP_RT_BACKEND": "host", "CUDA_VISIBLE_DEVICES": ""}
    run_program(tmp_path / "program.py", 2, timeout_s=120, **environment)


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
        "import deep_ep.buffers.elastic, deep_ep.buffers.legacy, deep_ep.utils.event\n"
        "from deep_ep import ElasticBuffer, EPHandle\n"
        "assert deep_ep.buffers.legacy.Buffer is Buffer and deep_ep.buffers.elastic.EPHandle is EPHandle\n"
        "assert deep_ep.buffers.elastic.ElasticBuffer is ElasticBuffer\n"
        "import deep_ep.buffers.ep, deep_ep.comm\n"
        "assert deep_ep.buffers.ep.EPBuffer is deep_ep.EPBuffer\n"
        "assert deep_ep.utils.event.EventOverlap is EventOverlap\n"
        "import deep_ep._C as compiled\n"
        "assert compiled.EventHandle is EventHandle and compiled.Config is Config\n"
        "assert compiled.topk_idx_t is topk_idx_t\n"
        "sys.modules['deep_ep_cpp'] = here\n"
        "from deep_ep_cpp import Config as other\n"
        "assert other is Config\n"
        "import importlib.util\n"
        "assert all(map(importlib.util.find_spec, ('deep_ep', 'deep_ep.utils')))\n"
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
    for module in (deep_ep, importlib.import_module("ep_rt.compat.deep_ep._C")):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            module.nothing  # noqa: B018
    for name in deep_ep.__all__:
        assert getattr(deep_ep, name) is not None
    for kind in (deep_ep.Buffer, deep_ep.ElasticBuffer, deep_ep.EPBuffer):
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
    assert parameters(deep_ep.EPBuffer.__init__)[:7] == [
        "group",
        "num_bytes",
        "num_max_tokens_per_rank",
        "hidden",
        "num_topk",
        "use_fp8_dispatch",
        "lb_allocation_plan_or_num_bytes",
    ]
    of_elastic = parameters(deep_ep.ElasticBuffer.dispatch)
    of_elastic.remove("previous_event_before_epilogue")
    assert parameters(deep_ep.EPBuffer.dispatch) == [*of_elastic, "defer_epilogue"]
    of_elastic = parameters(deep_ep.ElasticBuffer.combine)
    of_elastic.remove("previous_event_before_epilogue")
    assert parameters(deep_ep.EPBuffer.combine) == [*of_elastic, "defer_epilogue"]
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
    assert config.get_nvl_buffer_size_hint(14336, 64) == config.get_nvl_buffer_size_hint(14336, 16)
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


class Sent(torch.autograd.Function):  # type: ignore[misc]  # mypy does not see torch
    """A dispatch whose backward has nothing of the handle but its elements, kept by autograd."""

    @staticmethod
    def forward(ctx: Any, x: Any, buffer: Any, ids: Any) -> Any:
        _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 8)
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=ids, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert
        )
        ctx.save_for_backward(*handle)
        ctx.buffer = buffer
        return recv_x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, None, None]:
        return ctx.buffer.combine(grad.contiguous(), ctx.saved_tensors)[0], None, None


@pytest.mark.parametrize("ranks_per_node", [4, 2])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_normal_handle_comes_back_as_its_elements(ranks_per_node: int, is_checkpointed: bool) -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, int(1e9), int(1e9), backend="host", ranks_per_node=ranks_per_node)
        ids = torch.tensor([[0, 1], [2, 7], [6, -1], [4, 3]]).roll(group.rank, dims=0)
        x = torch.full((4, 128), 1.0 + group.rank, dtype=torch.bfloat16, requires_grad=True)
        if is_checkpointed:
            sent = torch.utils.checkpoint.checkpoint(Sent.apply, x, buffer, ids, use_reentrant=False)
        else:
            sent = Sent.apply(x, buffer, ids)
        gc.collect()
        sent.float().sum().backward()
        _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 8)
        assert x.grad[:, 0].tolist() == in_rank.sum(dim=1).tolist()

        first, _, _, _, handle, _ = buffer.dispatch(
            x.detach(), topk_idx=ids, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert
        )
        elements: Any = handle
        views = [each if each is None else each.detach() for each in elements]
        again, *_ = buffer.dispatch(x.detach(), handle=views)
        assert torch.equal(again, first)
        copies = tuple(each if each is None else each.clone() for each in elements)
        with pytest.raises(ep_rt.HandleError, match="handle is a tuple"):
            buffer.combine(first, copies)
        buffer.destroy()

    ep_rt.run_local(run, 4, timeout_s=20)


def test_a_low_latency_handle_that_was_taken_apart_is_refused() -> None:
    buffer = one_rank(low_latency_mode=True)
    x, ids = torch.ones(3, 128, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.int64)
    _, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 3, 1, use_fp8=False)
    with pytest.raises(ep_rt.HandleError, match="handle is a tuple"):
        buffer.get_next_low_latency_combine_buffer(tuple(handle))
    with pytest.raises(ep_rt.HandleError, match="handle is a tuple"):
        buffer.low_latency_combine(x[None], ids, torch.ones(3, 1), tuple(handle))
    assert buffer.get_next_low_latency_combine_buffer(handle).shape == (1, 3, 128)
    buffer.destroy()


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
    for wrong in ((in_rank, None), None):
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


def test_what_a_buffer_tells() -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(group, 1000, 1000, num_qps_per_rank=16 / 2, backend="host", ranks_per_node=2)
        runtime: Any = buffer.runtime
        assert (runtime.get_num_rdma_ranks(), runtime.get_rdma_rank()) == (2, group.rank // 2)
        assert runtime.is_available()
        assert runtime.is_internode_available()
        buffer.destroy()
        assert buffer.runtime is None
        with pytest.raises(ep_rt.ConfigError, match=r"num_qps_per_rank=2\.5 is not an integer"):
            deep_ep.Buffer(group, num_qps_per_rank=5 / 2, backend="host")

    ep_rt.run_local(run, 4, timeout_s=20)


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
        *_, expanded, _ = buffer.dispatch(x, ids, num_experts=4, num_max_tokens_per_rank=4, do_expand=True)
        with pytest.raises(ep_rt.HandleError, match="do_expand=False"):
            buffer.dispatch(x, handle=expanded, do_expand=False)
        again, *_ = buffer.dispatch(x, handle=expanded)
        assert again[:, 0].tolist() == [1, 2, 3, 4]
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


def test_what_an_ep_buffer_does_besides() -> None:
    def run(group: Group) -> None:
        with pytest.raises(ep_rt.ConfigError, match="no redundant experts"):
            deep_ep.EPBuffer(group, lb_allocation_plan_or_num_bytes=1 << 21, backend="host")
        num_bytes = deep_ep.get_num_allocation_alignment()
        assert deep_ep.EPBuffer.get_buffer_size_hint(group, 8, 128) % num_bytes == 0
        buffer = deep_ep.EPBuffer(group, num_bytes, backend="host", ranks_per_node=2)
        for found in (buffer.get_logical_domain_size(), deep_ep.get_physical_domain_size(buffer)):
            assert found == deep_ep.comm.get_logical_domain_size(buffer) == (2, 2)
        deep_ep.comm.barrier(buffer, wait_comm_stream=False)
        ids = torch.arange(4).view(4, 1)
        x = torch.full((4, 128), 1.0 + group.rank, dtype=torch.bfloat16)
        sizes: Any = {"num_experts": 4, "num_max_tokens_per_rank": 4}
        with pytest.raises(ep_rt.ConfigError, match="do_handle_copy=True"):
            buffer.dispatch(x, ids, **sizes, do_handle_copy=True)
        with pytest.raises(ep_rt.ConfigError, match="needs async_with_compute_stream=True"):
            buffer.dispatch(x, ids, **sizes, defer_epilogue=True)
        # A statistic is added to by the same wait that delivers, once.
        stats = torch.zeros(1, dtype=torch.int32)
        deferred: Any = {"async_with_compute_stream": True, "defer_epilogue": True}
        event = buffer.dispatch(x, ids, None, stats, **sizes, do_expand=True, **deferred)
        recv_x, recv_ids, recv_weights, handle = event.current_stream_wait()
        assert (recv_ids, recv_weights, handle.do_expand, stats.tolist()) == (None, None, True, [4])
        assert recv_x[:, 0].tolist() == [1, 2, 3, 4]
        assert event.wait() is None
        assert stats.tolist() == [4]
        # It need not be said again that the handle's dispatch was expanded.
        again, *_ = buffer.dispatch(x, handle=handle)
        assert torch.equal(again, recv_x)
        with pytest.raises(ep_rt.ConfigError, match="needs async_with_compute_stream=True"):
            buffer.combine(recv_x, handle, defer_epilogue=True)
        combined_x, combined_weights = buffer.combine(recv_x, handle, **deferred).wait()
        assert combined_weights is None
        assert torch.equal(combined_x, x)
        buffer.destroy()
        deep_ep.destroy_all_managed_nccl_comm()

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


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_that_stop_at_different_calls(num_ranks: int) -> None:
    def run(group: Group) -> None:
        buffer = deep_ep.Buffer(
            group, low_latency_mode=True, enable_shrink=True, backend="host", timeout_s=0.5
        )
        compat_cases.check_ranks_that_stop(buffer)
        buffer.destroy()  # also by those that stopped, while the others go on
        assert group.allgather(group.rank) == list(range(num_ranks))

    ep_rt.run_local(run, num_ranks, timeout_s=20)


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
