"""What the caller asked for, checked: one class per operation.

Everything that can be checked from shapes, dtypes and options alone is checked here, for every engine
alike; values (expert ids) are checked by the engine that can read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

from . import arrays
from .arrays import ArrayView
from .errors import ArrayError, ConfigError, HandleError
from .events import EventOverlap
from .handle import DispatchHandle, LowLatencyHandle

MOVED_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "uint8")
SUMMED_DTYPES = ("bfloat16", "float16", "float32")
SF_DTYPES = ("float32", "int32")
INDEX_DTYPES = ("int64", "int32")
LAYOUTS = ("rank", "expert")
QUANTIZERS = (None, "fp8")
REDUCTIONS = ("rank", "source")

ROW_ALIGN_BYTES = 16
FP8_BLOCK = 128
MAX_ALIGNMENT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine takes arrays.

    Attributes:
        device: "cpu" or "cuda:N".
        stream: CUDA stream that reads them; see `arrays.view`.
    """

    device: str
    stream: int | None = None


class Schedule(NamedTuple):
    """When a call runs and with how much. Changes nothing of the result.

    Attributes:
        previous_event: work to wait for first.
        async_finish: the result's ``event`` is waited for by the caller, not by the current stream.
        num_sms: streaming multiprocessors that its kernel may use.
    """

    previous_event: EventOverlap | None = None
    async_finish: bool = False
    num_sms: int = 16


def integer(value: object, name: str) -> int:
    """An int from any integer, NumPy's too, which not every call of CUDA takes."""
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name}={value!r} is not an integer") from None


def local_experts(num_experts: int, num_ranks: int) -> int:
    """Experts per rank."""
    if num_experts < 1 or num_experts % num_ranks:
        raise ConfigError(f"num_experts={num_experts} is not a positive multiple of num_ranks={num_ranks}")
    return num_experts // num_ranks


def load(
    obj: object, name: str, *, dtypes: Sequence[str], shape: Sequence[int | None] | None, place: Place
) -> ArrayView:
    """A view of `obj` at `place`, of one of `dtypes` and, unless that is None, of a shape: see `check_shape`.

    A producer is asked once: each export may order streams.
    """
    view = arrays.view(obj, name=name, stream=place.stream)
    if view.device != place.device:
        hint = "; move it there, or use backend='host'" if view.device == "cpu" else ""
        raise ArrayError(f"{name} lies on {view.device}; this buffer takes arrays on {place.device}{hint}")
    if view.dtype not in dtypes:
        raise ArrayError(f"{name} has dtype {view.dtype}; accepted: {', '.join(dtypes)}")
    if shape is not None:
        check_shape(view, name, shape)
    return view


def check_shape(view: ArrayView, name: str, shape: Sequence[int | None]) -> None:
    """Raise ArrayError for another shape. None matches any length."""
    if len(view.shape) != len(shape) or any(
        want is not None and have != want for have, want in zip(view.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ArrayError(f"{name} has shape {list(view.shape)}; expected [{wanted}]")


def _load_rows(
    obj: object, name: str, dtypes: Sequence[str], num_rows: int | None, place: Place
) -> ArrayView:
    rows = load(obj, name, dtypes=dtypes, shape=(num_rows, None), place=place)
    hidden = rows.shape[1]
    row_bytes = hidden * arrays.np_dtype(rows.dtype).itemsize
    if hidden == 0 or row_bytes % ROW_ALIGN_BYTES:
        raise ArrayError(
            f"{name} has rows of {row_bytes} bytes ({hidden} x {rows.dtype}); "
            f"pad hidden so that a row is a multiple of {ROW_ALIGN_BYTES} bytes"
        )
    return rows


def check_owner(handle: object, kind: type, owner: object) -> None:
    """Raise `HandleError` for what is no handle of a kind, or that of another buffer."""
    if not isinstance(handle, kind):
        raise HandleError(f"handle is a {type(handle).__name__}; expected a {kind.__name__}")
    if handle.owner is not owner:  # type: ignore[attr-defined]
        raise HandleError("handle comes from another buffer")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRequest:
    topk_idx: ArrayView
    num_experts: int

    @classmethod
    def of(cls, topk_idx: object, num_experts: int, *, num_ranks: int, place: Place) -> LayoutRequest:
        num_experts = integer(num_experts, "num_experts")
        local_experts(num_experts, num_ranks)
        ids = load(topk_idx, "topk_idx", dtypes=INDEX_DTYPES, shape=(None, None), place=place)
        return cls(topk_idx=ids, num_experts=num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchRequest:
    """`num_experts` is 0 when `handle` repeats an earlier dispatch; `layout` is the handle's then.

    `num_landed_rows` is the number of received tokens to have room for; 0 where counts or a handle tell.
    With `quantize`, `x` is what is cast, and the rows that travel are its FP8 rows and their scale factors.
    """

    x: ArrayView
    sf: ArrayView | None
    topk_idx: ArrayView | None
    topk_weights: ArrayView | None
    is_token_in_rank: ArrayView | None
    num_tokens_per_expert: ArrayView | None
    num_experts: int
    expert_alignment: int
    num_worst_tokens: int
    handle: DispatchHandle | None
    layout: str
    zero_padding: bool
    quantize: str | None
    num_max_tokens_per_rank: int | None
    num_landed_rows: int

    @classmethod
    def of(
        cls,
        x: Any,
        handle: DispatchHandle | None,
        is_token_in_rank: object,
        num_tokens_per_expert: object,
        topk_idx: object,
        topk_weights: object,
        expert_alignment: int,
        num_worst_tokens: int,
        num_experts: int | None,
        layout: str = "rank",
        zero_padding: bool = False,
        quantize: str | None = None,
        num_max_tokens_per_rank: int | None = None,
        *,
        owner: object,
        num_ranks: int,
        place: Place,
    ) -> DispatchRequest:
        x, sf = x if isinstance(x, tuple) else (x, None)
        if quantize not in QUANTIZERS:
            raise ConfigError(f"quantize={quantize!r}; None or 'fp8'")
        if quantize is not None and sf is not None:
            raise ConfigError(f"quantize={quantize!r} makes the scale factors; give x alone")
        rows = _load_rows(x, "x", MOVED_DTYPES if quantize is None else ("bfloat16",), None, place)
        num_tokens, hidden = rows.shape
        if quantize is not None and hidden % FP8_BLOCK:
            raise ArrayError(
                f"x has hidden={hidden}; with quantize={quantize!r} it must be a multiple of {FP8_BLOCK}"
            )
        scales = None
        if sf is not None:
            scales = load(sf, "sf", dtypes=SF_DTYPES, shape=None, place=place)
            if scales.shape != (num_tokens,):
                check_shape(scales, "sf", (num_tokens, None))
        expert_alignment = integer(expert_alignment, "expert_alignment")
        num_worst_tokens = integer(num_worst_tokens, "num_worst_tokens")
        if num_experts is not None:
            num_experts = integer(num_experts, "num_experts")
        if not 1 <= expert_alignment <= MAX_ALIGNMENT:
            raise ConfigError(f"expert_alignment={expert_alignment} must be from 1 to {MAX_ALIGNMENT}")
        if num_worst_tokens < 0:
            raise ConfigError(f"num_worst_tokens={num_worst_tokens} is negative")
        if layout not in LAYOUTS:
            raise ConfigError(f"layout={layout!r}; one of {', '.join(LAYOUTS)}")
        if num_max_tokens_per_rank is not None:
            num_max_tokens_per_rank = integer(num_max_tokens_per_rank, "num_max_tokens_per_rank")
            if num_tokens > num_max_tokens_per_rank:
                raise ConfigError(
                    f"x has {num_tokens} tokens; num_max_tokens_per_rank={num_max_tokens_per_rank}"
                )

        ids = weights = in_rank = per_expert = None
        if handle is not None:
            check_owner(handle, DispatchHandle, owner)
            routing = (topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert)
            if any(given is not None for given in routing):
                raise ConfigError("with handle= the routing is that of the handle; give x alone")
            if num_tokens != handle.num_tokens:
                raise HandleError(f"x has {num_tokens} tokens; the handle's dispatch had {handle.num_tokens}")
            if num_worst_tokens not in (0, handle.num_recv_rows):
                raise HandleError(
                    f"num_worst_tokens={num_worst_tokens}; "
                    f"the handle's dispatch had {handle.num_recv_rows} rows"
                )
            if layout == "expert" and handle.layout != layout:
                raise HandleError(f"layout={layout!r}; the handle's dispatch had layout={handle.layout!r}")
            layout = handle.layout
            num_experts = 0
        else:
            if num_tokens_per_expert is not None:
                per_expert = load(
                    num_tokens_per_expert,
                    "num_tokens_per_expert",
                    dtypes=INDEX_DTYPES,
                    shape=(num_experts,),
                    place=place,
                )
                num_experts = per_expert.shape[0]
            if num_experts is None:
                raise ConfigError("dispatch needs num_experts= (or num_tokens_per_expert, or a handle)")
            local_experts(num_experts, num_ranks)
            if topk_idx is not None:
                ids = load(topk_idx, "topk_idx", dtypes=INDEX_DTYPES, shape=(num_tokens, None), place=place)
            if is_token_in_rank is not None:
                in_rank = load(
                    is_token_in_rank,
                    "is_token_in_rank",
                    dtypes=("bool",),
                    shape=(num_tokens, num_ranks),
                    place=place,
                )
            if ids is None and (in_rank is None or per_expert is None):
                raise ConfigError(
                    "dispatch needs topk_idx, or is_token_in_rank with num_tokens_per_expert, or a handle"
                )
            if layout == "expert" and ids is None:
                raise ConfigError("layout='expert' needs topk_idx, or the handle of such a dispatch")
            if topk_weights is not None:
                if ids is None:
                    raise ConfigError("topk_weights needs topk_idx")
                weights = load(
                    topk_weights, "topk_weights", dtypes=("float32",), shape=ids.shape, place=place
                )
        if zero_padding and layout != "expert":
            raise ConfigError("zero_padding needs layout='expert': other layouts have no padding")
        num_landed_rows = num_worst_tokens if handle is None else 0
        if layout == "expert" and num_max_tokens_per_rank is not None:
            # A token arrives once, however many rows it becomes.
            num_landed_rows = min(num_landed_rows, num_ranks * num_max_tokens_per_rank)
        return cls(
            x=rows,
            sf=scales,
            topk_idx=ids,
            topk_weights=weights,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            num_experts=num_experts,
            expert_alignment=expert_alignment,
            num_worst_tokens=num_worst_tokens,
            handle=handle,
            layout=layout,
            zero_padding=zero_padding,
            quantize=quantize,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            num_landed_rows=num_landed_rows,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineRequest:
    """With a handle of layout "expert" `topk_weights` is [rows of x], and multiplies the rows."""

    x: ArrayView
    handle: DispatchHandle
    topk_weights: ArrayView | None
    biases: tuple[ArrayView, ...]

    @classmethod
    def of(
        cls,
        x: object,
        handle: DispatchHandle,
        topk_weights: object,
        bias: object,
        *,
        owner: object,
        place: Place,
    ) -> CombineRequest:
        check_owner(handle, DispatchHandle, owner)
        rows = _load_rows(x, "x", SUMMED_DTYPES, handle.num_recv_rows, place)
        weights = None
        if topk_weights is not None:
            shape: tuple[int | None, ...] = (handle.num_recv_rows,)
            if handle.layout == "rank":
                shape = (handle.num_recv_rows, handle.num_topk or None)
            weights = load(topk_weights, "topk_weights", dtypes=("float32",), shape=shape, place=place)
        given = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        if len(given) > 2:
            raise ConfigError(f"bias has {len(given)} arrays; at most 2")
        biases = tuple(
            load(
                each,
                f"bias[{number}]",
                dtypes=(rows.dtype,),
                shape=(handle.num_tokens, rows.shape[1]),
                place=place,
            )
            for number, each in enumerate(given)
            if each is not None
        )
        return cls(x=rows, handle=handle, topk_weights=weights, biases=biases)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowLatencyDispatchRequest:
    x: ArrayView
    topk_idx: ArrayView
    num_max_tokens_per_rank: int
    num_experts: int
    recv_stats: ArrayView | None
    wait_stats: ArrayView | None
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool
    topk_weights: ArrayView | None
    layout: str

    @classmethod
    def of(
        cls,
        x: object,
        topk_idx: object,
        num_max_tokens_per_rank: int,
        num_experts: int,
        recv_stats: object,
        wait_stats: object,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        topk_weights: object = None,
        layout: str = "expert",
        *,
        num_ranks: int,
        place: Place,
    ) -> LowLatencyDispatchRequest:
        num_max_tokens_per_rank = integer(num_max_tokens_per_rank, "num_max_dispatch_tokens_per_rank")
        num_experts = integer(num_experts, "num_experts")
        num_local_experts = local_experts(num_experts, num_ranks)
        rows = _load_rows(x, "x", ("bfloat16",), None, place)
        num_tokens, hidden = rows.shape
        if num_max_tokens_per_rank < 1 or num_tokens > num_max_tokens_per_rank:
            raise ConfigError(
                f"x has {num_tokens} tokens; num_max_dispatch_tokens_per_rank={num_max_tokens_per_rank}"
            )
        if use_fp8 and hidden % FP8_BLOCK:
            raise ArrayError(f"x has hidden={hidden}; with use_fp8 it must be a multiple of {FP8_BLOCK}")
        if use_ue8m0 and not (use_fp8 and round_scale):
            raise ConfigError("use_ue8m0 needs use_fp8 and round_scale: its scales are powers of two")
        if layout not in LAYOUTS:
            raise ConfigError(f"layout={layout!r}; one of {', '.join(LAYOUTS)}")
        ids = load(topk_idx, "topk_idx", dtypes=INDEX_DTYPES, shape=(num_tokens, None), place=place)
        return cls(
            x=rows,
            topk_idx=ids,
            topk_weights=None
            if topk_weights is None
            else load(topk_weights, "topk_weights", dtypes=("float32",), shape=ids.shape, place=place),
            layout=layout,
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            num_experts=num_experts,
            recv_stats=_load_stats(
                recv_stats, "cumulative_local_expert_recv_stats", "int32", num_local_experts, place
            ),
            wait_stats=_load_stats(wait_stats, "dispatch_wait_recv_cost_stats", "int64", num_ranks, place),
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LowLatencyCombineRequest:
    """`out_array` is the caller's object, which `out` views.

    `topk_weights` is None where those of the dispatch are used; then `topk_idx` is not looked at either.
    """

    x: ArrayView
    topk_idx: ArrayView
    topk_weights: ArrayView | None
    handle: LowLatencyHandle
    use_logfmt: bool
    zero_copy: bool
    out: ArrayView | None
    out_array: object
    wait_stats: ArrayView | None
    use_fp8: bool
    reduce: str

    @classmethod
    def of(
        cls,
        x: object,
        topk_idx: object,
        topk_weights: object,
        handle: LowLatencyHandle,
        use_logfmt: bool,
        zero_copy: bool,
        out: object,
        wait_stats: object,
        use_fp8: bool = False,
        reduce: str = "rank",
        *,
        owner: object,
        num_ranks: int,
        place: Place,
    ) -> LowLatencyCombineRequest:
        check_owner(handle, LowLatencyHandle, owner)
        num_local_experts = handle.num_experts // num_ranks
        num_rows = num_ranks * handle.num_max_tokens_per_rank
        rows = load(
            x,
            "x",
            dtypes=("bfloat16",),
            shape=(num_local_experts, num_rows, handle.hidden),
            place=place,
        )
        if (use_logfmt or use_fp8) and handle.hidden % FP8_BLOCK:
            name = "use_fp8" if use_fp8 else "use_logfmt"
            raise ArrayError(f"x has hidden={handle.hidden}; {name} needs a multiple of {FP8_BLOCK}")
        if use_logfmt and use_fp8:
            raise ConfigError("use_logfmt and use_fp8 exclude each other: rows travel in one way")
        if reduce not in REDUCTIONS:
            raise ConfigError(f"reduce={reduce!r}; one of {', '.join(REDUCTIONS)}")
        shape = (handle.num_tokens, handle.num_topk)
        ids = load(topk_idx, "topk_idx", dtypes=INDEX_DTYPES, shape=shape, place=place)
        weights = None
        if topk_weights is not None:
            weights = load(topk_weights, "topk_weights", dtypes=("float32",), shape=shape, place=place)
        if reduce == "rank" and handle.has_weights:
            weights = None
        elif weights is None:
            raise ConfigError(
                "low_latency_combine needs topk_weights, unless the dispatch took them and reduce='rank'"
            )
        target = None
        if out is not None:
            shape = (handle.num_tokens, handle.hidden)
            target = load(out, "out", dtypes=("bfloat16",), shape=shape, place=place)
        return cls(
            x=rows,
            topk_idx=ids,
            topk_weights=weights,
            handle=handle,
            use_logfmt=use_logfmt,
            zero_copy=zero_copy,
            out=target,
            out_array=out,
            use_fp8=use_fp8,
            reduce=reduce,
            wait_stats=_load_stats(wait_stats, "combine_wait_recv_cost_stats", "int64", num_ranks, place),
        )


def _load_stats(obj: object, name: str, dtype: str, length: int, place: Place) -> ArrayView | None:
    return None if obj is None else load(obj, name, dtypes=(dtype,), shape=(length,), place=place)
