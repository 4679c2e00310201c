"""What is run from seeds: named scenarios, each a way to draw programs and the conditions they run under.

A seed stands for a program (seed // SCHEDULES) and a schedule of it, so that programs are built once for several
schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np

from ep_rt.cuda import kernels
from ep_rt.cuda.hang import Report, verdict
from ep_rt.cuda.layout import HANG_RECORD
from ep_rt.errors import PeerTimeoutError

from . import cases
from .kernels import Kernels
from .machine import TIMEOUT_NS, Conditions, Failure
from .ranks import Ranks

SCHEDULES: Final = 8
PLACE_BYTES: Final = 32 << 10

Draw = Callable[[np.random.Generator, Ranks], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Programs of one kind.

    Attributes:
        draw: enqueues a program.
        needs: the kernels that it may launch.
        max_blocks: programs have between one and so many blocks.
        epochs: where the slabs' counters start.
        dies: a rank stops, at the start or at a random step; the others must say so.
        expires: deadlines are so short that they pass here and there.
        max_dead_step: the latest step at which a rank dies.
    """

    num_ranks: int
    architecture: int = 900
    draw: Draw
    needs: str = "normal"
    max_blocks: int = 2
    num_data_warps: int = 1
    epochs: tuple[int, ...] = (0,)
    place_bytes: int = PLACE_BYTES
    checks_uninitialised: bool = False
    dies: bool = False
    expires: bool = False
    max_dead_step: int = 60_000

    @property
    def is_failing(self) -> bool:
        return self.dies or self.expires


def _normal(num_calls: int, max_tokens: int) -> Draw:
    return partial(cases.draw_normal, num_calls=num_calls, max_tokens=max_tokens)


def _barriers(rng: np.random.Generator, ranks: Ranks) -> None:
    for _ in range(int(rng.integers(1, 5))):
        ranks.barrier()
    ranks.check_epoch()


def _each_path(name: str, **fields: Any) -> dict[str, Scenario]:
    """The scenario on both code paths."""
    return {
        f"{name}-sm{architecture // 10}": Scenario(architecture=architecture, **fields)
        for architecture in (900, 800)
    }


# Beyond 2^32 the epochs that words carry begin again.
_NEAR_WRAP: Final = ((1 << 32) - 3, (1 << 32) - 2, (1 << 32) - 1)

SCENARIOS: Final[dict[str, Scenario]] = {
    "barrier-r2": Scenario(num_ranks=2, draw=_barriers, max_blocks=1, checks_uninitialised=True),
    "barrier-r8": Scenario(num_ranks=8, draw=_barriers, max_blocks=1),
    **_each_path("dispatch-r2", num_ranks=2, draw=_normal(1, 4), max_blocks=1),
    **_each_path("normal-r2", num_ranks=2, draw=_normal(4, 6)),
    **_each_path("normal-r3", num_ranks=3, draw=_normal(4, 6)),
    **_each_path("normal-r3-wide", num_ranks=3, draw=_normal(3, 8), num_data_warps=2),
    **_each_path("normal-r8", num_ranks=8, draw=_normal(2, 3), max_blocks=1),
    **_each_path("normal-r3-wrap", num_ranks=3, draw=_normal(4, 4), epochs=_NEAR_WRAP),
    **_each_path("long-r2", num_ranks=2, draw=_normal(14, 3), max_blocks=1),
    **_each_path("staged-r2", num_ranks=2, draw=cases.draw_staged),
    **_each_path("quantized-r2", num_ranks=2, draw=partial(cases.draw_quantized, max_tokens=4)),
    **_each_path("without-ids-r3", num_ranks=3, draw=partial(cases.draw_without_ids, max_tokens=6)),
    **_each_path(
        "expert-major-r2",
        num_ranks=2,
        draw=partial(cases.draw_expert_major, max_tokens=5),
        needs="expert_major",
        epochs=(0, *_NEAR_WRAP),
    ),
    **_each_path("local-r2", num_ranks=2, draw=partial(cases.draw_local, max_tokens=40), needs="local"),
    **_each_path("dead-r2", num_ranks=2, draw=_normal(3, 4), dies=True),
    **_each_path("dead-r4", num_ranks=4, draw=_normal(2, 4), dies=True, max_dead_step=150_000),
    **_each_path("expiring-r2", num_ranks=2, draw=_normal(3, 4), expires=True),
    **_each_path("expiring-r3", num_ranks=3, draw=_normal(3, 4), expires=True),
}


@dataclass(slots=True)
class Runner:
    """Runs seeds of a scenario. Only the runner that was used last has its program in memory."""

    name: str
    load: Kernels
    scenario: Scenario = field(init=False)
    number: int = -1
    ranks: Ranks | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        self.scenario = SCENARIOS[self.name]

    @classmethod
    def of(cls, name: str, **kernels: Any) -> Runner:
        scenario = SCENARIOS[name]
        load = Kernels(scenario.architecture, num_data_warps=scenario.num_data_warps, **kernels)
        return cls(name, load)

    def run(self, seed: int, **changes: Any) -> None:
        """One seed.

        Raises:
            Failure: it found something.
        """
        ranks = self._program(seed // SCHEDULES)
        scenario = self.scenario
        if scenario.dies:
            rng = np.random.default_rng((seed, 1))
            dead = int(rng.integers(scenario.num_ranks))
            step = int(rng.integers(scenario.max_dead_step)) if rng.integers(3) else 0
            result = ranks.machine.run(seed, dead_rank=dead, dead_step=step, **changes)
            _check_blame(ranks, dead, result.steps)
        else:
            result = ranks.machine.run(seed, **changes)
        self.steps += result.steps

    def _program(self, number: int) -> Ranks:
        if self.ranks is not None and self.number == number:
            return self.ranks
        scenario = self.scenario
        rng = np.random.default_rng(number)
        self.number = number
        self.ranks = Ranks(
            scenario.num_ranks,
            self.load,
            self._kernels(),
            num_blocks=int(rng.integers(1, scenario.max_blocks + 1)),
            epoch=int(rng.choice(scenario.epochs)),
            place_bytes=scenario.place_bytes,
            timeout_ns=int(2.0 ** rng.uniform(8, 17)) if scenario.expires else TIMEOUT_NS,
            conditions=Conditions(checks_uninitialised=scenario.checks_uninitialised),
            is_failing=scenario.is_failing,
        )
        scenario.draw(rng, self.ranks)
        return self.ranks

    def _kernels(self) -> list[Any]:
        num_ranks = self.scenario.num_ranks
        if self.scenario.needs == "expert_major":
            return self.load.expert_major(num_ranks)
        if self.scenario.needs == "local":
            specs = kernels.dispatch_layout(), kernels.contiguous(), kernels.wire_limit()
            return [self.load.barrier(num_ranks), *map(self.load.small, specs)]
        return self.load.normal(num_ranks)


def _check_blame(ranks: Ranks, dead: int, steps: int) -> None:
    """Whoever gave up names the rank that died, and nobody else."""
    reports = []
    for rank in range(ranks.num_ranks):
        record = ranks.header(rank)["hang"]
        reports.append(None if rank == dead else Report.of(rank, record))
    for rank, report in enumerate(reports):
        if report is None:
            continue
        mine = Report.of(rank, ranks.hangs[rank].array(HANG_RECORD, (1,)))
        if mine != report:
            raise Failure("record", f"rank {rank} tells its host and its peers different things", steps=steps)
        error = verdict(reports, rank=rank, timeout_s=1.0)
        if not isinstance(error, PeerTimeoutError) or list(error.peers) != [dead]:
            raise Failure("record", f"rank {rank} says, with rank {dead} dead: {error}", steps=steps)


def found(name: str, seeds: range, **kernels: Any) -> Iterator[tuple[int, Failure]]:
    """The seeds of a scenario that find something."""
    runner = Runner.of(name, **kernels)
    for seed in seeds:
        try:
            runner.run(seed)
        except Failure as failure:
            yield seed, failure


def replay(name: str, seed: int) -> str:
    """The command that runs one seed again."""
    return f"python -m tests.emulator run {name} --first {seed} --seeds 1"
