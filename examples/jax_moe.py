"""Train a model with an expert-parallel MoE layer in JAX; ``jax.grad`` runs through dispatch and combine.

    mpiexec -n 4 python examples/jax_moe.py      ranks are processes of MPI
    python examples/jax_moe.py --ranks 4         ranks are threads, in CPU memory

On a node with GPUs every process computes on one; else, or with --backend host, in CPU memory.

The model imitates a function that is another one in every region of its input, so that experts pay. A step is
one compiled program: a gate, its top-k experts, dispatch, the experts of this rank, combine, and all that
backwards. Every rank trains on its share of each batch and owns num_experts / num_ranks experts. Their
gradients are complete, for their rows come from all ranks; the gradients of the other parameters are summed
over the ranks.

The number of ranks changes nothing but the order of additions. The script shows it: it trains once on all
ranks, once on rank 0 alone, and compares.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import Place, add_sizes, example_parser, launch, place_of
from numpy.typing import NDArray
from training import Trained, is_equal, ranks_in_words

import ep_rt
import ep_rt.jax

Array = Any  # jax.Array
Parameters = dict[str, Any]

EXPERT_PARAMETERS = ("up", "down")  # a rank holds those of its own experts; all others are replicated


def moe(buffer: ep_rt.Buffer, parameters: Parameters, x: Array, *, num_topk: int, capacity: int) -> Array:
    """Tokens go to the ranks of their top-k experts and come back as weighted sums of the experts' outputs.

    Args:
        parameters: gate [hidden, num_experts] of all experts, the same on every rank; up
            [num_local_experts, hidden, ffn] and down [num_local_experts, ffn, hidden] of this rank's.
        capacity: rows that a rank takes. Tokens whose rows do not fit are dropped.
    """
    scores, topk_idx = jax.lax.top_k(x @ parameters["gate"], num_topk)
    sent = ep_rt.jax.dispatch(
        buffer,
        x.astype(jnp.float32),
        topk_idx,
        jax.nn.softmax(scores).astype(jnp.float32),
        num_experts=parameters["gate"].shape[1],
        num_worst_tokens=capacity,
        layout="expert",  # the rows of an expert lie together
    )
    lengths = jnp.diff(sent.handle.psum_num_tokens_per_expert, prepend=0)
    rows = sent.recv_x.astype(x.dtype)
    rows = jnp.tanh(jax.lax.ragged_dot(rows, parameters["up"], lengths))
    rows = jax.lax.ragged_dot(rows, parameters["down"], lengths).astype(jnp.float32)
    # Combine multiplies each row by its weight, and adds.
    return ep_rt.jax.combine(rows, sent.handle, sent.recv_topk_weights).combined_x.astype(x.dtype)


def random_matrix(seed: tuple[int, ...], *shape: int) -> NDArray[np.float64]:
    """Scaled for a vector times this matrix; the same on every rank."""
    rng = np.random.default_rng(seed)
    matrix: NDArray[np.float64] = rng.standard_normal(shape) / np.sqrt(shape[-2])
    return matrix


def new_parameters(buffer: ep_rt.Buffer, options: argparse.Namespace) -> Parameters:
    hidden, ffn, num_experts = options.hidden, options.ffn, options.num_experts
    num_local_experts = num_experts // buffer.num_ranks
    mine = slice(buffer.rank * num_local_experts, (buffer.rank + 1) * num_local_experts)
    return {
        "gate": jnp.asarray(random_matrix((options.seed, 1), hidden, num_experts)),
        "up": jnp.asarray(random_matrix((options.seed, 2), num_experts, hidden, ffn)[mine]),
        "down": jnp.asarray(random_matrix((options.seed, 3), num_experts, ffn, hidden)[mine]),
        "w_out": jnp.asarray(random_matrix((options.seed, 4), hidden, options.outputs)),
    }


def examples_of(step: int, options: argparse.Namespace) -> tuple[NDArray[Any], NDArray[Any]]:
    """A batch of inputs, and what the imitated function makes of them."""
    x = math.sqrt(options.hidden) * random_matrix((options.seed, 5, step), options.hidden, options.batch).T
    regions = random_matrix((options.seed, 6), options.hidden, 4)
    functions = random_matrix((options.seed, 7), 4, options.hidden, options.outputs)
    outputs = np.sin(np.einsum("nh,rho->nro", x, functions))
    return x, outputs[np.arange(len(x)), (x @ regions).argmax(axis=1)]


def summed(group: ep_rt.Group, gradients: Parameters) -> Parameters:
    """With those of the replicated parameters summed, in the order of the ranks: all get the same bits."""
    mine = {name: np.asarray(g) for name, g in gradients.items() if name not in EXPERT_PARAMETERS}
    parts = group.allgather(mine)
    return gradients | {name: jnp.asarray(np.sum([part[name] for part in parts], axis=0)) for name in mine}


def adam(
    step: Array,
    parameters: Parameters,
    gradients: Parameters,
    moments: tuple[Parameters, Parameters],
    rate: float,
) -> tuple[Parameters, tuple[Parameters, Parameters]]:
    """Parameters and moments after step number `step`, which counts from 0."""
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
    second = jax.tree.map(lambda m, g: 0.999 * m + 0.001 * g**2, moments[1], gradients)
    biases = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)

    def moved(p: Array, m: Array, v: Array) -> Array:
        return p - rate * (m / biases[0]) / (jnp.sqrt(v / biases[1]) + 1e-8)

    return jax.tree.map(moved, parameters, first, second), (first, second)


def train(group: ep_rt.Group, options: argparse.Namespace) -> Trained:
    """Train over the ranks of `group`. Every rank gets the whole result. Collective."""
    with (
        jax.enable_x64(True),  # for the comparison, see training.py
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
        jax.default_device(device_of(buffer, place)),
    ):
        # Functions of this rank: JAX compiles and runs one that threads share for one of them first.
        def loss_of(parameters: Parameters, x: Array, wanted: Array) -> Array:
            y = x + moe(
                buffer,
                parameters,
                x,
                num_topk=options.topk,
                capacity=options.batch * options.topk,  # all rows of all ranks
            )
            return ((y @ parameters["w_out"] - wanted) ** 2).sum() / (options.batch * options.outputs)

        loss_and_gradients = jax.jit(jax.value_and_grad(loss_of))
        update = jax.jit(adam, static_argnames="rate")
        parameters = new_parameters(buffer, options)
        moments = jax.tree.map(jnp.zeros_like, (parameters, parameters))
        mine = np.array_split(np.arange(options.batch), group.size)[group.rank]
        losses = []
        for step in range(options.steps):
            x, wanted = (each[mine] for each in examples_of(step, options))
            loss, gradients = loss_and_gradients(parameters, x, wanted)
            parameters, moments = update(
                step, parameters, summed(group, gradients), moments, rate=options.learning_rate
            )
            losses.append(sum(group.allgather(float(loss))))
            if group.rank == 0 and step % 50 == 0:
                print(
                    f"{ranks_in_words(group.size)}, {buffer.backend}, step {step}: loss {losses[-1]:.4f}",
                    flush=True,
                )
        trained = {name: np.asarray(p) for name, p in parameters.items()}
    for name in EXPERT_PARAMETERS:
        trained[name] = np.concatenate(group.allgather(trained[name]))
    return Trained(np.array(losses), trained)


def device_of(buffer: ep_rt.Buffer, place: Place) -> Any:
    if buffer.backend == "host":
        return jax.local_devices(backend="cpu")[0]
    return jax.local_devices(backend="gpu")[place.gpu]


def report(trained: Trained, options: argparse.Namespace, num_ranks: int) -> bool:
    """Print how the training went; compare it with one rank. Whether all is as it should be."""
    first, last = trained.losses[0], trained.losses[-10:].mean()
    passed = bool(last < 0.9 * first)
    print(f"loss {'fell' if passed else 'DID NOT FALL'}: first {first:.4f}, last {last:.4f}", flush=True)
    if num_ranks > 1:
        [alone] = ep_rt.run_local(train, 1, options)
        passed &= is_equal(trained, alone, ranks_in_words(num_ranks))
    return passed


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    if options.topk > options.num_experts:
        raise ep_rt.ConfigError(f"--topk {options.topk} of --num-experts {options.num_experts} is impossible")
    if options.ranks:
        if options.backend == "cuda":
            raise ep_rt.ConfigError("--backend cuda needs a process for each rank: mpiexec")
        options.backend = "host"
        # XLA reads it when it starts: ranks wait for each other on its threads.
        os.environ.setdefault("NPROC", str(options.ranks + 1))
    trained = train(group, options)
    passed = report(trained, options, group.size) if group.rank == 0 else None
    # The other ranks wait here while rank 0 trains alone.
    if not group.allgather(passed, timeout_s=math.inf)[0]:
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    parser = example_parser(__doc__, frameworks=("jax",))
    parser.set_defaults(framework="jax")
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


if __name__ == "__main__":
    launch(parser(), main)
