"""How long the first buffer and the first dispatch of a process take, without and with compiled kernels.

Only a process that has done nothing yet can tell. Threads are measured in two processes started here, over
one empty kernel cache: the first one compiles. Under MPI it is this process, with the cache that there is:
run it twice with ``EP_RT_CACHE_DIR`` set to one empty directory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import settings
from ..errors import DeviceError
from ..exchange import Group
from .layer import open_buffer
from .options import Options
from .places import Place, environment
from .report import FirstCall
from .workload import ELEMENTS, Payload, Routing

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Document:
    """What a process said."""

    machine: Mapping[str, Any]
    call: FirstCall


def measure_here(group: Group, place: Place, options: Options) -> FirstCall:
    """The first of this process, which has used no kernel yet. Collective."""
    element = ELEMENTS[options.dtypes[0]]
    routing = Routing.of(options, group.size, min(options.tokens))
    payload = Payload(element, options.hidden)
    tokens = np.arange(min(options.tokens))
    x = place.put(payload.rows(group.rank, tokens, 0))
    ids, weights = place.put(routing.topk_idx[group.rank]), place.put(routing.weights(group.rank))
    scales = place.put(payload.scales(group.rank, tokens, 0)) if element.block else None
    has_kernels = any((settings().cache_dir / "kernels").glob("*.cubin"))
    group.barrier()
    start = time.perf_counter()
    with open_buffer(group, place, routing, element, options) as buffer:
        opened = time.perf_counter()
        out = buffer.dispatch(
            x if scales is None else (x, scales),
            topk_idx=ids,
            topk_weights=weights,
            num_experts=options.num_experts,
        )
        place.synchronize()
        done = time.perf_counter()
        group.barrier()
        del out
    everyone = group.allgather((has_kernels, place.opened_s, opened - start, done - opened), op="first call")
    was_warm, imports_s, buffers_s, dispatches_s = zip(*everyone, strict=True)
    return FirstCall(
        cache="none" if place.setting.backend == "host" else "warm" if all(was_warm) else "cold",
        import_s=max(imports_s),
        buffer_s=max(buffers_s),
        dispatch_s=max(dispatches_s),
    )


def measure_in_processes(arguments: Sequence[str]) -> list[Document]:
    """Cold, then warm: two processes that run ``bench`` with these arguments.

    Raises:
        DeviceError: one of them failed; the message is what it said.
    """
    command = [sys.executable, "-m", "ep_rt", "bench", *arguments, "--in-place", "--json", "-"]
    documents = []
    with tempfile.TemporaryDirectory(prefix="ep_rt-first-call-") as directory:
        environ = environment(EP_RT_CACHE_DIR=directory, CUPY_CACHE_DIR=str(Path(directory) / "cupy"))
        for _ in range(2):
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S)
            if done.returncode:
                raise DeviceError(f"a process for the first call failed:\n{done.stderr.strip()}")
            said = json.loads(done.stdout)
            documents.append(Document(said["machine"], FirstCall(**said["first_calls"][0])))
    return documents
