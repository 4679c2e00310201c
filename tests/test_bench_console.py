"""What a run of the bench shows while it runs."""

from __future__ import annotations

import importlib.util
import io
import sys

import pytest

from ep_rt.bench.console import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_by(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None, stderr: io.StringIO) -> list[str]:
    """What a run of two steps draws on stderr, each drawing by itself."""
    monkeypatch.setattr(sys, "stderr", stderr)  # not by a fixture: pytest would put its own there again
    with Console(stream, 2) as console:
        console.lines(["tokens", "128"])
        console.step("dispatch, 128 tokens")
        console.step("combine, 128 tokens")
    return [each for each in stderr.getvalue().split("\r") if each]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    _, first, second, last = shown_by(monkeypatch, stream, Terminal())
    assert stream.getvalue() == "tokens\n128\n"
    assert first.startswith("dispatch, 128 tokens:")
    assert "0/2" in first
    assert second.startswith("combine, 128 tokens:")
    assert "1/2" in second
    assert not last.strip()  # wiped at the end


def test_silent_ranks_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_by(monkeypatch, None, Terminal()) == []


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_alone_without_a_terminal_or_tqdm(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_terminal:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    stream = io.StringIO()
    assert shown_by(monkeypatch, stream, Terminal() if is_terminal else io.StringIO()) == []
    assert stream.getvalue() == "tokens\n128\n"
