"""The host backend over threads, against the oracle and under misuse."""

from __future__ import annotations

import pytest
from host_cases import check_expert_major, check_low_latency, check_normal, check_worst_case

import ep_rt
from ep_rt import Buffer, Group


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_normal_mode_equals_the_oracle(num_ranks: int) -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host") as buffer:
            for seed in range(12):
                check_normal(buffer, seed)

    ep_rt.run_local(run, num_ranks, timeout_s=20)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_worst_case_capacity_equals_the_oracle(num_ranks: int) -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host") as buffer:
            for seed in range(12):
                check_worst_case(buffer, seed)

    ep_rt.run_local(run, num_ranks, timeout_s=20)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_expert_major_layout_equals_the_oracle(num_ranks: int, is_exact: bool) -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host") as buffer:
            for seed in range(24):
                check_expert_major(buffer, seed, is_exact=is_exact)

    ep_rt.run_local(run, num_ranks, timeout_s=20)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_low_latency_mode_equals_the_oracle(num_ranks: int, hook: bool) -> None:
    def run(group: Group) -> None:
        with Buffer(group, backend="host") as buffer:
            for seed in range(12):
                check_low_latency(buffer, seed, hook=hook)

    ep_rt.run_local(run, num_ranks, timeout_s=20)
