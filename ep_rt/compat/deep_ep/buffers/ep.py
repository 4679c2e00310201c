"""The buffer of DeepEP from version 2.5 on."""

from ep_rt.compat.ep_buffer import EPBuffer
from ep_rt.compat.ep_handle import EPHandle

__all__ = ["EPBuffer", "EPHandle"]
