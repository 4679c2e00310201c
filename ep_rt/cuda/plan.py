"""How a call is laid over a GPU: blocks, warps, stages, memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

from ..errors import ConfigError
from .layout import MAX_BLOCKS, MAX_LOCAL_RANKS, OFFSET_UNIT, align_up

DEFAULT_SLAB_BYTES: Final = 1 << 30
_MIN_MODEL_SLAB_BYTES: Final = 64 << 20
DEFAULT_NETWORK_TOKENS: Final = 8192
"""Most tokens that a rank dispatches over several nodes in a call, where no model says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Warps that move rows through rings in shared memory, and warps beside them."""

    num_data_warps: int
    num_other_warps: int
    num_stages: int
    stage_bytes: int
    scale_bytes: int = 0  # of a stage besides, for the scale factors of a row

    @property
    def num_threads(self) -> int:
        return 32 * (self.num_data_warps + self.num_other_warps)

    @property
    def shared_bytes(self) -> int:
        """Of all rings together."""
        return self.num_data_warps * self.num_stages * (self.stage_bytes + self.scale_bytes)


# Measured on H200: the shape of the stages hardly matters, one warp for the metadata is too few.
DISPATCH_STAGES: Final = Stages(
    num_data_warps=12, num_other_warps=4, num_stages=4, stage_bytes=3584, scale_bytes=512
)
# Not measured. A stage holds bfloat16; scale factors of a piece are a multiple of 16 bytes, for bulk copies.
QUANTIZING_STAGES: Final = Stages(
    num_data_warps=12, num_other_warps=4, num_stages=4, stage_bytes=4096, scale_bytes=64
)
COMBINE_STAGES: Final = Stages(num_data_warps=16, num_other_warps=0, num_stages=6, stage_bytes=2048)
# Not measured: those of the operations that they stand beside.
EXPAND_STAGES: Final = DISPATCH_STAGES
COLLAPSE_STAGES: Final = COMBINE_STAGES


# Two blocks of a low-latency kernel share an SM: one sends while the other receives. More threads would have
# to keep registers in memory, from where they come slowly: an acquire empties the first cache.
LOW_LATENCY_THREADS: Final = 256
LOW_LATENCY_BLOCKS_PER_SM: Final = 2


# Half of the blocks send, half receive; what one waits for, others move.
EXCHANGE_BLOCKS_PER_SM: Final = 4
SUM_BLOCKS_PER_SM: Final = 2

MAX_REDUNDANT_TOKENS: Final = DISPATCH_STAGES.num_threads
"""Up to so many tokens every block of a dispatch makes the whole layout for itself.

One token per thread is what a block holds. To read all ids in one pass costs less than an exchange between
blocks; more passes, in every block, soon cost more.
"""


def num_blocks(num_sms: int, *, num_device_sms: int, num_sharing: int) -> int:
    """Blocks of a kernel that waits for its peers, one per SM, so that all of them run at once.

    Args:
        num_sharing: ranks on this GPU. They wait for each other, so they divide its SMs: each gets at most
            its part, and that is the one case in which `num_sms` is not taken as it is.

    Raises:
        ConfigError: the GPU has fewer SMs, or too few for its ranks.
    """
    if not 1 <= num_sms <= min(num_device_sms, MAX_BLOCKS):
        raise ConfigError(
            f"num_sms={num_sms}; this GPU has {num_device_sms} and a kernel uses 1 to {MAX_BLOCKS}"
        )
    share = num_device_sms // num_sharing
    if share == 0:
        raise ConfigError(f"{num_sharing} ranks share a GPU of {num_device_sms} SMs")
    return min(num_sms, share)


def num_local_blocks(num_blocks: int, *, max_blocks: int) -> int:
    """Blocks of a kernel that moves rows within this GPU, beside a call of `num_blocks`.

    It is bound by what an SM moves and not by links, so it takes more SMs for a shorter time.
    """
    return min(4 * num_blocks, max_blocks)


def num_stagers(num_pullers: int, num_bytes: int, *, max_blocks: int) -> int:
    """Blocks of a combine that copy its input into the slab, beside `num_pullers` that sum.

    Measured on H200: a block copies about 45 GB/s, and 16 of them sum what a rank needs at 430 GB/s. They
    come as long as all together take half of the places at most: a chunk needs all that copy it, so of two
    buffers whose combines ranks start in different order none would end if one took places that the other
    needs. 0 where pullers take as many already: then they do it.
    """
    per_block = COMBINE_STAGES.shared_bytes
    return max(0, min(3 * num_pullers, max_blocks // 2 - num_pullers, -(-num_bytes // per_block)))


def slab_bytes(num_nvl_bytes: int) -> int:
    """Payload of a slab without a model; `num_nvl_bytes`: what the caller asked for, 0 for the usual size."""
    return align_up(num_nvl_bytes, OFFSET_UNIT) if num_nvl_bytes else DEFAULT_SLAB_BYTES


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What calls of a model need in the slab.

    Attributes:
        result: the most that a dispatch receives.
        largest: that, or the experts' output, or what comes next once one of them is there.
    """

    result: int
    largest: int

    @classmethod
    def of(cls, row_bytes: int, answer_bytes: int, num_topk: int, num_rows: int) -> ModelBytes:
        """
        Args:
            row_bytes, answer_bytes: of a row that is dispatched, and of one of the experts' output, at most.
            num_rows: the most a rank can receive in one call.
        """
        # Scale factors take a 32nd of an FP8 row.
        metadata_bytes = 12 * num_topk + row_bytes // 32
        num_bytes = num_rows * (row_bytes + metadata_bytes) + 4 * OFFSET_UNIT  # as its parts are aligned
        result = align_up(num_bytes, OFFSET_UNIT)
        return cls(result, result * max(1, -(-answer_bytes // row_bytes)))

    @property
    def slab(self) -> int:
        """A result, the experts' output, and what both of them leave free."""
        return max(_MIN_MODEL_SLAB_BYTES, self.result + 2 * self.largest)


def rounded(num_bytes: int) -> int:
    """To whole units of the slab."""
    return align_up(num_bytes, OFFSET_UNIT)


@dataclass(frozen=True, slots=True)
class Rings:
    """Rings between a rank and one of another node, one for each channel and direction."""

    num_channels: int
    num_slots: int
    slot_bytes: int

    def num_bytes(self, num_nodes: int) -> int:
        """Of all rings in one direction."""
        return num_nodes * self.num_channels * self.num_slots * self.slot_bytes


_RECORD_ALIGN: Final = 16  # of the parts of a row in a slot


@dataclass(frozen=True, slots=True)
class Parts:
    """What belongs to a row on the network: bytes of each part, 0 where it is absent, and where it lies.

    Attributes:
        offsets: within the record of those that travel together.
        order: the numbers of those that are there: the first `num_ahead` go ahead of the others, in records
            of their own.
        ahead_bytes, row_bytes: of a record of those, and of the others.
    """

    num_bytes: tuple[int, ...]
    offsets: tuple[int, ...]
    order: tuple[int, ...]
    num_ahead: int
    ahead_bytes: int
    row_bytes: int

    @classmethod
    def of(cls, num_bytes: Sequence[int], *, num_ahead: int = 0) -> Parts:
        """The last `num_ahead` parts, those that are there, go ahead of the others."""
        sizes = [align_up(each, _RECORD_ALIGN) for each in num_bytes]
        first = len(sizes) - num_ahead
        *offsets, row_bytes = accumulate(sizes[:first], initial=0)
        *ahead, ahead_bytes = accumulate(sizes[first:], initial=0)
        early = [number for number in range(first, len(sizes)) if sizes[number]]
        late = [number for number in range(first) if sizes[number]]
        order = (*early, *late)
        return cls(tuple(num_bytes), (*offsets, *ahead), order, len(early), ahead_bytes, row_bytes)

    @property
    def record_bytes(self) -> int:
        """Of a row with everything."""
        return self.ahead_bytes + self.row_bytes

    def places(self, num_rows: int) -> tuple[int, ...]:
        """Where each part of so many rows lies in memory that holds them, and where it ends."""
        sizes = (align_up(each * num_rows, OFFSET_UNIT) for each in self.num_bytes)
        return tuple(accumulate(sizes, initial=0))


def node_masks_bytes(num_nodes: int) -> int:
    """Of a token that no expert ids go with: a mask of ranks for each node, in whole words."""
    return align_up(num_nodes, 4)


# On two H200 channels of warps, with slots for two rows, had half the speed of these. A slot is a message on
# the network.
_MIN_SLOT_BYTES: Final = 128 << 10
_NUM_CHANNELS: Final = 32
_LARGEST_RECORD_BYTES: Final = 66 << 10  # 16384 float32, and 128 columns


def record_bytes(row_bytes: int, num_topk: int) -> int:
    """At least what a row takes on the network with its scale factors, ids and weights.

    Args:
        row_bytes: of the widest rows of the model, 0 for no model.
    """
    if not row_bytes:
        return _LARGEST_RECORD_BYTES
    return align_up(row_bytes + row_bytes // 32 + 12 * num_topk + 64, 1024)


def rings(num_nodes: int, num_bytes: int, record_bytes: int) -> Rings:
    """Rings of both directions that take `num_bytes` at most; 0 for the usual ones.

    Args:
        record_bytes: that a slot must hold.

    Raises:
        ConfigError: they do not fit.
    """
    chosen = Rings(num_channels=_NUM_CHANNELS, num_slots=4, slot_bytes=max(_MIN_SLOT_BYTES, record_bytes))
    while num_bytes and 2 * chosen.num_bytes(num_nodes) > num_bytes:
        if chosen.num_channels == 1:
            raise ConfigError(
                f"num_rdma_bytes={num_bytes}: rings between {num_nodes} nodes take at least "
                f"{2 * chosen.num_bytes(num_nodes)}"
            )
        chosen = replace(chosen, num_channels=chosen.num_channels // 2)
    return chosen


def scratch_bytes(num_tokens: int) -> int:
    """Of a dispatch besides its results: a mask for each token, and a list of tokens for each rank."""
    return num_tokens * (4 * MAX_LOCAL_RANKS + 1)


def aligned(counts: Sequence[int], alignment: int) -> list[int]:
    """Each count, rounded up to a multiple of `alignment`."""
    return list(counts) if alignment == 1 else [-(-count // alignment) * alignment for count in counts]
