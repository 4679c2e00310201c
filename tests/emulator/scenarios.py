"""What is run from seeds: named scenarios, each a way to draw programs and the conditions they run under.

A seed stands for a program (seed // SCHEDULES) and a schedule of it, so that programs are built once for
several schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np

from ep_rt.cuda import kernels
from ep_rt.cuda.hang import Names, Report, verdict
from ep_rt.cuda.layout import HANG_RECORD, MAX_LOCAL_RANKS
from ep_rt.errors import CollectiveMismatchError, ConfigError, EpError, PeerTimeoutError

from . import cases, low_latency_cases, segmented_cases
from .kernels import Kernels, host_reads
from .machine import TIMEOUT_NS, Conditions, EmulatedKernel, FoundError
from .ranks import Ranks

SCHEDULES: Final = 8
PLACE_BYTES: Final = 32 << 10

Draw = Callable[[np.random.Generator, Ranks], None]


BF16: Final = ("bfloat16",)


def _normal_kernels(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    return load.normal(num_ranks, BF16)


def _all_elements(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    return load.normal(num_ranks, kernels.ELEMENTS)


def _quantizing(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    return [load(host_reads()), load.dispatch(quantizes=True)]


def _segmented_kernels(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    beside = [load.barrier(num_ranks), load(host_reads())]
    return [*beside, load.dispatch(segmented=True), load.combine(*BF16, segmented=True)]


def _quantizing_segmented(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    return [load(host_reads()), load.dispatch(quantizes=True, segmented=True)]


def _expert_major(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    return [*load.normal(num_ranks, BF16), load.expand(), load.collapse(*BF16)]


def _local(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    specs = kernels.dispatch_layout(), kernels.contiguous(), kernels.wire_limit()
    return [load.barrier(num_ranks), *map(load.small, specs)]


def _low_latency_kernels(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    beside = [load.barrier(num_ranks), load(host_reads()), load.dispatch()]
    return [*beside, *map(load.small, kernels.low_latency_specs())]


def _low_latency_over_network(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    barrier = load.barrier(min(num_ranks, MAX_LOCAL_RANKS))
    return [barrier, *map(load.small, kernels.low_latency_specs(over_network=True))]


def _barrier(load: Kernels, num_ranks: int) -> list[EmulatedKernel]:
    return [load.barrier(num_ranks)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Programs of one kind.

    Attributes:
        draw: enqueues a program.
        kernels: that it may launch.
        max_blocks: programs have between one and so many blocks.
        is_small: kernels of few threads; else those of the product.
        epochs: where the slabs' counters start.
        dies: a rank stops, at the start or at a random step; the others must say so.
        mistake: what every rank must say, of programs that are wrong.
        expires: deadlines are so short that they pass here and there.
        max_dead_step: the latest step at which a rank dies.
        dies_midway: the rank without which a program goes on stops at a random step.
        max_grid: blocks of the largest kernel, beside those of the normal mode.
        max_resident: of `Conditions`.
        ranks_per_node: of `Ranks`.
    """

    num_ranks: int
    architecture: int = 900
    draw: Draw
    kernels: Callable[[Kernels, int], list[EmulatedKernel]] = _normal_kernels
    max_blocks: int = 2
    num_data_warps: int = 1
    is_small: bool = True
    epochs: tuple[int, ...] = (0,)
    place_bytes: int = PLACE_BYTES
    checks_uninitialised: bool = False
    dies: bool = False
    mistake: type[EpError] | None = None
    expires: bool = False
    max_dead_step: int = 60_000
    dies_midway: bool = False
    max_grid: int = 0
    max_resident: int = 0
    ranks_per_node: int = 0

    @property
    def is_failing(self) -> bool:
        return self.dies or self.expires or self.mistake is not None


def _normal(num_calls: int, max_tokens: int, elements: Sequence[str] = BF16) -> Draw:
    return partial(cases.draw_normal, num_calls=num_calls, max_tokens=max_tokens, elements=elements)


def _segmented(
    num_ranks: int, num_calls: int, max_tokens: int, *, by_ranks: bool = False, **fields: Any
) -> dict[str, Any]:
    draw = partial(
        segmented_cases.draw_segmented,
        num_calls=num_calls,
        max_tokens=max_tokens,
        elements=BF16,
        by_ranks=by_ranks,
    )
    return {"num_ranks": num_ranks, "draw": draw, "kernels": _segmented_kernels, **fields}


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


def _low_latency(
    num_ranks: int,
    num_rounds: int,
    max_tokens: int,
    *,
    with_masks: bool = False,
    has_dead: bool = False,
    dies_midway: bool = False,
    ranks_per_node: int = 0,
    hiddens: Sequence[int] = (8, 40, 128, 256, 520, 640),
    max_list_blocks: int = 2,
    **fields: Any,
) -> Scenario:
    draw = partial(
        low_latency_cases.draw_low_latency,
        num_rounds=num_rounds,
        max_tokens=max_tokens,
        hiddens=hiddens,
        with_masks=with_masks,
        has_dead=has_dead,
        dies_midway=dies_midway,
        over_network=ranks_per_node > 0,
        max_list_blocks=max_list_blocks,
    )
    return Scenario(
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        draw=draw,
        kernels=_low_latency_over_network if ranks_per_node else _low_latency_kernels,
        dies_midway=dies_midway,
        max_grid=(1 + max_list_blocks) * num_ranks + 7,
        **fields,
    )


# Beyond 2^32 the epochs that words carry begin again.
_NEAR_WRAP: Final = ((1 << 32) - 3, (1 << 32) - 2, (1 << 32) - 1)

_BARRIERS: Final[dict[str, Any]] = {
    "draw": _barriers,
    "kernels": _barrier,
    "max_blocks": 1,
    "checks_uninitialised": True,
}

SCENARIOS: Final[dict[str, Scenario]] = {
    "barrier-r2": Scenario(num_ranks=2, **_BARRIERS),
    "barrier-r8": Scenario(num_ranks=8, **_BARRIERS),
    "barrier-r12": Scenario(num_ranks=12, **_BARRIERS),  # the instance for many ranks
    **_each_path("dispatch-r2", num_ranks=2, draw=_normal(1, 4), max_blocks=1),
    **_each_path("normal-r1", num_ranks=1, draw=_normal(4, 6)),
    **_each_path("normal-r2", num_ranks=2, draw=_normal(4, 6, kernels.ELEMENTS), kernels=_all_elements),
    **_each_path("normal-r3", num_ranks=3, draw=_normal(4, 6)),
    **_each_path("normal-r3-wide", num_ranks=3, draw=_normal(3, 8), num_data_warps=2),
    **_each_path("normal-r8", num_ranks=8, draw=_normal(2, 3), max_blocks=1),
    **_each_path("product-r2", num_ranks=2, draw=_normal(2, 20), max_blocks=1, is_small=False),
    **_each_path("normal-r3-wrap", num_ranks=3, draw=_normal(4, 4), epochs=_NEAR_WRAP),
    **_each_path("long-r2", num_ranks=2, draw=_normal(14, 3), max_blocks=1),
    **_each_path("staged-r2", num_ranks=2, draw=cases.draw_staged),
    **_each_path(
        "quantized-r2",
        num_ranks=2,
        draw=partial(cases.draw_quantized, max_tokens=4),
        kernels=_quantizing,
    ),
    **_each_path("segmented-r1", **_segmented(1, 4, 5)),
    **_each_path("segmented-r2", **_segmented(2, 4, 4)),
    **_each_path("segmented-r3", **_segmented(3, 4, 3, epochs=(0, *_NEAR_WRAP))),
    **_each_path("segmented-r8", **_segmented(8, 2, 2, max_blocks=1)),
    **_each_path("segmented-by-ranks-r2", **_segmented(2, 3, 4, by_ranks=True)),
    **_each_path("segmented-by-ranks-r3", **_segmented(3, 3, 3, by_ranks=True, epochs=(0, *_NEAR_WRAP))),
    **_each_path("segmented-product-r2", **_segmented(2, 2, 8, max_blocks=1, is_small=False)),
    **_each_path(
        "segmented-quantized-r2",
        num_ranks=2,
        draw=partial(segmented_cases.draw_segmented_quantized, max_tokens=3),
        kernels=_quantizing_segmented,
    ),
    **_each_path("without-ids-r3", num_ranks=3, draw=partial(cases.draw_without_ids, max_tokens=6)),
    **_each_path(
        "expert-major-r2",
        num_ranks=2,
        draw=partial(cases.draw_expert_major, max_tokens=5, elements=BF16),
        kernels=_expert_major,
        epochs=(0, *_NEAR_WRAP),
    ),
    **_each_path("local-r2", num_ranks=2, draw=partial(cases.draw_local, max_tokens=40), kernels=_local),
    "low-latency-r1": _low_latency(1, 2, 3),
    "low-latency-r2": _low_latency(2, 3, 3),
    "low-latency-r2-sm80": _low_latency(2, 2, 3, architecture=800),
    # More pairs than a block lists together.
    "low-latency-long-r2": _low_latency(2, 1, 120, hiddens=(8,)),
    "low-latency-crowded-r3": _low_latency(3, 3, 3, max_resident=5),
    "low-latency-r3": _low_latency(3, 2, 3, epochs=(0, *_NEAR_WRAP)),
    "low-latency-r8": _low_latency(8, 1, 2),
    "low-latency-masks-r3": _low_latency(3, 2, 3, with_masks=True),
    "low-latency-masked-r3": _low_latency(3, 2, 2, with_masks=True, has_dead=True),
    "low-latency-dying-r3": _low_latency(
        3, 2, 2, with_masks=True, has_dead=True, dies_midway=True, max_dead_step=120_000
    ),
    "low-latency-dead-r3": _low_latency(3, 2, 3, dies=True),
    "low-latency-expiring-r2": _low_latency(2, 3, 3, expires=True),
    "low-latency-nodes-2x1": _low_latency(2, 3, 3, ranks_per_node=1),
    "low-latency-nodes-2x1-sm80": _low_latency(2, 2, 3, ranks_per_node=1, architecture=800),
    "low-latency-nodes-2x2": _low_latency(4, 2, 3, ranks_per_node=2, epochs=(0, *_NEAR_WRAP)),
    # As many as there are stacks for.
    "low-latency-nodes-12x1": _low_latency(12, 1, 1, ranks_per_node=1, hiddens=(8,), max_list_blocks=1),
    "low-latency-nodes-3x1-long": _low_latency(3, 1, 40, ranks_per_node=1, hiddens=(8,)),
    "low-latency-nodes-1x2": _low_latency(2, 3, 3, ranks_per_node=2),
    "low-latency-nodes-crowded-2x1": _low_latency(2, 3, 3, ranks_per_node=1, max_resident=5),
    "low-latency-nodes-masks-3x1": _low_latency(3, 2, 3, ranks_per_node=1, with_masks=True),
    "low-latency-nodes-masked-3x1": _low_latency(3, 2, 2, ranks_per_node=1, with_masks=True, has_dead=True),
    "low-latency-nodes-dying-3x1": _low_latency(
        3, 2, 2, ranks_per_node=1, with_masks=True, has_dead=True, dies_midway=True, max_dead_step=120_000
    ),
    "low-latency-nodes-engine-2x1": Scenario(
        num_ranks=2,
        ranks_per_node=1,
        draw=partial(low_latency_cases.draw_engine, num_rounds=3, max_tokens=3, over_network=True),
        kernels=_low_latency_over_network,
        max_grid=16,
    ),
    "low-latency-nodes-dead-2x2": _low_latency(4, 2, 3, ranks_per_node=2, dies=True),
    "low-latency-nodes-expiring-2x1": _low_latency(2, 3, 3, ranks_per_node=1, expires=True),
    **{
        f"low-latency-other-{mistake}-r3": Scenario(
            num_ranks=3,
            draw=partial(low_latency_cases.draw_mistaken, mistake=mistake),
            kernels=_low_latency_kernels,
            max_grid=11,
            mistake=CollectiveMismatchError if mistake == "call" else ConfigError,
        )
        for mistake in ("call", "arguments", "rows")
    },
    "low-latency-kept-r2": Scenario(
        num_ranks=2, draw=low_latency_cases.draw_kept, kernels=_low_latency_kernels, max_grid=9
    ),
    **{
        f"low-latency-nodes-other-{mistake}-3x1": Scenario(
            num_ranks=3,
            ranks_per_node=1,
            draw=partial(low_latency_cases.draw_mistaken, mistake=mistake, over_network=True),
            kernels=_low_latency_over_network,
            max_grid=11,
            mistake=CollectiveMismatchError if mistake == "call" else ConfigError,
        )
        for mistake in ("call", "arguments", "rows")
    },
    "low-latency-nodes-kept-2x1": Scenario(
        num_ranks=2,
        ranks_per_node=1,
        draw=partial(low_latency_cases.draw_kept, over_network=True),
        kernels=_low_latency_over_network,
        max_grid=9,
    ),
    "low-latency-engine-r2": Scenario(
        num_ranks=2,
        draw=partial(low_latency_cases.draw_engine, num_rounds=3, max_tokens=3),
        kernels=_low_latency_kernels,
        max_grid=16,
    ),
    **_each_path("dead-r2", num_ranks=2, draw=_normal(3, 4), dies=True),
    **_each_path("dead-r4", num_ranks=4, draw=_normal(2, 4), dies=True, max_dead_step=150_000),
    **_each_path("segmented-dead-r3", **_segmented(3, 3, 3, dies=True)),
    "segmented-by-ranks-dead-r3": Scenario(**_segmented(3, 3, 3, by_ranks=True, dies=True)),
    **_each_path("segmented-expiring-r2", **_segmented(2, 3, 3, expires=True)),
    "other-call-r3": Scenario(
        num_ranks=3,
        draw=partial(cases.draw_mistaken, is_other_call=True),
        mistake=CollectiveMismatchError,
    ),
    "other-arguments-r3": Scenario(
        num_ranks=3, draw=partial(cases.draw_mistaken, is_other_call=False), mistake=ConfigError
    ),
    **_each_path("expiring-r2", num_ranks=2, draw=_normal(3, 4), expires=True),
    **_each_path("expiring-r3", num_ranks=3, draw=_normal(3, 4), expires=True),
    **_each_path(
        "expiring-expert-major-r2",
        num_ranks=2,
        draw=partial(cases.draw_expert_major, max_tokens=5, elements=BF16),
        kernels=_expert_major,
        expires=True,
    ),
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
        load = Kernels(
            scenario.architecture,
            num_data_warps=scenario.num_data_warps,
            is_small=scenario.is_small,
            **kernels,
        )
        return cls(name, load)

    def run(self, seed: int, **changes: Any) -> None:
        """One seed.

        Raises:
            FoundError: it found something.
        """
        ranks = self._program(seed // SCHEDULES)
        scenario = self.scenario
        if scenario.dies:
            rng = np.random.default_rng((seed, 1))
            dead = int(rng.integers(scenario.num_ranks))
            step = int(rng.integers(scenario.max_dead_step)) if rng.integers(3) else 0
            result = ranks.machine.run(seed, dead_rank=dead, dead_step=step, **changes)
            _check_blame(ranks, dead, result.steps)
        elif ranks.dead is not None:
            rng = np.random.default_rng((seed, 1))
            step = int(rng.integers(scenario.max_dead_step)) if scenario.dies_midway else 0
            result = ranks.machine.run(seed, dead_rank=ranks.dead, dead_step=step, **changes)
        else:
            result = ranks.machine.run(seed, **changes)
            if scenario.mistake is not None:
                _check_mistake(ranks, scenario.mistake, result.steps)
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
            scenario.kernels(self.load, scenario.num_ranks),
            num_blocks=int(rng.integers(1, scenario.max_blocks + 1)),
            epoch=int(rng.choice(scenario.epochs)),
            place_bytes=scenario.place_bytes,
            timeout_ns=int(2.0 ** rng.uniform(8, 17)) if scenario.expires else TIMEOUT_NS,
            conditions=Conditions(
                checks_uninitialised=scenario.checks_uninitialised, max_resident=scenario.max_resident
            ),
            is_failing=scenario.is_failing,
            max_grid=scenario.max_grid,
            ranks_per_node=scenario.ranks_per_node,
        )
        scenario.draw(rng, self.ranks)
        return self.ranks


def _check_blame(ranks: Ranks, dead: int, steps: int) -> None:
    """Whoever gave up names the rank that died, and nobody else."""
    for rank in range(ranks.num_ranks):
        if rank == dead:
            continue
        mine = Report.of(0, ranks.hangs[rank].array(HANG_RECORD, (1,)))
        if mine != Report.of(0, ranks.header(rank)["hang"]):
            text = f"rank {rank} tells its host and its peers different things"
            raise FoundError("record", text, steps=steps)
        if mine is None:
            continue
        error = _said_by(ranks, rank, dead)
        if not isinstance(error, PeerTimeoutError) or list(error.peers) != [dead]:
            raise FoundError("record", f"rank {rank} says, with rank {dead} dead: {error}", steps=steps)


def _check_mistake(ranks: Ranks, mistake: type[EpError], steps: int) -> None:
    """Every rank has given up, and all say the same."""
    for rank in range(ranks.num_ranks):
        gave_up = Report.of(0, ranks.header(rank)["hang"]) is not None
        error = _said_by(ranks, rank) if gave_up else None
        if not isinstance(error, mistake):
            raise FoundError("record", f"rank {rank} says {error}, not {mistake.__name__}", steps=steps)
        if ranks.mistaken is not None and not str(error).startswith(f"rank {ranks.mistaken} "):
            raise FoundError("record", f"rank {rank} says {error}, of {ranks.mistaken}", steps=steps)


def _said_by(ranks: Ranks, rank: int, dead: int | None = None) -> EpError:
    """What a rank that gave up raises, as `HangWatch` finds it: it reads the records of its node alone."""
    first = rank // ranks.ranks_per_node * ranks.ranks_per_node
    names = Names(tuple(range(first, first + ranks.ranks_per_node)), ranks.num_ranks)
    farewells, reports = ranks.farewells, []

    def heard(_operation: int) -> list[int]:
        assert farewells is not None
        return farewells(rank)

    for peer in names.local:
        report = None if peer == dead else Report.of(peer - first, ranks.header(peer)["hang"])
        if report is not None and farewells is not None:
            report = names.informed(report, heard, rank=rank - first)
        reports.append(None if report is None else names.of(report))
    return verdict(reports, rank=rank, timeout_s=1.0, num_ranks=ranks.num_ranks)


def replay(name: str, seed: int) -> str:
    """The command that runs one seed again."""
    return f"python -m tests.emulator run {name} --first {seed} --seeds 1"
