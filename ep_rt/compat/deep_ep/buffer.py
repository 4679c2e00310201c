"""The buffer, by the module that DeepEP has it in."""

from ep_rt.compat.buffer import Buffer
from ep_rt.compat.config import Config

__all__ = ["Buffer", "Config"]
