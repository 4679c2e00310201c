"""Whether an operation does what it must, at the size at which it is timed. Every byte is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .. import reference
from ..buffer import Buffer
from ..errors import EpError, on_all_ranks
from ..exchange import Group
from .layer import Call, Layer, open_buffer
from .low_latency import LowLatencyLayer
from .options import Options
from .places import TIMEOUT_S, Place, fetch
from .workload import BF16, Array, Element, NetworkBytes, NvlinkBytes, Routing

_SMALL_HIDDEN: Final = 64
_SMALL_BUFFER_BYTES: Final = 64 << 20


class CheckError(EpError, AssertionError):
    """A result is not what it must be. Raised on every rank."""


def agree(group: Group, problem: str | None) -> None:
    """Raise on every rank if one has found a problem.

    Raises:
        CheckError: with what all ranks found.
    """
    found = group.allgather(problem, op="bench check")
    listing = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text)
    if listing:
        raise on_all_ranks(CheckError(listing))


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedBytes:
    """What kernels counted in one call, as far as they count, and the planner's numbers."""

    network: NetworkBytes | None = None
    nvlink: NvlinkBytes | None = None

    def problem(self, rank: int) -> str | None:
        """Where they differ on a rank; None if nowhere."""
        for where, moved in (("sent to the nodes", self.network), ("over NVLink", self.nvlink)):
            if moved is not None and moved.counted[rank] != moved.planned[rank]:
                return f"bytes {where} are {moved.counted[rank]}, the planner says {moved.planned[rank]}"
        return None


def check_call(layer: Layer | LowLatencyLayer, call: Call) -> MovedBytes:
    """Run one call on new rows and compare, on GPUs of several nodes also the bytes that it moved.

    Raises:
        CheckError: on every rank.
    """
    group, place = layer.group, layer.place
    layer.renew()
    before = sent_so_far(layer), nvlink_so_far(layer)
    group.barrier()
    out = call.run()
    place.synchronize()
    group.barrier()
    if isinstance(layer, LowLatencyLayer):
        problem = layer.problem(call, out)
    else:
        problem = (_combined if call.name.startswith("combine") else _dispatched)(layer, call, out)
    moved = MovedBytes()
    if before[0] and isinstance(layer, Layer):
        moved = _moved_bytes(layer, call, *before)
        problem = problem or moved.problem(group.rank)
    agree(group, None if problem is None else f"{call.name}, {len(layer.tokens)} tokens: {problem}")
    return moved


def count_over_nvlink(
    group: Group, place: Place, element: Element, routing: Routing, options: Options
) -> dict[str, NvlinkBytes]:
    """By operation, from calls that are not timed: kernels that count are slower. Nothing on a single node.

    Raises:
        CheckError: on every rank, also where a result is wrong.
    """
    if not is_counted(place):
        return {}
    with open_buffer(group, place, routing, element, options, counts_bytes=True) as buffer:
        layer = Layer(group, buffer, place, element, routing, options)
        layer.use_sms(options.sms[0] if buffer.backend == "cuda" else None)
        moved = {call.name: check_call(layer, call).nvlink for call in layer.calls()}
        del layer  # its arrays, before the buffer that they lie in
        group.barrier()
    return {name: nvlink for name, nvlink in moved.items() if nvlink is not None}


def is_counted(place: Place) -> bool:
    """Whether kernels count what they send over the network."""
    return place.setting.backend == "cuda" and place.setting.num_nodes > 1


def sent_so_far(layer: Layer | LowLatencyLayer) -> tuple[int, ...]:
    """Bytes that this rank has sent to each node; empty where nobody counts."""
    return layer.buffer.stats.network_bytes_by_node if is_counted(layer.place) else ()


def nvlink_so_far(layer: Layer | LowLatencyLayer) -> int | None:
    """Bytes that this rank has moved over NVLink; None where nobody counts."""
    return layer.buffer.stats.nvlink_bytes if is_counted(layer.place) else None


def _moved_bytes(
    layer: Layer, call: Call, sent_before: tuple[int, ...], nvlink_before: int | None
) -> MovedBytes:
    group, ranks_per_node = layer.group, layer.group.size // len(sent_before)
    sent = tuple(now - then for now, then in zip(sent_so_far(layer), sent_before, strict=True))
    plan = layer.routing.plan(call.name, layer.element, layer.payload.hidden, ranks_per_node=ranks_per_node)
    planned = plan.network.sent_bytes_by_node(ranks_per_node)
    network = NetworkBytes(
        counted=tuple(group.allgather(sent, op="bench bytes")),
        planned=tuple(tuple(of_rank) for of_rank in planned.tolist()),
    )
    nvlink_now = nvlink_so_far(layer)
    if nvlink_now is None or nvlink_before is None:
        return MovedBytes(network=network)
    # A dispatch stores, a combine loads.
    flow, is_combine = plan.nvlink, call.name.startswith("combine")
    nvlink = NvlinkBytes(
        counted=tuple(group.allgather(nvlink_now - nvlink_before, op="bench NVLink bytes")),
        planned=tuple((flow.received_bytes if is_combine else flow.sent_bytes).tolist()),
    )
    return MovedBytes(network=network, nvlink=nvlink)


def _dispatched(layer: Layer, call: Call, out: Any) -> str | None:
    with_scales = isinstance(out.recv_x, tuple)
    recv_x, recv_sf = out.recv_x if with_scales else (out.recv_x, None)
    num_received = len(layer.src_rank)
    num_rows = layer.num_worst_tokens if call.name == "dispatch" else num_received
    if len(recv_x) != num_rows:
        return f"{len(recv_x)} rows, {num_rows} expected"
    if out.handle.num_recv_tokens != num_received:
        return f"{out.handle.num_recv_tokens} tokens received, {num_received} expected"
    found = _different_row(layer, recv_x[:num_received], layer.payload.rows)
    if found is not None:
        return found
    if recv_sf is not None:
        found = _different_row(layer, recv_sf[:num_received], layer.payload.scales)
        if found is not None:
            return f"scale factors: {found}"
    return None if call.name == "dispatch-cached" else _metadata(layer, out, num_rows)


def _metadata(layer: Layer, out: Any, num_rows: int) -> str | None:
    rank, routing = layer.group.rank, layer.routing
    ids = np.full((num_rows, out.recv_topk_idx.shape[1]), -1, np.int64)
    weights = np.zeros(ids.shape, np.float32)
    ids[: len(layer.src_rank)] = routing.received_idx(rank)
    weights[: len(layer.src_rank)] = routing.received_weights(rank)
    if not np.array_equal(fetch(layer.place, out.recv_topk_idx, np.int64), ids):
        return "expert ids differ"
    if fetch(layer.place, out.recv_topk_weights, np.float32).tobytes() != weights.tobytes():
        return "weights differ"
    counts = np.bincount(ids[ids >= 0], minlength=routing.num_local_experts).tolist()
    if list(out.num_recv_tokens_per_expert_list) != counts:
        return f"tokens per expert are {list(out.num_recv_tokens_per_expert_list)}, expected {counts}"
    return None


def _different_row(layer: Layer, there: Any, expected: Callable[[Array, Array, int], Array]) -> str | None:
    for first, rows in layer.place.chunks(there):
        part = slice(first, first + len(rows))
        wanted = expected(layer.src_rank[part], layer.src_token[part], layer.salt)
        at = _first_difference(rows, wanted)
        if at is not None:
            row, byte = at
            origin = f"token {layer.src_token[first + row]} of rank {layer.src_rank[first + row]}"
            text = f"row {first + row}, {origin} with salt {layer.salt}, differs at byte {byte}"
            if wanted.dtype == layer.element.dtype:
                text += f" (it says: {layer.payload.origin(rows[row].view(wanted.dtype))})"
            return text
    return None


def _combined(layer: Layer, call: Call, out: Any) -> str | None:
    rank = layer.group.rank
    destinations = layer.routing.destinations[rank]
    if len(out.combined_x) != len(layer.tokens):
        return f"{len(out.combined_x)} rows, {len(layer.tokens)} expected"
    for first, rows in layer.place.chunks(out.combined_x):
        part = slice(first, first + len(rows))
        wanted = layer.payload.combined(rank, layer.tokens[part], destinations[part], layer.salt)
        at = _first_difference(rows, wanted)
        if at is not None:
            return f"the sum of token {first + at[0]} differs at byte {at[1]}"
    return None


def _first_difference(rows: Array, expected: Array) -> tuple[int, int] | None:
    """Row and byte, both counted from the first given."""
    wanted = expected.view(np.uint8).reshape(len(expected), -1)
    if rows.shape == wanted.shape and np.array_equal(rows, wanted):
        return None
    row, byte = np.argwhere(rows != wanted)[0]
    return int(row), int(byte)


# Against the oracle.


def check_against_reference(group: Group, place: Place, options: Options) -> None:
    """Run a small random case, and compare it with `ep_rt.reference`, bit by bit.

    Raises:
        CheckError: on every rank.
    """
    case = _Case(group.size, options)
    expected = reference.dispatch(
        case.x, case.topk_idx, num_experts=options.num_experts, topk_weights=case.topk_weights
    )
    setting = place.setting
    sums = reference.combine(
        case.y(expected),
        expected,
        num_tokens=[len(ids) for ids in case.topk_idx],
        topk_weights=[part.recv_topk_weights for part in expected if part.recv_topk_weights is not None],
        ranks_per_node=group.size // setting.num_nodes
        if setting.num_nodes > 1 and setting.backend == "cuda"
        else None,
    )
    rank = group.rank
    mine, my_sum = expected[rank], sums[rank]
    assert mine.recv_topk_weights is not None
    assert my_sum.topk_weights is not None
    num_bytes = _SMALL_BUFFER_BYTES if setting.backend == "cuda" else 0
    with Buffer(group, num_bytes, backend=setting.backend, timeout_s=TIMEOUT_S) as buffer:
        group.barrier()
        x, ids, weights = (place.put(each[rank]) for each in (case.x, case.topk_idx, case.topk_weights))
        y = place.put(case.y(expected)[rank])
        group.barrier()
        out = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, num_experts=options.num_experts)
        back = buffer.combine(y, out.handle, topk_weights=out.recv_topk_weights)
        place.synchronize()
        group.barrier()
        problems = [
            f"{name} of a small random case is not that of ep_rt.reference"
            for name, there, wanted in (
                ("recv_x", out.recv_x, mine.recv_x),
                ("recv_topk_idx", out.recv_topk_idx, mine.recv_topk_idx),
                ("recv_topk_weights", out.recv_topk_weights, mine.recv_topk_weights),
                ("combined_x", back.combined_x, my_sum.x),
                ("combined_topk_weights", back.combined_topk_weights, my_sum.topk_weights),
            )
            if there.shape != wanted.shape or fetch(place, there, wanted.dtype).tobytes() != wanted.tobytes()
        ]
        if out.num_recv_tokens_per_expert_list != mine.num_recv_tokens_per_expert:
            problems.append("num_recv_tokens_per_expert_list is not that of ep_rt.reference")
        agree(group, "; ".join(problems) or None)
        del out, back


class _Case:
    """Random rows, ids with gaps, another number of tokens on every rank, on one of them none."""

    def __init__(self, num_ranks: int, options: Options) -> None:
        rng = np.random.default_rng([options.seed, num_ranks])
        num_tokens = [0 if rank == 1 else 20 + 7 * rank for rank in range(num_ranks)]
        self._rng = rng
        self.x = [self._rows(count) for count in num_tokens]
        self.topk_idx = [
            rng.integers(-1, options.num_experts, (count, options.num_topk), np.int64) for count in num_tokens
        ]
        self.topk_weights = [rng.random((count, options.num_topk), np.float32) for count in num_tokens]
        self._y: list[Array] = []

    def y(self, expected: list[reference.Dispatched]) -> list[Array]:
        """What the experts return, by rank."""
        if not self._y:
            self._y = [self._rows(len(part.recv_x)) for part in expected]
        return self._y

    def _rows(self, count: int) -> Array:
        rows: Array = self._rng.standard_normal((count, _SMALL_HIDDEN), np.float32).astype(BF16.dtype)
        return rows
