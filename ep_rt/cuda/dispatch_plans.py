"""What dispatches need, worked out once: for a kind of arrays, then for numbers of tokens and rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .. import arrays
from ..arrays import ArrayView
from ..cuda_arrays import Column, Fact, ResultArrays, glance, lasting_facts, without_lengths
from ..errors import ConfigError
from ..handle import HandleShape
from ..requests import FP8_BLOCK, DispatchRequest, local_experts
from . import plan
from .digest import dispatch_digest
from .domain import Domain
from .expansion import Expansion
from .expert_major import ExpertMajor, check_columns
from .handle import CudaDispatchHandle, CudaHandleShape, routing_bytes
from .inputs import Input, itemsize
from .internode import Bringing, Internode
from .launch import Launch
from .layout import MAX_LOCAL_EXPERTS, ReceivedRow, ReceiveLayout
from .operations import Operations
from .plans import Plans, producers, seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Dispatches that differ in the number of tokens at most: what holds for every call of them.

    Attributes:
        set_pointers, set_call, set_landed: assign to the arguments of the launch.
        inputs: what x, sf, ids, weights and is_token_in_rank are like; None where absent.
        counted: the caller's counts by expert, where there are no ids.
        is_readable: they need no copy where their addresses are aligned.
        frameworks: of the inputs, that of x first.
        row: bytes of a received row on the wire.
        is_exact: only the counts will tell how many rows come.
        num_worst_tokens, num_landed_rows: of the result, and of what lands; 0 with a handle, too.
        num_max_tokens_per_rank: None where nothing was said.
        spare_factor: how much more than a result may come next: experts' outputs, with wider elements.
        arrays: recv_x, recv_sf, ids and weights.
        expansion: for layout "expert".
        bringing: over several nodes, the way of tokens to other ones.
    """

    launch: Launch
    set_pointers: Callable[..., None]
    set_call: Callable[..., None]
    set_landed: Callable[..., None]
    inputs: tuple[Input | None, ...]
    counted: ArrayView | None
    is_readable: bool
    frameworks: tuple[str, ...]
    num_blocks: int
    num_sms: int
    num_topk: int
    layout: str
    num_ranks: int
    num_local_experts: int
    expert_alignment: int
    row: ReceivedRow
    is_exact: bool
    num_worst_tokens: int
    num_landed_rows: int
    num_max_tokens_per_rank: int | None
    spare_factor: int
    arrays: ResultArrays
    digest: int
    expansion: Expansion | None
    bringing: Bringing | None

    def takes(self, num_tokens: int) -> bool:
        """Whether a rank may dispatch so many."""
        return self.num_max_tokens_per_rank is None or num_tokens <= self.num_max_tokens_per_rank

    def shapes(
        self, num_tokens: int, num_recv_rows: int, num_landed_rows: int
    ) -> tuple[HandleShape, CudaHandleShape]:
        """Of the handle of a call with these numbers."""
        return (
            HandleShape(num_tokens, self.num_topk, num_recv_rows, self.layout),
            CudaHandleShape(self.num_ranks, self.num_local_experts, self.expert_alignment, num_landed_rows),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A dispatch of certain shapes.

    Attributes:
        num_listed: tokens that the kernel dispatches, at most: those of x, and over several nodes others.
        routing_bytes: of the block that a new dispatch leaves.
        num_rows, num_bytes: of what lands; 0 if only the counts will tell.
        spare_bytes: for what may come after a result of `num_rows`, also if only the counts will tell.
        shape, landed: of the handle, if that many rows come.
        make: makes the arrays of a result of `num_rows`.
    """

    kind: Kind
    num_tokens: int
    num_listed: int
    routing_bytes: int
    num_rows: int
    num_bytes: int
    spare_bytes: int
    shape: HandleShape
    landed: CudaHandleShape
    make: Callable[[int, int, object], list[Any]]


class DispatchPlans:
    """Those of one rank.

    Args:
        owner: of the handles.
        internode: over several nodes.
    """

    def __init__(
        self,
        domain: Domain,
        operations: Operations,
        expert_major: ExpertMajor,
        *,
        owner: object,
        internode: Internode | None,
    ) -> None:
        self._domain = domain
        self._operations = operations
        self._expert_major = expert_major
        self._owner = owner
        self._internode = internode
        self._plans: Plans[Plan] = Plans()
        self._kinds: Plans[Kind] = Plans()

    def find(
        self,
        given: tuple[Any, ...],
        options: tuple[Hashable, ...],
        build: Callable[..., DispatchRequest],
        num_sms: int,
    ) -> tuple[Plan, list[int], Sequence[Any], tuple[int, ...]]:
        """The plan of a call; of x, scale factors, ids, weights and flags the addresses, and what owns them;
        streams that those name, or were exported to.

        Args:
            given, options: the caller's arguments; `build` makes a checked request of all of them.
        """
        x, handle, in_rank, per_expert, ids, weights = given
        x, sf = x if type(x) is tuple and len(x) == 2 else (x, None)
        objects: Sequence[Any] = (x, sf, ids, weights, in_rank)
        is_plannable = per_expert is None and (
            handle is None or (type(handle) is CudaDispatchHandle and handle.owner is self._owner)
        )
        # What decides everything but addresses. None where the arguments must be looked at each time.
        key: Hashable = None
        kind_key: Hashable = None
        if is_plannable and (glanced := glance(objects)) is not None:
            facts, pointers = glanced
            key = (facts, options, num_sms, None if handle is None else handle.facts)
            found = self._plans.find(key)
            if found is not None:
                return found, pointers, objects, ()
            if (left := _without_lengths(facts, options, handle)) is not None:
                kind_key = _kind_key(left, options, num_sms, handle)
                kind = self._kinds.find(kind_key)
                if kind is not None and kind.takes(x.shape[0]):
                    found = self._plans.keep(key, self._sized(kind, x.shape[0], handle))
                    return found, pointers, objects, ()
        request = build(*given, *options)
        views = request.x, request.sf, request.topk_idx, request.topk_weights, request.is_token_in_rank
        if kind_key is None and is_plannable:
            kind_key = _kind_key(lasting_facts(views), options, num_sms, handle)
        kind = self._kinds.find(kind_key)
        if kind is None:
            kind = self._kinds.keep(kind_key, self._prepare(request, num_sms))
        found = self._plans.keep(key, self._sized(kind, request.x.shape[0], handle))
        return found, *seen(*views), producers(*views, request.num_tokens_per_expert)

    def _prepare(self, request: DispatchRequest, num_sms: int) -> Kind:
        domain = self._domain
        x, ids, weights, sf = request.x, request.topk_idx, request.topk_weights, request.sf
        internode = self._internode
        num_nodes = 1 if internode is None else internode.num_nodes
        num_ranks = num_nodes * domain.group.size
        num_local_experts = local_experts(request.num_experts, num_ranks) if request.num_experts else 0
        if num_local_experts > MAX_LOCAL_EXPERTS:
            raise ConfigError(
                f"num_experts={request.num_experts} on {num_ranks} ranks; at most {MAX_LOCAL_EXPERTS} on each"
            )
        hidden = x.shape[1]
        columns = [
            None if view is None else Column(view.dtype, view.shape[1:]) for view in (x, sf, ids, weights)
        ]
        if request.quantize is not None:
            columns[:2] = Column("float8_e4m3fn", (hidden,)), Column("float32", (hidden // FP8_BLOCK,))
        num_bytes = [
            0 if column is None else arrays.np_dtype(column[0]).itemsize * prod(column[1])
            for column in columns
        ]
        row = ReceivedRow(
            row_bytes=num_bytes[0], sf_bytes=num_bytes[1], idx_bytes=num_bytes[2], weights_bytes=num_bytes[3]
        )
        # With expert ids, the destinations are those of the ids.
        views = (x, sf, ids, weights, request.is_token_in_rank if ids is None else None)
        inputs = tuple(None if view is None else Input.of(view) for view in views)
        # The host reads the counts once the call has counted.
        made = (*views, request.num_tokens_per_expert if ids is None else None)
        frameworks = tuple(dict.fromkeys(view.framework for view in made if view is not None))
        num_topk = 0 if ids is None else ids.shape[1]
        handle = request.handle
        assert handle is None or isinstance(handle, CudaDispatchHandle)  # its owner is this buffer
        is_cached = handle is not None
        bringing = None
        if internode is not None:
            bringing = internode.bringing(
                (x, sf, ids, weights), num_experts=request.num_experts, is_cached=is_cached
            )
        num_worst_tokens = 0 if is_cached else request.num_worst_tokens
        results = domain.results(columns, frameworks[0])
        spare_factor = 2 if row.row_bytes == hidden else 1
        launch = self._operations.dispatch(
            quantizes=request.quantize is not None,
            num_topk=num_topk,
            num_experts=request.num_experts // num_nodes,
            row_bytes=row.row_bytes,
            sf_row_bytes=row.sf_bytes,
            idx_bytes=0 if ids is None else itemsize(ids),
            is_cached=is_cached,
            fill_rows=request.num_landed_rows,
            max_redundant_tokens=plan.MAX_REDUNDANT_TOKENS,
            expert_alignment=request.expert_alignment,
        )
        return Kind(
            launch=launch,
            set_pointers=launch.setter(
                "result",
                *("x", "sf", "topk_idx", "topk_weights", "is_token_in_rank"),
                *("send_row", "send_plan"),
                *("masks", "send_token"),
            ),
            set_call=launch.setter("call", "digest", "recv_offset", "recv_capacity"),
            set_landed=launch.setter(
                "segments",
                *("landed_x", "landed_sf", "landed_topk_idx", "landed_topk_weights", "order"),
                *("node_masks", "landed_node_masks", "node_masks_bytes"),
                *("first_expert", "waits_for_announced", "num_exchange_blocks"),
            ),
            inputs=inputs,
            counted=request.num_tokens_per_expert if num_topk == 0 else None,
            is_readable=all(
                given is None or (given.is_contiguous and not given.is_empty) for given in inputs
            ),
            frameworks=frameworks,
            num_blocks=domain.num_blocks(num_sms),
            num_sms=num_sms,
            num_topk=num_topk,
            layout=request.layout,
            num_ranks=num_ranks,
            num_local_experts=num_local_experts,
            expert_alignment=request.expert_alignment,
            row=row,
            is_exact=not is_cached and num_worst_tokens == 0,
            num_worst_tokens=num_worst_tokens,
            num_landed_rows=request.num_landed_rows,
            num_max_tokens_per_rank=request.num_max_tokens_per_rank,
            spare_factor=spare_factor,
            arrays=results,
            digest=dispatch_digest(request),
            expansion=self._expansion(request, row, columns, num_local_experts, num_sms),
            bringing=bringing,
        )

    def _sized(self, kind: Kind, num_tokens: int, handle: CudaDispatchHandle | None) -> Plan:
        """The plan for so many tokens.

        Raises:
            ConfigError: more than any rank may have over several nodes.
        """
        internode, row = self._internode, kind.row
        num_listed = num_tokens if internode is None else internode.list_capacity(num_tokens)
        num_recv_rows, num_rows = kind.num_worst_tokens, kind.num_landed_rows
        if handle is not None:
            num_recv_rows, num_rows = handle.num_recv_rows, handle.landed.num_landed_rows
        at = row.layout(num_rows)
        return Plan(
            kind,
            num_tokens,
            num_listed,
            routing_bytes(num_listed),
            num_rows,
            at.end if num_rows else 0,
            row.num_bytes(num_rows) * kind.spare_factor,
            *kind.shapes(num_tokens, num_recv_rows, num_rows),
            kind.arrays.placed(result_places(at, num_rows)),
        )

    def _expansion(
        self,
        request: DispatchRequest,
        row: ReceivedRow,
        columns: Sequence[Column | None],
        num_local_experts: int,
        num_sms: int,
    ) -> Expansion | None:
        if request.layout != "expert":
            return None
        x, ids, handle = columns[0], request.topk_idx, request.handle
        assert x is not None
        assert handle is None or isinstance(handle, CudaDispatchHandle)
        num_topk = handle.num_topk if handle is not None else columns[2].shape[0] if columns[2] else 0
        check_columns(num_topk)
        framework = request.x.framework
        return Expansion(
            self._domain,
            self._expert_major,
            row=row,
            x=x,
            sf=columns[1],
            num_topk=num_topk,
            num_local_experts=num_local_experts if handle is None else handle.landed.num_local_experts,
            alignment=request.expert_alignment if handle is None else handle.landed.expert_alignment,
            num_out_rows=request.num_worst_tokens,
            zero_padding=request.zero_padding,
            is_cached=handle is not None,
            idx_bytes=0 if ids is None else itemsize(ids),
            frameworks=(framework, framework if ids is None else ids.framework),
            num_blocks=plan.num_local_blocks(
                self._domain.num_blocks(num_sms), max_blocks=self._domain.max_blocks
            ),
        )


def result_places(at: ReceiveLayout, num_rows: int) -> tuple[tuple[int, int], ...]:
    """Of x, scale factors, ids and weights of a result."""
    return (at.x, num_rows), (at.sf, num_rows), (at.topk_idx, num_rows), (at.topk_weights, num_rows)


def _kind_key(
    left: Hashable, options: tuple[Hashable, ...], num_sms: int, handle: CudaDispatchHandle | None
) -> Hashable:
    return left, options, num_sms, None if handle is None else handle.lasting_facts


def _without_lengths(
    facts: Sequence[Fact | None], options: tuple[Hashable, ...], handle: CudaDispatchHandle | None
) -> Hashable:
    """What is left of facts where there may be any number of tokens. None where the numbers of arrays and
    handle do not go together, so that the arguments must be looked at."""
    split = without_lengths(facts)
    if split is None:
        return None
    left, lengths = split
    num_tokens = lengths[0]
    if handle is not None:
        num_tokens, num_worst_tokens = handle.num_tokens, options[1]
        if num_worst_tokens and num_worst_tokens != handle.num_recv_rows:
            return None
    return left if all(length is None or length == num_tokens for length in lengths) else None
