"""`EventHandle`: a point in the current stream, by DeepEP's name."""

from __future__ import annotations

from typing import Any

from ..buffer import Buffer


class EventHandle:
    """A point behind the work enqueued on the current streams when it is made; on the host it is reached.

    ``EventOverlap(EventHandle())`` is what `Buffer.capture` returns.
    """

    def __init__(self) -> None:
        self._event = Buffer.capture().event

    def current_stream_wait(self) -> None:
        """Order the later work of the current stream after the point."""
        self.wait(None)

    def wait(self, stream: Any) -> None:
        """Make the later work of `stream` wait; None for the current one."""
        self._event.wait(stream)

    def synchronize(self) -> None:
        """Make the host wait."""
        self._event.synchronize()

    def query(self) -> bool:
        """Whether the point has been reached."""
        return self._event.query()
