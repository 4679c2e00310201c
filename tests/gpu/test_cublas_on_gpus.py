"""Products that leave SMs, beside a kernel that holds these."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import IS_UNDER_MPI, device_count

from ep_rt import leaving_sms

if device_count():
    import cupy
    from occupants import Holder

SIZE = 4096
NUM_SMS = 16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_UNDER_MPI, reason="needs no peers"),
    pytest.mark.skipif(device_count() == 0, reason="no GPU"),
]


@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_product_ends_beside_a_kernel_that_holds_sms(framework: str) -> None:
    library: Any = pytest.importorskip(framework)
    ones = library.ones((SIZE, SIZE), dtype=library.float16)
    if framework == "torch":
        ones = ones.cuda()
    ones @ ones  # loads its kernel and takes memory
    with leaving_sms(NUM_SMS, framework=framework):
        ones @ ones
    cupy.cuda.runtime.deviceSynchronize()
    holder = Holder(NUM_SMS)
    holder.start()
    with leaving_sms(NUM_SMS, framework=framework):
        product = ones @ ones
    done = library.cuda.Event()
    done.record()
    done.synchronize()
    assert holder.is_holding()
    holder.wait()
    assert bool((product == SIZE).all())
