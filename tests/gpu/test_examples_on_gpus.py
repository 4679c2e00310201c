"""The examples on the GPUs that are here, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import IS_UNDER_MPI, device_count

pytest.importorskip("matplotlib", reason="the examples need ep-rt[examples]")
pytest.importorskip("tqdm", reason="the examples need ep-rt[examples]")

ROOT = Path(__file__).parents[2]
NUM_SHARING = 4
FIRST_GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
SMALL_LAYER = "--tokens=200 --decode-tokens=16 --hidden=512 --ffn=64 --num-experts=16 --rounds=2"
SMALL_MODEL = "--steps=30 --batch=130 --context=8 --embedding=8 --hidden=32 --ffn=32 --sample=20"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_UNDER_MPI, reason="starts ranks of its own"),
    pytest.mark.skipif(device_count() == 0, reason="no GPU"),
]
# On one GPU only, "gpus" has a single rank.
on_every_place = pytest.mark.parametrize("place", ["virtual", "gpus"])


def run(place: str, script: str, *args: str) -> str:
    """What an example prints, with threads that share one GPU or with one rank for each GPU."""
    num_ranks = NUM_SHARING if place == "virtual" else next(n for n in (8, 4, 2, 1) if n <= device_count())
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    if place == "virtual":
        environ["CUDA_VISIBLE_DEVICES"] = FIRST_GPU
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), f"--ranks={num_ranks}", "--backend=cuda", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env=environ,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def require(framework: str) -> None:
    """Skip where a framework is not installed, or without CUDA. Asked elsewhere: JAX would take memory."""
    question = {
        "cupy": "import cupy",
        "torch": "import torch; assert torch.cuda.is_available()",
        "jax": "import jax; assert jax.default_backend() == 'gpu'",
    }[framework]
    environ = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if subprocess.run([sys.executable, "-c", question], capture_output=True, env=environ).returncode:
        pytest.skip(f"{framework} without CUDA")


@on_every_place
@pytest.mark.parametrize("framework", ["cupy", "torch", "jax"])
def test_moe_layer(place: str, framework: str) -> None:
    require(framework)
    if (place, framework) == ("virtual", "jax"):
        pytest.skip("JAX needs a GPU for each rank")
    printed = run(place, "moe_layer.py", *SMALL_LAYER.split(), f"--framework={framework}")
    assert f"cuda backend, {framework} arrays" in printed
    assert "check passed" in printed


@on_every_place
def test_train_moe(place: str, tmp_path: Path) -> None:
    args = ("--framework=cupy",) if place == "gpus" else ()
    printed = run(place, "train_moe.py", *SMALL_MODEL.split(), *args, "--plot", str(tmp_path / "loss.png"))
    assert "on cuda: 100%" in printed
    assert "loss fell" in printed
    assert "equality check passed" in printed or "1 rank, " in printed


@on_every_place
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_decode_overlap(place: str, framework: str) -> None:
    require(framework)
    sizes = "--tokens=16 --hidden=512 --num-experts=16 --rounds=5"
    printed = run(place, "decode_overlap.py", *sizes.split(), f"--framework={framework}")
    assert f"cuda backend, {framework} arrays" in printed
    assert "all as without hooks" in printed


def test_overlap(tmp_path: Path) -> None:
    plot = tmp_path / "overlap.png"
    args = "--tokens=512 --hidden=1024 --num-experts=16 --columns=512 --rounds=5 --sms 2 8"
    printed = run("gpus", "overlap.py", *args.split(), "--plot", str(plot))
    assert "check passed" in printed
    rows = [line.split() for line in printed.splitlines() if line.strip().endswith("%")]
    assert [row[0] for row in rows] == ["2", "8"]
    assert all(float(milliseconds) > 0 for row in rows for milliseconds in (row[1], *row[3:7]))
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ("adapt_vllm.py", "check passed"),
        ("adapt_sglang.py", "check passed"),
        ("adapt_megatron.py", "equality check passed"),
        ("torch_moe.py", "equality check passed"),
    ],
)
def test_processes_in_torch(script: str, verdict: str) -> None:
    require("torch")
    if device_count() < 2:
        pytest.skip("needs two GPUs")
    num_ranks = next(n for n in (8, 4, 2) if n <= device_count())
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / script), "--backend=cuda"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout
    assert verdict in done.stdout
