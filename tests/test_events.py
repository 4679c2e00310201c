"""`EventOverlap`: waits, as a context manager, and its hook."""

from __future__ import annotations

from typing import Any

import pytest

import ep_rt
from ep_rt import EventOverlap


class FakeEvent:
    """Writes down who waits."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def wait(self, stream: Any) -> None:
        self.log.append(("wait", stream))

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def query(self) -> bool:
        return False


@pytest.fixture
def event() -> FakeEvent:
    return FakeEvent()


def test_waits_reach_the_event(event: FakeEvent) -> None:
    overlap = EventOverlap(event)
    assert overlap.current_stream_wait() is None
    overlap.wait()
    overlap.current_stream_wait(stream=7)
    overlap.synchronize()
    assert event.log == [("wait", None), ("wait", None), ("wait", 7), "synchronize"]
    assert not overlap.query()


def test_no_event_is_work_that_is_done() -> None:
    overlap = EventOverlap()
    overlap.synchronize()
    assert overlap.wait() is None
    assert overlap.query()


def test_leaving_the_body_waits(event: FakeEvent) -> None:
    overlap = EventOverlap(event)
    with overlap as entered:
        event.log.append("body")
    assert entered is overlap
    assert event.log == ["body", ("wait", None)]


def test_hook_follows_the_next_wait_once(event: FakeEvent) -> None:
    overlap = EventOverlap(event)

    def hook() -> str:
        event.log.append("hook")
        return "sorted"

    overlap.register_hook_after_wait(hook)
    overlap.synchronize()
    assert event.log == ["synchronize"]
    assert overlap.current_stream_wait() == "sorted"
    assert overlap.current_stream_wait() is None
    assert event.log == ["synchronize", ("wait", None), "hook", ("wait", None)]
    overlap.register_hook_after_wait(hook)
    with overlap:
        pass
    assert event.log[-2:] == [("wait", None), "hook"]


def test_hook_that_raises_or_waits_is_not_called_again(event: FakeEvent) -> None:
    overlap = EventOverlap(event)
    overlap.register_hook_after_wait(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        overlap.wait()
    assert overlap.wait() is None
    overlap.register_hook_after_wait(overlap.wait)
    assert overlap.wait() is None
    assert event.log == [("wait", None)] * 4


def test_second_hook_is_refused(event: FakeEvent) -> None:
    overlap = EventOverlap(event)
    overlap.register_hook_after_wait(lambda: "first")
    with pytest.raises(ep_rt.ConfigError, match="has a hook already"):
        overlap.register_hook_after_wait(lambda: "second")
    assert overlap.wait() == "first"


def test_body_that_raises_waits_without_the_hook(event: FakeEvent) -> None:
    overlap = EventOverlap(event)
    overlap.register_hook_after_wait(lambda: event.log.append("hook"))
    with pytest.raises(ZeroDivisionError), overlap:
        raise ZeroDivisionError
    assert event.log == [("wait", None)]


def test_tensors_live_until_a_wait_releases_them(event: FakeEvent) -> None:
    kept = (object(),)
    overlap = EventOverlap(event, extra_tensors=kept)
    with overlap:
        assert overlap.extra_tensors is kept
    assert overlap.extra_tensors is kept
    with overlap(release_handle=True) as entered:
        assert entered is overlap
        assert overlap.extra_tensors is kept
    assert overlap.extra_tensors is None

    overlap = EventOverlap(event, extra_tensors=kept)
    overlap.current_stream_wait(True)
    assert overlap.extra_tensors is None
