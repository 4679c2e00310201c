"""How vLLM's modular MoE kernel would call ep_rt: prepare and finalize, high-throughput and low-latency.

    mpiexec -n 4 python examples/adapt_vllm.py              ranks are processes of MPI
    torchrun --nproc-per-node 4 examples/adapt_vllm.py      ranks are processes of torchrun
    python examples/adapt_vllm.py --ranks 4                 ranks are threads, in CPU memory

vLLM is not needed: `PrepareAndFinalize` and what is beside it stand for its classes, with the methods and
arguments that a dispatcher has to do with. The two adapters below are what would be derived from
``FusedMoEPrepareAndFinalize``:

    HighThroughput    dispatch with ``layout="expert"``: rows arrive permuted, as top-1 tokens in the order
                      of their experts. Combine applies the weights, sums, and undoes the permutation.
    LowLatency        batched experts, with receive hooks.

With block quantization rows travel as FP8, which the calls cast to. Two micro-batches may be under way. Each
way of the layer is compared with the same layer computed densely on one rank.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are the parallelism; libraries read it when they load

import abc
import argparse
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from adapter_layer import Experts, Output, Rank, Tensor, check, parser, rank_of
from launch import launch_torch
from moe_layer import Tokens

import ep_rt

# What stands for vLLM.


class ActivationFormat(enum.Enum):
    STANDARD = "[num_tokens, hidden]"
    BATCHED_EXPERTS = "[num_local_experts, num_max_tokens, hidden]"


@dataclass
class ExpertTokensMetadata:
    expert_num_tokens: Tensor  # int32 [num_local_experts]
    expert_num_tokens_cpu: Tensor | None


@dataclass
class QuantConfig:
    is_block_quantized: bool


class TopKWeightAndReduceDelegate:
    """Experts leave weighting and summing to `finalize`."""


Receiver = Callable[[], Any]  # of rows, scale factors, metadata, ids and weights; of nothing after finalize


class PrepareAndFinalize(abc.ABC):
    """Of ``FusedMoEPrepareAndFinalize``, lately ``...Modular``, what communication implements.

    A receiver waits for what its call has started; a hook before it is the part that needs no result yet.
    """

    @abc.abstractmethod
    def prepare_async(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: QuantConfig,
        defer_input_quant: bool = False,
    ) -> Receiver | tuple[Callable[[], None], Receiver]: ...

    @abc.abstractmethod
    def finalize_async(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: object,
    ) -> Receiver | tuple[Callable[[], None], Receiver]: ...

    def prepare(self, *args: Any, **options: Any) -> Any:
        return received(self.prepare_async(*args, **options))

    def finalize(self, *args: Any, **options: Any) -> None:
        received(self.finalize_async(*args, **options))

    def supports_async(self) -> bool:
        return True

    @property
    @abc.abstractmethod
    def activation_format(self) -> ActivationFormat: ...

    @abc.abstractmethod
    def max_num_tokens_per_rank(self) -> int | None: ...

    @abc.abstractmethod
    def num_dispatchers(self) -> int: ...

    def topk_indices_dtype(self) -> Any:
        return torch.int64

    def output_is_reduced(self) -> bool:
        return True


def received(started: Receiver | tuple[Callable[[], None], Receiver]) -> Any:
    if isinstance(started, tuple):
        hook, receiver = started
        hook()
        return receiver()
    return started()


class ModularKernel:
    """prepare, experts, finalize; or the same for two micro-batches in turn."""

    def __init__(
        self, communication: EpRtPrepareAndFinalize, experts: Experts, quant_config: QuantConfig
    ) -> None:
        self.communication, self.experts, self.quant_config = communication, experts, quant_config

    def forward(self, tokens: Tokens) -> Tensor:
        output = torch.empty_like(tokens.x)
        prepared = self.communication.prepare(*self._to_prepare(tokens))
        self.communication.finalize(*self._to_finalize(tokens, self._experts(prepared), output))
        return output

    def forward_of_two(self, tokens: Tokens) -> Tensor:
        """Halves of the batch: rows of one travel while the other one is computed."""
        half = len(tokens.x) // 2
        batches = [Tokens(*(each[part] for each in tokens)) for part in (slice(half), slice(half, None))]
        output = torch.empty_like(tokens.x)
        communication = self.communication
        prepared, finalized = [], []
        for number, batch in enumerate(batches):
            communication.micro_batch = number
            prepared.append(communication.prepare_async(*self._to_prepare(batch)))
        for number, (batch, part) in enumerate(zip(batches, (output[:half], output[half:]), strict=True)):
            communication.micro_batch = number
            rows = self._experts(received(prepared[number]))
            finalized.append(communication.finalize_async(*self._to_finalize(batch, rows, part)))
        for each in finalized:
            received(each)
        communication.micro_batch = 0
        return output

    def _to_prepare(self, tokens: Tokens) -> tuple[Any, ...]:
        num_experts = self.communication.num_dispatchers() * self.experts.num_local
        weights_and_ids = tokens.topk_weights, tokens.topk_idx.to(self.communication.topk_indices_dtype())
        return tokens.x, *weights_and_ids, num_experts, None, False, self.quant_config

    def _to_finalize(self, tokens: Tokens, rows: Tensor, output: Tensor) -> tuple[Any, ...]:
        weights_and_ids = tokens.topk_weights, tokens.topk_idx
        return output, rows, *weights_and_ids, False, TopKWeightAndReduceDelegate()

    def _experts(self, prepared: Any) -> Tensor:
        rows, scales, meta, _, _ = prepared
        if self.communication.activation_format is ActivationFormat.BATCHED_EXPERTS:
            return self.experts.batched(rows, scales)
        return self.experts.grouped(rows, scales, meta.expert_num_tokens_cpu.tolist())


# The adapters.


class EpRtPrepareAndFinalize(PrepareAndFinalize):
    """What both have.

    Attributes:
        micro_batch: 0 or 1, what vLLM's ``dbo_current_ubatch_id()`` says.
    """

    def __init__(self, buffer: ep_rt.Buffer) -> None:
        self.buffer = buffer
        self.micro_batch = 0
        self._sent: list[Any] = [None, None]  # by micro-batch

    def num_dispatchers(self) -> int:
        return self.buffer.num_ranks

    @staticmethod
    def _input(a1: Tensor, topk_weights: Tensor, apply_router_weight_on_input: bool) -> Tensor:
        if not apply_router_weight_on_input:
            return a1
        if topk_weights.shape[1] != 1:
            raise ValueError("weights on the input need top-1: a token is sent once for all its experts")
        return a1 * topk_weights.to(a1.dtype)


class HighThroughput(EpRtPrepareAndFinalize):
    """Rows arrive as top-1 tokens, sorted by expert, so experts find nothing to permute."""

    @property
    def activation_format(self) -> ActivationFormat:
        return ActivationFormat.STANDARD

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def prepare_async(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: QuantConfig,
        defer_input_quant: bool = False,
    ) -> Receiver:
        quantizes = quant_config.is_block_quantized and not defer_input_quant
        sent = self.buffer.dispatch(
            self._input(a1, topk_weights, apply_router_weight_on_input),
            topk_idx=topk_ids,
            topk_weights=topk_weights,
            num_experts=num_experts,
            layout="expert",
            quantize="fp8" if quantizes else None,
            async_finish=True,
        )
        self._sent[self.micro_batch] = sent
        first_expert = self.buffer.rank * (num_experts // self.buffer.num_ranks)

        def receive() -> Any:
            sent.event.current_stream_wait()
            rows, scales = sent.recv_x if quantizes else (sent.recv_x, None)
            counts = torch.tensor(sent.num_recv_tokens_per_expert_list, dtype=torch.int32)
            here = counts.to(rows.device)
            ids = first_expert + torch.arange(len(here), device=rows.device).repeat_interleave(here)
            meta = ExpertTokensMetadata(here, counts)
            return rows, scales, meta, ids[:, None], sent.recv_topk_weights[:, None]

        return receive

    def finalize_async(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: object,
    ) -> Receiver:
        assert isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate)
        sent = self._sent[self.micro_batch]
        weights = None if apply_router_weight_on_input else sent.recv_topk_weights
        done = self.buffer.combine(fused_expert_output, sent.handle, weights, async_finish=True)

        def receive() -> None:
            done.event.current_stream_wait()
            output.copy_(done.combined_x)

        return receive


class LowLatency(EpRtPrepareAndFinalize):
    """Rows of an expert side by side, with room for all; a hook receives.

    Args:
        num_max_tokens: of a rank and call; the same on all ranks.
    """

    def __init__(self, buffer: ep_rt.Buffer, num_max_tokens: int) -> None:
        super().__init__(buffer)
        self.num_max_tokens = num_max_tokens

    @property
    def activation_format(self) -> ActivationFormat:
        return ActivationFormat.BATCHED_EXPERTS

    def max_num_tokens_per_rank(self) -> int | None:
        return self.num_max_tokens

    def prepare_async(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: QuantConfig,
        defer_input_quant: bool = False,
    ) -> tuple[Callable[[], None], Receiver]:
        quantizes = quant_config.is_block_quantized and not defer_input_quant
        sent = self.buffer.low_latency_dispatch(
            self._input(a1, topk_weights, apply_router_weight_on_input),
            topk_ids,
            self.num_max_tokens,
            num_experts,
            use_fp8=quantizes,
            return_recv_hook=True,
        )
        self._sent[self.micro_batch] = sent
        assert sent.hook is not None

        def receive() -> Any:
            rows, scales = sent.recv_x if quantizes else (sent.recv_x, None)
            return rows, scales, ExpertTokensMetadata(sent.recv_count, None), None, None

        return sent.hook, receive

    def finalize_async(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: object,
    ) -> tuple[Callable[[], None], Receiver]:
        assert isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate)
        done = self.buffer.low_latency_combine(
            fused_expert_output,
            topk_ids,
            torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights,
            self._sent[self.micro_batch].handle,
            return_recv_hook=True,
            out=output,
        )
        assert done.hook is not None
        return done.hook, lambda: None


def layers(rank: Rank, options: argparse.Namespace) -> dict[str, Output]:
    """The layer in every way."""
    outputs = {}
    for communication in (HighThroughput(rank.buffer), LowLatency(rank.buffer, options.tokens)):
        for is_fp8 in (False, True):
            kernel = ModularKernel(communication, rank.experts, QuantConfig(is_block_quantized=is_fp8))
            for forward, batches in ((kernel.forward, ""), (kernel.forward_of_two, ", two micro-batches")):
                name = f"{type(communication).__name__}, {'FP8' if is_fp8 else 'bfloat16'}{batches}"
                outputs[name] = Output(rank.lib.fetch(forward(rank.tokens)), is_fp8)
    return outputs


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    with rank_of(group, options) as rank:
        outputs = layers(rank, options)
    check(group, options, outputs)


if __name__ == "__main__":
    launch_torch(parser(__doc__), main)
