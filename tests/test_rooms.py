"""Which room may import which, and who alone may name an outside library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ep_rt"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A room imports only from rooms above it. Rooms of one line do not import each other.
ORDER = [
    {"_version", "errors", "dlpack"},
    {"config", "cublas", "network_options", "arrays", "events", "handle"},
    {"cuda_arrays", "exchange", "results", "requests", "reference"},
    {"groups_torch", "node_group", "topology"},
    {"groups"},
    {"host", "cuda"},
    {"backend", "moe_sizes"},
    {"buffer", "planner"},
    {"jax_calls"},
    {"__init__", "bench", "torch", "jax"},
    {"doctor", "compat", "planner_cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules imported by a file, absolute, and whether the import runs with the module itself."""
    package = ["ep_rt", *path.relative_to(PACKAGE).parent.parts]
    found = []
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in inside
        if isinstance(node, ast.Import):
            found += [(alias.name, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.append((node.module or "", at_import))
            else:
                base = package[: len(package) - node.level + 1]
                stem = ".".join([*base, *([node.module] if node.module else [])])
                found += [(f"{stem}.{alias.name}", at_import) for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    mine = room(path)
    assert mine in LEVEL, f"{mine} has no place in ORDER"
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "ep_rt" or len(parts) < 2:
            continue
        other = (
            parts[1] if (PACKAGE / f"{parts[1]}.py").exists() or (PACKAGE / parts[1]).is_dir() else "__init__"
        )
        assert other == mine or LEVEL[other] < LEVEL[mine], f"{mine} imports {other}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_where_they_are_used(path: Path) -> None:
    always = {"numpy", "ml_dtypes", "ep_rt", "kernels_cu"}
    standard = __import__("sys").stdlib_module_names
    if path == PACKAGE / "torch.py":  # imported only by who asks; its operators are torch's
        always.add("torch")
    if path in (PACKAGE / "jax.py", PACKAGE / "jax_calls.py"):  # the same for JAX
        always.add("jax")
    for module, at_import in imports(path):
        top = module.partition(".")[0]
        assert not at_import or top in always or top in standard, f"{path.name} imports {module} at import"


@pytest.mark.parametrize(
    ("pattern", "owners"),
    [
        (r"\bmpi4py\b.*import|import.*\bmpi4py\b", {"groups.py"}),
        (r"__dlpack__|__cuda_array_interface__", {"arrays.py"}),
        (r"^\s*(from|import) nvshmem", {"cuda/nvshmem_host.py"}),
        (r"os\.environ\b", {"config.py", "network_options.py", "groups.py", "bench/places.py"}),
        (r"\bprint\(", {"bench/console.py"}),
    ],
)
def test_one_file_knows(pattern: str, owners: set[str]) -> None:
    for path in SOURCES:
        if str(path.relative_to(PACKAGE)) not in owners:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                code = line.partition("#")[0]
                assert not re.search(pattern, code), f"{path}:{number}: {line.strip()}"


def test_assembly_is_in_one_file_and_nothing_traps() -> None:
    for path in sorted((ROOT / "kernels_cu").glob("*.cu*")):
        text = path.read_text()
        assert path.name == "ptx.cuh" or not re.search(r"\basm\b", text), path.name
        assert not re.search(r"\btrap\s*;|__trap\s*\(", text), path.name
