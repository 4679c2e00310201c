"""From a `KernelSpec` to a cubin on disk: render, compile by NVRTC, link, cache. Needs no GPU and no driver.

Kernels that use NVSHMEM are compiled to LTO-IR and linked with NVSHMEM's device library and a bridge to it,
which is compiled once for all of them; see network_bridge.cu. Others are compiled in one step.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from ..config import settings
from ..errors import BackendError, CompileError
from . import linker, nvshmem_files
from .kernel_spec import KernelSpec
from .layout import layout_asserts, twin_asserts

_LOG = logging.getLogger("ep_rt")
_INCLUDE: Final = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A translation unit.

    Attributes:
        text: what is compiled. Holds the digest of everything that it includes.
        headers: the included files of `kernels_cu` by name, handed to the compiler from memory.
    """

    name: str
    text: str
    headers: Mapping[str, str]


def render(spec: KernelSpec, *, sources: Path | None = None) -> Source:
    """The translation unit of `spec`: its configuration by name, and every layout twin asserted.

    Args:
        sources: the directory of the `.cu` files; default the installed `kernels_cu`.
    """
    headers, digest = _included(f'#include "{spec.source}"\n', sources or _sources())
    prefix = f"ep::{spec.struct_prefix}"
    args = f"{spec.name}_args"
    num_threads = spec.cfg.num_threads
    lines = [
        f"// kernels_cu sha256 {digest}",
        f'#include "{spec.source}"',
        *layout_asserts(),
        f"static_assert(sizeof({prefix}Cfg) == {4 * len(fields(spec.cfg))});",
        f"constexpr {prefix}Cfg {spec.name}_cfg{{{spec.cfg_initializer}}};",
        f"using {args} = {prefix}Args<{spec.name}_cfg>;",
        *twin_asserts(args, spec.args),
        f'extern "C" __global__ void __launch_bounds__({num_threads}, {spec.blocks_per_sm})',
        f"{spec.name}(const __grid_constant__ {args} args) {{",
        f"    ep::{spec.function}<{spec.name}_cfg>(args);",
        "}",
        "",
    ]
    return Source(name=f"{spec.name}.cu", text="\n".join(lines), headers=headers)


def architecture(compute_capability: tuple[int, int]) -> str:
    """NVRTC's name of a device's architecture, with what only that one has (``sm_90a``) from Hopper on."""
    major, minor = compute_capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def prepare(specs: Iterable[KernelSpec], architecture: str, *, cache_dir: Path | None = None) -> None:
    """Have all of these in the cache. What is missing is compiled side by side, by a thread each.

    Raises:
        CompileError, BackendError: see `cubin`.
    """
    specs = list(specs)
    nvrtc_version()  # loads the library: once, and not in many threads
    if any(spec.uses_network for spec in specs):
        linker.version()
    with ThreadPoolExecutor(os.cpu_count(), "ep_rt-compile") as threads:
        for _ in threads.map(lambda spec: cubin(spec, architecture, cache_dir=cache_dir), specs):
            pass


def cubin(spec: KernelSpec, architecture: str, *, cache_dir: Path | None = None) -> Path:
    """The compiled kernel, from the cache when it is there.

    Safe with any number of processes at once: a file appears whole or not at all, and its name holds the
    digest of its bytes, so a damaged one is compiled again. Threads of a process that want the same kernel
    compile it once. Where the cache cannot be written, the file goes to a directory of this process alone.

    Args:
        architecture: of the device. A kernel that uses NVSHMEM may be compiled for an earlier one that it
            runs too, see `nvshmem_files.link_architecture`.

    Raises:
        CompileError: NVRTC refused the source, or nvJitLink what came of it.
        BackendError: NVRTC is not installed, or for a kernel that uses NVSHMEM nvJitLink or NVSHMEM is not,
            or they do not go together.
    """
    source = render(spec)
    if spec.uses_network:
        return _linked_cubin(spec, source, architecture, cache_dir)
    return _cached(
        f"{spec.name}-{architecture}",
        [source.text, *_options(architecture), _compiler()],
        lambda: compile_cubin(source, architecture),
        cache_dir=cache_dir,
    )


def _linked_cubin(spec: KernelSpec, source: Source, architecture: str, cache_dir: Path | None) -> Path:
    """The cubin of a kernel that uses NVSHMEM, as `cubin`."""
    nvrtc = nvrtc_version()
    nvshmem = nvshmem_files.find()
    nvshmem.require_cuda(nvrtc[0])
    linker.require_reads(nvrtc)
    architecture = nvshmem_files.link_architecture(architecture, nvrtc[0])
    bridge = render_bridge()
    key = [*_options(architecture), _compiler(), nvshmem.identity()]

    def compile_bridge() -> bytes:
        # Headers of NVSHMEM 3.4 lack an annotation of a function that both sides call.
        folders = (nvshmem.include_dir, nvshmem_files.cccl_dir())
        return compile_ltoir(bridge, architecture, "-default-device", *(f"-I{folder}" for folder in folders))

    def link() -> bytes:
        stem = f"network_bridge-{architecture}"
        bridge_path = _cached(stem, [bridge.text, *key], compile_bridge, suffix=".ltoir", cache_dir=cache_dir)
        modules = {"kernel": compile_ltoir(source, architecture), "bridge": bridge_path.read_bytes()}
        return linker.link(
            spec.name,
            modules,
            nvshmem.device_library,
            architecture,
            max_registers=spec.max_registers,
        )

    linked_by = "nvJitLink {}.{}, {} registers".format(*linker.version(), spec.max_registers)
    return _cached(
        f"{spec.name}-{architecture}", [source.text, bridge.text, *key, linked_by], link, cache_dir=cache_dir
    )


def render_bridge() -> Source:
    """The translation unit that defines network.cuh. NVSHMEM's own headers are not in its digest."""
    headers, digest = _included('#include "network_bridge.cu"\n', _sources())
    text = f'// kernels_cu sha256 {digest}\n#include "network_bridge.cu"\n'
    return Source(name="bridge.cu", text=text, headers=headers)


def _cached(
    name: str, parts: list[str], make: Callable[[], bytes], *, cache_dir: Path | None, suffix: str = ".cubin"
) -> Path:
    """The file of the cache that holds what `make` returns, and depends on `parts` alone."""
    directory = (cache_dir or settings().cache_dir) / "kernels"
    stem = f"{name}-{_digest(*parts)}"
    with _COMPILING.setdefault(stem, threading.Lock()):
        cached = _find(directory, stem, suffix) or _find(_own_directory(), stem, suffix)
        if cached is not None:
            return cached
        image = make()
        try:
            return _publish(directory, stem, suffix, image)
        except OSError as error:
            _LOG.warning("the kernel cache %s cannot be written (%s)", directory, error)
            return _publish(_own_directory(), stem, suffix, image)


_COMPILING: Final[dict[str, threading.Lock]] = {}


@functools.cache
def _own_directory() -> Path:
    """Of this process alone, removed when it ends. Made when something is put there."""
    directory = Path(tempfile.gettempdir(), f"ep_rt-{secrets.token_hex(8)}")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def compile_cubin(source: Source, architecture: str) -> bytes:
    """Compile for one architecture, for instance ``"sm_90a"``.

    Raises:
        CompileError: NVRTC refused the source; `log` says why.
        BackendError: NVRTC is not installed.
    """
    return _compile(source, _options(architecture), "CUBIN")


def compile_ltoir(source: Source, architecture: str, *options: str) -> bytes:
    """Compile to what the linker takes, with more options than those of all kernels. Raises as above."""
    return _compile(source, [*_options(architecture), "-dlto", *options], "LTOIR")


def _compile(source: Source, options: list[str], kind: str) -> bytes:
    """What NVRTC makes of a source: ``"CUBIN"`` or ``"LTOIR"``."""
    nvrtc = _nvrtc()
    options = [*options, *(f"-I{directory}" for directory in include_dirs())]
    status, program = nvrtc.nvrtcCreateProgram(
        source.text.encode(),
        source.name.encode(),
        len(source.headers),
        [text.encode() for text in source.headers.values()],
        [name.encode() for name in source.headers],
    )
    _check(nvrtc, status, "nvrtcCreateProgram")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _fetch(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise CompileError(
                source.name.removesuffix(".cu"),
                source=source.text,
                options=options,
                log=log or _error_name(nvrtc, status),
            )
        return _fetch(nvrtc, program, kind)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def nvrtc_version() -> tuple[int, int]:
    """The compiler's version.

    Raises:
        BackendError: NVRTC is not installed.
    """
    nvrtc = _nvrtc()
    status, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, status, "nvrtcVersion")
    return major, minor


def _compiler() -> str:
    return "NVRTC {}.{}".format(*nvrtc_version())


def include_dirs() -> tuple[Path, ...]:
    """Where CUDA's headers are: in NVIDIA's wheels, which need no toolkit, or in a toolkit."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError:
        return ()
    found = find_nvidia_header_directory("cudart")
    return (Path(found),) if found else ()


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"NVRTC cannot be loaded ({error}); install ep-rt[cuda12] or ep-rt[cuda13]"
        ) from error
    return nvrtc


def _options(architecture: str) -> list[str]:
    """What the code depends on. Include directories are not here: the digest holds what is in them."""
    return [f"--gpu-architecture={architecture}", "-std=c++20"]


def _sources() -> Path:
    return Path(str(files("kernels_cu")))


def _included(text: str, sources: Path) -> tuple[dict[str, str], str]:
    """The files of `sources` that `text` includes, also indirectly, and a digest of them and of CUDA's."""
    headers: dict[str, str] = {}
    outside: dict[str, str] = {}
    pending = [text]
    while pending:
        for quoted, angled in _INCLUDE.findall(pending.pop()):
            name = quoted or angled
            if name in headers or name in outside:
                continue
            if quoted and (sources / name).is_file():
                headers[name] = (sources / name).read_text()
                pending.append(headers[name])
                continue
            for directory in include_dirs():
                if (directory / name).is_file():
                    outside[name] = (directory / name).read_text(errors="replace")
                    pending.append(outside[name])
    parts = [part for group in (headers, outside) for item in sorted(group.items()) for part in item]
    return dict(sorted(headers.items())), _digest(*parts)


def _digest(*parts: str) -> str:
    joined = hashlib.sha256()
    for part in parts:
        data = part.encode()
        joined.update(len(data).to_bytes(8, "little") + data)
    return joined.hexdigest()[:16]


def _find(directory: Path, stem: str, suffix: str) -> Path | None:
    """A whole file of this stem, if there is one. Damaged ones are removed."""
    for path in sorted(directory.glob(f"{stem}-*{suffix}")):
        with contextlib.suppress(OSError):
            if path.stem == f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}":
                return path
            _LOG.warning("%s is damaged and will be compiled again", path)
            path.unlink()
    return None


def _publish(directory: Path, stem: str, suffix: str, image: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{stem}-{hashlib.sha256(image).hexdigest()[:16]}{suffix}"
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{stem}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _fetch(nvrtc: Any, program: Any, what: str) -> bytes:
    """``nvrtcGet<what>`` of a program."""
    status, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _check(nvrtc, status, f"nvrtcGet{what}Size")
    data = bytes(size)
    (status,) = getattr(nvrtc, f"nvrtcGet{what}")(program, data)
    _check(nvrtc, status, f"nvrtcGet{what}")
    return data


def _check(nvrtc: Any, status: Any, call: str) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"{call} failed: {_error_name(nvrtc, status)}")


def _error_name(nvrtc: Any, status: Any) -> str:
    _, name = nvrtc.nvrtcGetErrorString(status)
    return str(name.decode())
