"""nvJitLink: from LTO-IR and a library of device code to a cubin. Needs no GPU and no driver."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import BackendError, CompileError

MAX_REGISTERS: Final = 255
"""That a thread can have."""


def link(
    name: str,
    modules: Mapping[str, bytes],
    library: Path,
    architecture: str,
    *,
    max_registers: int = MAX_REGISTERS,
) -> bytes:
    """The cubin of a kernel.

    Args:
        name: of the kernel, for errors.
        modules: LTO-IR by name, all compiled for `architecture`.
        library: an archive that has what they do not define.
        max_registers: of a thread, also in functions that the kernel calls: they are compiled by themselves,
            and must not take more than its launch bounds leave.

    Raises:
        CompileError: something is not defined, or an input is refused; `log` says what.
        BackendError: nvJitLink is not installed.
    """
    nvjitlink = _nvjitlink()
    options = [f"-arch={architecture}", "-lto", f"-maxrregcount={max_registers}"]
    try:
        handle = nvjitlink.create(len(options), options)
    except nvjitlink.nvJitLinkError as error:
        raise CompileError(name, source="", options=options, log=str(error)) from error
    try:
        for module, data in modules.items():
            nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, data, len(data), module)
        nvjitlink.add_file(handle, nvjitlink.InputType.LIBRARY, str(library))
        nvjitlink.complete(handle)
        image = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, image)
        return bytes(image)
    except nvjitlink.nvJitLinkError as error:
        log = f"{error}\n{_error_log(nvjitlink, handle)}"
        raise CompileError(name, source="", options=options, log=log) from error
    finally:
        nvjitlink.destroy(handle)


def version() -> tuple[int, int]:
    """The linker's version.

    Raises:
        BackendError: nvJitLink is not installed.
    """
    major, minor = _nvjitlink().version()
    return int(major), int(minor)


def require_reads(nvrtc: tuple[int, int]) -> None:
    """Raise `BackendError` unless the linker reads what NVRTC of this version writes."""
    own = version()
    if own[0] != nvrtc[0] or own < nvrtc:
        raise BackendError(
            f"nvJitLink {own[0]}.{own[1]} cannot link what NVRTC {nvrtc[0]}.{nvrtc[1]} compiles: "
            f"it must be of CUDA {nvrtc[0]} and not older; upgrade nvidia-nvjitlink"
        )


def _nvjitlink() -> Any:
    try:
        from cuda.bindings import nvjitlink

        nvjitlink.version()  # loads the library
    except (ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise BackendError(
            f"nvJitLink cannot be loaded ({reason}); install ep-rt[cuda12] or ep-rt[cuda13]"
        ) from error
    return nvjitlink


def _error_log(nvjitlink: Any, handle: Any) -> str:
    size = nvjitlink.get_error_log_size(handle)
    if not size:
        return ""
    log = bytearray(size)
    nvjitlink.get_error_log(handle, log)
    return log.rstrip(b"\0").decode(errors="replace")
