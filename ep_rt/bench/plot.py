"""Bandwidth over tokens, as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import BackendError
from .report import Report, Result


def require() -> None:
    """Say before the measurement, not after it, that it cannot be drawn.

    Raises:
        BackendError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError("--plot needs matplotlib; install ep-rt[examples]")


def draw(report: Report, path: Path) -> None:
    """Write the picture; its suffix says in which format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in curves(report).items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    if report.best_limit is not None:
        axes.axhline(report.best_limit, color="black", linestyle=":", label="limit of the links")
    axes.set_xscale("log", base=2)
    tokens = sorted({result.num_tokens for result in report.results})
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens per rank")
    axes.set_ylabel("GB/s leaving a rank")
    axes.set_title(f"{report.machine.get('gpu') or 'host'}, {report.machine['ranks']}")
    axes.legend(fontsize="small")
    figure.savefig(path)


def curves(report: Report) -> dict[str, list[tuple[int, float]]]:
    """(tokens, GB/s) by label, tokens ascending."""
    found: dict[str, list[tuple[int, float]]] = {}
    for result in sorted(report.results, key=lambda each: each.num_tokens):
        found.setdefault(_label(result), []).append((result.num_tokens, result.wire_gbps))
    return found


def _label(result: Result) -> str:
    sms = f", {result.num_sms} SMs" if result.num_sms else ""
    return f"{result.operation} {result.element}{sms}"
