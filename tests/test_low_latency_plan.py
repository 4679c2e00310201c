"""How low-latency calls are laid over memory and blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ep_rt.cuda import low_latency_plan as plan
from ep_rt.cuda.layout import (
    LOW_LATENCY_AREA,
    MAX_CLEAR_BLOCKS,
    MAX_GRID_BLOCKS,
    MAX_SEND_BLOCKS,
    OFFSET_UNIT,
)
from ep_rt.cuda.low_latency_plan import AreaLayout, AreaShape
from ep_rt.errors import ConfigError

DSV3 = AreaShape(num_ranks=8, num_max_tokens=128, hidden=7168, num_experts=256, num_topk=8)
SHAPES = [
    DSV3,
    replace(DSV3, has_columns=True, num_topk=64),
    replace(DSV3, is_main=False, has_columns=True),
    AreaShape(num_ranks=1, num_max_tokens=1, hidden=8, num_experts=1, num_topk=1),
    AreaShape(num_ranks=3, num_max_tokens=7, hidden=136, num_experts=6, num_topk=5, has_columns=True),
    AreaShape(num_ranks=2, num_max_tokens=1024, hidden=128, num_experts=1024, num_topk=2),
    replace(DSV3, over_network=True),
    replace(DSV3, over_network=True, num_ranks=32),
    AreaShape(num_ranks=3, num_max_tokens=7, hidden=136, num_experts=6, num_topk=5, over_network=True),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_an_area_do_not_overlap_and_are_large_enough(shape: AreaShape) -> None:
    layout = AreaLayout.of(shape)
    end = LOW_LATENCY_AREA.itemsize
    words_bytes = 8 * shape.num_ranks * shape.num_pairs
    num_rows = shape.num_ranks * shape.num_max_tokens
    for zone in layout.dispatch:
        assert end <= zone.ids <= zone.weights <= zone.landed <= zone.rows <= zone.end
        if shape.is_main:
            assert 2 * (zone.weights - zone.ids) >= words_bytes
            assert zone.landed - zone.weights >= words_bytes
            assert zone.end - zone.rows >= 2 * num_rows * shape.hidden
            if shape.hidden % 128 == 0:
                assert zone.sf(shape) >= zone.rows + num_rows * shape.hidden
                assert zone.end - zone.sf(shape) >= 4 * num_rows * shape.scale_words(packed=False)
        assert zone.end <= zone.out_ids <= zone.out_weights <= zone.out_rows <= zone.out_end
        if shape.over_network:
            assert zone.rows - zone.landed >= 2 * 8 * num_rows
            assert 2 * (zone.out_weights - zone.out_ids) >= words_bytes
            assert zone.out_rows - zone.out_weights >= words_bytes
            assert zone.out_end - zone.out_rows >= 2 * shape.num_max_tokens * shape.hidden
            assert zone.out_end - zone.out_sf(shape) >= 4 * shape.num_max_tokens * (shape.hidden // 128)
        end = zone.out_end
    for back in layout.combine:
        assert end <= back.weights <= back.landed <= back.rows <= back.end
        assert back.landed - back.weights >= words_bytes
        slots = shape.num_max_tokens * shape.num_slots
        assert back.end - back.rows >= slots * plan.slot_bytes(shape.hidden)
        assert back.end <= back.out_weights <= back.out_rows <= back.out_end
        if shape.over_network:
            assert back.rows - back.landed >= 8 * num_rows
            assert back.out_rows - back.out_weights >= words_bytes
            assert back.out_end - back.out_rows >= num_rows * plan.slot_bytes(shape.hidden)
        end = back.out_end
    assert layout.num_bytes == end
    for zone in layout.dispatch:
        assert zone.ids % OFFSET_UNIT == zone.weights % OFFSET_UNIT == zone.rows % OFFSET_UNIT == 0


def test_landing_zones_of_a_model_stay_below_64_megabytes() -> None:
    assert AreaLayout.of(DSV3).num_bytes < 64_000_000
    assert AreaLayout.of(DSV3).num_bytes == plan.area_bytes_hint(128, 7168, 8, 256, num_topk=8)
    assert AreaLayout.of(DSV3).num_bytes < plan.area_bytes_hint(128, 7168, 8, 256) < 64_000_000
    by_column = AreaLayout.of(replace(DSV3, is_main=False, has_columns=True)).num_bytes
    both = plan.area_bytes_hint(128, 7168, 8, 256, num_topk=8, with_columns=True)
    assert both == AreaLayout.of(DSV3).num_bytes + by_column


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 32])
@pytest.mark.parametrize(("num_max_tokens", "hidden"), [(1, 128), (128, 7168), (1024, 2048)])
def test_twice_the_hint_has_room_for_the_outbox(num_ranks: int, num_max_tokens: int, hidden: int) -> None:
    sizes = num_max_tokens, hidden, num_ranks, 8 * num_ranks
    assert plan.area_bytes_hint(*sizes, over_network=True) <= 2 * plan.area_bytes_hint(*sizes)


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 12, 32])
def test_the_least_sms_are_what_the_error_says(num_ranks: int) -> None:
    shape, least = replace(DSV3, num_ranks=num_ranks, num_experts=8 * num_ranks), plan.least_sms(num_ranks)
    for more in range(300):
        assert plan.max_send_blocks(shape, max_blocks=least + more) >= 1
    with pytest.raises(ConfigError, match=f"{num_ranks} ranks need {least} SMs .* {least - 1} are there"):
        plan.max_send_blocks(shape, max_blocks=least - 1)
    assert num_ranks + 2 <= least <= num_ranks + num_ranks // 8 + 2


@pytest.mark.parametrize("max_blocks", [9, 16, 33, 66, 78, 132, 256])
def test_all_blocks_of_a_call_fit(max_blocks: int) -> None:
    for shape in (DSV3, replace(DSV3, num_max_tokens=1), replace(DSV3, num_ranks=2)):
        if max_blocks < plan.least_sms(shape.num_ranks):
            continue
        senders = plan.max_send_blocks(shape, max_blocks=max_blocks)
        assert 1 <= senders < MAX_SEND_BLOCKS
        clears = plan.num_clear_blocks(shape, 2, max_blocks=max_blocks)
        assert 1 <= clears <= MAX_CLEAR_BLOCKS
        lists = plan.num_list_blocks(shape, max_blocks=max_blocks)
        copies = plan.num_copy_blocks(shape, senders, max_blocks=max_blocks)
        blocks = plan.dispatch_blocks(shape, shape.num_max_tokens, senders, clears, lists, copies)
        assert blocks[2] <= 2 * max_blocks
        for is_alone in (True, False):
            sizes: Any = {"max_blocks": max_blocks, "is_alone": is_alone}
            most = plan.max_combine_blocks(shape, **sizes)
            assert senders <= most < MAX_SEND_BLOCKS
            for num_tokens in (0, 1, shape.num_max_tokens):
                sums = plan.num_sum_blocks(shape, num_tokens, most, **sizes)
                blocks = plan.combine_blocks(shape, most, sums, sends_weights=True)
                assert 1 <= sums <= 2 * max_blocks - max_blocks // 4  # others find a place
                assert blocks[0] <= 2 * max_blocks
                assert blocks[2] <= (MAX_GRID_BLOCKS if is_alone else 2 * max_blocks)
                assert plan.num_send_blocks(num_tokens * shape.num_pieces, senders) <= senders


def test_a_model_takes_every_sm() -> None:
    assert plan.max_send_blocks(DSV3, max_blocks=132) == 132


def test_a_rank_alone_on_its_gpu_combines_with_more_blocks() -> None:
    shapes = [replace(DSV3, num_max_tokens=each) for each in (1, 8, 32, 128)]
    alone, beside = (
        [plan.max_combine_blocks(each, max_blocks=132, is_alone=is_alone) for each in shapes]
        for is_alone in (True, False)
    )
    assert alone == [28, 132, 132, 224]
    assert beside == [28, 132, 132, 132]


def test_long_lists_are_cleared_by_more_blocks() -> None:
    longer = replace(DSV3, num_max_tokens=1024)
    sizes = [(DSV3, 1), (DSV3, 2), (longer, 2)]
    assert [plan.num_clear_blocks(*each, max_blocks=132) for each in sizes] == [4, 8, 16]


def test_long_lists_are_made_by_more_blocks() -> None:
    shapes = [
        replace(DSV3, num_max_tokens=8),
        DSV3,
        replace(DSV3, num_max_tokens=1024),
        replace(DSV3, num_max_tokens=1024, num_ranks=2),
        replace(DSV3, num_ranks=32),
    ]
    assert [plan.num_list_blocks(each, max_blocks=132) for each in shapes] == [1, 4, 4, 8, 1]


def test_too_few_sms_for_all_ranks() -> None:
    with pytest.raises(ConfigError, match="need 10 SMs"):
        plan.max_send_blocks(DSV3, max_blocks=8)
