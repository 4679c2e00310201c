"""What `import ep_rt` gives, and what it does not load."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import ep_rt

README = Path(__file__).parents[1] / "README.md"


def test_all_is_what_is_there() -> None:
    assert sorted(ep_rt.__all__) == ep_rt.__all__
    for name in ep_rt.__all__:
        assert getattr(ep_rt, name) is not None
    public = {name for name in vars(ep_rt) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(ep_rt, name)).__name__ == "module"}
    assert public - modules == set(ep_rt.__all__) - {"__version__", "reference"}


def test_every_public_object_explains_itself() -> None:
    for name in ep_rt.__all__:
        assert getattr(ep_rt, name).__doc__, name
    for name, member in vars(ep_rt.Buffer).items():
        if callable(member) and not name.startswith("_"):
            assert member.__doc__, f"Buffer.{name}"


def test_import_loads_neither_cupy_nor_mpi() -> None:
    program = (
        "import sys, ep_rt\n"
        "heavy = {'cupy', 'mpi4py', 'torch', 'jax', 'cuda', 'nvshmem', 'matplotlib', 'tqdm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_program_of_the_readme_runs() -> None:
    match = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert match is not None
    names: dict[str, Any] = {}
    exec(match[1], names)
    for difference in ep_rt.run_local(names["layer"], num_ranks=2):
        assert np.abs(difference).max() < 1e-6
