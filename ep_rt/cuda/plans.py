"""Plans of an operation by what decides them: made for the first call of a kind, found by others. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from ..arrays import ArrayView

PlanT = TypeVar("PlanT")

MAX_PLANS: Final = 512


class Plans(Generic[PlanT]):
    """Bounded, so that shapes that never come again do not stay for ever.

    Attributes:
        find: the plan kept for a key.
    """

    def __init__(self) -> None:
        self._plans: dict[Hashable, PlanT] = {}
        self.find: Final[Callable[[Hashable], PlanT | None]] = self._plans.get

    def keep(self, key: Hashable, plan: PlanT) -> PlanT:
        """The plan, which later calls find; None as key keeps nothing."""
        if key is not None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan


def producers(*views: ArrayView | None) -> tuple[int, ...]:
    """Streams that must be waited for before arrays that were looked at are read, distinct."""
    return tuple(dict.fromkeys(view.stream for view in views if view is not None and view.stream is not None))


def seen(*views: ArrayView | None) -> tuple[list[int], list[object]]:
    """Addresses and owners of arrays that were looked at; 0 and None where there is none."""
    return [0 if view is None else view.pointer for view in views], [
        None if view is None else view.owner for view in views
    ]
