"""Where the parts of the expert-major layout lie on a GPU."""

from __future__ import annotations

import pytest

from ep_rt.cuda import expert_major, plan
from ep_rt.cuda.expert_major import PlacesLayout
from ep_rt.cuda.layout import MAX_EXPAND_TOPK, OFFSET_UNIT, ReceivedRow
from ep_rt.errors import ConfigError


@pytest.mark.parametrize(
    ("row_capacity", "num_topk", "num_local_experts"), [(0, 8, 32), (21000, 8, 512), (3, 1, 1)]
)
def test_places_do_not_overlap(row_capacity: int, num_topk: int, num_local_experts: int) -> None:
    at = PlacesLayout.of(row_capacity=row_capacity, num_topk=num_topk, num_local_experts=num_local_experts)
    assert at.num_needed_rows + 8 <= at.psum
    assert at.psum + 4 * num_local_experts <= at.expert_row
    assert at.expert_row + 4 * row_capacity * num_topk == at.end
    assert at.psum % OFFSET_UNIT == at.expert_row % OFFSET_UNIT == 0


def test_a_row_has_no_ids_and_one_weight() -> None:
    received = ReceivedRow(idx_bytes=64, weights_bytes=32, sf_bytes=224, row_bytes=7168)
    row = expert_major.expert_row_bytes(received)
    assert row == ReceivedRow(idx_bytes=0, weights_bytes=4, sf_bytes=224, row_bytes=7168)
    at = row.layout(1000)
    assert at.topk_idx == at.topk_weights == 0
    assert at.sf >= 4000
    bare = ReceivedRow(idx_bytes=8, weights_bytes=0, sf_bytes=0, row_bytes=16)
    assert expert_major.expert_row_bytes(bare).layout(5).x == 0


def test_rows_of_padded_segments() -> None:
    assert plan.aligned([0, 1, 8, 9], 8) == [0, 8, 8, 16]
    assert expert_major.num_expert_rows([0, 8, 8, 16], 8) == 32
    assert expert_major.num_expert_rows([], 8) == 0
    with pytest.raises(ConfigError, match="expert_alignment=2147483647 pads"):
        expert_major.num_expert_rows([2**31 - 1] * 2, 2**31 - 1)
    expert_major.check_columns(MAX_EXPAND_TOPK)
    with pytest.raises(ConfigError, match="at most 64"):
        expert_major.check_columns(65)
