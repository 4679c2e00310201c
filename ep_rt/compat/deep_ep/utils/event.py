"""The events, by the module that they are in from DeepEP's second version on."""

from ep_rt.compat.events import EventHandle
from ep_rt.events import EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
