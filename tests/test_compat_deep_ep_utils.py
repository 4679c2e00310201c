"""DeepEP's helpers for tests and benchmarks: beside NumPy, between processes, and what is timed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ep_rt

torch: Any = pytest.importorskip("torch")

from ep_rt.compat import deep_ep  # noqa: E402  # whose functions import torch
from ep_rt.compat.deep_ep.utils import envs, gate, math, refs, testing  # noqa: E402

ROOT = Path(__file__).parents[1]
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
F32 = np.float32


def bits(tensor: Any) -> Any:
    """The elements of a tensor as a NumPy array, of bytes where NumPy has no such dtype."""
    return (
        tensor.view(torch.uint8).numpy() if tensor.element_size() == 1 else tensor.view(torch.int16).numpy()
    )


def random_bf16(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> tuple[Any, Any]:
    """Values as a tensor, and as float32 in NumPy."""
    values = (np.random.default_rng(seed).standard_normal(shape) * scale).astype(BF16)
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16), values.astype(F32)


# Modules.


def test_importing_needs_no_torch_and_either_name_keeps_the_same_seeds() -> None:
    program = (
        "import sys\n"
        "from ep_rt.compat import deep_ep as here\n"
        "sys.modules['deep_ep'] = here\n"
        "import deep_ep.utils.gate, deep_ep.utils.math, deep_ep.utils.refs, deep_ep.utils.testing\n"
        "import deep_ep.utils.envs\n"
        "one, two = (sys.modules[name + '.utils.envs'] for name in ('deep_ep', 'ep_rt.compat.deep_ep'))\n"
        "assert one is not two and one.Launched is two.Launched\n"
        "one.Launched.global_seed, two.Launched.local_seed = 5, 6\n"
        "assert (two.get_global_seed(), one.get_local_seed()) == (5, 6)\n"
        "assert deep_ep.utils.refs.get_global_seed() == 5\n"
        "print(sorted({'torch', 'cupy', 'mpi4py'} & set(sys.modules)))\n"
    )
    environ = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [envs, gate, math, refs, testing])
def test_every_public_function_explains_itself(module: Any) -> None:
    own = {name: member for name, member in vars(module).items() if not name.startswith("_")}
    functions = [each for each in own.values() if getattr(each, "__module__", "") == module.__name__]
    assert functions
    assert all(each.__doc__ for each in functions)


# Numbers.


def test_numbers() -> None:
    assert [math.ceil_div(x, 4) for x in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert [math.align(x, 128) for x in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert (math.safe_div(3, 4), math.safe_div(0, 0), math.safe_div(0, 5)) == (0.75, 0, 0)
    with pytest.raises(ZeroDivisionError):
        math.safe_div(1, 0)
    one, two = torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(7, dtype=torch.int64)
    assert math.count_bytes(one, None, (two, [one, None])) == 30 + 56 + 30
    assert math.count_bytes(None) == 0


def test_differences() -> None:
    assert math.calc_diff(torch.tensor([0.0]), torch.tensor([2.0])) == pytest.approx(0.4, abs=0)
    assert math.calc_diff(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -3.0])) == 0.0
    assert math.calc_diff(torch.tensor([0.0]), torch.tensor([-2.0])) == 2.0
    assert math.calc_diff(torch.zeros(0, 8), torch.zeros(0, 8)) == 0.0
    x, in_numpy = random_bf16((9, 33))
    y, other = random_bf16((9, 33), seed=1)
    a, b = in_numpy.astype(np.float64) + 1, other.astype(np.float64) + 1
    expected = 1 - 2 * (a * b).sum() / (a * a + b * b).sum()
    assert math.calc_diff(x, y) == pytest.approx(expected, rel=1e-12)
    # Small differences stay, where one minus a quotient would lose them.
    assert math.calc_diff(torch.tensor([1.0]), torch.tensor([1.0 + 2**-30]).double()) == 0.0
    near = torch.tensor([1.0 + 2**-30], dtype=torch.float64)
    assert math.calc_diff(torch.ones(1), near) == pytest.approx(2.0**-63, rel=1e-6)


# Casts.


def expected_fp8(x: Any) -> tuple[Any, Any]:
    """Bytes and scale factors of the cast, block by block in NumPy."""
    rows, columns = x.shape
    cast = np.zeros((rows, columns), np.uint8)
    factors = np.zeros((rows, -(-columns // 128)), F32)
    for row, block in np.ndindex(factors.shape):
        part = x[row, 128 * block : 128 * (block + 1)]
        amax = max(F32(1e-4), np.abs(part).max())
        factors[row, block] = amax * (F32(1) / F32(448))
        cast[row, 128 * block : 128 * (block + 1)] = (part * (F32(448) / amax)).astype(FP8).view(np.uint8)
    return cast, factors


@pytest.mark.parametrize("hidden", [128, 200, 384, 7])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
def test_the_cast_to_fp8_equals_numpy_and_comes_back_within_its_bound(hidden: int, scale: float) -> None:
    x, in_numpy = random_bf16((6, hidden), seed=hidden, scale=scale)
    x[3], in_numpy[3] = 0, 0
    x_fp8, factors = math.per_token_cast_to_fp8(x)
    cast, expected = expected_fp8(in_numpy)
    assert (x_fp8.dtype, factors.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert x_fp8.is_contiguous()
    np.testing.assert_array_equal(bits(x_fp8), cast)
    np.testing.assert_array_equal(factors.numpy(), expected)
    back = math.per_token_cast_back(x_fp8, factors)
    wide = np.repeat(factors.numpy(), 128, axis=1)[:, :hidden]
    np.testing.assert_array_equal(bits(back), (cast.view(FP8).astype(F32) * wide).astype(BF16).view(np.int16))
    # Three bits behind the leading one, down to 2**-6; steps of 2**-9 below; then eight bits for bfloat16.
    bound = np.maximum(np.abs(in_numpy) * 2**-4, wide * 2**-10) + np.abs(in_numpy) * 2**-7
    assert (np.abs(back.float().numpy() - in_numpy) <= bound).all()


def test_casts_of_what_fp8_holds_are_exact_also_strided_and_of_nothing() -> None:
    x = torch.tensor([448.0, -1.75, 0.0, 2.0**-6, -240.0]).repeat(52)[:256].view(1, 256)
    wide = torch.stack([x, -x], dim=2).expand(3, 256, 2)[:, :, 1]
    x_fp8, factors = math.per_token_cast_to_fp8(wide)
    assert torch.equal(factors, torch.ones(3, 2))
    assert torch.equal(x_fp8.float(), wide)
    assert torch.equal(math.per_token_cast_back(x_fp8, factors.T.contiguous().T).float(), wide)
    none, no_factors = math.per_token_cast_to_fp8(torch.zeros(0, 200, dtype=torch.bfloat16))
    assert (none.shape, no_factors.shape) == ((0, 200), (0, 2))
    back = math.per_token_cast_back(none, no_factors)
    assert (back.shape, back.dtype) == ((0, 200), torch.bfloat16)
    with pytest.raises(ep_rt.ArrayError, match=r"x is \[2, 2, 128\]; expected two dimensions"):
        math.per_token_cast_to_fp8(torch.zeros(2, 2, 128))
    with pytest.raises(ep_rt.ArrayError, match="2 scale factors are needed for each of 3 rows"):
        math.per_token_cast_back(x_fp8, torch.ones(3, 1))


def test_exponents_of_four_blocks_lie_in_one_word() -> None:
    exponents = np.array([[127, 120, 130, 0, 128, 99, 99, 99], [1, 254, 127, 64, 3, 99, 99, 99]], np.uint8)
    x_fp8 = torch.tensor([1.0, -1.5] * 320).to(torch.float8_e4m3fn).expand(2, 640).contiguous()
    words = torch.from_numpy(exponents.view(np.int32))
    back = math.per_token_cast_back(x_fp8, words).float().numpy().reshape(2, 5, 128)
    factors = np.where(exponents == 0, 0.0, 2.0 ** (exponents.astype(int) - 127))[:, :5]
    np.testing.assert_array_equal(back[..., 0], factors.astype(F32))
    np.testing.assert_array_equal(back[..., 1], (factors * -1.5).astype(F32))


def test_rows_of_low_latency_calls_come_back() -> None:
    buffer = deep_ep.Buffer(ep_rt.groups.thread_groups(1)[0], low_latency_mode=True, backend="host")
    x, _ = random_bf16((5, 640))
    ids = torch.zeros(5, 1, dtype=torch.int64)
    for use_ue8m0 in (False, True):
        (recv_x, factors), *_ = buffer.low_latency_dispatch(
            x, ids, 5, 1, round_scale=use_ue8m0, use_ue8m0=use_ue8m0
        )
        back = math.per_token_cast_back(recv_x[0], factors[0].contiguous())
        assert math.calc_diff(back, x) < 1e-3
        if not use_ue8m0:
            assert torch.equal(
                recv_x[0].view(torch.uint8), math.per_token_cast_to_fp8(x)[0].view(torch.uint8)
            )
    buffer.destroy()


# Hashes, sets.


def test_hashes_count_words_in_any_order() -> None:
    x, _ = random_bf16((7, 34))
    words = bits(x).reshape(-1).view(np.int32)
    assert math.hash_tensor(x) == int(words.sum(dtype=np.int64))
    assert math.hash_tensor(x) == math.hash_tensor(x.flip(0)) == math.hash_tensor(x.T.contiguous().T)
    changed = x.clone()
    changed.view(torch.int16)[3, 5] ^= 1
    assert math.hash_tensor(changed) != math.hash_tensor(x)
    swapped = x[:, [1, 0, *range(2, 34)]]  # the halves of a word are not alike
    assert math.hash_tensor(swapped) != math.hash_tensor(x)
    assert math.hash_tensor(torch.tensor([True, False, True])) == 2
    assert math.hash_tensor(torch.tensor([[200, 100, 7]], dtype=torch.uint8)) == 307
    assert math.hash_tensor(torch.zeros(0, 4)) == 0
    y = torch.arange(5)
    assert math.hash_tensors(x, None, [y, (None,)]) == math.hash_tensor(x) ^ math.hash_tensor(y)
    assert math.hash_tensors(x, (x,)) == math.hash_tensors() == 0


@pytest.mark.parametrize(("num_slots", "num_columns"), [(3, 6), (6, 3), (1, 4)])
def test_each_number_once(num_slots: int, num_columns: int) -> None:
    x = torch.from_numpy(np.random.default_rng(num_slots).integers(-2, num_slots, (50, num_columns)))
    expected = []
    for row in x.tolist():
        numbers = sorted({number for number in row if number >= 0}, reverse=True)
        expected.append(numbers + [-1] * (num_columns - len(numbers)))
    kept = x.data_ptr()
    math.inplace_unique(x, num_slots)
    assert x.tolist() == expected
    assert x.data_ptr() == kept
    with pytest.raises(ep_rt.ArrayError, match=f"num_slots={num_slots}"):
        math.inplace_unique(x + num_slots + 1, num_slots)
    math.inplace_unique(x[:0], num_slots)


def test_scores_of_the_chosen_groups_alone() -> None:
    scores = torch.arange(1.0, 25.0).view(2, 12)
    grouped = math.create_grouped_scores(scores, torch.tensor([[0, 2], [3, 3]]), 4)
    assert grouped[0].tolist() == [1, 2, 3, 0, 0, 0, 7, 8, 9, 0, 0, 0]
    assert grouped[1].tolist() == [0] * 9 + [22, 23, 24]
    assert scores.min() == 1


# Gates.


def tokens_per_rank(scores: Any, num_topk: int, num_ranks: int) -> Any:
    """How many tokens each rank receives, counted in NumPy."""
    ids = np.argsort(-scores.numpy(), axis=1)[:, :num_topk] // (scores.shape[1] // num_ranks)
    return np.array([(ids == rank).any(axis=1).sum() for rank in range(num_ranks)])


@pytest.mark.parametrize(("num_ranks", "num_local_experts"), [(2, 16), (8, 8), (9, 2)])
def test_a_precise_ratio_is_met(num_ranks: int, num_local_experts: int) -> None:
    torch.manual_seed(1)
    num_tokens, num_experts = 1000, num_ranks * num_local_experts
    for num_topk, ratio in product((1, 2, 6), (1.0, 2.0, 3.5)):
        most = min(num_topk, num_ranks, int((num_ranks - 1) / ratio) + 1)
        sizes = num_tokens, num_experts, num_ranks, num_topk, ratio
        if most * num_local_experts < num_topk:
            with pytest.raises(ep_rt.ConfigError, match="leaves at most"):
                gate.get_unbalanced_scores(*sizes, precise=True)
            continue
        scores = gate.get_unbalanced_scores(*sizes, precise=True)
        assert (scores.shape, scores.dtype) == ((num_tokens, num_experts), torch.float32)
        assert scores.min() >= 0
        first, *others = tokens_per_rank(scores, num_topk, num_ranks)
        assert max(others) - min(others) <= 1
        assert abs(first - ratio * np.mean(others)) <= ratio


def test_a_ratio_is_met_on_average() -> None:
    torch.manual_seed(2)
    for ratio in (1.0, 2.0, 4.0):
        scores = gate.get_unbalanced_scores(4000, 64, 8, 6, ratio, precise=False)
        first, *others = tokens_per_rank(scores, 6, 8)
        # Rank 0 has a token in 500 of 1000 cases or more, so two draws of 4000 differ by some hundredths.
        assert first / np.mean(others) == pytest.approx(ratio, rel=0.12)
    assert gate.map_unbalanced_ratio_to_factor(100, 8, 1, 2, 3.0) == 1.0
    assert gate.get_unbalanced_scores(1, 8, 8, 2, 2.0, precise=True).shape == (1, 8)
    assert gate.get_unbalanced_scores(5, 8, 1, 2, 1.0, precise=True).shape == (5, 8)
    for wrong in ((5, 9, 2, 2, 1.0), (5, 8, 2, 9, 1.0), (5, 8, 2, 2, 0.5)):
        with pytest.raises(ep_rt.ConfigError):
            gate.get_unbalanced_scores(*wrong, precise=True)


# Times.


class Clock:
    """In place of the host's clock: calls take as long as they say."""

    def __init__(self) -> None:
        self.now, self.calls = 100.0, 0

    def call(self) -> None:
        self.calls += 1
        self.now += self.calls

    def pause(self) -> None:
        self.now += 1000


def test_calls_are_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    # Calls 1 to 3 warm up, 4 does not count, 5 to 8 do.
    assert testing.bench(clock.call, 3, 5, clock.pause) == (6.5, 5.0, 8.0)
    assert clock.calls == 8
    testing.flush_l2_cache()
    with pytest.raises(ep_rt.ConfigError, match="num_tests=1"):
        testing.bench(clock.call, num_tests=1)


def test_calls_that_wait_take_as_long() -> None:
    mean, shortest, longest = testing.bench(lambda: time.sleep(3e-3), num_warmups=1, num_tests=5)
    assert 3e-3 <= shortest <= mean <= longest < 3


def traced(path: Path, name: str) -> list[float]:
    """Seconds of each event of this name, in the profiler's own file."""
    events = [each for each in json.loads(path.read_text())["traceEvents"] if each.get("name") == name]
    return [each["dur"] * 1e-6 for each in sorted(events, key=lambda each: each["ts"])]


def test_operators_are_timed_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(100, 100)
    num_calls = 0

    def call() -> None:
        nonlocal num_calls
        num_calls += 1
        for _ in range(2):
            with torch.profiler.record_function("one part"):
                torch.mm(x, x)

    trace = tmp_path / "trace.json"
    with caplog.at_level(logging.WARNING, "ep_rt"):
        mm, absent = testing.bench_kineto(call, ("aten::mm", "no_such"), 4, trace_path=str(trace))
    assert num_calls == 1 + 4 + 4
    assert absent == 0.0
    assert "'no_such'" in caplog.text
    assert "aten::mm" in caplog.text
    events = traced(trace, "aten::mm")
    assert len(events) == 2 * 4
    assert mm == pytest.approx(np.mean(events), rel=1e-3)

    pair = testing.bench_kineto(call, "one part", 3, trace_path=str(trace), num_kernels_per_period=2)
    events = traced(trace, "one part")
    assert len(events) == 2 * 3
    assert pair == pytest.approx([np.mean(events[0::2]), np.mean(events[1::2])], rel=1e-3)
    with pytest.raises(ep_rt.ConfigError, match=r"launched 6 times.*num_kernels_per_period=4"):
        testing.bench_kineto(call, "aten::mm", 3, num_kernels_per_period=4)
    with pytest.raises(ep_rt.ConfigError, match=r"'aten::' is part of the names of .*aten::mm"):
        testing.bench_kineto(call, "aten::", 1)
    assert testing.bench_kineto(call, ("no_such",), 1, num_kernels_per_period=2) == [[0.0, 0.0]]
    for wrong in (["aten::mm"], (1,)):
        with pytest.raises(ep_rt.ConfigError, match="neither a string nor a tuple"):
            testing.bench_kineto(call, wrong)  # type: ignore[arg-type]
    with pytest.raises(ep_rt.ConfigError, match="num_tests=0"):
        testing.bench_kineto(call, "aten::mm", 0)


def test_ranks_meet_before_each_call_unless_the_environment_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: order.append("reduce"))

    def call() -> Any:
        order.append("call")
        return torch.ones(3) + 1

    def bench(barrier: Any = None) -> Any:
        order.clear()
        return testing.bench_kineto(call, "aten::add", 2, barrier_comm_profiling=True, barrier=barrier)

    assert bench(lambda: order.append("barrier")) > 0
    assert order == ["call", *["barrier", "call"] * 4]
    bench()
    assert order == ["call", *["reduce", "call"] * 4]
    monkeypatch.setenv("EP_DISABLE_BARRIER_PROFILING", "1")
    bench()
    assert order == ["call"] * 5
    monkeypatch.setenv("EP_USE_NVIDIA_TOOLS", "1")
    assert bench() == 1.0
    assert order == []
    both = testing.bench_kineto(call, ("a", "b"), num_kernels_per_period=2)
    assert both == [[1.0, 1.0], [1.0, 1.0]]


def test_output_is_silenced_meanwhile(capfd: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        print("of python")
        os.write(1, b"of a library\n")
        os.write(2, b"an error of a library\n")
        _ = torch.ones(3) + 1

    assert testing.bench_kineto(call, "aten::add", 1, suppress_kineto_output=True) > 0
    once = capfd.readouterr()  # the call before the profiler
    assert (once.out.count("of python"), once.out.count("of a library")) == (1, 1)
    assert once.err.count("an error") == 1
    print("back", flush=True)
    os.write(2, b"back, too\n")
    after = capfd.readouterr()
    assert (after.out, after.err) == ("back\n", "back, too\n")


# Links.


@contextlib.contextmanager
def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Iterator[None]:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    envs.get_nvlink_gbs.cache_clear()
    yield
    envs.get_nvlink_gbs.cache_clear()


def test_the_links_of_the_first_gpu_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "GPU 0: H (UUID: GPU-1)\\n\\t Link 0: 26.5 GB/s\\n\\t Link 11: 25 GB/s\\n\\t Link 2: <inactive>\\n"
    )
    with nvidia_smi(tmp_path, monkeypatch, f"printf '{lines}{lines.replace('GPU 0', 'GPU 1')}'"):
        assert envs.get_nvlink_gbs() == pytest.approx(0.9 * 51.5)
        assert envs.get_nvlink_gbs(factor=1) == 51.5
    for script in ("exit 6", "echo none"):
        with nvidia_smi(tmp_path, monkeypatch, script):
            assert envs.get_nvlink_gbs() == 0.0


# References.


@pytest.mark.parametrize(("by_rank", "by_node"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_sums_are_rounded_where_they_are_passed_on(by_rank: bool, by_node: bool, num_biases: int) -> None:
    num_tokens, num_topk, hidden, num_nodes, num_local_ranks, num_experts = 20, 6, 5, 2, 3, 24
    y, in_numpy = random_bf16((num_tokens, num_topk, hidden), seed=num_biases)
    ids = np.random.default_rng(num_biases).integers(-1, num_experts, (num_tokens, num_topk))
    in_numpy[ids < 0], y[torch.from_numpy(ids < 0)] = 0, 0
    made = [random_bf16((num_tokens, hidden), seed=10 + each) for each in range(num_biases)]
    bias = (None, made[0][0] if made else None, tuple(each for each, _ in made))[num_biases]

    def rounded(sums: Any) -> Any:
        return sums.astype(BF16).astype(F32)

    def grouped(terms: list[tuple[int, Any]], size: int) -> list[tuple[int, Any]]:
        """Sums of what has the same quotient, in the order of the quotients."""
        sums = {
            expert // size: np.zeros(hidden, F32) for expert, _ in sorted(terms, key=lambda each: each[0])
        }
        for expert, term in terms:
            sums[expert // size] += term
        return [(group * size, rounded(total)) for group, total in sums.items()]

    expected = np.zeros((num_tokens, hidden), F32)
    for token in range(num_tokens):
        terms = list(zip(ids[token].tolist(), in_numpy[token], strict=True))
        terms = grouped(terms, num_experts // num_nodes // num_local_ranks) if by_rank else terms
        terms = grouped(terms, num_experts // num_nodes) if by_node else terms
        for _, term in terms:
            expected[token] += term
        for _, values in made:
            expected[token] += values[token]
    got = refs.combine(
        y, torch.from_numpy(ids), num_nodes, num_local_ranks, num_experts, bias, by_rank, by_node
    )
    assert got.dtype == torch.bfloat16
    np.testing.assert_array_equal(got.float().numpy(), rounded(expected))
    with pytest.raises(ep_rt.ConfigError, match="needs reduce_in_local"):
        refs.combine(y, torch.from_numpy(ids), 1, 1, num_experts, None, False, True)


# Ranks.


def test_lines_need_ranks() -> None:
    with pytest.raises(ep_rt.ConfigError, match="dist_print needs init_dist"):
        envs.dist_print("nobody")


PROGRAM = """
import multiprocessing, os, random, sys

from ep_rt.compat import deep_ep
sys.modules["deep_ep"] = deep_ep

import deep_ep
import compat_cases
from deep_ep.utils import refs
from deep_ep.utils.envs import *
from deep_ep.utils.testing import bench

def rank_of(local_rank, num_local_ranks):
    rank, num_ranks, group = init_dist(local_rank, num_local_ranks, seed=7)
    import torch, torch.distributed as dist
    assert (rank, num_ranks) == (int(os.environ["RANK"]) * num_local_ranks + local_rank, 4)
    assert (group.rank(), group.size(), dist.get_backend()) == (rank, num_ranks, "gloo")
    assert torch.get_default_dtype() == torch.bfloat16 and torch.get_default_device().type == "cpu"
    assert (get_global_seed(), get_local_seed(), torch.initial_seed()) == (7, 7 + rank, 7 + rank)
    assert random.random() == random.Random(7 + rank).random()
    drawn = torch.rand(5)
    init_seed(7)
    assert torch.equal(torch.rand(5), drawn)
    dist_print(f"rank {rank}")
    dist_print(f"node of {rank}", once_in_node=True)
    assert get_physical_domain_size(group) == get_logical_domain_size(group) == (2, 2)
    assert deep_ep.get_logical_domain_size(group, allow_hybrid_mode=False) == (1, 4)

    mean, shortest, longest = bench(lambda: dist.all_reduce(torch.ones(8)), 2, 4)
    assert 0 < shortest <= mean <= longest

    buffer = deep_ep.ElasticBuffer(group, 1 << 21, explicitly_destroy=True)
    for use_fp8, num_biases in ((False, 2), (True, 1), (False, 0)):
        compat_cases.check_elastic_refs(buffer, use_fp8=use_fp8, num_biases=num_biases)
    if rank == 0:
        try:  # before anything is sent
            refs.dispatch(torch.ones(2, 4), torch.zeros(1, 1, dtype=torch.int64), None, 2, 4)
        except TypeError as error:
            assert "arrays of" in str(error)
        else:
            raise AssertionError("no error")
    buffer.destroy()
    dist.destroy_process_group()
    print("passed", flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_of, args=(each, 2), daemon=True) for each in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    sys.exit(max(abs(each.exitcode) for each in ranks))
"""


def test_ranks_of_two_nodes_as_deep_ep_starts_them(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        EP_RT_BACKEND="host",
        EP_RT_RANKS_PER_NODE="2",
        CUDA_VISIBLE_DEVICES="",
    )
    nodes = [
        subprocess.Popen(
            [sys.executable, str(program)],
            env=dict(environ, RANK=str(node)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for node in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=60)[0] for node in nodes]
    finally:
        for node in nodes:  # with the ranks that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    said = [line for output in outputs for line in output.splitlines()]
    assert sum(output.count("passed") for output in outputs) == 4
    assert {line for line in said if line.startswith("rank ")} == {f"rank {rank}" for rank in range(4)}
    assert {line for line in said if line.startswith("node ")} == {"node of 0", "node of 2"}


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ep_rt.ConfigError, match="num_local_ranks=8; this node has 4 GPUs"):
        envs.init_dist(0, 8)
    assert not torch.distributed.is_initialized()
