"""Rendering, and the cache of compiled kernels. The compiler is replaced, so nothing here needs NVRTC."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from nvrtc_here import require_nvrtc

from ep_rt.cuda import jit, kernels, layout, linker, nvshmem_files
from ep_rt.cuda.kernel_spec import KernelSpec
from ep_rt.errors import BackendError, CompileError

SPEC = kernels.barrier(8)
SOURCES = Path(__file__).parents[1] / "kernels_cu"


class Compiler:
    """Stands for NVRTC: counts what it is asked for."""

    def __init__(self) -> None:
        self.version = (13, 0)
        self.calls: list[str] = []
        self.error: CompileError | None = None

    def compile(self, source: jit.Source, architecture: str) -> bytes:
        if self.error is not None:
            raise self.error
        self.calls.append(architecture)
        return f"{architecture} {self.version} {source.text}".encode()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(jit, "compile_cubin", compiler.compile)
    monkeypatch.setattr(jit, "nvrtc_version", lambda: compiler.version)
    return compiler


def test_rendered_source_names_configuration_and_arguments() -> None:
    source = jit.render(SPEC)
    assert source.name == "barrier_r8_t32.cu"
    assert "constexpr ep::BarrierCfg barrier_r8_t32_cfg{.max_ranks = 8, .num_threads = 32};" in source.text
    assert "static_assert(EP_OFFSETOF(barrier_r8_t32_args, num_ranks) == 20);" in source.text
    assert "static_assert(EP_OFFSETOF(ep::SlabHeader, epoch) == 1024);" in source.text
    assert set(source.headers) == {"barrier.cu", "sync.cuh", "layout.cuh", "ptx.cuh", "base.cuh"}


@pytest.mark.parametrize("name", ["barrier.cu", "base.cuh"])
def test_an_edited_source_is_a_new_kernel(name: str, tmp_path: Path) -> None:
    shutil.copytree(SOURCES, tmp_path, dirs_exist_ok=True)
    assert jit.render(SPEC, sources=tmp_path) == jit.render(SPEC)
    with (tmp_path / name).open("a") as file:
        file.write("// edited\n")
    assert jit.render(SPEC, sources=tmp_path).text != jit.render(SPEC).text


def test_headers_outside_the_package_are_in_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outer.h").write_text('#include "inner.h"\n')
    (tmp_path / "inner.h").write_text("// one\n")
    sources = tmp_path / "kernels"
    shutil.copytree(SOURCES, sources)
    with (sources / "base.cuh").open("a") as file:
        file.write("#include <outer.h>\n")
    monkeypatch.setattr(jit, "include_dirs", lambda: (tmp_path,))
    first = jit.render(SPEC, sources=sources)
    assert set(first.headers) == set(jit.render(SPEC).headers)  # the compiler finds the others itself
    (tmp_path / "inner.h").write_text("// two\n")
    assert jit.render(SPEC, sources=sources).text != first.text


def test_architecture_names() -> None:
    assert [jit.architecture(capability) for capability in [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)]] == [
        "sm_80",
        "sm_89",
        "sm_90a",
        "sm_100a",
        "sm_121a",
    ]


def test_cache_compiles_once_per_key(tmp_path: Path, compiler: Compiler) -> None:
    first = jit.cubin(SPEC, "sm_90a", cache_dir=tmp_path)
    assert jit.cubin(SPEC, "sm_90a", cache_dir=tmp_path) == first
    assert compiler.calls == ["sm_90a"]
    assert jit.cubin(SPEC, "sm_80", cache_dir=tmp_path) != first
    assert jit.cubin(kernels.barrier(9), "sm_90a", cache_dir=tmp_path) != first
    compiler.version = (13, 5)
    assert jit.cubin(SPEC, "sm_90a", cache_dir=tmp_path) != first
    assert len(compiler.calls) == 4


@pytest.mark.parametrize("damage", [b"", b"\x7fELF and no more"])
def test_a_damaged_file_is_compiled_again(tmp_path: Path, compiler: Compiler, damage: bytes) -> None:
    path = jit.cubin(SPEC, "sm_90a", cache_dir=tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage)
    assert jit.cubin(SPEC, "sm_90a", cache_dir=tmp_path).read_bytes() == whole
    assert len(compiler.calls) == 2
    assert len(list(path.parent.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_not_fatal(
    tmp_path: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    with caplog.at_level(logging.WARNING, logger="ep_rt"):
        path = jit.cubin(SPEC, "sm_90a", cache_dir=tmp_path / "file")
    assert path.read_bytes().startswith(b"sm_90a")
    assert "cannot be written" in caplog.text
    assert jit.cubin(SPEC, "sm_90a", cache_dir=tmp_path / "file") == path
    assert len(compiler.calls) == 1
    shutil.rmtree(path.parent)


def test_threads_that_start_at_once_get_the_same_file(tmp_path: Path, compiler: Compiler) -> None:
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(jit.cubin(SPEC, "sm_90a", cache_dir=tmp_path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert len(set(paths)) == 1
    assert [path.name for path in paths[0].parent.iterdir()] == [paths[0].name]
    assert len(compiler.calls) == 1


def test_what_is_missing_is_compiled_side_by_side(tmp_path: Path, compiler: Compiler) -> None:
    specs = kernels.normal_mode_specs()
    first = jit.cubin(specs[0], "sm_90a", cache_dir=tmp_path)
    jit.prepare(specs, "sm_90a", cache_dir=tmp_path)
    assert len(list(first.parent.iterdir())) == len(compiler.calls) == len(specs)
    compiler.error = CompileError("name", source="", options=[], log="no")
    with pytest.raises(CompileError):
        jit.prepare(specs, "sm_80", cache_dir=tmp_path)


def test_processes_that_start_at_once_get_the_same_file(tmp_path: Path) -> None:
    require_nvrtc()
    program = (
        "import sys, pathlib\n"
        "from ep_rt.cuda import jit, kernels\n"
        "print(jit.cubin(kernels.barrier(8), 'sm_90a', cache_dir=pathlib.Path(sys.argv[1])))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(paths) == 1
    assert [str(path) for path in (tmp_path / "kernels").iterdir()] == list(paths)


class Toolchain(Compiler):
    """Stands for NVRTC, nvJitLink and NVSHMEM's files, for kernels that use it."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.linker_version = (13, 0)
        self.nvshmem_version = (3, 4, 5)
        self.cuda_major: int | None = 13
        self.links: list[str] = []
        self.max_registers: list[int] = []
        self.library = root / "lib" / "libnvshmem_device.a"
        self.library.parent.mkdir(parents=True)
        self.library.write_bytes(b"one")

    def find(self) -> nvshmem_files.NvshmemFiles:
        return nvshmem_files.NvshmemFiles(
            root=self.library.parents[1], version=self.nvshmem_version, cuda_major=self.cuda_major
        )

    def compile_ltoir(self, source: jit.Source, architecture: str, *options: str) -> bytes:
        self.calls.append(source.name)
        return f"{source.name} {architecture} {' '.join(options)}".encode()

    def link(
        self, name: str, modules: dict[str, bytes], library: Path, architecture: str, *, max_registers: int
    ) -> bytes:
        self.links.append(architecture)
        self.max_registers.append(max_registers)
        return b"|".join([name.encode(), *modules.values(), library.read_bytes()])


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Toolchain:
    toolchain = Toolchain(tmp_path / "nvshmem")
    monkeypatch.setattr(jit, "compile_ltoir", toolchain.compile_ltoir)
    monkeypatch.setattr(jit, "nvrtc_version", lambda: toolchain.version)
    monkeypatch.setattr(linker, "version", lambda: toolchain.linker_version)
    monkeypatch.setattr(linker, "link", toolchain.link)
    monkeypatch.setattr(nvshmem_files, "find", toolchain.find)
    monkeypatch.setattr(nvshmem_files, "cccl_dir", lambda: Path("cccl"))
    return toolchain


PING = kernels.nvshmem_ping("warp")


def test_a_kernel_on_the_network_is_linked_with_a_bridge(tmp_path: Path, toolchain: Toolchain) -> None:
    path = jit.cubin(PING, "sm_90a", cache_dir=tmp_path)
    kernel, bridge = f"{PING.name}.cu sm_90a ", "bridge.cu sm_90a -default-device"
    image = path.read_text()
    assert image.startswith(f"{PING.name}|{kernel}|{bridge}")
    assert image.endswith("|one")
    assert "/include -Icccl" in image
    assert toolchain.calls == ["bridge.cu", f"{PING.name}.cu"]
    source = jit.render(PING)
    assert "network.cuh" in source.headers
    assert not any("nvshmem" in name for name in source.headers if name != "nvshmem_ping.cu")
    assert set(jit.render_bridge().headers) == {"network_bridge.cu", "network.cuh", "base.cuh"}


def test_linked_kernels_are_cached_and_share_the_bridge(tmp_path: Path, toolchain: Toolchain) -> None:
    first = jit.cubin(PING, "sm_90a", cache_dir=tmp_path)
    assert jit.cubin(PING, "sm_90a", cache_dir=tmp_path) == first
    assert jit.cubin(kernels.nvshmem_ping("block"), "sm_90a", cache_dir=tmp_path) != first
    assert toolchain.calls.count("bridge.cu") == 1
    assert len(toolchain.links) == 2
    first.write_bytes(b"damaged")
    assert jit.cubin(PING, "sm_90a", cache_dir=tmp_path) == first
    assert toolchain.calls.count("bridge.cu") == 1


def test_another_compiler_linker_or_nvshmem_is_a_new_kernel(tmp_path: Path, toolchain: Toolchain) -> None:
    paths = [jit.cubin(PING, "sm_90a", cache_dir=tmp_path)]
    toolchain.linker_version = (13, 1)
    paths.append(jit.cubin(PING, "sm_90a", cache_dir=tmp_path))
    assert toolchain.calls.count("bridge.cu") == 1
    toolchain.version = (13, 1)
    paths.append(jit.cubin(PING, "sm_90a", cache_dir=tmp_path))
    toolchain.nvshmem_version = (3, 8, 0)
    paths.append(jit.cubin(PING, "sm_90a", cache_dir=tmp_path))
    toolchain.library.write_bytes(b"two")  # the same version, built again
    paths.append(jit.cubin(PING, "sm_90a", cache_dir=tmp_path))
    crowded = replace(PING, blocks_per_sm=4)
    assert crowded.max_registers < PING.max_registers
    paths.append(jit.cubin(crowded, "sm_90a", cache_dir=tmp_path))
    assert len(set(paths)) == len(toolchain.links) == 6
    assert toolchain.max_registers == [PING.max_registers] * 5 + [crowded.max_registers]
    assert toolchain.calls.count("bridge.cu") == 4


def test_an_edited_bridge_is_a_new_kernel(
    tmp_path: Path, toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = jit.cubin(PING, "sm_90a", cache_dir=tmp_path)
    edited = tmp_path / "kernels_cu"
    shutil.copytree(SOURCES, edited)
    with (edited / "network_bridge.cu").open("a") as file:
        file.write("// edited\n")
    monkeypatch.setattr(jit, "_sources", lambda: edited)
    assert jit.render(PING) == jit.render(PING, sources=SOURCES)
    assert jit.cubin(PING, "sm_90a", cache_dir=tmp_path) != first


@pytest.mark.parametrize(
    ("linker_version", "cuda_major", "text"),
    [
        ((12, 9), 13, "nvJitLink 12.9 cannot link what NVRTC 13.0 compiles"),
        ((14, 0), 13, "must be of CUDA 13"),
        ((13, 0), 12, "uninstall nvidia-nvshmem-cu12 and install nvidia-nvshmem-cu13"),
    ],
)
def test_versions_that_do_not_go_together(
    tmp_path: Path, toolchain: Toolchain, linker_version: tuple[int, int], cuda_major: int, text: str
) -> None:
    toolchain.linker_version, toolchain.cuda_major = linker_version, cuda_major
    with pytest.raises(BackendError, match=text):
        jit.cubin(PING, "sm_90a", cache_dir=tmp_path)
    assert toolchain.calls == []


def test_signal_words_grow_with_epoch_then_operation() -> None:
    words = [
        layout.signal_word(epoch, operation)
        for epoch in (1, 2, 2**40)
        for operation in (layout.Operation.NO_OPERATION, layout.Operation.BARRIER, layout.Operation.GAVE_UP)
    ]
    assert words == sorted(set(words))
    assert all(word < 2**64 for word in words)
    assert [layout.signal_epoch(word) for word in words[::3]] == [1, 2, 2**40]
    assert layout.signal_operation(words[1]) == layout.Operation.BARRIER


ALL_SPECS = [*kernels.all_specs(), *kernels.network_specs()]


@pytest.mark.parametrize("spec", ALL_SPECS, ids=lambda spec: spec.name)
def test_names_of_instances_differ(spec: KernelSpec) -> None:
    assert [other.name for other in ALL_SPECS].count(spec.name) == 1
