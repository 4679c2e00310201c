"""What the examples of adapters share: one MoE layer in PyTorch, and the comparison with a dense one."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from frameworks import Library
from launch import add_sizes, example_parser, place_of
from moe_layer import Rows, Tokens, dense_layer, random_expert, random_tokens
from training import ranks_in_words

import ep_rt

Tensor = Any  # torch.Tensor

FP8_BLOCK = 128


class Experts:
    """The experts of one rank, in float32. They stand for the kernels of an engine."""

    def __init__(self, options: argparse.Namespace, group: ep_rt.Group, lib: Library) -> None:
        self.num_local = options.num_experts // group.size
        self.first = group.rank * self.num_local
        experts = [random_expert(options, self.first + number) for number in range(self.num_local)]
        self.up, self.down = (lib.put(np.stack(each)) for each in zip(*experts, strict=True))

    def grouped(self, rows: Tensor, scales: Tensor | None, counts: Sequence[int]) -> Tensor:
        """Of rows [num_rows, hidden] the first ``counts[0]`` are for the first expert, and so on."""
        outputs = [
            (group @ up).relu() @ down
            for group, up, down in zip(
                widened(rows, scales).split(list(counts)), self.up, self.down, strict=True
            )
        ]
        return torch.cat(outputs).bfloat16()

    def batched(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        """Of rows [num_local, num_rows, hidden]; what a row past an expert's last one becomes is nobody's."""
        return torch.bmm(torch.bmm(widened(rows, scales), self.up).relu(), self.down).bfloat16()


def widened(rows: Tensor, scales: Tensor | None) -> Tensor:
    """As float32. FP8 has a scale factor for every `FP8_BLOCK` numbers of a row."""
    if scales is None:
        return rows.float()
    blocks = rows.float().unflatten(-1, (-1, FP8_BLOCK))
    return (blocks * scales[..., None]).flatten(-2)


class Output(NamedTuple):
    """What a layer made of the tokens of a rank."""

    y: Rows
    is_fp8: bool  # rows travelled to the experts as FP8


class Rank(NamedTuple):
    """What the adapters of one rank work with."""

    buffer: ep_rt.Buffer
    lib: Library
    tokens: Tokens  # on the device
    experts: Experts


@contextlib.contextmanager
def rank_of(group: ep_rt.Group, options: argparse.Namespace) -> Iterator[Rank]:
    """Tokens and experts of this rank, and a buffer for either mode. Collective."""
    if options.topk > options.num_experts:
        raise ep_rt.ConfigError(f"--topk {options.topk} of --num-experts {options.num_experts} is impossible")
    with (
        place_of(group, options) as place,
        ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=options.tokens,
            hidden=options.hidden,
            num_experts=options.num_experts,
            num_topk=options.topk,
            backend=place.backend,
            low_latency_mode=True,
        ) as buffer,
    ):
        lib = Library.of(buffer, place)
        tokens = Tokens(*map(lib.put, random_tokens(options, group.rank)))
        yield Rank(buffer, lib, tokens, Experts(options, group, lib))


def check(group: ep_rt.Group, options: argparse.Namespace, outputs: dict[str, Output]) -> None:
    """Compare with the layer on one rank, which rank 0 computes, and leave if they differ. Collective."""
    everyone = group.allgather(outputs)
    if group.rank == 0 and not report(everyone, options):
        sys.exit(1)


def report(everyone: Sequence[dict[str, Output]], options: argparse.Namespace) -> bool:
    """Print how far each way of the layer is from the dense one. Whether all are near enough."""
    tokens = [random_tokens(options, rank) for rank in range(len(everyone))]
    passed = True
    for name, (_, is_fp8) in everyone[0].items():
        dense, once, once_more = dense_layer([as_sent(each, is_fp8=is_fp8) for each in tokens], options)
        y = np.stack([outputs[name].y for outputs in everyone]).astype(np.float32)
        error = np.abs(y - dense)
        # Rounded are the experts' outputs, the sums of each rank, and their sums.
        share = (error / (once + once_more)).max()
        passed &= bool(share <= 1)
        print(f"{name}: max error {error.max():.4f}, {share:.0%} of what rounding to bfloat16 allows")
    ranks = ranks_in_words(len(everyone))
    print(f"check {'passed' if passed else 'FAILED'}: {ranks} against one dense layer")
    return passed


def as_sent(tokens: Tokens, *, is_fp8: bool) -> Tokens:
    """Tokens as the experts see them: rounding to FP8 is no error of the layer."""
    if not is_fp8:
        return tokens
    q, scales = ep_rt.reference.quantize_fp8(tokens.x)
    blocks = q.astype(np.float32).reshape(len(q), -1, FP8_BLOCK) * scales[..., None]
    return tokens._replace(x=blocks.reshape(q.shape))


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = example_parser(description, frameworks=("torch",))
    parser.set_defaults(framework="torch")
    sizes = {
        "tokens": (64, "tokens per rank"),
        "hidden": (512, "numbers per token, a multiple of 128"),
        "ffn": (128, "width inside an expert"),
        "num-experts": (16, "experts, of all ranks together"),
        "topk": (4, "experts per token"),
    }
    add_sizes(parser, sizes)
    return parser
