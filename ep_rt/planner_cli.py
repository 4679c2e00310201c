"""``python -m ep_rt plan``: what must move over which links, and the time that it takes at least."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from .bench.console import say
from .bench.options import Options as Workload
from .bench.options import add_workload, positive, workload_of
from .bench.workload import ELEMENTS, Routing
from .planner import Flow, Plan, Routes, num_nodes_of
from .requests import local_experts

OPERATIONS: Final = ("dispatch", "dispatch-cached", "combine")

_EPILOG: Final = """\
Megabytes that leave a rank, the mean over ranks; in brackets those of the busiest link, of whichever rank
sends or receives most. Counted are rows with their scale factors, ids and weights, as the kernels count them.
  two levels   a token crosses the network once for each node, and NVLink spreads it there: so does ep_rt
  one level    a token crosses the network once for each rank
  floor us     time of the busiest link, everything else hidden behind it. In ep_rt the levels of a call run
               one after the other, so it takes longer.
Operations are those of bench. Combine sums bfloat16 rows: it is shown with --dtype bf16 or both.

examples:
  python -m ep_rt plan                                          two nodes of eight GPUs
  python -m ep_rt plan --ranks 64 --tokens 4096 --dtype both --routing zipf
  python -m ep_rt plan --ranks 64 --tokens 4096 --routing grouped    a group of experts for each node
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is moved, between which ranks, at which speed."""

    workload: Workload
    num_ranks: int
    ranks_per_node: int
    network_gbps: float
    nvlink_gbps: float


def add_parser(commands: Any) -> None:
    """Add ``plan`` to the subparsers of a program."""
    parser = commands.add_parser(
        "plan",
        help="what must move over network and NVLink, and the time that it takes at least",
        description="What must move over network and NVLink, and the time that it takes at least.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload(parser)
    where = parser.add_argument_group("where")
    where.add_argument("--ranks", type=positive, default=16, metavar="N", help="default: 16")
    where.add_argument("--ranks-per-node", type=positive, default=8, metavar="N", help="default: 8")
    where.add_argument(
        "--network-gbps",
        type=_speed,
        default=50.0,
        metavar="GB/S",
        help="of each rank and direction; default: 50, a card of 400 Gbit/s for each GPU",
    )
    where.add_argument(
        "--nvlink-gbps",
        type=_speed,
        default=450.0,
        metavar="GB/S",
        help="of each rank and direction; default: 450, the 18 links of an H100 or H200",
    )


def options_of(parsed: argparse.Namespace) -> Options:
    """The checked options.

    Raises:
        ConfigError: they do not go together.
    """
    local_experts(parsed.experts, parsed.ranks)
    num_nodes_of(parsed.ranks, parsed.ranks_per_node)
    return Options(
        workload=workload_of(parsed),
        num_ranks=parsed.ranks,
        ranks_per_node=parsed.ranks_per_node,
        network_gbps=parsed.network_gbps,
        nvlink_gbps=parsed.nvlink_gbps,
    )


def main(options: Options) -> int:
    """Print the table; the exit status."""
    for line in report(options):
        say(line, sys.stdout)
    return 0


def report(options: Options) -> Iterator[str]:
    """Its lines, each as soon as it is known."""
    work, size = options.workload, options.ranks_per_node
    yield (
        f"{options.num_ranks} ranks, {size} on a node; network {options.network_gbps:g} GB/s, "
        f"NVLink {options.nvlink_gbps:g} GB/s, of a rank in each direction"
    )
    yield (
        f"hidden {work.hidden}, top-{work.num_topk} of {work.num_experts} experts, {work.routing_text}, "
        f"seed {work.seed}"
    )
    yield ""
    yield f"{'MB of a rank (of the busiest link)':<34}{'two levels':>36}{'one level':>41}"
    columns = f"{'network':>16}{'NVLink':>16}{'floor us':>9}"
    yield f"{'tokens':>6} {'dtype':<6}{'operation':<16}{columns}{columns}"
    for num_tokens in work.tokens:
        drawn = Routing.of(work, options.num_ranks, num_tokens)
        routes = Routes.of(drawn.topk_idx, num_experts=work.num_experts, ranks_per_node=size)
        for name in work.dtypes:
            element = ELEMENTS[name]
            for operation in OPERATIONS:
                if operation not in work.operations_of(name, "cuda"):
                    continue
                row = element.received_row(operation, work.hidden, work.num_topk)
                plans = routes.plan(operation, row), routes.direct(row)
                cells = "".join(_cells(plan, options) for plan in plans)
                yield f"{num_tokens:>6} {name:<6}{operation:<16}{cells}"


def _cells(plan: Plan, options: Options) -> str:
    floor_s = plan.floor_s(network_gbps=options.network_gbps, nvlink_gbps=options.nvlink_gbps)
    return f"{_megabytes(plan.network):>16}{_megabytes(plan.nvlink):>16}{floor_s * 1e6:>9.0f}"


def _megabytes(flow: Flow) -> str:
    digits = 2 if flow.busiest_bytes < 1e8 else 1
    return f"{flow.mean_bytes / 1e6:.{digits}f} ({flow.busiest_bytes / 1e6:.{digits}f})"


def _speed(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value:g} GB/s is not positive")
    return value
