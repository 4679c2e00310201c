"""The command line of ``bench``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any, Final

from ..errors import ConfigError

OPERATIONS: Final = ("dispatch", "dispatch-cached", "dispatch-exact", "combine", "combine-copied")

LOW_LATENCY: Final = (
    *("ll-dispatch", "ll-dispatch-packed", "ll-dispatch-split"),
    *("ll-combine", "ll-combine-split", "ll-combine-fp8", "ll-combine-logfmt", "ll-combine-source"),
    *("ll-pair", "ll-pair-packed"),
)

SUMMED_AT_SOURCE: Final = "ll-combine-source"
"""The one whose rows travel for each column of ``topk_idx``, and not for each rank."""

LIBRARIES: Final = ("nccl", "jax")

ONE_NODE: Final = "one-node"
"""What else there is to compare with."""

_EPILOG: Final = """\
operations:
  dispatch         with num_worst_tokens for the worst case: the host waits for nothing
  dispatch-cached  with the handle of an earlier dispatch
  dispatch-exact   results of exactly the rows received: the host waits for their number
  combine          rows in communication memory (Buffer.empty)
  combine-copied   rows in an ordinary array, which are copied there first; GPUs only; on one node up to three
                   times as many SMs copy, besides those that it is told to use
  ll-dispatch         low-latency mode, rows stay where they land (layout "rank"); weights travel along
  ll-dispatch-packed  rows are copied to their experts (layout "expert")
  ll-combine          one row for each rank (reduce "rank"), in bfloat16
  ll-dispatch-split, ll-combine-split  as ll-dispatch and ll-combine, in two kernels: the send phase, and the
                      receive hook at once. On GPUs each is also timed alone, the hook when all has landed
  ll-combine-fp8, ll-combine-logfmt  the same rows cast for their way
  ll-combine-source   a row for each expert, summed where they arrive (reduce "source"); on GPUs of one node
  ll-pair, ll-pair-packed  ll-dispatch or ll-dispatch-packed, and ll-combine
Those of the low-latency mode are measured when they are named; they take the SMs that they need,
or --low-latency-sms at most.
Combine sums bfloat16 rows, also after a dispatch of FP8: it is measured with --dtype bf16 or both.

Every result is compared with what it must be, byte by byte, before it is timed. The status is 1 if one
differs, 2 if the benchmark cannot run.

examples:
  mpirun -n 8 python -m ep_rt bench --sms 16 24 --dtype both --json figures.json
  mpirun -n 2 python -m ep_rt bench --compare nccl jax
  EP_RT_RANKS_PER_NODE=2 mpirun -n 4 python -m ep_rt bench --compare one-node
  mpirun -n 2 python -m ep_rt bench --operations ll-pair --tokens 8 --beside-product 4096 --leave-sms 16
  python -m ep_rt bench --ranks 8 --virtual --tokens 128     eight ranks on one GPU
  python -m ep_rt bench --backend host --ranks 3 --tokens 64 no GPU needed
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure, how often, and where to."""

    tokens: tuple[int, ...] = (128, 1024, 4096)
    hidden: int = 7168
    num_experts: int = 256
    num_topk: int = 8
    dtypes: tuple[str, ...] = ("bf16",)
    sms: tuple[int, ...] = (16,)
    routing: str = "uniform"
    zipf_exponent: float = 1.0
    num_groups: int = 8
    num_topk_groups: int = 4
    seed: int = 0
    operations: tuple[str, ...] = OPERATIONS
    repeat: int = 5
    backend: str = "auto"
    num_ranks: int = 0  # 0: the processes of the launcher, else as many threads as fit the machine
    is_virtual: bool = False
    with_puts: bool = False
    with_masks: bool = False
    with_stats: bool = False
    num_low_latency_sms: int | None = None
    compare: tuple[str, ...] = ()
    product: int = 0  # rows and columns; 0 for none
    num_left_sms: int = 0  # by the product
    json: str = ""
    plot: str = ""
    is_first_call: bool = False
    is_in_place: bool = False

    def __post_init__(self) -> None:
        if self.num_topk > self.num_experts:
            raise ConfigError(f"top-{self.num_topk} of {self.num_experts} experts")
        if not self.zipf_exponent >= 0:
            raise ConfigError(f"--zipf-exponent {self.zipf_exponent} is negative")
        num_groups, num_picked = self.groups
        if self.num_experts % num_groups:
            raise ConfigError(f"{self.num_experts} experts cannot be divided into {num_groups} groups")
        if num_picked > num_groups:
            raise ConfigError(f"top-{num_picked} of {num_groups} groups")
        num_within = self.num_experts // num_groups * num_picked
        if self.num_topk > num_within:
            raise ConfigError(f"top-{self.num_topk} of the {num_within} experts of {num_picked} groups")
        if self.num_left_sms < 0 or (self.num_left_sms and not self.product):
            raise ConfigError(
                f"--leave-sms {self.num_left_sms}: of a product, --beside-product N, and from 0 up"
            )
        if self.hidden % 16:
            raise ConfigError(f"--hidden {self.hidden}: rows must be a multiple of 16 bytes in every dtype")

    @property
    def exponent(self) -> float:
        """Of the popularity of the experts."""
        return self.zipf_exponent if self.routing == "zipf" else 0.0

    @property
    def groups(self) -> tuple[int, int]:
        """Of experts, and how many of them a token picks."""
        return (self.num_groups, self.num_topk_groups) if self.routing == "grouped" else (1, 1)

    @property
    def routing_text(self) -> str:
        """For people."""
        if self.routing == "grouped":
            return f"grouped routing, top-{self.num_topk_groups} of {self.num_groups} groups"
        return self.routing + (f" with exponent {self.zipf_exponent:g}" if self.exponent else "") + " routing"

    def low_latency_of(self, dtype: str) -> tuple[str, ...]:
        """Those of the low-latency mode. A combine by itself does not depend on the dtype of the dispatch."""
        names = tuple(name for name in self.operations if name in LOW_LATENCY)
        return tuple(name for name in names if not name.startswith("ll-combine") or dtype == "bf16")

    def operations_of(self, dtype: str, backend: str) -> tuple[str, ...]:
        """Those of `operations` that there are for a dtype on a backend."""
        return tuple(
            name
            for name in self.operations
            if name not in LOW_LATENCY
            and not (name.startswith("combine") and dtype != "bf16")
            and not (name == "combine-copied" and backend == "host")
        )


_DEFAULTS: Final = Options()


def add_parser(commands: Any) -> None:
    """Add ``bench`` to the subparsers of a program."""
    parser = commands.add_parser(
        "bench",
        help="time dispatch and combine, checked, beside the limit of the links",
        description="Time dispatch and combine, checked, beside the limit of the links.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--operations", nargs="+", choices=OPERATIONS + LOW_LATENCY, default=OPERATIONS, metavar="OP"
    )
    what.add_argument(
        "--sms", type=positive, nargs="+", default=_DEFAULTS.sms, help="SMs that an operation may use"
    )
    what.add_argument(
        "--low-latency-sms",
        type=positive,
        default=_DEFAULTS.num_low_latency_sms,
        metavar="N",
        help="SMs that an operation of the low-latency mode may use; default: all",
    )
    what.add_argument("--repeat", type=positive, default=_DEFAULTS.repeat, help="readings of each time")
    what.add_argument(
        "--compare",
        nargs="+",
        choices=("none", *LIBRARIES, ONE_NODE),
        default=("none",),
        help="the same rows, packed already and not summed, through NCCL's all-to-all or JAX's "
        "ragged_all_to_all; processes with a GPU each. one-node: over nodes that EP_RT_RANKS_PER_NODE made, "
        "each operation of the normal mode on one node of all ranks, too, and how many times that it takes",
    )
    what.add_argument(
        "--beside-product",
        type=positive,
        default=0,
        metavar="N",
        help="also each operation beside a product of N x N float16 matrices, and what that loses; "
        "ranks with a GPU each",
    )
    what.add_argument(
        "--leave-sms",
        type=int,
        default=_DEFAULTS.num_left_sms,
        metavar="N",
        help="SMs that the product leaves to an operation beside it; default: none",
    )
    what.add_argument(
        "--first-call",
        action="store_true",
        help="instead: time of the first Buffer and dispatch of a process, without and with compiled kernels",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--backend", choices=("auto", "cuda", "host"), default="auto")
    where.add_argument(
        "--ranks",
        type=positive,
        default=0,
        metavar="N",
        help="threads; default: the processes of mpirun, else one for each GPU, or 4 on the host",
    )
    where.add_argument("--virtual", action="store_true", help="all threads on one GPU")
    where.add_argument(
        "--puts", action="store_true", help="low-latency calls put to every rank, through NVSHMEM"
    )
    where.add_argument(
        "--masks", action="store_true", help="low-latency calls that leave late ranks out (enable_shrink)"
    )
    where.add_argument(
        "--stats", action="store_true", help="low-latency calls count rows of experts, and how long they wait"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", default="", metavar="FILE", help="all readings; - for stdout, the tables then go to stderr"
    )
    output.add_argument("--plot", default="", metavar="FILE", help="bandwidth over tokens, as a picture")
    parser.add_argument("--in-place", action="store_true", help=argparse.SUPPRESS)


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Add what is moved."""
    work = parser.add_argument_group("workload")
    work.add_argument("--tokens", type=positive, nargs="+", default=_DEFAULTS.tokens, help="of each rank")
    work.add_argument("--hidden", type=positive, default=_DEFAULTS.hidden)
    work.add_argument("--experts", type=positive, default=_DEFAULTS.num_experts, help="of all ranks")
    work.add_argument("--topk", type=positive, default=_DEFAULTS.num_topk)
    work.add_argument(
        "--dtype",
        choices=("bf16", "fp8", "both"),
        default="bf16",
        help="fp8: bytes, with a float32 scale factor for every 128 of them",
    )
    work.add_argument(
        "--routing",
        choices=("uniform", "zipf", "grouped"),
        default="uniform",
        help="zipf: some experts are popular; grouped: a token picks groups, then experts of these",
    )
    work.add_argument("--zipf-exponent", type=float, default=_DEFAULTS.zipf_exponent, metavar="S")
    work.add_argument(
        "--groups",
        type=positive,
        default=_DEFAULTS.num_groups,
        metavar="N",
        help="of consecutive experts, of --routing grouped; default: 8",
    )
    work.add_argument(
        "--topk-groups", type=positive, default=_DEFAULTS.num_topk_groups, metavar="N", help="default: 4"
    )
    work.add_argument("--seed", type=int, default=_DEFAULTS.seed)


def workload_of(parsed: argparse.Namespace) -> Options:
    """Checked options of the workload; the others have their defaults.

    Raises:
        ConfigError: they do not go together.
    """
    return Options(
        tokens=tuple(dict.fromkeys(parsed.tokens)),
        hidden=parsed.hidden,
        num_experts=parsed.experts,
        num_topk=parsed.topk,
        dtypes=("bf16", "fp8") if parsed.dtype == "both" else (parsed.dtype,),
        routing=parsed.routing,
        zipf_exponent=parsed.zipf_exponent,
        num_groups=parsed.groups,
        num_topk_groups=parsed.topk_groups,
        seed=parsed.seed,
    )


def options_of(parsed: argparse.Namespace) -> Options:
    """The checked options.

    Raises:
        ConfigError: they do not go together.
    """
    return replace(
        workload_of(parsed),
        sms=tuple(dict.fromkeys(parsed.sms)),
        operations=tuple(name for name in OPERATIONS + LOW_LATENCY if name in parsed.operations),
        repeat=parsed.repeat,
        backend=parsed.backend,
        num_ranks=parsed.ranks,
        is_virtual=parsed.virtual,
        with_puts=parsed.puts,
        with_masks=parsed.masks,
        with_stats=parsed.stats,
        num_low_latency_sms=parsed.low_latency_sms,
        compare=tuple(name for name in (*LIBRARIES, ONE_NODE) if name in parsed.compare),
        product=parsed.beside_product,
        num_left_sms=parsed.leave_sms,
        json=parsed.json,
        plot=parsed.plot,
        is_first_call=parsed.first_call,
        is_in_place=parsed.in_place,
    )


def positive(text: str) -> int:
    """Of the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
