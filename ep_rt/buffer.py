"""`Buffer`: the object through which ranks exchange tokens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import astuple, replace
from types import TracebackType
from typing import Any, ClassVar

from . import _version, arrays
from . import backend as backends
from .config import DEFAULT_TIMEOUT_S, Config
from .cuda.engine import CudaEngine, CudaStats, MemoryReport
from .cuda.low_latency import CudaLowLatency, NoLowLatency
from .cuda.low_latency_plan import area_bytes_hint
from .cuda.streams import capture
from .errors import BackendError, ClosedError, ConfigError, EpError
from .events import EventOverlap
from .exchange import PeerGroup
from .groups import as_group
from .handle import DispatchHandle, FlatLayout, FlatShape, LowLatencyHandle
from .host.engine import HostEngine
from .host.low_latency import HostLowLatency
from .host.peers import Announcement, Peers, attempt
from .moe_sizes import MoeSizes, remote_sizes, slab_bytes, spare_bytes
from .network_options import NetworkOptions
from .requests import (
    CombineRequest,
    DispatchRequest,
    LayoutRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    Schedule,
    check_owner,
    integer,
    local_experts,
)
from .results import Combined, Dispatched, DispatchLayout, LowLatencyCombined, LowLatencyDispatched, named
from .topology import discover


class Buffer:
    """Dispatch tokens to the ranks of their experts, and combine the experts' outputs.

    The calls carry the names and the argument order of DeepEP's ``Buffer``; results are named tuples in its
    order. Arrays may be CuPy, PyTorch or JAX on the GPU that is current when the buffer is made or, on the
    host backend, NumPy, PyTorch or JAX in CPU memory. Results come back in the framework of `x`, without a
    copy; what is made of `topk_idx` alone, in that of this array.

    Unless said otherwise a call is collective: every rank makes the same calls in the same order.
    Wrong arguments on any rank, arguments that must agree and do not, and ranks making different calls raise
    the same error on every rank before anything has moved, and the buffer stays usable. A rank that does not
    arrive within `timeout_s` raises `PeerTimeoutError` naming it, after which the buffer can only be closed.

    On GPUs hosts exchange nothing during a call, which returns when its work is enqueued; but for the counts
    by expert that a dispatch without `topk_idx` is given, unless it has `num_worst_tokens`. What a rank finds
    wrong with its own arguments it raises alone, and its peers wait for its part of the call. Arguments that
    must agree and do not, ranks making different calls, and late ranks raise on every rank, at the latest
    by its next call; `reset` then makes the buffer usable again. Expert ids out of range count as -1, and
    routing given beside `topk_idx` is not compared with it. The work runs on the stream that is current for
    the arrays given or, with `previous_event`, `async_finish`, JAX arrays or those of two frameworks, on
    `get_comm_stream`, ordered with it. Arrays of other producers, by DLPack or the CUDA array interface,
    count as CuPy's, and a call also comes after the streams that they name, but not those before it: on such
    a stream their memory may be used anew once it waits for that of the call. Calls come one after the other
    whatever their streams. The memory of a result that was dropped goes to later calls: what reads it on a
    stream other than theirs must come before them. Ranks that are threads on one GPU each need a
    non-blocking stream of their own, made current.

    A node is an NVLink domain. Where NVLink does not join all GPUs of a host, its nodes are as many
    consecutive ranks as it does join, down to a single one, and rows travel between them through NVSHMEM,
    directly over PCIe where GPUs reach each other so. ``EP_RT_NVLINK=0`` forces that, ``EP_RT_NVLINK=1``
    one node for each host. Ranks that are threads of one process stay on one node.

    Over several nodes every rank is a process with a GPU of its own, the ranks of a node are consecutive, and
    all nodes have as many. GPUs serve the normal mode for up to `num_max_tokens_per_rank` tokens of `for_moe`
    in a call, else 8192. A combine rounds the sums of each node. What has no room on a rank raises on the
    ranks of its node alone. Low-latency calls serve up to 32 ranks: rows go straight to the ranks of their
    experts, by stores where these reach and else by puts. A combine sums on the experts' ranks alone, and
    results with ``layout="rank"`` do not outlive the buffer.

    Args:
        group: the peers: an mpi4py communicator, a torch process group, an `ep_rt.Group`, or None for
            ``MPI.COMM_WORLD`` under an MPI launcher and a single rank otherwise.
        num_nvl_bytes: memory on this GPU that the peers write results to: enough for all results held at a
            time. 0: from the sizes of `for_moe`, else 1 GiB. The host backend needs none.
        num_rdma_bytes: memory besides for the landing zones of low-latency calls, as
            `get_low_latency_rdma_size_hint` says; over several nodes twice as much is taken, since rows go
            out through memory of the network, too. 0: from the sizes of `for_moe`, else taken from
            `num_nvl_bytes`, and over several nodes 256 MiB. Without `low_latency_mode`, over several nodes,
            the rings between them; 0, and beside low-latency calls: 16 MiB or a little more for each node and
            direction, in and out.
        low_latency_mode: on GPUs, load the kernels of the low-latency calls, which raise without.
        allow_nvlink_for_low_latency_mode: False, for tests: low-latency calls on GPUs go through NVSHMEM to
            every rank, as if each was on a node of its own.
        num_qps_per_rank: see `NetworkOptions`, whose own value wins.
        allow_mnnvl, explicitly_destroy: as in DeepEP; every value means the same.
        enable_shrink: in low-latency mode, mask a late rank and go on without it instead of raising. What
            a rank still sends that was late and not lost may spoil rows of later calls: end it, or let it
            come to `reset`, with all others. `close` waits for no masked rank, which may call it, too. A
            group that is not one of ep_rt's must be a `PeerGroup` for these two. Over several nodes it is for
            NVSHMEM's transport to bear that a rank is lost, and that was not tried.
        num_low_latency_sms: on GPUs, the most SMs that a low-latency call takes, at least two more than there
            are ranks; None: all. Told so, it runs beside a product that leaves as many, see `leaving_sms`.
            Ranks that share a GPU take their part of it at most.
        backend: "host"; "cuda", over several nodes with NVSHMEM; or "auto": what ``EP_RT_BACKEND`` says, else
            "cuda" if the ranks are on one host, the current GPU of each is its own, and several nodes of that
            host can be served, else "host". The attribute `backend` tells.
        ranks_per_node: split the ranks into nodes of this size instead of asking the machine; wins over
            ``EP_RT_NVLINK``.
        timeout_s: how long to wait for a peer.
        moe: sizes to check calls against, see `for_moe`.
        network: settings of NVSHMEM. They count for the first buffer of a process that needs it.
        counts_bytes: on GPUs, use kernels of the normal mode that count what they move over NVLink, for
            `stats`. They are slower, and meant for tests.

    Raises:
        ConfigError: a bad value, or values that differ between ranks.
        BackendError: the backend cannot run here.

    Collective. As a context manager it closes itself; if the body raises on one rank, the others are told.
    """

    num_sms: ClassVar[int] = 16

    def __init__(
        self,
        group: object = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        *,
        low_latency_mode: bool = False,
        num_qps_per_rank: int | None = None,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        num_low_latency_sms: int | None = None,
        backend: str = "auto",
        ranks_per_node: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        moe: MoeSizes | None = None,
        network: NetworkOptions | None = None,
        counts_bytes: bool = False,
    ) -> None:
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s={timeout_s} must be positive")
        self.group = as_group(group)
        self._closed = False
        self._timeout_s = timeout_s
        self._enable_shrink = enable_shrink
        self._moe = moe
        self.num_max_tokens_per_rank = None if moe is None else moe.num_max_tokens_per_rank
        self._network_options = network or NetworkOptions()
        peers = Peers(self.group, timeout_s)
        requested = attempt(
            lambda: self._check_construction(
                backend, num_nvl_bytes, num_rdma_bytes, num_qps_per_rank, num_low_latency_sms
            )
        )
        place = backends.gpu_place() if requested in ("auto", "cuda") else None
        announced = peers.agree(
            "Buffer",
            requested
            if isinstance(requested, EpError)
            else Announcement(
                facts={
                    "ep_rt version": _version.__version__,
                    "backend": requested,
                    "low_latency_mode": low_latency_mode,
                    "enable_shrink": enable_shrink,
                    "num_low_latency_sms": num_low_latency_sms,
                    "allow_nvlink_for_low_latency_mode": allow_nvlink_for_low_latency_mode,
                    "network": astuple(self._network_options),
                    "model": None if moe is None else astuple(moe),
                },
                payload=(secrets.token_hex(2), place),
            ),
        )
        assert isinstance(requested, str)  # agree raised the error
        # Several buffers may use one group: their operations must not be taken for each other's.
        peers.label = f" of buffer {announced[0][0]}"
        self.topology = discover(self.group, ranks_per_node=ranks_per_node, place=place)
        self.backend = requested
        if requested == "auto":
            self.backend = backends.choose([place for _, place in announced], self.topology)
            if self.backend == "host" and self.topology.lacks_nvlink:
                self.topology = discover(self.group, ranks_per_node=ranks_per_node)
        self._identity = object()
        self._engine: HostEngine | CudaEngine
        self._low_latency: HostLowLatency | CudaLowLatency | NoLowLatency
        if self.backend == "host":
            self._engine = HostEngine(peers, self.topology, owner=self._identity)
            self._low_latency = HostLowLatency(peers, owner=self._identity, enable_shrink=enable_shrink)
        else:
            # Over the network low-latency calls do not land in the slab.
            is_remote = self.topology.num_nodes > 1 or not allow_nvlink_for_low_latency_mode
            self._engine = CudaEngine(
                self.group,
                self.topology,
                owner=self._identity,
                num_bytes=slab_bytes(
                    moe,
                    self.num_ranks,
                    num_nvl_bytes,
                    0 if is_remote else num_rdma_bytes,
                    low_latency_mode=low_latency_mode and not is_remote,
                ),
                spare_bytes=spare_bytes(moe, self.num_ranks, num_nvl_bytes),
                timeout_s=timeout_s,
                remote=remote_sizes(moe, self.num_ranks, num_rdma_bytes, low_latency_mode=low_latency_mode),
                network=self._network_options,
                with_low_latency=low_latency_mode,
                with_nvlink_low_latency=allow_nvlink_for_low_latency_mode,
                enable_shrink=enable_shrink,
                num_low_latency_sms=num_low_latency_sms,
                counts_bytes=counts_bytes,
                label=peers.label,
            )
            self._low_latency = self._engine.low_latency or NoLowLatency(self._engine.close)

    @classmethod
    def for_moe(
        cls,
        group: object = None,
        *,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_experts: int,
        num_topk: int,
        dtype: str = "bfloat16",
        **options: Any,
    ) -> Buffer:
        """A buffer sized for a model; its sizes are compared between ranks, and calls checked against them.

        Its communication memory holds a result of the normal mode, the experts' output in `empty`, and the
        next result, each with as many rows as a rank can receive, and the landing zones of low-latency calls.
        So unless `num_nvl_bytes` says less, calls find room outside of CUDA graphs, whatever is held.

        Args:
            num_max_tokens_per_rank: the most tokens a rank dispatches in one call.
            hidden, num_experts, num_topk: of the model. Calls then need no ``num_experts``.
            dtype: of the payload, "bfloat16", "float16", "float32", "float8_e4m3fn" or "uint8".
            options: any keyword of `Buffer`.
        """
        moe = MoeSizes(
            integer(num_max_tokens_per_rank, "num_max_tokens_per_rank"),
            integer(hidden, "hidden"),
            integer(num_experts, "num_experts"),
            integer(num_topk, "num_topk"),
            dtype,
        )
        return cls(group, moe=moe, **options)

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def num_ranks(self) -> int:
        return self.group.size

    def __repr__(self) -> str:
        state = "closed, " if self._closed else ""
        return f"Buffer({state}rank={self.rank}, num_ranks={self.num_ranks}, backend={self.backend!r})"

    # Normal mode.

    def get_dispatch_layout(
        self,
        topk_idx: Any,
        num_experts: int | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> DispatchLayout:
        """Count where this rank's tokens go. Not collective; `dispatch` computes it itself when not given.

        Args:
            topk_idx: [num_tokens, num_topk], int64 or int32, expert ids; -1 for none.
            num_experts: of all ranks together; default: that of `for_moe`.

        Returns:
            DispatchLayout: ``num_tokens_per_rank`` int32 [num_ranks]; ``num_tokens_per_rdma_rank`` int32
            [num_nodes], None on a single node; ``num_tokens_per_expert`` int32 [num_experts];
            ``is_token_in_rank`` bool [num_tokens, num_ranks]; ``event``.

        Raises:
            ArrayError, ConfigError: `topk_idx` or `num_experts` is wrong.

        Source: reference.dispatch_layout.
        """
        self._enter()
        return self._engine.get_dispatch_layout(
            topk_idx,
            self._num_experts(num_experts),
            self._layout_request,
            self._schedule(None, previous_event, async_finish),
        )

    def dispatch(
        self,
        x: Any,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        num_experts: int | None = None,
        layout: str = "rank",
        zero_padding: bool = False,
        quantize: str | None = None,
        num_max_tokens_per_rank: int | None = None,
    ) -> Dispatched:
        """Send every token once to each rank that owns at least one of its experts.

        Rows travel the same way whatever the `layout`: it says how a rank finds what it received. With "rank"
        there is one row for each token. With "expert" there is one for each local expert of a token, and the
        rows of an expert lie together, in the order of (source rank, source token, column): what a grouped
        GEMM takes.

        Args:
            x: [num_tokens, hidden], bfloat16, float16, float32, float8_e4m3fn or uint8, rows of a multiple
                of 16 bytes; or a tuple (x, sf) with scale factors [num_tokens, any], float32 or int32.
            handle: repeat the routing of an earlier dispatch with new rows; give `x` alone then. The layout
                is that of the earlier dispatch.
            num_tokens_per_rank, num_tokens_per_rdma_rank: accepted; they follow from `is_token_in_rank`.
            is_token_in_rank: bool [num_tokens, num_ranks]; computed from `topk_idx` if not given.
            num_tokens_per_expert: int32 [num_experts]; computed from `topk_idx` if not given.
            topk_idx: [num_tokens, num_topk], int64 or int32, expert ids; -1 for none.
            topk_weights: float32 [num_tokens, num_topk]; delivered, not applied.
            expert_alignment: per-expert counts are rounded up to it. With layout "expert" each expert's rows
                begin at a multiple of it, and padding rows follow them up to the next one.
            num_worst_tokens: if not 0, the results have exactly this many rows. Rows past the received ones
                are unspecified, with expert ids -1 and weights 0; rows that do not fit are dropped and
                ``handle.overflow`` says so. With layout "expert" these are the rows from there on once all
                padded segments are laid out, and where even more tokens arrived, the last tokens before that.
            config: accepted; see `Config`.
            previous_event: work to wait for first.
            async_finish: as in DeepEP; on the host the work is done on return.
            allocate_on_comm_stream: accepted; memory is the buffer's own, in the order of calls.
            num_experts: of all ranks together; needed with `topk_idx` alone. Default: that of `for_moe`.
            layout: "rank" or "expert"; "expert" needs `topk_idx`, or the handle of such a dispatch.
            zero_padding: with layout "expert", fill the padding rows of ``recv_x`` and of its scale factors
                with zeros; else they are unspecified. Rows past the last segment are padding too.
            quantize: "fp8" casts rows before they travel: `x` is bfloat16 without scale factors, hidden a
                multiple of 128, and ``recv_x`` a tuple (float8_e4m3fn, float32 [.., hidden / 128]).
            num_max_tokens_per_rank: the most tokens that a rank dispatches in this call, the same on every
                rank. A token arrives at a rank once, however many rows it becomes there: with layout "expert"
                and `num_worst_tokens`, memory of the buffer is taken for so many of each rank, else for
                `num_worst_tokens`. Default, and the most that may be given: that of `for_moe`.

        Returns:
            Dispatched: ``recv_x`` [num_recv_tokens, hidden] (or a tuple with its scale factors), rows ordered
            by source rank, then source token; ``recv_topk_idx`` [num_recv_tokens, num_topk] with *local*
            expert ids, -1 where the expert is not on this rank; ``recv_topk_weights``, 0 there;
            ``num_recv_tokens_per_expert_list``, one count per local expert, also of dropped rows: a list
            or, on a GPU with `num_worst_tokens`, a sequence that waits for the device when it is looked at,
            and is empty without `topk_idx`;
            ``handle`` for `combine`; ``event``. With `handle` the ids and weights are None.

            With layout "expert" ``recv_x`` has P rows, P the sum of the padded segments, or
            `num_worst_tokens`; ``recv_topk_idx`` is None; ``recv_topk_weights`` is float32 [P], the weight of
            each row, 0 in padding; ``num_recv_tokens_per_expert_list`` holds the lengths of the padded
            segments; ``handle.psum_num_tokens_per_expert`` says where the true rows of each expert end.

        Raises:
            ArrayError, ConfigError, HandleError: on every rank; nothing moved.
            CollectiveMismatchError, PeerTimeoutError, PeerFailedError: see `Buffer`.

        Collective. The backward of dispatch is `combine` of the rows' gradients with the same handle.
        Source: reference.dispatch, reference.dispatch_cached, reference.expand, reference.quantize_fp8.
        """
        self._enter()
        given = (x, handle, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights)
        options = (
            expert_alignment,
            num_worst_tokens,
            num_experts if self._moe is None else self._num_experts(num_experts),
            layout,
            zero_padding,
            quantize,
            self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank,
        )
        return self._engine.dispatch(
            given, options, self._dispatch_request, self._schedule(config, previous_event, async_finish)
        )

    def combine(
        self,
        x: Any,
        handle: DispatchHandle,
        topk_weights: Any = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Combined:
        """Return every token's rows to its source rank and sum them.

        With layout "rank" the sum is not weighted: experts apply ``recv_topk_weights`` to their outputs, rank
        by rank. With "expert" each rank first sums the rows of a received token over its columns, weighted if
        `topk_weights` is given, and what travels is that one row.

        Args:
            x: [rows of recv_x, hidden], bfloat16, float16 or float32, rows as the dispatch delivered them.
                Padding rows of layout "expert" are ignored.
            handle: of that dispatch.
            topk_weights: float32 [rows of recv_x, num_topk], summed the same way (the gradient of the
                weights, in a backward pass). With layout "expert" float32 [rows of recv_x], such as
                ``recv_topk_weights``: each row is multiplied by its weight before it is added.
            bias: [num_tokens, hidden], or a tuple of two, dtype of `x`, added at the end.

        Returns:
            Combined: ``combined_x`` [num_tokens, hidden], dtype of `x`: the rows in ascending order of rank,
            then the biases, added in float32 and rounded once to nearest even; ``combined_topk_weights``
            float32 [num_tokens, num_topk], or None without `topk_weights` and with layout "expert";
            ``event``. With layout "expert" a rank's row is the sum of its products, each rounded to float32,
            over the columns in ascending order, added in float32 and rounded once to the dtype of `x`.

        Raises:
            ArrayError, ConfigError, HandleError: on every rank; nothing moved.
            CollectiveMismatchError, PeerTimeoutError, PeerFailedError: see `Buffer`.

        Collective. The backward of combine is `dispatch` of the gradient with the same handle.
        Source: reference.combine, reference.collapse.
        """
        self._enter()
        return self._engine.combine(
            (x, handle, topk_weights, bias),
            self._combine_request,
            self._schedule(config, previous_event, async_finish),
        )

    # Handles for graphs that hold arrays and constants alone, see `ep_rt.jax`.

    def flat_layout(self, shape: FlatShape) -> FlatLayout:
        """The sizes of the arrays of a flat handle, and what is where in them. Local.

        Raises:
            ConfigError: more tokens than a rank may dispatch over several nodes.
        """
        self._enter()
        return self._engine.flat_layout(shape)

    def flatten_handle(self, handle: DispatchHandle, shape: FlatShape, framework: str) -> list[Any]:
        """All that a handle holds, as arrays of bytes in a framework, which keep no handle. Local.

        They stand for the handle on this rank, as do copies, while this buffer is open. On a GPU they are the
        memory that the handle keeps.

        Args:
            shape: what follows from the arguments of the dispatch; after an exact one, from its results.
            framework: "numpy" or "jax" on the host backend, "cupy" or "jax" on a GPU.
        """
        self._enter()
        return self._engine.flatten_handle(handle, shape, framework)

    def unflatten_handle(self, shape: FlatShape, parts: Sequence[Any]) -> DispatchHandle:
        """The handle again, from the arrays of `flatten_handle` or from copies. Local.

        On a GPU it refers to the arrays; ranks do not compare which dispatch it comes from.
        """
        self._enter()
        return self._engine.unflatten_handle(shape, parts)

    def deliver(self, results: Sequence[Any], targets: Sequence[arrays.ArrayView]) -> None:
        """Copy CuPy arrays to memory of others, on CuPy's current stream. Local.

        Later calls come after that, whatever their stream, so results may be dropped at once.

        Raises:
            BackendError: on the host backend.
        """
        self._cuda().deliver(results, targets)

    # Low-latency mode.

    def low_latency_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        num_max_dispatch_tokens_per_rank: int | None = None,
        num_experts: int | None = None,
        cumulative_local_expert_recv_stats: Any = None,
        dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: Any = None,
        layout: str = "expert",
    ) -> LowLatencyDispatched:
        """Send every token to its experts, which receive them padded and ordered by expert.

        A row travels once to each rank that owns an expert of its token. With layout "expert" the receiver
        copies it to the rows of its experts; with "rank" the result is where it landed, and lists say which
        rows each expert takes: no copy, and the fastest.

        Below, El is num_experts / num_ranks, R num_ranks and M num_max_dispatch_tokens_per_rank.

        Args:
            x: [num_tokens, hidden], bfloat16, at most M tokens.
            topk_idx: [num_tokens, num_topk], int64 or int32; -1 for none. On GPUs up to 64 columns.
            num_max_dispatch_tokens_per_rank: the same on every rank. Default: that of `for_moe`.
            num_experts: of all ranks together, on GPUs at most 512 on each and 4096 in all. Default: that of
                `for_moe`.
            cumulative_local_expert_recv_stats: int32 [El]; the rows of each expert are added to it.
            dispatch_wait_recv_cost_stats: int64 [R]; microseconds waited for each source are added to it. On
                the host for its rows alone: ranks have met before.
            use_fp8: cast to float8_e4m3fn, one float32 scale factor for 128 channels.
            round_scale: round scale factors up to powers of two.
            use_ue8m0: deliver those as packed exponents, four in an int32.
            return_recv_hook: return once this rank's rows are on their way; ``hook()`` receives and fills the
                results; called again it does nothing. It waits for the peers' dispatch calls, not for their
                hooks. Not for JAX arrays. On GPUs at most two dispatches may be without their hooks; a third
                one takes the place of the first, whose hook then raises, and over several nodes raises
                itself: what was put must arrive.
            topk_weights: float32 [num_tokens, num_topk], to travel along: a combine with ``reduce="rank"``
                then uses these, and need not send any first.
            layout: "expert" or "rank"; the same on all ranks.

        Returns:
            LowLatencyDispatched: ``recv_x`` [El, R*M, hidden], or a tuple with scale factors float32
            [El, R*M, hidden/128] or int32 [El, R*M, ceil(hidden/512)], contiguous along R*M; ``recv_count``
            int32 [El]; ``handle``; ``event``; ``hook``, None without `return_recv_hook`. An expert's
            rows come first, by source rank, token and column of `topk_idx`; the others are unspecified.

            With layout "rank" ``recv_x`` is [R, M, hidden] and scale factors [R, M, ..], C-contiguous: the
            row of each (source rank, token), unspecified where no expert of the token is here;
            ``handle.expert_rows`` lists those of each expert in the same order. On GPUs this is landing
            memory, valid until the next low-latency dispatch of this shape receives (without a hook: is
            called), or until the combine with its handle. A replay of a captured call lands where the
            capture did.

        Raises:
            ArrayError, ConfigError: on every rank; nothing moved.
            CollectiveMismatchError, PeerTimeoutError, PeerFailedError: see `Buffer`. With `enable_shrink` a
                late rank is masked instead of PeerTimeoutError.

        Collective. Source: reference.low_latency_dispatch.
        """
        self._enter()
        given = (x, topk_idx, cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats, topk_weights)
        options = (
            num_max_dispatch_tokens_per_rank,
            num_experts,
            use_fp8,
            round_scale,
            use_ue8m0,
            layout,
            async_finish,
            return_recv_hook,
        )
        return self._low_latency.dispatch(
            given,
            options,
            self._low_latency_dispatch_request,
            with_hook=return_recv_hook,
            schedule=self._schedule(None, None, async_finish),
        )

    def low_latency_combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Any = None,
        combine_wait_recv_cost_stats: Any = None,
        *,
        use_fp8: bool = False,
        reduce: str = "rank",
    ) -> LowLatencyCombined:
        """Return the expert rows of every token to its source rank, weighted and summed.

        With reduce "rank" each rank sums the rows of its own experts before they travel, so a token gets one
        row from each rank. That sum is rounded to bfloat16, which is one rounding more than with "source",
        where every row travels and is weighted at the token's rank, as in DeepEP.

        Args:
            x: [El, R*M, hidden], bfloat16, a row for each row of an expert that `low_latency_dispatch`
                delivered, or listed.
            topk_idx: as dispatched; entries set to -1 since then are left out of the sum.
            topk_weights: float32 [num_tokens, num_topk]. With reduce "rank", if the dispatch took weights,
                those are used and neither these nor `topk_idx` are looked at.
            handle: of that dispatch.
            use_logfmt: rows travel as LogFMT-10, with its rounding.
            use_fp8: rows travel as float8_e4m3fn with a float32 scale factor for 128 channels.
            reduce: "rank" or, on GPUs within one node alone, "source".
            zero_copy: the rows are already in `get_next_low_latency_combine_buffer`; `x` gives the shape.
            return_recv_hook: as in `low_latency_dispatch`; JAX needs `out` in another framework.
            out: [num_tokens, hidden], bfloat16, to write the result to.
            combine_wait_recv_cost_stats: int64 [R]; microseconds waited for each rank are added to it.

        Returns:
            LowLatencyCombined: ``combined_x`` [num_tokens, hidden], bfloat16: weight times row, summed in
            float32 in the order of the columns of `topk_idx`, rounded once; with reduce "rank" so on each
            rank, and then over the ranks in ascending order; ``event``; ``hook``.

        Raises: as `low_latency_dispatch`, and HandleError.

        Collective. Source: reference.low_latency_combine.
        """
        self._enter()
        return self._low_latency.combine(
            (x, topk_idx, topk_weights, out, combine_wait_recv_cost_stats),
            handle,
            (use_logfmt, zero_copy, use_fp8, reduce, async_finish, return_recv_hook),
            self._low_latency_combine_request,
            with_hook=return_recv_hook,
            schedule=self._schedule(None, None, async_finish),
        )

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Any:
        """The bfloat16 [El, R*M, hidden] array that the next combine with ``zero_copy`` reads. Local."""
        self._enter()
        check_owner(handle, LowLatencyHandle, self._identity)
        return self._low_latency.next_combine_buffer(handle)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing needs cleaning between modes; for programs that do it. Local."""
        self._enter()

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of this rank's low-latency calls, or take it back. Local; needs `enable_shrink`.

        A rank that was missing when calls of a shape were first made comes back by `reset` alone: before it
        this raises ConfigError, and `low_latency_clean_mask_buffer` leaves the rank out.

        A masked rank gets nothing from this rank; its tokens and its experts' outputs are missing.
        """
        self._enter()
        self._low_latency.update_mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Any) -> None:
        """Fill int32 [num_ranks] with 1 for masked ranks, 0 for others. Local; needs `enable_shrink`."""
        self._enter()
        self._low_latency.query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmask every rank, see `low_latency_update_mask_buffer`. Local; needs `enable_shrink`."""
        self._enter()
        self._low_latency.clean_mask()

    # Tuning and streams.

    @classmethod
    def set_num_sms(cls, num_sms: int) -> None:
        """Let kernels use this many streaming multiprocessors, from 1 up. The host backend has none."""
        if num_sms < 1:
            raise ConfigError(f"num_sms={num_sms} must be at least 1")
        cls.num_sms = num_sms

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        """The recommended `Config` for a number of ranks; any number will do."""
        return Config(num_sms=cls.num_sms)

    @classmethod
    def get_combine_config(cls, num_ranks: int) -> Config:
        """As `get_dispatch_config`."""
        return Config(num_sms=cls.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_ranks: int,
        num_experts: int,
        *,
        num_topk: int = 32,
        with_columns: bool = False,
    ) -> int:
        """Bytes to pass as ``num_rdma_bytes`` for low-latency mode, for calls of one shape.

        Two landing zones, of one bfloat16 row for each (source rank, token), for each direction. Combines
        with ``reduce="source"``, LogFMT or FP8, and all of a buffer with ``enable_shrink``, need two more of
        their own, larger ones with more than `num_ranks` columns of ``topk_idx``: give `with_columns` for
        these.

        Args:
            num_topk: columns of ``topk_idx``, at most.
        """
        local_experts(num_experts, num_ranks)
        return area_bytes_hint(
            num_max_dispatch_tokens_per_rank,
            hidden,
            num_ranks,
            num_experts,
            num_topk,
            with_columns=with_columns,
        )

    @staticmethod
    def capture() -> EventOverlap:
        """An event behind the work enqueued on the current streams; on the host, nothing is pending."""
        return capture()

    def get_comm_stream(self) -> Any:
        """The communication stream, see `Buffer`: a CuPy stream, which other frameworks understand too.

        Raises:
            BackendError: the host backend has none.
        """
        return self._cuda().comm_stream

    def get_local_buffer_tensor(
        self, dtype: Any, size: Any = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Any:
        """Raw communication memory: not there; `empty` gives arrays in it."""
        self._cuda()
        raise BackendError("the CUDA backend hands out no raw communication memory; use empty()")

    def empty(self, shape: Sequence[int], dtype: Any = "bfloat16", *, framework: str | None = None) -> Any:
        """An uninitialised array in communication memory, from which `combine` reads without a copy. Local.

        Where that memory would not have room for another result then, the array lies elsewhere on the device,
        and `stats` counts it.

        Args:
            dtype: a name, or a dtype of NumPy, torch or JAX.
            framework: "cupy", "torch" or "jax"; default that of a torch dtype, else CuPy.

        Raises:
            BackendError: on the host backend, where every array will do.
        """
        if framework is None:
            framework = "torch" if type(dtype).__module__ == "torch" else "cupy"
        return self._cuda().empty(tuple(shape), arrays.dtype_name(dtype), framework)

    @property
    def stats(self) -> CudaStats:
        """Counters of the CUDA backend. Local.

        Over several nodes, and with `counts_bytes`, kernels count too: reading waits for this rank's calls
        then, and is not allowed while a CUDA graph is captured.

        Raises:
            BackendError: the host backend has none.
            PeerTimeoutError: kernels count, and a call gave up.
        """
        return self._cuda().stats

    def memory_report(self) -> MemoryReport:
        """The device memory held by the CUDA backend; print it for a table. Local.

        Raises:
            BackendError: the host backend holds none.
        """
        return self._cuda().memory_report()

    # Life time.

    def reset(self) -> None:
        """After an error that all ranks raised, or of a late rank that came after all: start again together.

        Waits for this rank's device. Results and handles of earlier calls stay valid, but for handles of
        low-latency calls of a shape that was set up without a masked rank; what such calls left in a CUDA
        graph must not be replayed any more. Masks stay as they are. Collective.

        Raises:
            CollectiveMismatchError: with `enable_shrink`, another rank closes the buffer.
            PeerTimeoutError, PeerFailedError: a peer did not come; make a new buffer over the others.
        """
        self._enter()
        if self._enable_shrink and isinstance(self.group, PeerGroup):
            self.group.rejoin(op="reset", timeout_s=self._timeout_s)
        self._engine.reset()

    def close(self) -> None:
        """Give everything back. Collective; calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._low_latency.close()  # which knows the ranks that are lost

    destroy = close

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, EpError) and error.is_collective):
            self.close()
        else:
            # The peers are elsewhere: they learn why this rank leaves instead of waiting for it.
            self._closed = True
            self.group.abort(error)

    def _enter(self) -> None:
        if self._closed:
            raise ClosedError("the buffer is closed")

    def _schedule(
        self, config: Config | None, previous_event: EventOverlap | None, async_finish: bool
    ) -> Schedule:
        num_sms = self.num_sms if config is None else config.num_sms
        return named(Schedule, (previous_event, async_finish, num_sms))

    def _cuda(self) -> CudaEngine:
        self._enter()
        if not isinstance(self._engine, CudaEngine):
            raise BackendError("the host backend has no streams and no communication memory")
        return self._engine

    def _check_construction(
        self,
        backend: str,
        num_nvl_bytes: int,
        num_rdma_bytes: int,
        num_qps_per_rank: int | None,
        num_low_latency_sms: int | None,
    ) -> str:
        if num_qps_per_rank is not None and self._network_options.num_qps_per_rank is None:
            num_qps = integer(num_qps_per_rank, "num_qps_per_rank")
            self._network_options = replace(self._network_options, num_qps_per_rank=num_qps)
        if min(integer(num_nvl_bytes, "num_nvl_bytes"), integer(num_rdma_bytes, "num_rdma_bytes")) < 0:
            raise ConfigError(
                f"num_nvl_bytes={num_nvl_bytes} and num_rdma_bytes={num_rdma_bytes} must not be negative"
            )
        if num_low_latency_sms is not None and integer(num_low_latency_sms, "num_low_latency_sms") < 1:
            raise ConfigError(f"num_low_latency_sms={num_low_latency_sms} must be at least 1")
        if self._moe is not None:
            self._moe.check(self.num_ranks)
        return backends.requested(backend)

    def _num_experts(self, given: int | None) -> int:
        of_model = None if self._moe is None else self._moe.num_experts
        return _given_or_of_model("num_experts", given, of_model)

    def _num_max_tokens(self, given: int | None) -> int:
        return _given_or_of_model("num_max_dispatch_tokens_per_rank", given, self.num_max_tokens_per_rank)

    def _dispatch_request(self, x: Any, *given: Any) -> DispatchRequest:
        request = DispatchRequest.of(
            x, *given, owner=self._identity, num_ranks=self.num_ranks, place=self._engine.place
        )
        if self._moe is not None:
            self._moe.check_dispatch(request)
        return request

    def _low_latency_dispatch_request(
        self,
        x: Any,
        topk_idx: Any,
        recv_stats: Any,
        wait_stats: Any,
        topk_weights: Any,
        num_max_tokens: int | None,
        num_experts: int | None,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        layout: str,
        async_finish: bool,
        with_hook: bool,
    ) -> LowLatencyDispatchRequest:
        _check_finish(async_finish, with_hook)
        return LowLatencyDispatchRequest.of(
            x,
            topk_idx,
            self._num_max_tokens(num_max_tokens),
            self._num_experts(num_experts),
            recv_stats,
            wait_stats,
            use_fp8,
            round_scale,
            use_ue8m0,
            topk_weights,
            layout,
            num_ranks=self.num_ranks,
            place=self._engine.place,
        )

    def _low_latency_combine_request(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        out: Any,
        wait_stats: Any,
        handle: LowLatencyHandle,
        use_logfmt: bool,
        zero_copy: bool,
        use_fp8: bool,
        reduce: str,
        async_finish: bool,
        with_hook: bool,
    ) -> LowLatencyCombineRequest:
        _check_finish(async_finish, with_hook)
        return LowLatencyCombineRequest.of(
            x,
            topk_idx,
            topk_weights,
            handle,
            use_logfmt,
            zero_copy,
            out,
            wait_stats,
            use_fp8,
            reduce,
            owner=self._identity,
            num_ranks=self.num_ranks,
            place=self._engine.place,
        )

    def _layout_request(self, topk_idx: object, num_experts: int) -> LayoutRequest:
        return LayoutRequest.of(topk_idx, num_experts, num_ranks=self.num_ranks, place=self._engine.place)

    def _combine_request(self, x: Any, handle: DispatchHandle, weights: Any, bias: Any) -> CombineRequest:
        return CombineRequest.of(x, handle, weights, bias, owner=self._identity, place=self._engine.place)


def _given_or_of_model(name: str, given: int | None, of_model: int | None) -> int:
    value = of_model if given is None else given
    if value is None:
        raise ConfigError(f"{name}= is needed, or a buffer made by Buffer.for_moe")
    return value


def _check_finish(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ConfigError("async_finish and return_recv_hook exclude each other")
