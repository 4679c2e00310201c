"""Train a small MoE character model on Python's own documentation, its experts spread over the ranks.

    mpiexec -n 4 python examples/train_moe.py      ranks are processes
    python examples/train_moe.py --ranks 4         ranks are threads; needs no MPI

On a node with GPUs every rank computes on one; else, or with --backend host, in CPU memory.

The model guesses a character from those before it:

    x      = tanh(embeddings of the context, side by side, times w_in)
    y      = x + sum over the top-k experts of a token: gate weight * tanh(x up) down
    logits = y w_out

Every rank trains on its share of each batch and owns num_experts / num_ranks experts. The other parameters
are replicated, and their gradients are summed over the ranks. Backward mirrors forward:

    forward    dispatch(x, gate weights)   ->  experts  ->  combine(rows)
    backward   combine(gradient of rows,   <-  experts  <-  dispatch(gradient of y, same handle)
                       and of gate weights)

The number of ranks changes nothing but the order of additions. The script shows it: it trains once on all
ranks, once on rank 0 alone, and compares.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks are the parallelism; NumPy reads it when it loads

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from frameworks import Library
from launch import add_sizes, example_parser, launch, place_of
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm
from training import Trained, is_equal, ranks_in_words

import ep_rt

# What travels is float32, arithmetic on a rank is float64. The choice of experts is not continuous: a score
# that another order of additions changed in its last bit can send a token elsewhere. In float32 that happens
# within some twenty steps, and from there two correct runs drift apart.
Floats = Any  # float64 array of the library that computes
Payload = Any  # float32
Ints = Any  # int64
Parameters = dict[str, Floats]

EXPERT_PARAMETERS = ("up", "down")  # a rank holds those of its own experts; all others are replicated


class Text:
    """A text as numbers."""

    def __init__(self, text: str) -> None:
        self.vocabulary = sorted(set(text))
        self.ids: NDArray[np.int64] = np.searchsorted(self.vocabulary, list(text))

    def batch(
        self, rng: np.random.Generator, size: int, context: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Contexts [size, context] from anywhere in the text, and the characters [size] that follow."""
        start = rng.integers(len(self.ids) - context, size=size)
        windows = self.ids[start[:, None] + np.arange(context + 1)]
        return windows[:, :-1], windows[:, -1]

    def spell(self, ids: NDArray[np.int64]) -> str:
        return "".join(self.vocabulary[i] for i in ids)


def initial_parameters(options: argparse.Namespace, vocabulary_size: int) -> dict[str, NDArray[np.float64]]:
    """The parameters of the whole model, the same on every rank."""
    rng = np.random.default_rng(options.seed)

    def matrix(*shape: int) -> NDArray[np.float64]:
        return np.divide(rng.standard_normal(shape), np.sqrt(shape[-2]))

    return {
        "embedding": rng.standard_normal((vocabulary_size, options.embedding)),
        "w_in": matrix(options.context * options.embedding, options.hidden),
        "b_in": np.zeros(options.hidden),
        "w_gate": matrix(options.hidden, options.num_experts),
        "up": matrix(options.num_experts, options.hidden, options.ffn),
        "down": matrix(options.num_experts, options.ffn, options.hidden),
        "w_out": matrix(options.hidden, vocabulary_size),
        "b_out": np.zeros(vocabulary_size),
    }


def softmax(xp: Any, x: Floats) -> Floats:
    e = xp.exp(x - xp.amax(x, axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


class ExpertPass(NamedTuple):
    """What one expert keeps of the forward pass. It saw n of the rows that its rank received."""

    row: Ints  # [n], which rows
    k: Ints  # [n], the column of topk_idx that chose it
    weight: Floats  # [n, 1], of the gate
    x: Floats  # [n, hidden]
    activation: Floats  # [n, ffn]
    output: Floats  # [n, hidden], before the weight


class MoePass(NamedTuple):
    """What the MoE block keeps of the forward pass."""

    x: Floats
    chosen: Floats  # [n, num_topk, num_experts], one-hot
    topk_weights: Floats
    experts: list[ExpertPass]
    handle: ep_rt.DispatchHandle


class MoeBlock:
    """Tokens go to the ranks of their experts and come back as weighted sums of the experts' outputs."""

    def __init__(self, buffer: ep_rt.Buffer, lib: Library, p: Parameters, num_topk: int) -> None:
        self.buffer = buffer
        self.lib = lib
        self.p = p
        self.num_topk = num_topk
        self.one_hot = lib.put(np.eye(p["w_gate"].shape[1]))

    def forward(self, x: Floats) -> tuple[Floats, MoePass]:
        lib, xp = self.lib, self.lib.xp
        scores = x @ self.p["w_gate"]
        topk_idx = xp.argsort(-scores, axis=1)[:, : self.num_topk]
        chosen = self.one_hot[topk_idx]
        topk_weights = softmax(xp, (chosen * scores[:, None]).sum(axis=2))

        payload = xp.asarray(x, dtype=xp.float32)
        payload_weights = xp.asarray(topk_weights, dtype=xp.float32)
        with lib.communication():
            sent = self.buffer.dispatch(payload, topk_idx=topk_idx, topk_weights=payload_weights)
        experts = []
        rows_out: Payload = xp.zeros_like(sent.recv_x)
        for expert, (up, down) in enumerate(zip(self.p["up"], self.p["down"], strict=True)):
            row, k = xp.where(sent.recv_topk_idx == expert)
            weight = xp.asarray(sent.recv_topk_weights[row, k, None], dtype=xp.float64)
            rows = xp.asarray(sent.recv_x[row], dtype=xp.float64)
            activation = xp.tanh(rows @ up)
            output = activation @ down
            rows_out[row] += xp.asarray(weight * output, dtype=xp.float32)
            experts.append(ExpertPass(row, k, weight, rows, activation, output))
        with lib.communication():
            combined = self.buffer.combine(rows_out, sent.handle)
        y = xp.asarray(combined.combined_x, dtype=xp.float64)
        return y, MoePass(x, chosen, topk_weights, experts, sent.handle)

    def backward(self, grad_y: Floats, saved: MoePass) -> tuple[Floats, Parameters]:
        """The gradients of the block's input and of its parameters."""
        lib, xp, p = self.lib, self.lib.xp, self.p
        payload = xp.asarray(grad_y, dtype=xp.float32)
        with lib.communication():
            received = self.buffer.dispatch(payload, handle=saved.handle)
        g = {name: xp.zeros_like(p[name]) for name in EXPERT_PARAMETERS}
        grad_rows: Payload = xp.zeros_like(received.recv_x)
        grad_weights: Payload = lib.put(np.zeros((len(grad_rows), self.num_topk), np.float32))
        for expert, (row, k, weight, x, activation, output) in enumerate(saved.experts):
            grad = xp.asarray(received.recv_x[row], dtype=xp.float64)
            grad_weights[row, k] = xp.asarray((grad * output).sum(axis=1), dtype=xp.float32)
            grad_output = weight * grad
            grad_activation = (grad_output @ p["down"][expert].T) * (1 - activation**2)
            g["down"][expert] = activation.T @ grad_output
            g["up"][expert] = x.T @ grad_activation
            grad_rows[row] += xp.asarray(grad_activation @ p["up"][expert].T, dtype=xp.float32)
        with lib.communication():
            back = self.buffer.combine(grad_rows, saved.handle, topk_weights=grad_weights)

        # The softmax ran over the chosen experts only: the scores of the others have no gradient.
        w, grad_w = saved.topk_weights, back.combined_topk_weights
        grad_chosen = w * (grad_w - (w * grad_w).sum(axis=1, keepdims=True))
        grad_scores = (saved.chosen * grad_chosen[:, :, None]).sum(axis=1)
        g["w_gate"] = saved.x.T @ grad_scores
        return back.combined_x + grad_scores @ p["w_gate"].T, g


class ModelPass(NamedTuple):
    """What the model keeps of the forward pass."""

    embedded: Floats
    x: Floats
    y: Floats
    probabilities: Floats  # [n, vocabulary], of the next character
    moe: MoePass


class CharacterModel:
    """Embeddings, the MoE block with a residual connection, the output layer. Calls are collective."""

    def __init__(self, buffer: ep_rt.Buffer, lib: Library, p: Parameters, num_topk: int) -> None:
        self.xp = lib.xp
        self.p = p
        self.moe = MoeBlock(buffer, lib, p, num_topk)
        self.one_hot = lib.put(np.eye(len(p["embedding"])))

    def forward(self, contexts: Ints) -> ModelPass:
        xp, p = self.xp, self.p
        embedded = p["embedding"][contexts].reshape(len(contexts), len(p["w_in"]))
        x = xp.tanh(embedded @ p["w_in"] + p["b_in"])
        moe_y, moe = self.moe.forward(x)
        y = x + moe_y
        return ModelPass(embedded, x, y, softmax(xp, y @ p["w_out"] + p["b_out"]), moe)

    def loss_and_gradients(self, contexts: Ints, targets: Ints, batch_size: int) -> tuple[float, Parameters]:
        """This rank's part of the mean cross-entropy over the `batch_size` characters of all ranks.

        Returns:
            The loss and the gradients; those of the rank's own experts are complete, the others its part.
        """
        p = self.p
        embedded, x, y, probabilities, moe = self.forward(contexts)
        right = self.one_hot[targets]
        loss = -self.xp.log((probabilities * right).sum(axis=1)).sum() / batch_size

        grad_logits = (probabilities - right) / batch_size
        grad_y = grad_logits @ p["w_out"].T
        grad_x, g = self.moe.backward(grad_y, moe)
        grad_in = (grad_y + grad_x) * (1 - x**2)
        grad_embedded = (grad_in @ p["w_in"].T).reshape(-1, p["embedding"].shape[1])
        g["w_out"], g["b_out"] = y.T @ grad_logits, grad_logits.sum(axis=0)
        g["w_in"], g["b_in"] = embedded.T @ grad_in, grad_in.sum(axis=0)
        g["embedding"] = self.one_hot[contexts.reshape(-1)].T @ grad_embedded
        return float(loss), g


class Adam:
    def __init__(self, xp: Any, p: Parameters, learning_rate: float) -> None:
        self.xp = xp
        self.learning_rate = learning_rate
        self.mean = {name: xp.zeros_like(value) for name, value in p.items()}
        self.square = {name: xp.zeros_like(value) for name, value in p.items()}
        self.num_steps = 0

    def step(self, p: Parameters, g: Parameters) -> None:
        self.num_steps += 1
        for name in p:
            self.mean[name] += 0.1 * (g[name] - self.mean[name])
            self.square[name] += 0.01 * (g[name] ** 2 - self.square[name])
            mean = self.mean[name] / (1 - 0.9**self.num_steps)
            square = self.square[name] / (1 - 0.99**self.num_steps)
            p[name] -= self.learning_rate * mean / (self.xp.sqrt(square) + 1e-8)


def sum_over_ranks(group: ep_rt.Group, lib: Library, values: Parameters) -> Parameters:
    """Added in the order of the ranks, so that every rank gets the same bits. Collective."""
    parts = group.allgather({name: lib.fetch(value) for name, value in values.items()})
    return {name: lib.put(sum(part[name] for part in parts)) for name in values}


@dataclass(frozen=True)
class TrainedWriter(Trained):
    sample: str


def train(group: ep_rt.Group, options: argparse.Namespace, text: Text) -> TrainedWriter:
    """Train over the ranks of `group`. Every rank gets the whole result. Collective."""
    with (
        place_of(group, options) as place,
        ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=-(-options.batch // group.size),
            hidden=options.hidden,
            num_experts=options.num_experts,
            num_topk=options.topk,
            dtype="float32",
            backend=place.backend,
        ) as buffer,
    ):
        lib = Library.of(buffer, place)
        initial = initial_parameters(options, len(text.vocabulary))
        for name in EXPERT_PARAMETERS:
            initial[name] = np.split(initial[name], group.size)[group.rank]
        p = {name: lib.put(value) for name, value in initial.items()}
        model = CharacterModel(buffer, lib, p, options.topk)
        adam = Adam(lib.xp, p, options.learning_rate)
        rng = np.random.default_rng(options.seed)
        mine = np.array_split(np.arange(options.batch), group.size)[group.rank]
        losses = []
        title = f"{ranks_in_words(group.size)}, {lib.name} on {buffer.backend}"
        with tqdm(total=options.steps, desc=title, mininterval=0.5, disable=group.rank > 0) as progress:
            for _ in range(options.steps):
                contexts, targets = text.batch(rng, options.batch, options.context)
                loss, g = model.loss_and_gradients(
                    lib.put(contexts[mine]), lib.put(targets[mine]), options.batch
                )
                replicated = {name: part for name, part in g.items() if name not in EXPERT_PARAMETERS}
                g |= sum_over_ranks(group, lib, replicated)
                adam.step(p, g)
                losses.append(sum(group.allgather(loss)))
                progress.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
                progress.update()
        sample = write(model, lib, text, options, is_author=group.rank == 0)
        trained = {name: lib.fetch(value) for name, value in p.items()}
    for name in EXPERT_PARAMETERS:
        trained[name] = np.concatenate(group.allgather(trained[name]))
    return TrainedWriter(np.array(losses), trained, sample)


def write(
    model: CharacterModel, lib: Library, text: Text, options: argparse.Namespace, *, is_author: bool
) -> str:
    """Let the model go on from somewhere in the text. Collective, and the author alone has a token."""
    rng = np.random.default_rng(options.seed)
    start, _ = text.batch(rng, 1, options.context)
    written = start[0]
    for _ in range(options.sample):
        contexts = written[None, -options.context :] if is_author else start[:0]
        for probabilities in lib.fetch(model.forward(lib.put(contexts)).probabilities):
            bold = probabilities**2
            written = np.append(written, rng.choice(len(bold), p=bold / bold.sum()))
    return text.spell(written)


def save_plot(path: Path, curves: dict[str, NDArray[np.float64]]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for (label, losses), style in zip(curves.items(), ("-", "--"), strict=False):
        axes.plot(losses, style, label=label)
    axes.set(xlabel="step", ylabel="cross-entropy per character")
    axes.legend()
    figure.savefig(path, dpi=150)


def report(trained: TrainedWriter, options: argparse.Namespace, num_ranks: int, text: Text) -> bool:
    """Print and plot how the training went; compare it with one rank. Whether all is as it should be."""
    first, last = trained.losses[0], trained.losses[-10:].mean()
    passed = bool(last < 0.9 * first)
    print(f"loss {'fell' if passed else 'DID NOT FALL'}: first {first:.3f}, last {last:.3f}", flush=True)
    label = ranks_in_words(num_ranks)
    curves = {label: trained.losses}
    if num_ranks > 1 and options.compare:
        [alone] = ep_rt.run_local(train, 1, options, text)
        curves["1 rank"] = alone.losses
        passed &= is_equal(trained, alone, label)
    save_plot(options.plot, curves)
    given, written = trained.sample[: options.context], trained.sample[options.context :]
    print(f"loss curve saved to {options.plot}\n\nafter {given!r} the model writes:\n{written}")
    return passed


def main(group: ep_rt.Group, options: argparse.Namespace) -> None:
    if options.topk > options.num_experts:
        raise ep_rt.ConfigError(f"--topk {options.topk} of --num-experts {options.num_experts} is impossible")
    if not options.plot.parent.is_dir():
        raise ep_rt.ConfigError(f"--plot {options.plot}: there is no such folder")
    text = Text("\n\n".join(topics[name] for name in sorted(topics)))
    trained = train(group, options, text)
    passed = report(trained, options, group.size, text) if group.rank == 0 else None
    # The other ranks wait here while rank 0 trains alone.
    if not group.allgather(passed, timeout_s=math.inf)[0]:
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    # Not JAX: its arrays do not change in place.
    parser = example_parser(__doc__, frameworks=("numpy", "cupy", "torch"))
    sizes = {
        "steps": (300, "batches to train on"),
        "batch": (768, "characters to predict in a batch, of all ranks together"),
        "context": (16, "characters that the model looks at"),
        "embedding": (16, "numbers per character"),
        "hidden": (128, "width of the MoE block"),
        "ffn": (256, "width inside an expert"),
        "num-experts": (8, "experts, of all ranks together"),
        "sample": (300, "characters to write at the end"),
    }
    add_sizes(parser, sizes)
    # More than two terms would be added in an order that depends on the ranks, in float32: see Floats.
    parser.add_argument("--topk", type=int, choices=(1, 2), default=2, help="experts per token (default: 2)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, metavar="X")
    parser.add_argument("--plot", type=Path, default=Path("loss.png"), metavar="FILE")
    parser.add_argument(
        "--no-compare", dest="compare", action="store_false", help="do not repeat the training on one rank"
    )
    return parser


if __name__ == "__main__":
    launch(parser(), main)
