"""`EventOverlap`: when the work of a call is done."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol


class Event(Protocol):
    """A point in a stream's work."""

    def wait(self, stream: Any) -> None:
        """Make the later work of `stream` wait for this point. The host does not wait."""

    def synchronize(self) -> None:
        """Make the host wait for this point."""

    def query(self) -> bool:
        """Whether the point has been reached."""


class CompletedEvent:
    """The event of work that was done when the call returned, as on the host backend."""

    def wait(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class EventOverlap:
    """What a call returns as ``event`` and takes as ``previous_event``.

    Args:
        event: the point to wait for; None stands for work that is already done.
        extra_tensors: arrays kept alive as long as this object.

    As a context manager, the body overlaps with the work, and leaving it waits::

        out = buffer.dispatch(..., async_finish=True)
        with out.event:
            other_work()
        use(out.recv_x)
    """

    def __init__(self, event: Event | None = None, extra_tensors: tuple[Any, ...] | None = None) -> None:
        self.event: Event = CompletedEvent() if event is None else event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, stream: Any = None) -> None:
        """Order the later work of `stream` (None: the current stream) after the event."""
        self.event.wait(stream)

    def synchronize(self) -> None:
        """Wait on the host."""
        self.event.synchronize()

    def query(self) -> bool:
        """Whether the work is done."""
        return self.event.query()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current_stream_wait()
