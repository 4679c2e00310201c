"""How the examples start: flags they share, and one function that runs on every rank."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable

import ep_rt


def example_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every example has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help="run N ranks as threads of this process (default: the ranks that mpiexec started, or one)",
    )
    parser.add_argument("--backend", choices=("auto", "host", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def launch(parser: argparse.ArgumentParser, run: Callable[[ep_rt.Group, argparse.Namespace], object]) -> None:
    """Call ``run(group, options)`` on every rank. What is wrong with the options is said once, by rank 0."""
    group = ep_rt.as_group(None)  # the processes of mpiexec; a single rank without it
    unheard = io.StringIO()
    with contextlib.ExitStack() as stack:
        if group.rank > 0:
            stack.enter_context(contextlib.redirect_stdout(unheard))
            stack.enter_context(contextlib.redirect_stderr(unheard))
        options = parser.parse_args()
        if options.ranks and group.size > 1:
            parser.error(f"--ranks starts threads, but mpiexec started {group.size} processes already")
        if not options.ranks and group.size == 1:
            print("one rank only; more with --ranks 4, or mpiexec -n 4 before python", file=sys.stderr)
    try:
        if options.ranks:
            ep_rt.run_local(run, options.ranks, options)
        else:
            run(group, options)
    except (ep_rt.ConfigError, ep_rt.ArrayError, ep_rt.BackendError) as error:
        sys.exit(f"error: {error}" if group.rank == 0 else 1)
