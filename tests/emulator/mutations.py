"""All bugs that are planted: what the emulator must find, within how many seeds, and what it cannot."""

from __future__ import annotations

from typing import Final

from .mutations_combine import COMBINE, LOCAL
from .mutations_dispatch import DISPATCH
from .mutations_low_latency import LOW_LATENCY
from .mutations_segmented import SEGMENTED
from .mutations_sync import SYNC

MUTATIONS: Final = (*SYNC, *DISPATCH, *COMBINE, *LOCAL, *SEGMENTED, *LOW_LATENCY)
