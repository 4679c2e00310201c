"""`EventOverlap`: when the work of a call is done."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from .errors import ConfigError


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
        extra_tensors: arrays kept alive as long as this object, or until a wait releases them.

    As a context manager, the body overlaps with the work, and leaving it waits::

        out = buffer.dispatch(..., async_finish=True)
        with out.event:
            other_work()
        use(out.recv_x)

    A hook is what else belongs to the call and must come after its work, on the stream that waits for it::

        out.event.register_hook_after_wait(lambda: cast(out.recv_x))
        x = out.event.current_stream_wait()  # what the hook returned

    Nothing here makes the host wait but `synchronize`, so hooks enqueue their work like any other code.
    Source: DeepEP's EventOverlap of V1 and V2.
    """

    def __init__(self, event: Event | None = None, extra_tensors: tuple[Any, ...] | None = None) -> None:
        self.event: Event = CompletedEvent() if event is None else event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], Any] | None = None
        self._releases_on_exit = False

    def current_stream_wait(self, release_handle: bool = False, *, stream: Any = None) -> Any:
        """Order the later work of a stream after the event; then call the hook, if there is one.

        Args:
            release_handle: let go of `extra_tensors`: work of this stream alone may reuse their memory.
            stream: the one that waits; None for the current stream.

        Returns:
            What the hook returned; None without one. It is called once, also if it raises or waits itself.
        """
        self.event.wait(stream)
        if release_handle:
            self.extra_tensors = None
        hook, self.hook_after_wait = self.hook_after_wait, None
        return None if hook is None else hook()

    def wait(self) -> Any:
        """`current_stream_wait` by the name that work handles have in torch."""
        return self.current_stream_wait()

    def register_hook_after_wait(self, hook_after_wait: Callable[[], Any]) -> None:
        """Have `hook_after_wait` called by the next wait.

        Raises:
            ConfigError: there is a hook already.
        """
        if self.hook_after_wait is not None:
            raise ConfigError("this event has a hook already; one is called by the next wait")
        self.hook_after_wait = hook_after_wait

    def synchronize(self) -> None:
        """Wait on the host. The hook stays for the wait of a stream."""
        self.event.synchronize()

    def query(self) -> bool:
        """Whether the work is done."""
        return self.event.query()

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """For ``with event(release_handle=True):``, as in `current_stream_wait`."""
        self._releases_on_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        releases, self._releases_on_exit = self._releases_on_exit, False
        if error is None:
            self.current_stream_wait(releases)
        else:
            self.event.wait(None)  # what comes next may touch the memory; the hook counts on the body
