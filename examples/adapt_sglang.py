"""How a token dispatcher of SGLang would call ep_rt: dispatch and combine in two steps each, in both modes.

    mpiexec -n 4 python examples/adapt_sglang.py            ranks are processes of MPI
    torchrun --nproc-per-node 4 examples/adapt_sglang.py    ranks are processes of torchrun
    python examples/adapt_sglang.py --ranks 4               ranks are threads, in CPU memory

SGLang is not needed: `BaseDispatcher` and the tuples beside it stand for its own, with the fields that matter
between a dispatcher and the runner of the experts. The adapters:

    NormalDispatcher        `dispatch_b` gets rows in the order of their experts, each expert's aligned, as a
                            contiguous grouped GEMM takes them: nothing scatters them before it, or gathers
                            them after it. Combine applies the weights.
    LowLatencyDispatcher    `dispatch_a` and `combine_a` send, `dispatch_b` and `combine_b` receive, by hooks
                            or by events.

Rows travel as bfloat16 or FP8. A dispatcher for each of two batches lets one batch travel while the other one
computes. Each way of the layer is compared with the same layer computed densely on one rank.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are the parallelism; libraries read it when they load

import abc
import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from adapter_layer import Experts, Output, Rank, Tensor, check, parser, rank_of
from launch import launch_torch
from moe_layer import Tokens

import ep_rt

EXPERT_ALIGNMENT = 8  # 128, for kernels that work on tiles of 128 rows

# What stands for SGLang.


class TopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor


class NormalDispatchOutput(NamedTuple):
    """Rows of the experts one after the other.

    Attributes:
        topk_ids: [num_rows], the local expert of each row.
        topk_weights: [num_rows], 0 in padding.
        num_recv_tokens_per_expert: rows of each expert, with its padding.
    """

    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    num_recv_tokens_per_expert: list[int]


class LowLatencyDispatchOutput(NamedTuple):
    """Rows [num_local_experts, num_max_rows, hidden], of each expert `masked_m`, and about `expected_m`."""

    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    masked_m: Tensor
    expected_m: int


DispatchOutput = NormalDispatchOutput | LowLatencyDispatchOutput


class CombineInput(NamedTuple):
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


class BaseDispatcher(abc.ABC):
    """Step a begins, step b ends; between them other work may be enqueued."""

    @abc.abstractmethod
    def dispatch_a(self, hidden_states: Tensor, topk_output: TopKOutput) -> None: ...

    @abc.abstractmethod
    def dispatch_b(self) -> DispatchOutput: ...

    @abc.abstractmethod
    def combine_a(self, combine_input: CombineInput) -> None: ...

    @abc.abstractmethod
    def combine_b(self) -> Tensor: ...

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput) -> DispatchOutput:
        self.dispatch_a(hidden_states, topk_output)
        return self.dispatch_b()

    def combine(self, combine_input: CombineInput) -> Tensor:
        self.combine_a(combine_input)
        return self.combine_b()


def run_experts(experts: Experts, dispatched: DispatchOutput) -> CombineInput:
    """The runner: a grouped GEMM over contiguous rows, or over rows of which `masked_m` count."""
    rows, scales = dispatched.hidden_states, dispatched.hidden_states_scale
    if isinstance(dispatched, NormalDispatchOutput):
        outputs = experts.grouped(rows, scales, dispatched.num_recv_tokens_per_expert)
    else:
        outputs = experts.batched(rows, scales)
    return CombineInput(outputs, dispatched.topk_ids, dispatched.topk_weights)


def forward(experts: Experts, dispatcher: BaseDispatcher, tokens: Tokens) -> Tensor:
    dispatched = dispatcher.dispatch(tokens.x, TopKOutput(tokens.topk_weights, tokens.topk_idx))
    return dispatcher.combine(run_experts(experts, dispatched))


def forward_of_two(experts: Experts, dispatchers: Sequence[BaseDispatcher], tokens: Tokens) -> Tensor:
    """Two-batch overlap: halves of the batch, each with a dispatcher of its own, in turn."""
    one, other = dispatchers
    half = len(tokens.x) // 2
    first, second = (Tokens(*(each[part] for each in tokens)) for part in (slice(half), slice(half, None)))
    one.dispatch_a(first.x, TopKOutput(first.topk_weights, first.topk_idx))
    dispatched = one.dispatch_b()
    other.dispatch_a(second.x, TopKOutput(second.topk_weights, second.topk_idx))
    outputs = run_experts(experts, dispatched)  # on the device beside the dispatch of the second half
    dispatched = other.dispatch_b()
    one.combine_a(outputs)
    outputs = run_experts(experts, dispatched)  # beside the combine of the first half
    y = one.combine_b()
    other.combine_a(outputs)
    return torch.cat([y, other.combine_b()])


# The adapters.


class NormalDispatcher(BaseDispatcher):
    """Exact sizes: `dispatch_b` waits until they are known, and no longer."""

    def __init__(self, buffer: ep_rt.Buffer, num_experts: int, *, use_fp8: bool) -> None:
        self.buffer = buffer
        self.num_experts = num_experts
        self.use_fp8 = use_fp8
        self._state: Any = None  # between the steps

    def dispatch_a(self, hidden_states: Tensor, topk_output: TopKOutput) -> None:
        # The host waits for sizes in the call, so it is left to step b; the device waits for this point only.
        self._state = hidden_states, topk_output, self.buffer.capture()

    def dispatch_b(self) -> NormalDispatchOutput:
        hidden_states, topk_output, previous_event = self._state
        sent = self.buffer.dispatch(
            hidden_states,
            topk_idx=topk_output.topk_ids,
            topk_weights=topk_output.topk_weights,
            num_experts=self.num_experts,
            expert_alignment=EXPERT_ALIGNMENT,
            layout="expert",
            zero_padding=True,
            quantize="fp8" if self.use_fp8 else None,
            previous_event=previous_event,
            async_finish=True,
        )
        sent.event.current_stream_wait()
        self._state = sent.handle
        rows, scales = sent.recv_x if self.use_fp8 else (sent.recv_x, None)
        counts = list(sent.num_recv_tokens_per_expert_list)
        lengths = torch.tensor(counts, device=rows.device)
        ids = torch.arange(len(counts), device=rows.device).repeat_interleave(lengths)
        return NormalDispatchOutput(rows, scales, ids, sent.recv_topk_weights, counts)

    def combine_a(self, combine_input: CombineInput) -> None:
        rows, _, weights = combine_input
        self._state = self.buffer.combine(rows, self._state, weights, async_finish=True)

    def combine_b(self) -> Tensor:
        done, self._state = self._state, None
        done.event.current_stream_wait()
        return done.combined_x


class LowLatencyDispatcher(BaseDispatcher):
    """Room for all rows that may come, so nothing waits before step b.

    Args:
        num_max_tokens: of a rank and call; the same on all ranks.
        return_recv_hook: receive by hooks, which hold no SM until step b; else on the communication stream.
    """

    def __init__(
        self,
        buffer: ep_rt.Buffer,
        num_experts: int,
        num_max_tokens: int,
        *,
        use_fp8: bool,
        return_recv_hook: bool,
    ) -> None:
        self.buffer = buffer
        self.num_experts = num_experts
        self.num_max_tokens = num_max_tokens
        self.use_fp8 = use_fp8
        self.how: dict[str, Any] = {
            "async_finish": not return_recv_hook,
            "return_recv_hook": return_recv_hook,
        }
        self._state: Any = None  # between the steps

    def dispatch_a(self, hidden_states: Tensor, topk_output: TopKOutput) -> None:
        sent = self.buffer.low_latency_dispatch(
            hidden_states,
            topk_output.topk_ids,
            self.num_max_tokens,
            self.num_experts,
            use_fp8=self.use_fp8,
            **self.how,
        )
        self._state = sent, topk_output

    def dispatch_b(self) -> LowLatencyDispatchOutput:
        sent, (weights, ids) = self._state
        self._receive(sent)
        self._state = sent.handle
        rows, scales = sent.recv_x if self.use_fp8 else (sent.recv_x, None)
        num_pairs = ids.numel() * self.buffer.num_ranks
        expected = (num_pairs + self.num_experts) // self.num_experts
        return LowLatencyDispatchOutput(rows, scales, ids, weights, sent.recv_count, expected)

    def combine_a(self, combine_input: CombineInput) -> None:
        rows, ids, weights = combine_input
        self._state = self.buffer.low_latency_combine(rows, ids, weights, self._state, **self.how)

    def combine_b(self) -> Tensor:
        done, self._state = self._state, None
        self._receive(done)
        return done.combined_x

    def _receive(self, result: Any) -> None:
        result.hook() if self.how["return_recv_hook"] else result.event.current_stream_wait()


MODES = ("normal", "low-latency, events", "low-latency, hooks")


def new_dispatcher(
    mode: str, buffer: ep_rt.Buffer, options: argparse.Namespace, *, use_fp8: bool
) -> BaseDispatcher:
    if mode == "normal":
        return NormalDispatcher(buffer, options.num_experts, use_fp8=use_fp8)
    return LowLatencyDispatcher(
        buffer,
        options.num_experts,
        options.tokens,
        use_fp8=use_fp8,
        return_recv_hook=mode == "low-latency, hooks",
    )


def layers(rank: Rank, options: argparse.Namespace) -> dict[str, Output]:
    """The layer in every way."""
    outputs = {}
    for mode in MODES:
        for use_fp8 in (False, True):
            name = f"{mode}, {'FP8' if use_fp8 else 'bfloat16'}"
            two = [new_dispatcher(mode, rank.buffer, options, use_fp8=use_fp8) for _ in range(2)]
            y = forward(rank.experts, two[0], rank.tokens)
            outputs[name] = Output(rank.lib.fetch(y), use_fp8)
            y = forward_of_two(rank.experts, two, rank.tokens)
            outputs[f"{name}, two batches"] = Output(rank.lib.fetch(y), use_fp8)
    return outputs


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    with rank_of(group, options) as rank:
        outputs = layers(rank, options)
    check(group, options, outputs)


if __name__ == "__main__":
    launch_torch(parser(__doc__), main)
