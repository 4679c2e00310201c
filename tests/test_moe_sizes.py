"""What follows from the model of a buffer: checks, and memory."""

from __future__ import annotations

import random

import pytest

from ep_rt.cuda import plan
from ep_rt.cuda.low_latency_plan import area_bytes_hint
from ep_rt.cuda.pool import Lease, Pool
from ep_rt.errors import ArrayError, ConfigError, EpError
from ep_rt.moe_sizes import MoeSizes, remote_sizes, slab_bytes, spare_bytes

NUM_RANKS = 8
MOE = MoeSizes(num_max_tokens_per_rank=128, hidden=7168, num_experts=256, num_topk=8, dtype="bfloat16")
OF_MODEL = plan.ModelBytes.of(14336, 14336, 8, NUM_RANKS * 128).slab


def zones_bytes(*, over_network: bool) -> int:
    return area_bytes_hint(
        128, 7168, NUM_RANKS, 256, 8, with_columns=not over_network, over_network=over_network
    )


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ({"hidden": 0}, ConfigError),
        ({"num_topk": 0}, ConfigError),
        ({"num_max_tokens_per_rank": 0}, ConfigError),
        ({"num_experts": 255}, ConfigError),
        ({"dtype": "float64"}, ArrayError),
    ],
)
def test_a_model_is_checked(sizes: dict[str, int | str], error: type[EpError]) -> None:
    MOE.check(NUM_RANKS)
    fields = {name: getattr(MOE, name) for name in MoeSizes.__dataclass_fields__}
    with pytest.raises(error):
        MoeSizes(**{**fields, **sizes}).check(NUM_RANKS)


@pytest.mark.parametrize(
    ("moe", "num_nvl_bytes", "num_rdma_bytes", "low_latency_mode", "expected"),
    [
        (None, 0, 0, False, 1 << 30),
        (None, 0, 0, True, 1 << 30),
        (None, 5 << 20, 0, False, 5 << 20),
        (None, 5 << 20, 3 << 20, True, 8 << 20),
        (None, 0, 3 << 20, True, 3 << 20),  # all of it for low-latency calls
        (MOE, 0, 0, False, OF_MODEL),
        (MOE, 5 << 20, 0, False, 5 << 20),
        (MOE, 0, 3 << 20, True, OF_MODEL + (3 << 20)),
        (MOE, 0, 0, True, OF_MODEL + plan.rounded(zones_bytes(over_network=False))),
    ],
)
def test_slab(
    moe: MoeSizes | None, num_nvl_bytes: int, num_rdma_bytes: int, low_latency_mode: bool, expected: int
) -> None:
    num_bytes = slab_bytes(moe, NUM_RANKS, num_nvl_bytes, num_rdma_bytes, low_latency_mode=low_latency_mode)
    assert num_bytes == expected


def test_room_that_is_kept_free() -> None:
    assert spare_bytes(None, NUM_RANKS, 0) == spare_bytes(MOE, NUM_RANKS, 5 << 20) == 0
    assert spare_bytes(MOE, NUM_RANKS, 0) == plan.ModelBytes.of(14336, 14336, 8, 1024).result
    narrow = MoeSizes(128, 7168, 256, 8, "float8_e4m3fn")
    assert spare_bytes(narrow, NUM_RANKS, 0) == 2 * plan.ModelBytes.of(7168, 14336, 8, 1024).result


@pytest.mark.parametrize("seed", range(20))
def test_calls_of_a_model_find_room_whatever_is_held(seed: int) -> None:
    """Results and outputs that leave less than is to be kept free go elsewhere; what comes next fits."""
    rng = random.Random(seed)
    sizes, spare = plan.ModelBytes.of(14336, 14336, 8, NUM_RANKS * 128), spare_bytes(MOE, NUM_RANKS, 0)
    pool = Pool(slab_bytes(MOE, NUM_RANKS, 0, 0, low_latency_mode=False))
    held: list[Lease] = []
    for _ in range(300):
        num_bytes = rng.randint(1, sizes.largest if rng.random() < 0.5 else sizes.largest // 8)
        lease = pool.take(num_bytes, spare)
        if lease is not None:
            held.append(lease)
        del lease
        assert pool.largest_free() >= spare
        if held and rng.random() < 0.6:
            del held[rng.randrange(len(held))]


@pytest.mark.parametrize(
    ("moe", "num_rdma_bytes", "low_latency_mode", "rings_bytes", "low_latency_bytes"),
    [
        (None, 0, False, 0, 256 << 20),
        (None, 3 << 20, False, 3 << 20, 6 << 20),
        (None, 3 << 20, True, 0, 6 << 20),  # the usual rings beside what lands and what goes out
        (MOE, 0, True, 0, zones_bytes(over_network=True)),
        (MOE, 3 << 20, True, 0, 6 << 20),
    ],
)
def test_over_the_network(
    moe: MoeSizes | None,
    num_rdma_bytes: int,
    low_latency_mode: bool,
    rings_bytes: int,
    low_latency_bytes: int,
) -> None:
    sizes = remote_sizes(moe, NUM_RANKS, num_rdma_bytes, low_latency_mode=low_latency_mode)
    assert (sizes.rings_bytes, sizes.low_latency_bytes) == (rings_bytes, low_latency_bytes)
    assert sizes.max_tokens == (plan.DEFAULT_NETWORK_TOKENS if moe is None else 128)


@pytest.mark.parametrize(("dtype", "row_bytes"), [("uint8", 14336), ("bfloat16", 14336), ("float32", 28672)])
def test_answers_to_fp8_rows_may_be_bfloat16(dtype: str, row_bytes: int) -> None:
    moe = MoeSizes(128, 7168, 256, 8, dtype)
    sizes = remote_sizes(moe, NUM_RANKS, 0, low_latency_mode=False)
    assert sizes.max_record_bytes == plan.record_bytes(row_bytes, 8)
