"""What a launch is made of, as far as it needs no device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ep_rt.cuda import kernels, launch, layout
from ep_rt.errors import ArrayError, TopologyError

ARGS = {"hang": 0x1000, "timeout_ns": 5, "rank": 1, "num_ranks": 3, "operation": 1, "slabs": (16, 32, 48)}


def test_pack_places_fields_by_name() -> None:
    args = launch.pack(kernels.barrier(3).args, **ARGS)
    assert args.nbytes == 32 + 8 * 8
    assert args.tobytes()[16:24] == (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    assert args["slabs"][0].tolist() == [16, 32, 48, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("change", [{"extra": 1}, {"rank": None}])
def test_pack_wants_every_field_and_no_other(change: dict[str, int | None]) -> None:
    values = {name: value for name, value in {**ARGS, **change}.items() if value is not None}
    with pytest.raises(ValueError, match="needed"):
        launch.pack(kernels.barrier(3).args, **values)


def test_fields_are_the_same_memory() -> None:
    spec = kernels.intranode_combine("bfloat16")
    args = np.zeros(1, spec.args)
    fields = launch.fields_type(spec.args).from_address(args.ctypes.data)
    fields.out, fields.digest, fields.num_topk = 1 << 63, 2**32 - 1, -5
    fields.bias[1] = 77
    assert args["out"][0] == 1 << 63
    assert (args["digest"][0], args["num_topk"][0]) == (2**32 - 1, -5)
    assert args["bias"][0].tolist() == [0, 77]


def test_arrays_of_structs() -> None:
    spec = kernels.internode_exchange()
    values = {name: () if spec.args[name].shape else 1 for name in spec.args.names or ()}
    args = launch.pack(spec.args, **{**values, "sections": [(8, 16, 4, 0), (24, 32, 8, 16)]})
    assert args["sections"][0].tolist() == [(8, 16, 4, 0), (24, 32, 8, 16), (0, 0, 0, 0), (0, 0, 0, 0)]
    launch.fields_type(spec.args).from_address(args.ctypes.data).sections[3].target = 99
    assert args["sections"]["target"][0].tolist() == [16, 32, 0, 99]
    assert not launch.pack(spec.args, **values)["sections"]["bytes"].any()


def test_saved_arguments_come_back_in_place() -> None:
    spec = kernels.barrier(3)
    args = launch.pack(spec.args, **ARGS)
    bound = object.__new__(launch.Launch)  # without a device
    bound.args = launch.fields_type(spec.args).from_address(args.ctypes.data)
    saved = bound.saved()
    bound.args.timeout_ns, bound.args.slabs[2] = 6, 7
    assert (args["timeout_ns"][0], args["slabs"][0][2]) == (6, 7)
    bound.restore(saved)
    assert args.tobytes() == launch.pack(spec.args, **ARGS).tobytes()


def test_fields_that_lie_one_after_the_other_are_set_at_once() -> None:
    spec = kernels.intranode_combine("bfloat16")
    args = np.zeros(1, spec.args)
    bound = object.__new__(launch.Launch)  # without a device
    bound.args = launch.fields_type(spec.args).from_address(args.ctypes.data)
    set_pointers = bound.setter("send_row", "send_plan", "y", "bias", "out", "out_weights")
    set_pointers(1, 2, 1 << 63, 3, 4, 5, 6)
    bound.setter("digest", "y_offset", "weights_offset")(2**32 - 1, 7, 8)
    bound.setter("rank", "num_ranks")(-1, True)
    wanted = {"send_row": 1, "send_plan": 2, "y": 1 << 63, "out": 5, "out_weights": 6}
    wanted |= {"digest": 2**32 - 1, "y_offset": 7, "weights_offset": 8, "rank": -1, "num_ranks": 1}
    names = spec.args.names or ()
    assert {name: args[name][0] for name in names if np.any(args[name]) and name != "bias"} == wanted
    assert args["bias"][0].tolist() == [3, 4]
    for apart in (("send_row", "y"), ("out_weights", "digest"), ("send_plan", "send_row")):
        with pytest.raises(AssertionError, match="one after the other"):
            bound.setter(*apart)


def test_more_ranks_than_a_domain_has() -> None:
    assert kernels.barrier(layout.MAX_RANKS).name == f"barrier_r{layout.MAX_RANKS}_t{layout.MAX_RANKS}"
    with pytest.raises(TopologyError, match="at most 128"):
        kernels.barrier(layout.MAX_RANKS + 1)


class _Stream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 77


class _OlderStream:
    ptr = 78


def test_stream_pointer() -> None:
    assert [launch.stream_pointer(stream) for stream in (5, _Stream(), _OlderStream())] == [5, 77, 78]
    with pytest.raises(ArrayError, match="__cuda_stream__"):
        launch.stream_pointer(None)


def test_a_launch_that_starts_early_says_so_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    attribute = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    status = driver.CUresult.CUDA_SUCCESS
    seen: list[Any] = []

    def launched(config: Any, function: Any, params: int, extra: int) -> tuple[Any]:
        (given,) = config.attrs
        seen.append((config.gridDimX, config.gridDimY, config.gridDimZ))
        seen.append((config.blockDimX, config.blockDimY, config.blockDimZ, config.sharedMemBytes))
        seen.append((int(config.hStream), int(function), params, extra, config.numAttrs, given.id))
        seen.append(given.value.programmaticStreamSerializationAllowed)
        return (status,)

    monkeypatch.setattr(driver, "cuLaunchKernelEx", launched)
    early = launch._early_launch(0x100, 256, 4096, 0x300, lambda code: RuntimeError(code))
    early(0x200, 5)
    assert seen == [(5, 1, 1), (256, 1, 1, 4096), (0x200, 0x100, 0x300, 0, 1, attribute), 1]
    del seen[:]
    early(0x200, 6)
    early(0x201, 7)
    assert seen[::4] == [(6, 1, 1), (7, 1, 1)]
    assert [where[0] for where in seen[2::4]] == [0x200, 0x201]
    status = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
    with pytest.raises(RuntimeError, match="201"):
        early(0x200, 5)
