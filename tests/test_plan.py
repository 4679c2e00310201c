"""How calls are laid over a GPU, and where what is received lies."""

from __future__ import annotations

import pytest

from ep_rt.cuda import kernels, plan
from ep_rt.cuda.kernel_spec import KernelSpec
from ep_rt.cuda.layout import MAX_BLOCKS, OFFSET_UNIT, ReceivedRow
from ep_rt.errors import ConfigError

ROWS = [
    ReceivedRow(idx_bytes=64, weights_bytes=32, sf_bytes=224, row_bytes=7168),
    ReceivedRow(idx_bytes=0, weights_bytes=0, sf_bytes=0, row_bytes=16),
    ReceivedRow(idx_bytes=8, weights_bytes=0, sf_bytes=4, row_bytes=14336),
]


def test_blocks_are_the_sms_asked_for() -> None:
    assert [plan.num_blocks(num_sms, num_device_sms=132, num_sharing=1) for num_sms in (1, 2, 16, 132)] == [
        1,
        2,
        16,
        132,
    ]


def test_ranks_on_one_gpu_divide_its_sms() -> None:
    assert plan.num_blocks(16, num_device_sms=132, num_sharing=8) == 16
    assert plan.num_blocks(24, num_device_sms=132, num_sharing=8) == 16
    assert plan.num_blocks(1, num_device_sms=132, num_sharing=8) == 1


@pytest.mark.parametrize(
    ("num_sms", "num_device_sms", "num_sharing"),
    [(0, 132, 1), (133, 132, 1), (MAX_BLOCKS + 1, 300, 1), (1, 4, 8)],
)
def test_grids_that_cannot_be(num_sms: int, num_device_sms: int, num_sharing: int) -> None:
    with pytest.raises(ConfigError):
        plan.num_blocks(num_sms, num_device_sms=num_device_sms, num_sharing=num_sharing)


def test_slab_sizes() -> None:
    assert plan.slab_bytes(1000) == 1024
    assert plan.slab_bytes(0) == 1 << 30
    assert plan.ModelBytes.of(32, 32, 2, 64).slab == 64 << 20
    alike, wide = plan.ModelBytes.of(14336, 14336, 8, 32768), plan.ModelBytes.of(7168, 14336, 8, 32768)
    for sizes, row_bytes, factor in ((alike, 14336 + 448 + 96, 1), (wide, 7168 + 224 + 96, 2)):
        assert 0 <= sizes.result - 32768 * row_bytes <= 5 * OFFSET_UNIT
        assert sizes.largest == factor * sizes.result
        assert sizes.slab == sizes.result + 2 * sizes.largest


def test_combines_of_two_buffers_find_places() -> None:
    for num_sms in range(1, 133):
        num_blocks = num_sms + plan.num_stagers(num_sms, 1 << 30, max_blocks=132)
        assert num_blocks == max(num_sms, min(4 * num_sms, 66))
    assert plan.num_stagers(16, 3 * plan.COMBINE_STAGES.shared_bytes, max_blocks=132) == 3


@pytest.mark.parametrize("row", ROWS)
def test_what_fits_into_a_place_fits(row: ReceivedRow) -> None:
    for num_bytes in (0, 1, OFFSET_UNIT, 5 * OFFSET_UNIT, 1 << 20, (1 << 30) + 256):
        capacity = row.capacity(num_bytes)
        assert capacity == 0 or row.layout(capacity).end <= num_bytes
        assert row.capacity(row.num_bytes(capacity)) >= capacity


@pytest.mark.parametrize("row", ROWS)
def test_parts_do_not_overlap(row: ReceivedRow) -> None:
    at = row.layout(1001)
    assert at.topk_idx + 1001 * row.idx_bytes <= at.topk_weights
    assert at.topk_weights + 1001 * row.weights_bytes <= at.sf
    assert at.sf + 1001 * row.sf_bytes <= at.x
    assert at.x + 1001 * row.row_bytes <= at.end
    assert all(part % OFFSET_UNIT == 0 for part in (at.topk_weights, at.sf, at.x, at.end))


NORMAL_MODE = [*kernels.normal_mode_specs(), *kernels.two_level_specs()]


@pytest.mark.parametrize("spec", NORMAL_MODE, ids=lambda spec: spec.name)
def test_kernels_fit_into_a_multiprocessor(spec: KernelSpec) -> None:
    # More than any of them has; a dispatch holds positions of tokens and a histogram of the experts.
    static_bytes = (29 if spec.function == "intranode_dispatch" else 6) << 10
    assert spec.shared_bytes + static_bytes <= 227 << 10
    assert spec.shared_bytes_sm80 + static_bytes <= 48 << 10
    assert spec.cfg.num_threads <= 1024
