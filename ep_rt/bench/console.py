"""What the user sees while it runs: lines, and a bar on a terminal that has tqdm."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from typing import Any, TextIO


def say(text: str, stream: TextIO) -> None:
    """The one place of this package that prints."""
    print(text, file=stream, flush=True)


class Console:
    """Writes for one rank; the others are silent.

    Args:
        stream: None to be silent.
        num_steps: calls of `step` to come.
    """

    def __init__(self, stream: TextIO | None, num_steps: int) -> None:
        self._stream = stream
        self._bar: Any = None
        if stream is not None and num_steps and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, file=sys.stderr, leave=False)

    def lines(self, lines: Iterable[str]) -> None:
        """Write them above the bar."""
        if self._stream is None:
            return
        for line in lines:
            if self._bar is not None:
                self._bar.write(line, file=self._stream)
            else:
                say(line, self._stream)

    def step(self, doing: str) -> None:
        """Say what comes next."""
        if self._bar is not None:
            self._bar.set_description(doing)
            self._bar.update()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
