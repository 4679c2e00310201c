"""``python ragged_program.py CASE START_S DEADLINE_S`` under mpirun: the comparison with JAX, on CPUs.

XLA has no ragged_all_to_all for CPUs, so it is made of other collectives here; everything else is real.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bench_library import packed_rows

from ep_rt.bench import ragged
from ep_rt.bench.check import CheckError
from ep_rt.bench.ragged import Indices, Ragged
from ep_rt.errors import BackendError
from ep_rt.exchange import Group
from ep_rt.groups import as_group

REPEAT = 3


def ragged_all_to_all(
    operand: Any,
    output: Any,
    input_offsets: Any,
    send_sizes: Any,
    output_offsets: Any,
    recv_sizes: Any,
    *,
    axis_name: str,
) -> Any:
    """As `jax.lax` says, and nothing moves where sizes differ."""
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, targets = (
        jax.lax.all_gather(each, axis_name) for each in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(len(output))
    for src in range(len(operands)):
        place = row - targets[src, me]
        is_sent = (place >= 0) & (place < sizes[src, me]) & (sizes[src, me] == recv_sizes[src])
        sent = operands[src][jnp.clip(place + starts[src, me], 0, len(operand) - 1)]
        output = jnp.where(is_sent[:, None], sent, output)
    return output


def opened(group: Group) -> Ragged:
    place: Any = SimpleNamespace(device=0)
    return Ragged(group, place, REPEAT)


def whole(group: Group) -> None:
    """Times; rows in other places; a failure of one rank. The library can be used after both."""
    library = opened(group)
    for of_ranks in packed_rows(group.size):
        times = library.measure(of_ranks[group.rank])
        assert times.kernel_us is None
        assert len(times.op_us) == REPEAT
        assert times.call_us is not None
        assert min(times.call_us) > 0
    assert jax.__version__ in library.title
    packed = packed_rows(group.size)[0][group.rank]

    def offsets_of_the_receiver(counts: Any, rank: int) -> Indices:
        right = indices_of(counts, rank)
        of_rank = (np.cumsum(counts, axis=0) - counts)[:, rank].astype(np.int32)
        return Indices(
            input_offsets=right.input_offsets,
            send_sizes=right.send_sizes,
            output_offsets=of_rank,
            recv_sizes=right.recv_sizes,
        )

    indices_of = Indices.of
    Indices.of = offsets_of_the_receiver  # type: ignore[method-assign]
    with pytest.raises(CheckError, match="JAX's dispatch brought other rows") as caught:
        library.measure(packed)
    assert caught.value.is_collective

    def fail(counts: Any, rank: int) -> Indices:
        if rank == 1:
            raise MemoryError("no room")
        return indices_of(counts, rank)

    Indices.of = fail  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="JAX, dispatch: MemoryError: no room") as failed:
        library.measure(packed)
    assert failed.value.is_collective
    Indices.of = indices_of  # type: ignore[method-assign]
    library.measure(packed)
    library.close()


def absent(group: Group) -> None:
    """The last rank does not come to JAX."""
    if group.rank == group.size - 1:
        jax.distributed.initialize = no_one
    opened(group)


def no_one(**_: Any) -> None:
    raise RuntimeError("did not come")


def stuck(group: Group) -> None:
    """One rank does not come to a call, for which the others wait inside XLA."""
    library = opened(group)
    if group.rank == 0:
        library._received = lambda *_: time.sleep(1e6)  # type: ignore[method-assign, assignment]
    library.measure(packed_rows(group.size)[0][group.rank])


if __name__ == "__main__":
    ragged._PLATFORM = "cpu"
    jax.lax.ragged_all_to_all = ragged_all_to_all
    ragged._START_S, ragged._DEADLINE_S = int(sys.argv[2]), float(sys.argv[3])  # type: ignore[misc]
    ranks = as_group()
    {"whole": whole, "absent": absent, "stuck": stuck}[sys.argv[1]](ranks)
    print(f"rank {ranks.rank} is done")
