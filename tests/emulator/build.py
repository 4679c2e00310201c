"""From sources to shared libraries: the runtime, and each kernel as g++ sees it through the shim."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from ep_rt.config import settings
from ep_rt.cuda import jit
from ep_rt.cuda.kernel_spec import KernelSpec

HERE: Final = Path(__file__).resolve().parent
SHIM: Final = HERE / "cpp"
TEST_KERNELS: Final = HERE / "kernels"
KERNELS_CU: Final = HERE.parents[1] / "kernels_cu"

_TOOLS: Final = ("g++", "objcopy", "addr2line")
_RUNTIME_FLAGS: Final = ("-std=c++20", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra")
# -fsanitize=thread instruments ordinary accesses; nothing of it is linked. Shared memory is thread-local, and
# must be reached by a call. Accesses stay as they are written: none are merged, none become calls.
_KERNEL_FLAGS: Final = (
    *("-std=c++20", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-return-type"),
    *(
        "-fsanitize=thread",
        "--param=tsan-distinguish-volatile=1",
        "--param=tsan-instrument-func-entry-exit=0",
    ),
    *("-fno-extern-tls-init", "-fno-gnu-unique", "-fno-stack-protector", "-fvisibility=hidden"),
    *("-fno-tree-loop-distribute-patterns", "-fno-tree-vectorize", "-fno-tree-slp-vectorize"),
)
_RENAMED: Final = (
    *("--redefine-sym", "__tls_get_addr=emu_shared_address"),
    *("--redefine-sym", "memcpy=emu_memcpy", "--redefine-sym", "memset=emu_memset"),
)
ENTRY: Final = "emu_kernel"


def absence() -> str | None:
    """Why nothing can be built here; None when it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"the emulator needs {', '.join(missing)}"
    if os.uname().machine != "x86_64":
        return "the emulator switches threads of an x86-64 processor"
    return None


def runtime() -> Path:
    """The emulator itself."""
    sources = sorted(SHIM.glob("*.cpp")) + sorted(SHIM.glob("*.h"))
    key = _digest(*_RUNTIME_FLAGS, *(path.read_text() for path in sources))

    def make(output: Path) -> None:
        _run("g++", *_RUNTIME_FLAGS, "-shared", "-o", output, SHIM / "runtime.cpp", "-ldl")

    return _cached(f"runtime-{key}.so", make)


def kernel(spec: KernelSpec, architecture: int, *, sources: Path = KERNELS_CU) -> Path:
    """A kernel for one of the code paths: `architecture` is what ``__CUDA_ARCH__`` says, 900 or 800.

    Args:
        sources: the `.cu` files; those of `TEST_KERNELS` may include them.
    """
    with tempfile.TemporaryDirectory(prefix="emulator-") as folder:
        root = Path(folder)
        for path in [*sources.glob("*.cu*"), *TEST_KERNELS.glob("*.cu")]:
            shutil.copy(path, root / path.name)
        for name in ("ptx.cuh", "network.cuh"):
            shutil.copy(SHIM / name, root / name)
        rendered = jit.render(spec, sources=root)
        text = rendered.text + _appendix(spec, rendered.headers, architecture)
        shim = [(SHIM / name).read_text() for name in ("cuda.h", "device.h", "numbers.h", "nvshmem.h")]
        flags = (*_KERNEL_FLAGS, f"-D__CUDA_ARCH__={architecture}")
        key = _digest(*flags, *_RENAMED, text, *shim, *rendered.headers.values())

        def make(output: Path) -> None:
            unit, compiled = root / f"{spec.name}.cpp", root / "kernel.o"
            unit.write_text(text)
            _run(
                "g++", *flags, "-include", SHIM / "cuda.h", "-I", root, "-I", SHIM, "-c", unit, "-o", compiled
            )
            _run("objcopy", *_RENAMED, compiled)
            _run("g++", "-shared", "-nostdlib", "-o", output, compiled)

        return _cached(f"{spec.name}-{architecture}-{key}.so", make)


def _appendix(spec: KernelSpec, headers: Mapping[str, str], architecture: int) -> str:
    """What the host does for a launch: the dynamic shared memory, and an entry for any argument struct."""
    num_bytes = max(spec.shared_bytes if architecture >= 900 else spec.shared_bytes_sm80, 16)
    lines = [
        f"namespace {place} {{ alignas(128) thread_local uint8_t {name}[{num_bytes}]; }}"
        for place, name in sorted({each for text in headers.values() for each in _dynamic_arrays(text)})
    ]
    lines += [
        f'extern "C" __attribute__((visibility("default"))) void {ENTRY}(const void* args) {{',
        f"    {spec.name}(*static_cast<const {spec.name}_args*>(args));",
        "}",
        "",
    ]
    return "\n".join(lines)


def _dynamic_arrays(text: str) -> list[tuple[str, str]]:
    """Namespace and name of every ``extern __shared__`` array of a source."""
    found = []
    inside: list[str] = []
    for line in text.splitlines():
        if opened := re.match(r"namespace ([\w:]+) \{$", line):
            inside.append(opened[1])
        elif line.startswith("}  // namespace"):
            inside.pop()
        elif array := re.search(r"extern __shared__ .*?(\w+)\[\];", line):
            found.append(("::".join(inside), array[1]))
    return found


def decode(library: Path, pc: int) -> list[str]:
    """The chain of inlined places at a return address: ``file:line``, innermost first, without the shim."""
    ran = subprocess.run(
        ["addr2line", "-e", library, "-i", f"0x{pc - 1:x}"], capture_output=True, text=True, check=True
    )
    places = [Path(line.split(" ")[0]).name for line in ran.stdout.splitlines()]
    shim = {path.name for path in SHIM.iterdir()} - {"runtime.cpp"}
    return [place for place in places if place.partition(":")[0] not in shim]


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    folder = settings().cache_dir / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}-")
        os.close(handle)
        try:
            make(Path(temporary))
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _run(*command: str | Path) -> None:
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{ran.stderr}")
    if ran.stderr:
        raise RuntimeError(f"the compiler warns:\n{ran.stderr}")


def _digest(*parts: str) -> str:
    joined = hashlib.sha256()
    for part in parts:
        joined.update(part.encode() + b"\0")
    return joined.hexdigest()[:16]
