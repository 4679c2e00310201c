"""The command line: ``python -m tests.emulator``, from the root of the repository."""

from __future__ import annotations

import argparse
import multiprocessing
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .build import KERNELS_CU
from .machine import FoundError
from .mutations import MUTATIONS
from .planting import catch, sources_with
from .scenarios import SCENARIOS, Runner, replay


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the names of all scenarios")
    run = commands.add_parser("run", help="seeds of one scenario")
    run.add_argument("name", choices=SCENARIOS)
    run.add_argument("--first", type=int, default=0, help="the first seed")
    run.add_argument("--seeds", type=int, default=100, help="how many")
    run.add_argument("--sources", type=Path, default=KERNELS_CU, help="other sources of the kernels")
    run.add_argument("--keep-going", action="store_true", help="after a seed that finds something")
    night = commands.add_parser("night", help="new seeds of all scenarios, in turn")
    night.add_argument("--minutes", type=float, default=480)
    night.add_argument("--jobs", type=int, default=2)
    night.add_argument("--first", type=int, help="the first seed; default a new one, which is printed")
    figures = commands.add_parser("figures", help="schedules a minute of every scenario")
    figures.add_argument("--seconds", type=float, default=5, help="for each")
    figures.add_argument("names", nargs="*")
    mutations = commands.add_parser("mutations", help="how soon planted bugs are found")
    mutations.add_argument("name", nargs="?", default="", help="a part of the names")
    mutations.add_argument("--tries", type=int, default=5, help="from different seeds")
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        print("\n".join(SCENARIOS))
        return 0
    if chosen.command == "run":
        return _run(chosen.name, chosen.first, chosen.seeds, chosen.sources, chosen.keep_going)
    if chosen.command == "mutations":
        return _mutations(chosen.name, chosen.tries)
    if chosen.command == "figures":
        return _figures(chosen.names or list(SCENARIOS), chosen.seconds)
    return _night(chosen.minutes, chosen.jobs, chosen.first)


def report(name: str, seed: int, failure: FoundError) -> str:
    """What is printed of a seed that found something."""
    return f"{name}, seed {seed}: {failure}\n    replay: {replay(name, seed)}"


def _run(name: str, first: int, num_seeds: int, sources: Path, keeps_going: bool) -> int:
    runner = Runner.of(name, sources=sources)
    began, num_found = time.monotonic(), 0
    for seed in range(first, first + num_seeds):
        try:
            runner.run(seed)
        except FoundError as failure:
            num_found += 1
            print(report(name, seed, failure), flush=True)
            if not keeps_going:
                break
    seconds = time.monotonic() - began
    num_run = seed + 1 - first
    print(
        f"{name}: {num_run} seeds from {first}, {num_found} found something; "
        f"{num_run / seconds:.0f} schedules/s, {runner.steps / num_run:.0f} steps each"
    )
    return int(num_found > 0)


def _figures(names: Sequence[str], seconds: float) -> int:
    """In processor time, so that what else runs on the machine does not count."""
    print("| scenario | schedules a minute and core | steps of each |\n|---|---|---|")
    for name in names:
        runner = Runner.of(name)
        runner.run(0)
        runner.steps, seed, began = 0, 1, time.process_time()
        while time.process_time() < began + seconds:
            runner.run(seed)
            seed += 1
        rate = 60 * (seed - 1) / (time.process_time() - began)
        print(f"| {name} | {rate:,.0f} | {runner.steps / (seed - 1):,.0f} |", flush=True)
    return 0


def _mutations(name: str, num_tries: int) -> int:
    """With the checks of order, and by wrong values, hangs and what else a schedule alone shows."""
    print("| bug | file | scenario | seeds: median, worst | by value alone: median | reported first |")
    print("|---|---|---|---|---|---|")
    for mutation in MUTATIONS:
        if name not in mutation.name:
            continue
        with sources_with(mutation) as sources:
            runner = Runner.of(mutation.scenario, sources=sources)
            firsts = [1_000 * number for number in range(num_tries)]
            limit = 2 * mutation.max_seeds
            found = [catch(runner, limit, first=first) for first in firsts]
            by_value = [catch(runner, 40, first=first, finds_races=False) for first in firsts]
        counts = sorted(each.num_seeds if each else limit + 1 for each in found)
        values = sorted(each.num_seeds if each else 41 for each in by_value)
        median, worst, value = counts[num_tries // 2], counts[-1], values[num_tries // 2]
        seeds = f"> {limit}" if median > limit else f"{median}, {worst}"
        text = f"seed {found[0].seed}: {found[0].found.kind}" if found[0] else mutation.uncaught
        at_value = value if value <= 40 else "> 40"
        print(
            f"| {mutation.name} | {mutation.file} | {mutation.scenario} | {seeds} | {at_value} | {text} |",
            flush=True,
        )
    return 0


def _night(minutes: float, num_jobs: int, first: int | None) -> int:
    first = secrets.randbelow(1 << 40) if first is None else first
    print(f"{num_jobs} jobs for {minutes:g} minutes, seeds from {first}", flush=True)
    until = time.time() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=_night_job, args=(job, num_jobs, first + job * (1 << 32), until))
        for job in range(num_jobs)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    return int(any(job.exitcode for job in jobs))


def _night_job(job: int, num_jobs: int, first: int, until: float) -> None:
    """Every scenario in turn, a fifth of a minute each time."""
    num_run, num_found, seed = 0, 0, first
    while time.time() < until:
        for name in SCENARIOS:
            runner, end = Runner.of(name), min(until, time.time() + 12)
            while time.time() < end:
                try:
                    runner.run(seed)
                except FoundError as failure:
                    num_found += 1
                    print(report(name, seed, failure), flush=True)
                num_run += 1
                seed += 1
        print(f"job {job}: {num_run} schedules, {num_found} found something", flush=True)
    sys.exit(num_found > 0)
