"""The buffer of DeepEP's first version."""

from ep_rt.compat.buffer import Buffer
from ep_rt.compat.config import Config

__all__ = ["Buffer", "Config"]
