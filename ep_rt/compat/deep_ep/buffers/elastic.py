"""The buffer of DeepEP's second version."""

from ep_rt.compat.elastic import ElasticBuffer
from ep_rt.compat.ep_handle import EPHandle

__all__ = ["EPHandle", "ElasticBuffer"]
