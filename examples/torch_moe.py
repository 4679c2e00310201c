"""Train a model with an expert-parallel MoE layer in PyTorch; autograd runs through dispatch and combine.

    torchrun --nproc-per-node 4 examples/torch_moe.py      ranks are processes of torchrun
    mpiexec -n 4 python examples/torch_moe.py              ranks are processes of MPI
    python examples/torch_moe.py --ranks 4                 ranks are threads, in CPU memory

On a node with GPUs every process computes on one; else, or with --backend host, in CPU memory. With --compile
the model is one compiled graph.

The model imitates a function that is another one in every region of its input, so that experts pay. `EPMoE`
is the layer: a gate, its top-k experts, dispatch, the experts of this rank, combine. Every rank trains on its
share of each batch and owns num_experts / num_ranks experts. Their gradients are complete, for their rows
come from all ranks; the gradients of the other parameters are summed over the ranks.

The number of ranks changes nothing but the order of additions. The script shows it: it trains once on all
ranks, once on rank 0 alone, and compares.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are the parallelism; libraries read it when they load

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from launch import add_sizes, example_parser, launch_torch, place_of
from training import Trained, is_equal, ranks_in_words

import ep_rt
import ep_rt.torch

Tensor = Any  # torch.Tensor


class EPMoE(torch.nn.Module):  # type: ignore[misc]  # see pyproject.toml: torch is Any
    """Tokens go to the ranks of their top-k experts and come back as weighted sums of the experts' outputs.

    Args:
        buffer: of the ranks that share the experts. It must outlive the module's use.
        gate: [hidden, num_experts], of all experts, the same on every rank.
        up, down: [num_local_experts, hidden, ffn] and [num_local_experts, ffn, hidden], of this rank's.
        num_topk: experts of a token.
        capacity: 0, or the rows that a rank takes. All shapes are static then, as compiled graphs like them,
            and tokens whose rows do not fit are dropped.
    """

    def __init__(
        self, buffer: ep_rt.Buffer, gate: Tensor, up: Tensor, down: Tensor, *, num_topk: int, capacity: int
    ) -> None:
        super().__init__()
        self.key = ep_rt.torch.key_of(buffer)
        self.gate, self.up, self.down = (torch.nn.Parameter(each) for each in (gate, up, down))
        self.num_topk = num_topk
        self.capacity = capacity

    def forward(self, x: Tensor) -> Tensor:
        scores, topk_idx = (x @ self.gate).topk(self.num_topk)
        sent = ep_rt.torch.dispatch(
            self.key,
            x.float(),
            topk_idx,
            scores.softmax(dim=1).float(),
            num_experts=self.gate.shape[1],
            num_worst_tokens=self.capacity,
            layout="expert",  # the rows of an expert lie together
        )
        ends = sent.handle.psum_num_tokens_per_expert
        y = self.experts(sent.recv_x.to(x.dtype), ends)
        # Combine multiplies each row by its weight, and adds.
        return ep_rt.torch.combine(y.float(), sent.handle, sent.recv_topk_weights).combined_x.to(x.dtype)

    def experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The local experts, each for its rows, which end at `ends`. A grouped GEMM, where there is one."""
        if not self.capacity:
            lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
            groups = rows.split(lengths)
            return torch.cat([self.expert(number, group) for number, group in enumerate(groups)])
        # No shape may depend on the routing, so every expert computes all rows, and padding is nobody's.
        place = torch.arange(len(rows), device=rows.device)
        owner = torch.searchsorted(ends, place, right=True)[:, None]
        y = torch.zeros_like(rows)
        for number in range(len(self.up)):
            y = torch.where(owner == number, self.expert(number, rows), y)
        return y

    def expert(self, number: int, rows: Tensor) -> Tensor:
        return torch.tanh(rows @ self.up[number]) @ self.down[number]


EXPERT_PARAMETERS = ("moe.up", "moe.down")  # a rank holds those of its own experts; all others are replicated


class Imitator(torch.nn.Module):  # type: ignore[misc]
    """x + MoE(x), then a linear layer. Calls are collective."""

    def __init__(self, moe: torch.nn.Module, w_out: Tensor) -> None:
        super().__init__()
        self.moe = moe
        self.w_out = torch.nn.Parameter(w_out)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.moe(x)) @ self.w_out


def random_matrix(seed: tuple[int, ...], *shape: int) -> Tensor:
    """float64, scaled for a vector times this matrix; the same on every rank."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape) / np.sqrt(shape[-2]))


def new_model(
    group: ep_rt.Group,
    new_layer: Callable[[Tensor, Tensor, Tensor], Any],
    options: argparse.Namespace,
    device: str,
) -> Imitator:
    """A model around ``new_layer(gate, up, down)``, which gets the gate and the experts of this rank."""
    hidden, ffn, num_experts = options.hidden, options.ffn, options.num_experts
    num_local_experts = num_experts // group.size
    mine = slice(group.rank * num_local_experts, (group.rank + 1) * num_local_experts)
    moe = new_layer(
        random_matrix((options.seed, 1), hidden, num_experts),
        random_matrix((options.seed, 2), num_experts, hidden, ffn)[mine].clone(),
        random_matrix((options.seed, 3), num_experts, ffn, hidden)[mine].clone(),
    )
    model = Imitator(moe, random_matrix((options.seed, 4), hidden, options.outputs))
    model.to(device)
    return model


def examples_of(step: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """A batch of inputs, and what the imitated function makes of them."""
    x = math.sqrt(options.hidden) * random_matrix((options.seed, 5, step), options.hidden, options.batch).T
    regions = random_matrix((options.seed, 6), options.hidden, 4)
    functions = random_matrix((options.seed, 7), 4, options.hidden, options.outputs)
    outputs = torch.sin(torch.einsum("nh,rho->nro", x, functions))
    return x.contiguous(), outputs[torch.arange(len(x)), (x @ regions).argmax(dim=1)]


def sum_gradients(group: ep_rt.Group, model: Imitator) -> None:
    """Of the replicated parameters, in the order of the ranks, so that all get the same bits. Collective."""
    replicated = {name: p for name, p in model.named_parameters() if name not in EXPERT_PARAMETERS}
    parts = group.allgather({name: p.grad.cpu().numpy() for name, p in replicated.items()})
    for name, p in replicated.items():
        # A new array: ranks that are threads may still be reading the old one.
        p.grad = torch.from_numpy(np.sum([part[name] for part in parts], axis=0)).to(p.device)


@contextlib.contextmanager
def buffer_of(group: ep_rt.Group, options: argparse.Namespace) -> Iterator[tuple[ep_rt.Buffer, str]]:
    """A buffer for the model's layer, and the device of its tensors. Collective."""
    with (
        place_of(group, options) as place,
        ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=options.batch,
            hidden=options.hidden,
            num_experts=options.num_experts,
            num_topk=options.topk,
            dtype="float32",
            backend=place.backend,
        ) as buffer,
    ):
        yield buffer, f"cuda:{place.gpu}" if buffer.backend == "cuda" else "cpu"


def train(group: ep_rt.Group, options: argparse.Namespace) -> Trained:
    """Train over the ranks of `group`. Every rank gets the whole result. Collective."""
    with buffer_of(group, options) as (buffer, device):

        def new_layer(gate: Tensor, up: Tensor, down: Tensor) -> EPMoE:
            capacity = options.batch * options.topk if options.compile else 0  # all rows of all ranks
            return EPMoE(buffer, gate, up, down, num_topk=options.topk, capacity=capacity)

        model = new_model(group, new_layer, options, device)
        forward = torch.compile(model, fullgraph=True, backend=options.compile) if options.compile else model
        return fit(group, model, forward, options, device)


def fit(
    group: ep_rt.Group, model: Imitator, forward: Any, options: argparse.Namespace, device: str
) -> Trained:
    """Train a model whose experts are divided among the ranks of `group`. Collective.

    Args:
        forward: calls the model.
    """
    adam = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    mine = np.array_split(np.arange(options.batch), group.size)[group.rank]
    losses = []
    for step in range(options.steps):
        x, wanted = (each[mine].to(device) for each in examples_of(step, options))
        loss = ((forward(x) - wanted) ** 2).sum() / (options.batch * options.outputs)
        adam.zero_grad()
        loss.backward()
        sum_gradients(group, model)
        adam.step()
        losses.append(sum(group.allgather(loss.item())))
        if group.rank == 0 and step % 50 == 0:
            print(f"{ranks_in_words(group.size)}, {device}, step {step}: loss {losses[-1]:.4f}", flush=True)
    trained = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
    for name in EXPERT_PARAMETERS:
        trained[name] = np.concatenate(group.allgather(trained[name]))
    return Trained(np.array(losses), trained)


def has_learned(trained: Trained) -> bool:
    """Print how the training went. Whether the loss fell."""
    first, last = trained.losses[0], trained.losses[-10:].mean()
    passed = bool(last < 0.9 * first)
    print(f"loss {'fell' if passed else 'DID NOT FALL'}: first {first:.4f}, last {last:.4f}", flush=True)
    return passed


def report(trained: Trained, options: argparse.Namespace, num_ranks: int) -> bool:
    """Compare with a training on one rank. Whether all is as it should be."""
    passed = has_learned(trained)
    if num_ranks > 1:
        [alone] = ep_rt.run_local(train, 1, options)
        passed &= is_equal(trained, alone, ranks_in_words(num_ranks))
    return passed


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    train_and_compare(group, options, train, report)


def train_and_compare(
    group: ep_rt.Group,
    options: argparse.Namespace,
    train: Callable[[ep_rt.Group, argparse.Namespace], Trained],
    report: Callable[[Trained, argparse.Namespace, int], bool],
) -> None:
    """Train on all ranks; then rank 0 reports, and all leave if something is wrong. Collective."""
    if options.topk > options.num_experts:
        raise ep_rt.ConfigError(f"--topk {options.topk} of --num-experts {options.num_experts} is impossible")
    trained = train(group, options)
    passed = report(trained, options, group.size) if group.rank == 0 else None
    # The other ranks wait here while rank 0 trains alone.
    if not group.allgather(passed, timeout_s=math.inf)[0]:
        sys.exit(1)


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """Flags for the model and its training."""
    parser = example_parser(description, frameworks=("torch",))
    parser.set_defaults(framework="torch")
    sizes = {
        "steps": (300, "batches to train on"),
        "batch": (256, "examples in a batch, of all ranks together"),
        "hidden": (32, "width of the MoE layer"),
        "ffn": (64, "width inside an expert"),
        "outputs": (4, "numbers to predict"),
        "num-experts": (8, "experts, of all ranks together"),
    }
    add_sizes(parser, sizes)
    # More than two terms would be added in an order that depends on the ranks, in float32.
    parser.add_argument("--topk", type=int, choices=(1, 2), default=2, help="experts per token (default: 2)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, metavar="X")
    return parser


def parser() -> argparse.ArgumentParser:
    parser = model_parser(__doc__)
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model as one graph (default BACKEND: inductor)",
    )
    return parser


if __name__ == "__main__":
    launch_torch(parser(), main)
