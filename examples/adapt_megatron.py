"""How a dispatch manager of Megatron-LM would call ep_rt, with gradients through dispatch and combine.

    mpiexec -n 4 python examples/adapt_megatron.py          ranks are processes of MPI
    torchrun --nproc-per-node 4 examples/adapt_megatron.py  ranks are processes of torchrun
    python examples/adapt_megatron.py --ranks 4             ranks are threads, in CPU memory

Megatron-LM is not needed: `DispatchManager` stands for the class of that name, and `FlexMoE` calls it as the
flex token dispatcher does. In `EpRtManager` dispatch also permutes, and combine also undoes that: rows travel
with ``layout="expert"`` of `ep_rt.torch`, so the two methods in between have nothing left to do.

The model of torch_moe.py is trained with this layer on all ranks, and with a dense layer on one, where every
expert computes every token and autograd sees no communication. The trainings are compared: losses, gate,
experts and all else.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are the parallelism; libraries read it when they load

import abc
import argparse
from typing import Any

import torch
from launch import launch_torch
from torch_moe import Tensor, buffer_of, fit, has_learned, model_parser, new_model, train_and_compare
from training import Trained, is_equal, ranks_in_words

import ep_rt
import ep_rt.torch

# What stands for Megatron-LM.


class DispatchManager(abc.ABC):
    """Moves the tokens of one layer, forward; autograd does the rest."""

    @abc.abstractmethod
    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        """Where tokens go, bool [num_tokens, num_experts], and their weights, 0 elsewhere."""

    @abc.abstractmethod
    def dispatch(
        self, hidden_states: Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> Tensor: ...

    @abc.abstractmethod
    def get_dispached_metadata(self) -> tuple[Tensor, Tensor]:
        """Ids and weights of what arrived."""

    @abc.abstractmethod
    def get_number_of_tokens_per_expert(self) -> Tensor: ...

    @abc.abstractmethod
    def get_permuted_hidden_states_by_experts(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the experts one after the other, and the weight of each row."""

    @abc.abstractmethod
    def get_restored_hidden_states_by_experts(self, hidden_states: Tensor) -> Tensor:
        """The inverse, for rows."""

    @abc.abstractmethod
    def combine(
        self, hidden_states: Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> Tensor: ...


class Router(torch.nn.Module):  # type: ignore[misc]  # see pyproject.toml: torch is Any
    """The weights of experts: the softmax over the scores of the best, 0 for all others."""

    def __init__(self, gate: Tensor, num_topk: int) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(gate)
        self.num_topk = num_topk

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = x @ self.gate
        best, topk_idx = scores.topk(self.num_topk)
        probs = torch.zeros_like(scores).scatter(1, topk_idx, best.softmax(dim=1))
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, topk_idx, True), probs


class MoE(torch.nn.Module):  # type: ignore[misc]
    """Gate and experts; the weight of a token is applied inside the expert, where it costs least."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, *, num_topk: int) -> None:
        super().__init__()
        self.router = Router(gate, num_topk)
        self.up, self.down = torch.nn.Parameter(up), torch.nn.Parameter(down)

    def expert(self, number: int, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows travel as float32; what is computed with them is float64."""
        wide = self.up.dtype
        inner = torch.tanh(rows.to(wide) @ self.up[number]) * weights.to(wide)[:, None]
        return (inner @ self.down[number]).float()


class FlexMoE(MoE):
    """The order of calls of Megatron's flex token dispatcher."""

    def __init__(self, manager: DispatchManager, *weights: Tensor, num_topk: int) -> None:
        super().__init__(*weights, num_topk=num_topk)
        self.manager = manager

    def forward(self, x: Tensor) -> Tensor:
        manager = self.manager
        manager.setup_metadata(*self.router(x))
        arrived = manager.dispatch(x.float())
        rows, weights = manager.get_permuted_hidden_states_by_experts(arrived)
        lengths = manager.get_number_of_tokens_per_expert().tolist()
        groups = zip(rows.split(lengths), weights.split(lengths), strict=True)
        y = torch.cat([self.expert(number, *group) for number, group in enumerate(groups)])
        return manager.combine(manager.get_restored_hidden_states_by_experts(y)).to(x.dtype)


class DenseMoE(MoE):
    """The same on one rank: all experts compute all tokens, most of them with weight 0."""

    def forward(self, x: Tensor) -> Tensor:
        _, probs = self.router(x)
        rows, weights = x.float(), probs.float()
        y = torch.zeros_like(rows)
        for number in range(len(self.up)):
            y = y + self.expert(number, rows, weights[:, number])
        return y.to(x.dtype)


# The adapter.


class EpRtManager(DispatchManager):
    """Dispatch and combine by `ep_rt.torch`, on the current stream.

    Args:
        router_topk: the most experts of a token.
        num_experts: of all ranks together.
    """

    def __init__(self, buffer: ep_rt.Buffer, *, router_topk: int, num_experts: int) -> None:
        self.key = ep_rt.torch.key_of(buffer)
        self.router_topk = router_topk
        self.num_experts = num_experts
        self._routing: Any = None
        self._sent: Any = None

    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        weights, ids = probs.topk(self.router_topk, dim=1)
        # Tokens of capacity-limited routers may have fewer experts.
        is_routed = routing_map.gather(1, ids)
        self._routing = ids.masked_fill(~is_routed, -1), weights.float()

    def dispatch(
        self, hidden_states: Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> Tensor:
        ids, weights = self._routing
        self._sent = ep_rt.torch.dispatch(
            self.key, hidden_states, ids, weights, num_experts=self.num_experts, layout="expert"
        )
        return self._sent.recv_x

    def get_dispached_metadata(self) -> tuple[Tensor, Tensor]:
        counts = self.get_number_of_tokens_per_expert()
        ids = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        return ids, self._sent.recv_topk_weights

    def get_number_of_tokens_per_expert(self) -> Tensor:
        ends = self._sent.handle.psum_num_tokens_per_expert
        return ends.diff(prepend=ends.new_zeros(1))

    def get_permuted_hidden_states_by_experts(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, self._sent.recv_topk_weights

    def get_restored_hidden_states_by_experts(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine(
        self, hidden_states: Tensor, async_finish: bool = False, allocate_on_comm_stream: bool = False
    ) -> Tensor:
        combined = ep_rt.torch.combine(hidden_states, self._sent.handle).combined_x
        self._sent = None  # what a backward pass needs is kept by autograd
        return combined


def train(group: ep_rt.Group, options: argparse.Namespace) -> Trained:
    """Train over the ranks of `group`. Every rank gets the whole result. Collective."""
    with buffer_of(group, options) as (buffer, device):
        manager = EpRtManager(buffer, router_topk=options.topk, num_experts=options.num_experts)

        def new_layer(*weights: Tensor) -> FlexMoE:
            return FlexMoE(manager, *weights, num_topk=options.topk)

        model = new_model(group, new_layer, options, device)
        return fit(group, model, model, options, device)


def train_dense(group: ep_rt.Group, options: argparse.Namespace) -> Trained:
    """Train on one rank, in CPU memory, without a buffer."""

    def new_layer(*weights: Tensor) -> DenseMoE:
        return DenseMoE(*weights, num_topk=options.topk)

    model = new_model(group, new_layer, options, "cpu")
    return fit(group, model, model, options, "cpu")


def report(trained: Trained, options: argparse.Namespace, num_ranks: int) -> bool:
    """Compare with the dense layer. Whether all is as it should be."""
    passed = has_learned(trained)
    [dense] = ep_rt.run_local(train_dense, 1, options)
    return is_equal(trained, dense, ranks_in_words(num_ranks)) and passed


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    train_and_compare(group, options, train, report)


if __name__ == "__main__":
    parser = model_parser(__doc__)
    parser.set_defaults(steps=100)
    launch_torch(parser, main)
