"""What `init_dist` and `init_seed` were told.

Python loads `envs` a second time, as ``deep_ep.utils.envs``. This module is imported by its whole name alone,
so both see the same values.
"""

from __future__ import annotations

from typing import ClassVar


class Launched:
    """Of this process, which is one rank.

    Attributes:
        local_rank: None before `init_dist`.
        global_seed: what `init_seed` was given, the same on all ranks.
        local_seed: what it made of that for this rank.
    """

    local_rank: ClassVar[int | None] = None
    global_seed: ClassVar[int] = 0
    local_seed: ClassVar[int] = 0
