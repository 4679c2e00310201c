"""Expert-parallel communication for Mixture-of-Experts models, with no build step."""

from . import reference
from ._version import __version__
from .buffer import Buffer
from .config import Config
from .cublas import leaving_sms
from .errors import (
    ArrayError,
    BackendError,
    ClosedError,
    CollectiveMismatchError,
    CompileError,
    ConfigError,
    DeviceError,
    EpError,
    HandleError,
    PeerFailedError,
    PeerTimeoutError,
    TopologyError,
)
from .events import EventOverlap
from .exchange import Group
from .groups import as_group, run_local
from .handle import DispatchHandle, LowLatencyHandle
from .network_options import NetworkOptions
from .results import Combined, Dispatched, DispatchLayout, LowLatencyCombined, LowLatencyDispatched
from .topology import Topology

__all__ = [
    "ArrayError",
    "BackendError",
    "Buffer",
    "ClosedError",
    "CollectiveMismatchError",
    "Combined",
    "CompileError",
    "Config",
    "ConfigError",
    "DeviceError",
    "DispatchHandle",
    "DispatchLayout",
    "Dispatched",
    "EpError",
    "EventOverlap",
    "Group",
    "HandleError",
    "LowLatencyCombined",
    "LowLatencyDispatched",
    "LowLatencyHandle",
    "NetworkOptions",
    "PeerFailedError",
    "PeerTimeoutError",
    "Topology",
    "TopologyError",
    "__version__",
    "as_group",
    "leaving_sms",
    "reference",
    "run_local",
]
