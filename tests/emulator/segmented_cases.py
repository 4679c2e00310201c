"""Random programs of the level within a node, of the normal mode over several nodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import ml_dtypes
import numpy as np

from ep_rt import reference
from ep_rt.arrays import np_dtype
from ep_rt.cuda.kernels import ELEMENTS

from . import normal
from .cases import DTYPES, Routing, random_bits, random_values, repeat
from .machine import Array
from .ranks import Ranks
from .segments import SegmentList, node_masks, over_lists, segment_lists


class Nodes:
    """Routing of all ranks of several nodes, and the part of one of them in it.

    Ids that do not exist, which the oracle refuses, are -1 in `valid`, and stay what they are in `ids`.
    """

    def __init__(self, rng: np.random.Generator, ranks: Ranks, *, max_tokens: int) -> None:
        num_nodes = (
            int(rng.integers(2, 4)) if rng.integers(8) else int(rng.choice([1, 5, 32 // ranks.num_ranks]))
        )
        if num_nodes > 5:
            max_tokens = 1
        self.num_ranks = num_nodes * ranks.num_ranks
        self.routing = Routing.draw(rng, self.num_ranks, max_tokens=max_tokens, max_topk=4)
        self.num_experts = self.routing.num_experts
        self.valid, self.ids = self.routing.ids, [ids.copy() for ids in self.routing.ids]
        if rng.integers(2):
            for ids in self.ids:
                lies = rng.random(ids.shape) < 0.2
                beyond = (self.num_experts, -2, np.iinfo(ids.dtype).max, np.iinfo(ids.dtype).min)
                ids[lies] = rng.choice(np.array(beyond, ids.dtype), int(lies.sum()))
            self.valid = [np.where((ids < 0) | (ids >= self.num_experts), -1, ids) for ids in self.ids]
        in_rank = [
            reference.dispatch_layout(
                ids, num_experts=self.num_experts, num_ranks=self.num_ranks
            ).is_token_in_rank
            for ids in self.valid
        ]
        self.lists = segment_lists(
            in_rank,
            node=int(rng.integers(num_nodes)),
            num_local_ranks=ranks.num_ranks,
            slack=int(rng.integers(4)),
        )
        self.num_node_experts = self.num_experts // num_nodes
        self.masks = [node_masks(each, num_nodes, padding=0x7B) for each in in_rank]

    def rows(self, rng: np.random.Generator, width: int, dtype: object) -> list[Array]:
        return [random_bits(rng, (count, width), dtype) for count in self.routing.num_tokens]

    def over_lists(self, arrays: Sequence[Array]) -> list[Array]:
        """Arrays of all ranks, as the ranks of the node have them."""
        return [self._gather(arrays, local_rank) for local_rank in range(len(self.lists))]

    def _gather(self, arrays: Sequence[Array], local_rank: int) -> Array:
        mine: SegmentList = self.lists[local_rank]
        return mine.gather(arrays[local_rank :: len(self.lists)])

    def dispatched(
        self,
        x: list[Array],
        weights: list[Array] | None,
        sf: list[Array] | None,
        *,
        num_worst_tokens: int = 0,
    ) -> list[reference.Dispatched]:
        """What the oracle of all ranks says of those of the node."""
        dispatched = reference.dispatch(
            x,
            self.valid,
            num_experts=self.num_experts,
            topk_weights=weights,
            sf=sf,
            num_worst_tokens=num_worst_tokens,
        )
        return over_lists(dispatched, self.lists)


def draw_segmented(
    rng: np.random.Generator,
    ranks: Ranks,
    *,
    num_calls: int,
    max_tokens: int,
    elements: Sequence[str] = ELEMENTS,
    by_ranks: bool = False,
) -> None:
    """Dispatches of lists, repeated ones, combines and barriers, all enqueued at once.

    Args:
        by_ranks: routing is given by ranks, without ids.
    """
    done = 0
    while done < num_calls:
        nodes = Nodes(rng, ranks, max_tokens=max_tokens)
        dtype = DTYPES[rng.integers(len(DTYPES))]
        hidden = 16 // np.dtype(dtype).itemsize * int(rng.integers(1, 8))
        sf_width = (0, 1, 4, 5)[rng.integers(4)]
        with_weights = bool(rng.integers(3))
        worst = int(rng.integers(1, sum(nodes.routing.num_tokens) + 2)) if rng.integers(2) else 0
        rows, scales = (
            partial(nodes.rows, rng, hidden, dtype),
            partial(nodes.rows, rng, sf_width, np.float32),
        )

        def places() -> list[int]:
            return [int(number) for number in rng.integers(0, ranks.num_places, ranks.num_ranks)]

        x, sf = rows(), scales() if sf_width else None
        weights = nodes.routing.weights if with_weights and not by_ranks else None
        expected = nodes.dispatched(x, weights, sf, num_worst_tokens=worst)
        handle, _ = normal.dispatch(
            ranks,
            nodes.over_lists(x),
            expected,
            ids=None if by_ranks else nodes.over_lists(nodes.ids),
            masks=nodes.over_lists(nodes.masks) if by_ranks else None,
            weights=None if weights is None else nodes.over_lists(weights),
            sf=None if sf is None else nodes.over_lists(sf),
            num_experts=nodes.num_node_experts,
            num_worst_tokens=worst,
            places=places(),
            max_redundant_tokens=(0, 512)[rng.integers(2)],
            lists=nodes.lists,
        )
        done += 1
        if done < num_calls and rng.integers(2):
            again = nodes.over_lists(rows())
            again_sf = nodes.over_lists(scales()) if sf_width else None
            normal.dispatch(
                ranks,
                again,
                repeat(expected, again, again_sf),
                ids=None,
                sf=again_sf,
                handle=handle,
                places=places(),
                lists=nodes.lists,
            )
            done += 1
        if done < num_calls and rng.integers(4):
            summed = np_dtype(elements[int(rng.integers(len(elements)))])
            width = 16 // np.dtype(summed).itemsize * int(rng.integers(1, 50))
            given = [rng.random(each.recv_topk_idx.shape, np.float32) - 0.5 for each in expected]
            normal.combine(
                ranks,
                [random_values(rng, (len(each.recv_x), width), summed) for each in expected],
                handle,
                weights=given if rng.integers(2) else None,
                places=places(),
            )
            done += 1
        if done < num_calls and rng.integers(4) == 0:
            ranks.barrier()
            done += 1
    ranks.check_epoch()


def draw_segmented_quantized(rng: np.random.Generator, ranks: Ranks, *, max_tokens: int) -> None:
    """A dispatch of lists that casts to FP8, and a repeated one."""
    nodes = Nodes(rng, ranks, max_tokens=max_tokens)
    hidden = 128 * int(rng.choice([1, 4, 9]))

    def rows() -> tuple[list[Array], list[Array], list[Array]]:
        counts = nodes.routing.num_tokens
        x = [random_values(rng, (count, hidden), ml_dtypes.bfloat16) for count in counts]
        q, sf = zip(*map(reference.quantize_fp8, x), strict=True)
        return x, list(q), list(sf)

    def places() -> list[int]:
        return [int(number) for number in rng.integers(0, ranks.num_places, ranks.num_ranks)]

    x, q, sf = rows()
    expected = nodes.dispatched(q, None, sf)
    handle, _ = normal.dispatch(
        ranks,
        nodes.over_lists(x),
        expected,
        ids=nodes.over_lists(nodes.ids),
        num_experts=nodes.num_node_experts,
        quantizes=True,
        places=places(),
        lists=nodes.lists,
    )
    x, q, sf = rows()
    repeated = repeat(expected, nodes.over_lists(q), nodes.over_lists(sf))
    normal.dispatch(
        ranks,
        nodes.over_lists(x),
        repeated,
        ids=None,
        quantizes=True,
        handle=handle,
        places=places(),
        lists=nodes.lists,
    )
    ranks.check_epoch()
