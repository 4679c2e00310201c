"""The events, by the module that DeepEP's users import them from; its submodules hold helpers."""

from ep_rt.compat.events import EventHandle
from ep_rt.events import EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
