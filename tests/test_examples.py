"""The examples, run as a user runs them, and whether their own checks would notice a fault."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import ep_rt

pytest.importorskip("matplotlib", reason="the examples need ep-rt[examples]")
pytest.importorskip("tqdm", reason="the examples need ep-rt[examples]")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# tests/gpu has them on GPUs, which they would use here too where there are some.
SMALL_LAYER = "--backend=host --tokens=40 --decode-tokens=8 --hidden=64 --ffn=32 --num-experts=8"
SMALL_MODEL = (
    "--backend=host --steps=40 --batch=130 --context=8 --embedding=8 --hidden=32 --ffn=32 --sample=20"
)
SMALL_TORCH = "--backend=host --steps=40 --batch=60 --hidden=16 --ffn=16"
SMALL_ADAPTERS = "--backend=host --tokens=20 --hidden=128 --ffn=32 --num-experts=8 --topk=3"
SMALL_OVERLAP = "--backend=host --tokens=32 --hidden=64 --num-experts=16 --columns=32"

RunExample = Callable[..., "tuple[int, str]"]


@pytest.fixture(params=["threads", "mpi"])
def run_on_4_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RunExample:
    """``run(script, *args)`` gives the exit code and everything that was printed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if request.param == "threads":
        return lambda script, *args: run_alone(script, "--ranks", "4", *args)
    mpirun = request.getfixturevalue("mpirun")

    def run(script: str, *args: str) -> tuple[int, str]:
        done = mpirun(4, EXAMPLES / script, *args)
        return done.returncode, done.stdout

    return run


def run_alone(script: str, *args: str) -> tuple[int, str]:
    return run_python(str(EXAMPLES / script), *args)


def run_python(*args: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """``example(name)`` imports one."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


# two_nodes.py


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_two_nodes(run_on_4_ranks: RunExample, ranks_per_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", str(ranks_per_node))
    code, printed = run_on_4_ranks("two_nodes.py", "--tokens", "50", "--hidden", "64")
    assert code == 0, printed
    lines = printed.rstrip().splitlines()
    assert f"4 ranks on {4 // ranks_per_node} nodes" in lines[-6]
    assert lines[-1] == "check passed: every token came back right"
    for rank, line in enumerate(lines[-5:-1]):
        numbers = [int(word) for word in re.findall(r"\d+", line)]
        assert numbers[:2] == [rank, rank // ranks_per_node]
        crossing, rows = numbers[2:]
        assert crossing <= rows <= crossing * ranks_per_node
        assert (rows > 0) == (ranks_per_node < 4)


# moe_layer.py


def test_moe_layer(run_on_4_ranks: RunExample) -> None:
    code, printed = run_on_4_ranks("moe_layer.py", *SMALL_LAYER.split())
    assert code == 0, printed
    assert printed.rstrip().splitlines()[-1].startswith("check passed: max error 0.")
    assert printed.count("check passed") == 1
    normal, low_latency = tables(printed)
    to_rank = [f"to {rank}" for rank in range(4)]
    for rank in range(4):
        arrived = [row[to_rank[rank]] for row in normal]
        assert normal[rank]["received"] == sum(arrived)
        assert normal[rank]["logical MiB"] == pytest.approx(sum(arrived) * 64 * 2 / 2**20, abs=0.005)
        assert normal[rank]["wire MiB"] == pytest.approx(
            (sum(arrived) - arrived[rank]) * 64 * 2 / 2**20, abs=0.005
        )
    # In low-latency mode a token has a row for each of its top-4 experts.
    assert sum(row["received"] for row in low_latency) == 4 * 8 * 4


def tables(printed: str) -> list[list[dict[str, float]]]:
    """The tables of moe_layer.py, of each rank a row: number by column."""
    found: list[list[dict[str, float]]] = []
    columns: list[str] = []
    for line in printed.splitlines():
        cells = line.strip().split("  ")
        cells = [cell.strip() for cell in cells if cell.strip()]
        if cells[:1] == ["rank"]:
            columns = cells
            found.append([])
        elif columns and len(cells) == len(columns):
            found[-1].append(dict(zip(columns, map(float, cells), strict=True)))
    return found


def test_moe_layer_on_one_rank() -> None:
    code, printed = run_alone("moe_layer.py", *SMALL_LAYER.split(), "--seed", "3")
    assert code == 0, printed
    assert "one rank only" in printed
    assert "check passed" in printed


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_moe_layer_in_other_frameworks(framework: str) -> None:
    pytest.importorskip(framework)
    code, printed = run_alone("moe_layer.py", *SMALL_LAYER.split(), "--ranks", "2", "--framework", framework)
    assert code == 0, printed
    assert f"host backend, {framework} arrays" in printed
    assert "check passed" in printed


@pytest.mark.parametrize("seed", range(5))
def test_moe_layer_notices_a_wrong_row(
    example: Callable[[str], Any], seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    moe_layer = example("moe_layer")
    args = f"--tokens=40 --hidden=64 --ffn=32 --num-experts=4 --topk=2 --seed={seed}"
    options = moe_layer.parser().parse_args(args.split())
    lib = moe_layer.Library()

    def run(group: ep_rt.Group) -> list[Any]:
        with ep_rt.Buffer.for_moe(
            group, num_max_tokens_per_rank=40, hidden=64, num_experts=4, num_topk=2, backend="host"
        ) as buffer:
            tokens = moe_layer.random_tokens(options, group.rank)
            experts = [moe_layer.random_expert(options, 2 * group.rank + e) for e in range(2)]
            return group.allgather(
                (tokens, {"normal": moe_layer.normal_layer(buffer, lib, tokens, experts, 1)})
            )

    everyone = ep_rt.run_local(run, 2)[0]
    assert moe_layer.report(everyone, options)
    y = everyone[1][1]["normal"].y
    for wrong in (y[5, 7] * 1.05, np.nan):
        y[5, 7] = wrong
        assert not moe_layer.report(everyone, options)
    assert "check FAILED" in capsys.readouterr().out


# train_moe.py


def test_train_moe(run_on_4_ranks: RunExample, tmp_path: Path) -> None:
    plot = tmp_path / "loss.png"
    code, printed = run_on_4_ranks("train_moe.py", *SMALL_MODEL.split(), "--plot", str(plot))
    assert code == 0, printed
    assert "loss fell: first 4." in printed
    assert "equality check passed: 4 ranks and 1 rank differ by at most" in printed
    assert printed.count("equality check") == 1
    for label in ("4 ranks, numpy on host: 100%", "1 rank, numpy on host: 100%"):
        assert label in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_train_moe_with_top_1_and_no_comparison(tmp_path: Path) -> None:
    args = ("--ranks", "2", "--topk", "1", "--no-compare", "--plot", str(tmp_path / "loss.png"))
    code, printed = run_alone("train_moe.py", *SMALL_MODEL.split(), *args)
    assert code == 0, printed
    assert "loss fell" in printed
    assert "equality check" not in printed


def test_train_moe_in_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    args = ("--ranks", "2", "--framework", "torch", "--plot", str(tmp_path / "loss.png"))
    code, printed = run_alone("train_moe.py", *SMALL_MODEL.split(), *args)
    assert code == 0, printed
    assert "2 ranks, torch on host: 100%" in printed
    assert "loss fell" in printed
    assert "equality check passed" in printed


def test_train_moe_says_when_the_loss_does_not_fall(tmp_path: Path) -> None:
    args = ("--ranks", "2", "--steps", "10", "--learning-rate", "0", "--plot", str(tmp_path / "loss.png"))
    code, printed = run_alone("train_moe.py", *SMALL_MODEL.split(), *args)
    assert code == 1
    assert "loss DID NOT FALL" in printed
    assert "equality check passed" in printed


def test_equality_check_notices_a_lost_token(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_moe = example("train_moe")
    options = train_moe.parser().parse_args([*SMALL_MODEL.split(), "--steps=3"])
    text = train_moe.Text("the quick brown fox jumps over the lazy dog. " * 20)

    def train(num_ranks: int) -> Any:
        return ep_rt.run_local(train_moe.train, num_ranks, options, text)[0]

    alone = train(1)
    assert train_moe.is_equal(train(2), alone, "2 ranks")
    backward = train_moe.MoeBlock.backward

    def forgetful(self: Any, grad_y: Any, saved: Any) -> Any:
        grad_y[:1] = 0
        return backward(self, grad_y, saved)

    monkeypatch.setattr(train_moe.MoeBlock, "backward", forgetful)
    assert not train_moe.is_equal(train(2), alone, "2 ranks")
    assert "equality check FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("topk", [1, 2])
def test_gradients_are_those_of_the_loss(example: Callable[[str], Any], num_ranks: int, topk: int) -> None:
    """The slope of the loss along random directions in each parameter, by central differences."""
    train_moe = example("train_moe")
    args = f"--context=3 --embedding=8 --hidden=16 --ffn=24 --topk={topk}"
    options = train_moe.parser().parse_args(args.split())
    num_tokens, vocabulary_size, num_directions, step = 30, 11, 4, 1e-3
    rng = np.random.default_rng(5)
    contexts = rng.integers(vocabulary_size, size=(num_tokens, 3))
    targets = rng.integers(vocabulary_size, size=num_tokens)
    whole = train_moe.initial_parameters(options, vocabulary_size)
    whole["b_in"] += rng.normal(size=whole["b_in"].shape)
    directions = {name: rng.standard_normal((num_directions, *value.shape)) for name, value in whole.items()}

    def run(group: ep_rt.Group) -> dict[str, list[tuple[float, float]]]:
        def own(name: str, value: Any) -> Any:
            is_sharded = name in train_moe.EXPERT_PARAMETERS
            return np.split(value, group.size)[group.rank].copy() if is_sharded else value.copy()

        p = {name: own(name, value) for name, value in whole.items()}
        # Unequal shares, and rank 0 of several has none.
        mine = np.split(np.arange(num_tokens), [0, 17, 20][: group.size - 1])[group.rank]
        with ep_rt.Buffer.for_moe(
            group,
            num_max_tokens_per_rank=30,
            hidden=16,
            num_experts=8,
            num_topk=topk,
            dtype="float32",
            backend="host",
        ) as buffer:
            model = train_moe.CharacterModel(buffer, train_moe.Library(), p, topk)

            def loss_and_gradients() -> tuple[float, Any]:
                loss, g = model.loss_and_gradients(contexts[mine], targets[mine], num_tokens)
                return sum(group.allgather(loss)), g

            _, g = loss_and_gradients()
            slopes: dict[str, list[tuple[float, float]]] = {name: [] for name in p}
            for name, original in {name: value.copy() for name, value in p.items()}.items():
                for direction in directions[name]:
                    unit = own(name, direction / np.linalg.norm(direction))
                    losses = []
                    for sign in (+1, -1):
                        p[name][...] = original + sign * step * unit
                        losses.append(loss_and_gradients()[0])
                    p[name][...] = original
                    analytical = sum(group.allgather(float((g[name] * unit).sum())))
                    slopes[name].append(((losses[0] - losses[1]) / (2 * step), analytical))
        return slopes

    for slopes in ep_rt.run_local(run, num_ranks):
        for name, pairs in slopes.items():
            numerical, analytical = np.array(pairs).T
            # One expert alone has the weight 1, whatever its score.
            assert (np.abs(analytical).max() < 1e-3) == (name == "w_gate" and topk == 1), name
            # The payload's rounding to float32 leaves noise of about 1e-8 / step.
            np.testing.assert_allclose(numerical, analytical, rtol=1e-3, atol=2e-5, err_msg=name)


# torch_moe.py


def test_torch_moe(run_on_4_ranks: RunExample) -> None:
    pytest.importorskip("torch")
    code, printed = run_on_4_ranks("torch_moe.py", *SMALL_TORCH.split())
    assert code == 0, printed
    check_torch_moe(printed, "4 ranks")


def check_torch_moe(printed: str, label: str) -> None:
    assert f"{label}, cpu, step 0: loss 1." in printed
    assert "loss fell: first 1." in printed
    assert f"equality check passed: {label} and 1 rank differ by at most" in printed
    assert printed.count("equality check") == 1


def test_torch_moe_under_torchrun() -> None:
    code, printed = run_under_torchrun("torch_moe.py", *SMALL_TORCH.split(), "--topk", "1")
    assert code == 0, printed
    check_torch_moe(printed, "2 ranks")
    code, printed = run_under_torchrun("torch_moe.py", "--ranks", "2")
    assert code != 0
    assert printed.count("torchrun started 2 processes already") == 1, printed


def run_under_torchrun(script: str, *args: str) -> tuple[int, str]:
    pytest.importorskip("torch.distributed.run")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return run_python(*launcher, str(EXAMPLES / script), *args)


def test_torch_moe_compiled() -> None:
    pytest.importorskip("torch")
    args = ("--ranks", "2", "--compile", "aot_eager")
    code, printed = run_alone("torch_moe.py", *SMALL_TORCH.split(), *args)
    assert code == 0, printed
    check_torch_moe(printed, "2 ranks")


def test_torch_moe_notices_a_wrong_gradient(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    torch_moe = example("torch_moe")
    options = torch_moe.parser().parse_args([*SMALL_TORCH.split(), "--steps=3"])

    def train(num_ranks: int) -> Any:
        return ep_rt.run_local(torch_moe.train, num_ranks, options)[0]

    alone = train(1)
    assert torch_moe.is_equal(train(2), alone, "2 ranks")
    combine = torch_moe.ep_rt.torch.combine

    def forgetful(rows: Any, *args: Any) -> Any:
        is_kept = torch.arange(len(rows))[:, None] > 0
        return combine(torch.where(is_kept, rows, rows.detach()), *args)

    monkeypatch.setattr(torch_moe.ep_rt.torch, "combine", forgetful)
    assert not torch_moe.is_equal(train(2), alone, "2 ranks")
    assert "equality check FAILED" in capsys.readouterr().out


# jax_moe.py


def test_jax_moe(run_on_4_ranks: RunExample) -> None:
    pytest.importorskip("jax")
    code, printed = run_on_4_ranks("jax_moe.py", *SMALL_TORCH.split())
    assert code == 0, printed
    assert "4 ranks, host, step 0: loss 1." in printed
    assert "loss fell: first 1." in printed
    assert "equality check passed: 4 ranks and 1 rank differ by at most" in printed
    assert printed.count("equality check") == 1


def test_jax_moe_notices_a_wrong_gradient(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jax = pytest.importorskip("jax")
    jax_moe = example("jax_moe")
    options = jax_moe.parser().parse_args([*SMALL_TORCH.split(), "--steps=3"])

    def train(num_ranks: int) -> Any:
        return ep_rt.run_local(jax_moe.train, num_ranks, options)[0]

    alone = train(1)
    assert jax_moe.is_equal(train(2), alone, "2 ranks")
    combine = jax_moe.ep_rt.jax.combine

    def forgetful(rows: Any, *args: Any) -> Any:
        return combine(rows.at[0].set(jax.lax.stop_gradient(rows[0])), *args)

    monkeypatch.setattr(jax_moe.ep_rt.jax, "combine", forgetful)
    assert not jax_moe.is_equal(train(2), alone, "2 ranks")
    assert "equality check FAILED" in capsys.readouterr().out


# adapt_vllm.py, adapt_sglang.py, adapt_megatron.py

ADAPTERS = pytest.mark.parametrize(("script", "num_ways"), [("adapt_vllm.py", 8), ("adapt_sglang.py", 12)])


@ADAPTERS
def test_adapters(run_on_4_ranks: RunExample, script: str, num_ways: int) -> None:
    pytest.importorskip("torch")
    code, printed = run_on_4_ranks(script, *SMALL_ADAPTERS.split())
    assert code == 0, printed
    assert printed.count("of what rounding to bfloat16 allows") == num_ways
    assert printed.count("check passed: 4 ranks against one dense layer") == 1


@ADAPTERS
def test_adapters_under_torchrun(script: str, num_ways: int) -> None:
    code, printed = run_under_torchrun(script, *SMALL_ADAPTERS.split(), "--tokens=1")
    assert code == 0, printed
    assert printed.count("of what rounding to bfloat16 allows") == num_ways
    assert printed.count("check passed: 2 ranks against one dense layer") == 1


@pytest.mark.parametrize("module", ["adapt_vllm", "adapt_sglang"])
def test_adapters_notice_a_wrong_row(
    example: Callable[[str], Any], module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    adapter, adapter_layer = example(module), example("adapter_layer")
    options = adapter_layer.parser(None).parse_args(SMALL_ADAPTERS.split())

    def run(group: ep_rt.Group) -> Any:
        with adapter_layer.rank_of(group, options) as rank:
            return adapter.layers(rank, options)

    everyone = ep_rt.run_local(run, 2)
    assert adapter_layer.report(everyone, options)
    for name, output in everyone[1].items():
        kept, output.y[5, 7] = output.y[5, 7].copy(), np.nan
        assert not adapter_layer.report(everyone, options), name
        output.y[5, 7] = kept
    assert "check FAILED" in capsys.readouterr().out


def test_adapt_megatron(run_on_4_ranks: RunExample) -> None:
    pytest.importorskip("torch")
    code, printed = run_on_4_ranks("adapt_megatron.py", *SMALL_TORCH.split())
    assert code == 0, printed
    check_torch_moe(printed, "4 ranks")


def test_adapt_megatron_under_torchrun() -> None:
    code, printed = run_under_torchrun("adapt_megatron.py", *SMALL_TORCH.split(), "--topk", "1")
    assert code == 0, printed
    check_torch_moe(printed, "2 ranks")


def test_adapt_megatron_notices_a_wrong_gradient(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of weights, which travel beside the rows."""
    pytest.importorskip("torch")
    adapter = example("adapt_megatron")
    options = example("torch_moe").parser().parse_args([*SMALL_TORCH.split(), "--steps=3"])
    [dense] = ep_rt.run_local(adapter.train_dense, 1, options)
    assert adapter.is_equal(ep_rt.run_local(adapter.train, 2, options)[0], dense, "2 ranks")
    permuted = adapter.EpRtManager.get_permuted_hidden_states_by_experts

    def forgetful(self: Any, rows: Any) -> Any:
        rows, weights = permuted(self, rows)
        return rows, weights.detach()

    monkeypatch.setattr(adapter.EpRtManager, "get_permuted_hidden_states_by_experts", forgetful)
    assert not adapter.is_equal(ep_rt.run_local(adapter.train, 2, options)[0], dense, "2 ranks")
    assert "equality check FAILED" in capsys.readouterr().out


# decode_overlap.py


def test_decode_overlap_without_gpus(run_on_4_ranks: RunExample) -> None:
    arguments = "--backend=host --tokens=5 --hidden=128 --num-experts=8 --topk=2 --rounds=3"
    code, printed = run_on_4_ranks("decode_overlap.py", *arguments.split())
    assert code == 0, printed
    assert printed.count("all as without hooks") == 1


# overlap.py


def test_overlap_without_gpus(run_on_4_ranks: RunExample) -> None:
    code, printed = run_on_4_ranks("overlap.py", *SMALL_OVERLAP.split())
    assert code == 0, printed
    assert printed.count("check passed") == 1
    assert printed.count("nothing to overlap") == 1


def test_overlap_notices_a_wrong_product(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overlap = example("overlap")
    options = overlap.parser().parse_args(SMALL_OVERLAP.split())
    product = overlap.Layer.product
    monkeypatch.setattr(overlap.Layer, "product", lambda self: product(self) * 1.1)
    with pytest.raises(SystemExit):
        ep_rt.run_local(overlap.main, 2, options)
    assert "check FAILED" in capsys.readouterr().out


def test_overlap_is_a_share_of_the_shorter(example: Callable[[str], Any]) -> None:
    times = example("overlap").Times(16, dispatch=2.0, product=1.0, in_turn=3.2, untold=3.1, together=2.7)
    assert times.overlap == pytest.approx(0.5)


# Which GPU a rank gets


@pytest.mark.parametrize(
    ("ranks", "gpus"),
    [
        # Threads of one process, as many as GPUs, and more.
        ([("a", 1, "xy")] * 2, "xy"),
        ([("a", 1, "xy")] * 5, "xyxyx"),
        # Processes, on two nodes; then each is shown one GPU.
        ([("a", 1, "xy"), ("b", 1, "xy"), ("a", 2, "xy"), ("b", 2, "xy")], "xxyy"),
        ([("a", 1, "x"), ("a", 2, "y")], "xy"),
    ],
)
def test_gpu_follows_from_the_local_rank(
    example: Callable[[str], Any], ranks: list[tuple[str, int, str]], gpus: str
) -> None:
    visible = [(node, pid, list(addresses)) for node, pid, addresses in ranks]
    homes, obstacle = example("launch").assign_gpus(visible, "cupy")
    assert obstacle is None
    assert homes == [(rank[0], gpu) for rank, gpu in zip(ranks, gpus, strict=True)]


def test_gpus_that_cannot_be_shared(example: Callable[[str], Any]) -> None:
    assign = example("launch").assign_gpus
    _, obstacle = assign([("a", 1, ["x"]), ("a", 2, ["x"])], "cupy")
    assert "more processes than GPUs" in obstacle
    _, obstacle = assign([("a", 1, ["x"])] * 2, "jax")
    assert "every rank needs a GPU of its own" in obstacle


# What a user may get wrong


@pytest.mark.parametrize(
    ("script", "args", "complaint"),
    [
        ("moe_layer.py", ("--num-experts", "6"), "num_experts=6 is not a positive multiple of num_ranks=4"),
        ("moe_layer.py", ("--hidden", "30"), "pad hidden so that a row is a multiple of 16 bytes"),
        ("moe_layer.py", ("--tokens", "0"), "argument --tokens: 0 is not positive"),
        ("train_moe.py", ("--topk", "2", "--num-experts", "1"), "--topk 2 of --num-experts 1 is impossible"),
        ("torch_moe.py", ("--topk", "2", "--num-experts", "1"), "--topk 2 of --num-experts 1 is impossible"),
        ("jax_moe.py", ("--topk", "2", "--num-experts", "1"), "--topk 2 of --num-experts 1 is impossible"),
        ("moe_layer.py", ("--backend=cuda", "--framework=numpy"), "numpy has no arrays for --backend cuda"),
        ("overlap.py", ("--backend=host", "--framework=cupy"), "cupy has no arrays for --backend host"),
    ],
)
def test_wrong_options_are_explained_once(
    run_on_4_ranks: RunExample, script: str, args: tuple[str, ...], complaint: str
) -> None:
    if script.startswith(("torch", "jax")):
        pytest.importorskip(script.partition("_")[0])
    code, printed = run_on_4_ranks(script, *args)
    assert code in (1, 2)
    assert printed.count(complaint) == 1, printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("run_on_4_ranks", ["mpi"], indirect=True)
def test_threads_within_mpi_are_refused(run_on_4_ranks: RunExample) -> None:
    code, printed = run_on_4_ranks("moe_layer.py", "--ranks", "2")
    assert code == 2
    assert printed.count("mpiexec started 4 processes already") == 1
