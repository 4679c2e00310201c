"""Where NVSHMEM is installed, which version it is, and what its device library can be linked for.

Looks at files alone: nothing of NVSHMEM is loaded or imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..config import settings
from ..errors import BackendError

_LOG = logging.getLogger("ep_rt")

OLDEST_VERSION: Final = (3, 3, 0)
"""Of the versions whose headers NVRTC compiles."""

# Compute capabilities, from 8.0 on, for which the device libraries of the wheels hold code.
_LINKABLE: Final = {12: (80, 89, 90), 13: (80, 89, 90, 100, 120)}

_CUDA_MAJORS: Final = tuple(_LINKABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class NvshmemFiles:
    """An installation of NVSHMEM.

    Attributes:
        root: the directory that holds ``include`` and ``lib``.
        version: (major, minor, patch) of the headers and the device library.
        cuda_major: the CUDA that it was built for; None where nothing says so.
    """

    root: Path
    version: tuple[int, int, int]
    cuda_major: int | None

    @property
    def include_dir(self) -> Path:
        return self.root / "include"

    @property
    def device_library(self) -> Path:
        return self.root / "lib" / "libnvshmem_device.a"

    @property
    def host_library(self) -> Path:
        return self.root / "lib" / "libnvshmem_host.so.3"

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    def identity(self) -> str:
        """What code that is linked with it depends on: the version, and a digest of the device library."""
        digest = hashlib.sha256(self.device_library.read_bytes()).hexdigest()[:16]
        return f"NVSHMEM {self.version_text} {digest}"

    def require_cuda(self, major: int) -> None:
        """Raise `BackendError` unless it was built for this CUDA."""
        if self.cuda_major not in (None, major):
            raise BackendError(
                f"NVSHMEM in {self.root} is for CUDA {self.cuda_major}, but NVRTC is of CUDA {major}: "
                f"uninstall nvidia-nvshmem-cu{self.cuda_major} and install nvidia-nvshmem-cu{major}"
            )


def find() -> NvshmemFiles:
    """The installation to use: the one that ``NVSHMEM_HOME`` names, else that of the wheel.

    Raises:
        BackendError: there is none, it is not complete or too old, or the wheels of two CUDA generations
            have overwritten each other.
    """
    home = settings().nvshmem_home
    cuda_major = None
    if home is None:
        cuda_major = _installed_cuda()
        root = _wheel_root()
        if root is None:
            raise BackendError(
                "NVSHMEM is not installed; install ep-rt[cuda12] or ep-rt[cuda13], or set NVSHMEM_HOME"
            )
    else:
        root = home
    found = NvshmemFiles(root=root, version=_version(root), cuda_major=cuda_major)
    for path in (found.device_library, found.host_library):
        if not path.is_file():
            raise BackendError(f"NVSHMEM in {root} is not complete: {path.name} is missing")
    if found.version < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise BackendError(f"NVSHMEM {found.version_text} in {root} is older than {oldest}")
    return found


def link_architecture(architecture: str, cuda_major: int) -> str:
    """What to compile and link for, so that a device of `architecture` runs it.

    The device library has code for some architectures, which later ones of the same major number run too:
    ``sm_86`` becomes ``sm_80``, ``sm_103a`` becomes ``sm_100``, while ``sm_90a`` stays. CUDA 12 has no code
    for Blackwell, and then the library's PTX is compiled, which takes the linker minutes.
    """
    found = re.fullmatch(r"sm_(\d+)[af]?", architecture)
    if found is None:
        return architecture  # for the compiler to refuse
    number = int(found[1])
    linkable = _LINKABLE[max(_CUDA_MAJORS[0], min(cuda_major, _CUDA_MAJORS[-1]))]
    if number in linkable:
        return architecture
    related = [each for each in linkable if each // 10 == number // 10 and each < number]
    if related:
        return f"sm_{max(related)}"
    _LOG.warning(
        "NVSHMEM for CUDA %d has no code for %s: linking takes minutes, once; CUDA 13 has it",
        cuda_major,
        architecture,
    )
    return architecture


def cccl_dir() -> Path:
    """The directory of libcu++, which NVSHMEM's headers include: of its own wheel, a toolkit, or CuPy.

    Raises:
        BackendError: there is none.
    """
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = find_nvidia_header_directory("cccl")
    except (ImportError, RuntimeError):  # an older pathfinder does not know the name
        found = None
    if found:
        return Path(found)
    for folder in _package_dirs("cupy"):
        bundled = folder / "_core" / "include" / "cupy" / "_cccl" / "libcudacxx"
        if bundled.is_dir():
            return bundled
    raise BackendError(
        "libcu++ is not installed; install nvidia-cuda-cccl, or for CUDA 12 nvidia-cuda-cccl-cu12"
    )


def _wheel_root() -> Path | None:
    roots = (folder / "nvshmem" for folder in _package_dirs("nvidia"))
    return next((root for root in roots if root.is_dir()), None)


def _package_dirs(name: str) -> list[Path]:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _installed_cuda() -> int | None:
    """The CUDA generation of the installed wheel. Those of both put their files into the same directory."""
    installed = []
    for major in _CUDA_MAJORS:
        try:
            importlib.metadata.distribution(f"nvidia-nvshmem-cu{major}")
        except importlib.metadata.PackageNotFoundError:
            continue
        installed.append(major)
    if len(installed) > 1:
        names = " and ".join(f"nvidia-nvshmem-cu{major}" for major in installed)
        raise BackendError(
            f"{names} are both installed and have overwritten each other: uninstall both, then install one"
        )
    return installed[0] if installed else None


def _version(root: Path) -> tuple[int, int, int]:
    header = root / "include" / "non_abi" / "nvshmem_version.h"
    try:
        text = header.read_text(errors="replace")
    except OSError as error:
        raise BackendError(f"NVSHMEM in {root} is not complete: {error}") from error
    numbers = [
        re.search(rf"#define NVSHMEM_VENDOR_{name}_VERSION (\d+)", text)
        for name in ("MAJOR", "MINOR", "PATCH")
    ]
    major, minor, patch = (int(number[1]) if number else 0 for number in numbers)
    return major, minor, patch
