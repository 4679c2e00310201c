"""What was found, as numbers, as a table and as JSON. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

from .measure import PhaseTimes, Times
from .options import Options
from .product import BesideTimes
from .workload import NetworkBytes, NvlinkBytes, Traffic


@dataclass(frozen=True, slots=True)
class Reading:
    """One time of all ranks: [rank][reading], in microseconds."""

    ranks_us: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> list[float]:
        """Of each rank."""
        return [median(readings) for readings in self.ranks_us]

    @property
    def median(self) -> float:
        """Over ranks, of their medians."""
        return median(self.medians)

    @property
    def text(self) -> str:
        """Median, and the range over ranks."""
        return self._text(1e3)

    @property
    def short_text(self) -> str:
        """The same in fewer digits."""
        return self._text(10)

    def _text(self, limit: float) -> str:
        """The range has a decimal below `limit`, the median one digit more."""
        median, least, most = self.median, min(self.medians), max(self.medians)
        digits, median_digits = (1 if most < below else 0 for below in (limit, 10 * limit))
        return f"{median:.{median_digits}f} ({least:.{digits}f}-{most:.{digits}f})"

    def as_json(self) -> dict[str, Any]:
        medians = self.medians
        return {
            "median": self.median,
            "min": min(medians),
            "max": max(medians),
            "ranks": [[round(reading, 3) for reading in readings] for readings in self.ranks_us],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """An operation and a product of matrices, alone and at the same time, on all ranks."""

    op_alone: Reading
    op: Reading
    product_alone: Reading
    product: Reading

    @classmethod
    def of(cls, times: Sequence[BesideTimes]) -> Beside:
        """From the times of every rank."""
        return cls(
            **{
                each.name: Reading(tuple(getattr(rank, f"{each.name}_us") for rank in times))
                for each in fields(cls)
            }
        )

    @property
    def text(self) -> str:
        return (
            f"{self.op.median:.1f} us, not {self.op_alone.median:.1f}; "
            f"the product {self.product.median:.1f}, not {self.product_alone.median:.1f}"
        )

    def as_json(self) -> dict[str, Any]:
        return {f"{each.name}_us": getattr(self, each.name).as_json() for each in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """The two phases of an operation on all ranks; see `PhaseTimes`."""

    send: Reading
    receive: Reading

    @classmethod
    def of(cls, times: Sequence[PhaseTimes]) -> Phases:
        """From the times of every rank."""
        return cls(
            send=Reading(tuple(each.send_us for each in times)),
            receive=Reading(tuple(each.receive_us for each in times)),
        )

    @property
    def text(self) -> str:
        return f"the send phase {self.send.text} us, the hook {self.receive.text} us once all has landed"

    def as_json(self) -> dict[str, Any]:
        return {"send_us": self.send.as_json(), "receive_us": self.receive.as_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class OneNode:
    """An operation on one node of all ranks, where they were split into several."""

    kernel: Reading | None
    op: Reading
    call: Reading | None
    row: Reading | None
    max_sms: int | None

    @classmethod
    def of(cls, times: Sequence[Times], *, max_sms: int | None) -> OneNode:
        """From the times of every rank."""
        return cls(**_readings(times), max_sms=max_sms)

    @property
    def time_us(self) -> float:
        """As that of a `Result`."""
        return (self.kernel or self.op).median

    def as_json(self) -> dict[str, Any]:
        return {"max_sms": self.max_sms, **_readings_json(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One operation of one configuration, on all ranks.

    Attributes:
        num_sms: that it was told to use.
        max_sms: that it may take; None where that is not known.
        row_bytes: of a row on its way, with its scale factors.
        network_bytes, nvlink_bytes: what one call moved over the network and within nodes, where that is
            counted.
        phases: of an operation in two.
        beside: a product of matrices, if that was asked for.
        one_node: the same on one node, if that was asked for.
    """

    element: str
    num_tokens: int
    num_sms: int | None
    operation: str
    row_bytes: int
    traffic: Traffic
    kernel: Reading | None
    op: Reading
    call: Reading | None
    row: Reading | None = None
    max_sms: int | None = None
    network_bytes: NetworkBytes | None = None
    nvlink_bytes: NvlinkBytes | None = None
    phases: Phases | None = None
    beside: Beside | None = None
    one_node: OneNode | None = None

    @classmethod
    def of(cls, times: Sequence[Times], **facts: Any) -> Result:
        """From the times of every rank."""
        return cls(**_readings(times), **facts)

    @property
    def shown_sms(self) -> int | None:
        """More than it was told to use, where it may take those."""
        return max(self.num_sms, self.max_sms or 0) if self.num_sms else None

    @property
    def time_us(self) -> float:
        """What bandwidth is taken from: kernel, where there is one, else op."""
        return (self.kernel or self.op).median

    @property
    def logical_gbps(self) -> float:
        """Bytes that a rank receives, from itself too, by time; mean over ranks."""
        return self.traffic.logical_rows * self.row_bytes / self.time_us / 1e3

    @property
    def wire_gbps(self) -> float:
        """Bytes that leave a rank, by time; mean over ranks."""
        return self.traffic.wire_rows * self.row_bytes / self.time_us / 1e3

    @property
    def ratio_to_one_node(self) -> float | None:
        """Its time by that on one node."""
        return None if self.one_node is None else self.time_us / self.one_node.time_us

    def as_json(self) -> dict[str, Any]:
        return {
            "dtype": self.element,
            "tokens": self.num_tokens,
            "sms": self.num_sms,
            "max_sms": self.max_sms,
            "operation": self.operation,
            "row_bytes": self.row_bytes,
            "rows": asdict(self.traffic),
            "busiest_link": self.traffic.busiest,
            **_readings_json(self),
            "logical_gbps": self.logical_gbps,
            "wire_gbps": self.wire_gbps,
            "network_bytes": None if self.network_bytes is None else asdict(self.network_bytes),
            "nvlink_bytes": None if self.nvlink_bytes is None else asdict(self.nvlink_bytes),
            "phases": None if self.phases is None else self.phases.as_json(),
            "beside_product": None if self.beside is None else self.beside.as_json(),
            "one_node": None if self.one_node is None else self.one_node.as_json(),
            "ratio_to_one_node": self.ratio_to_one_node,
        }


def _readings(times: Sequence[Times]) -> dict[str, Any]:
    """By name: of all ranks, or None for what does not exist here."""
    found = {}
    for name in ("kernel", "op", "call", "row"):
        readings = [getattr(each, f"{name}_us") for each in times]
        found[name] = None if None in readings else Reading(tuple(readings))
    return found


def _readings_json(of: Result | OneNode) -> dict[str, Any]:
    readings = {"kernel_us": of.kernel, "op_us": of.op, "call_us": of.call, "row_us": of.row}
    return {name: None if each is None else each.as_json() for name, each in readings.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstCall:
    """The first buffer and the first dispatch of a process, the slowest rank's seconds.

    Attributes:
        cache: "cold" if no kernel was compiled yet, else "warm"; "none" where there are no kernels.
        import_s: libraries and context of CUDA, which a program has anyway.
    """

    cache: str
    import_s: float
    buffer_s: float
    dispatch_s: float

    @property
    def text(self) -> str:
        total_s = self.buffer_s + self.dispatch_s
        return (
            f"{self.cache:<6}buffer {self.buffer_s:.2f} s, first dispatch {self.dispatch_s:.3f} s, together "
            f"{total_s:.2f} s (before that, CUDA and its libraries: {self.import_s:.2f} s)"
        )


@dataclass(slots=True, kw_only=True)
class Report:
    """All of a run. Grows while it is made."""

    options: Options
    machine: Mapping[str, Any]
    clock_mhz: float | None = None
    barrier: Reading | None = None
    wire_limit: Mapping[tuple[str, int], float] = field(default_factory=dict)  # GB/s by way and SM count
    wire_limit_ranks: Sequence[Mapping[tuple[str, int], tuple[float, ...]]] = ()
    results: list[Result] = field(default_factory=list)
    first_calls: list[FirstCall] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def best_limit(self) -> float | None:
        """GB/s that left a rank at most, whichever way."""
        return max(self.wire_limit.values(), default=None)

    def limit_share(self, result: Result) -> float | None:
        """Of the best limit of the links."""
        return result.wire_gbps / self.best_limit if self.best_limit else None


def header(report: Report) -> list[str]:
    """Lines that say what is measured, on what."""
    machine, options = report.machine, report.options
    lines = [f"ep_rt {machine['ep_rt']} bench on {machine['host']}, {machine['time']}: {machine['ranks']}"]
    if machine["backend"] == "host":
        lines.append(f"no GPU: NumPy on {machine.get('cpu') or 'this CPU'}; times and GB/s are of its memory")
    else:
        facts = {
            "links": machine["links"],
            "driver": machine["driver"],
            "CUDA": machine["cuda_driver"],
            "runtime": machine["cuda_runtime"],
            "CuPy": machine["cupy"],
        }
        known = [f"{name} {value}" for name, value in facts.items() if value]
        lines.append(", ".join([f"{machine['gpu']} with {machine['gpu_sms']} SMs", *known]))
    lines.append(
        f"hidden {options.hidden}, top-{options.num_topk} of {options.num_experts} experts, "
        f"{options.routing_text}, seed {options.seed}; {options.repeat} readings of each time"
    )
    how = {"puts": options.with_puts, "masks": options.with_masks, "statistics": options.with_stats}
    if any(how.values()):
        lines.append(
            f"low-latency calls with {', '.join(name for name, is_asked in how.items() if is_asked)}"
        )
    return lines


def limit_lines(report: Report) -> list[str]:
    """The limit of the links, the barrier and the clock, as far as they were measured."""
    lines = []
    for way in dict.fromkeys(way for way, _ in report.wire_limit):
        listed = ", ".join(
            f"{sms} SMs {gbps:.0f}" for (its, sms), gbps in report.wire_limit.items() if its == way
        )
        lines.append(f"wire limit (all ranks {way} at once), GB/s leaving a rank: {listed}")
    small = []
    if report.barrier is not None:
        small.append(f"barrier {report.barrier.text} us")
    if report.clock_mhz:
        small.append(f"SM clock {report.clock_mhz:.0f} MHz")
    return [*lines, ", ".join(small)] if small else lines


_WIDTHS = {"kernel us (ranks)": 20, "op us (ranks)": 23, "call us": 14, "row us": 14}
_WIDTHS |= {"logical": 8, "wire": 6, "limit": 6}

COLUMNS = f"{'tokens':>6}{'SMs':>4} {'operation':<18}" + "".join(
    name.rjust(width) for name, width in _WIDTHS.items()
)


_LEGEND = (
    "kernel: (barrier, operation) pairs in a CUDA graph, less the barriers. op: back to back in a graph",
    "(dispatch-exact: on the stream). call: until Python returns, the stream idle before; row: each of calls",
    "in a row, nothing between them. Medians; in brackets least and most of the ranks. GB/s of kernel,",
    "else of op: logical, rows received; wire, rows that leave a rank; limit, share of the best of those.",
)
_HOST_LEGEND = (
    "op: one call after a barrier. Medians; in brackets least and most of the ranks.",
    "GB/s of op: logical, rows received; wire, rows sent to other ranks.",
)


def title(element: str, row_bytes: int) -> list[str]:
    """The lines above a table."""
    return ["", f"{element.upper()}: rows of {row_bytes} bytes", COLUMNS]


def line(report: Report, result: Result, name: str | None = None) -> str:
    """One line of a table; `name` stands for that of the operation."""
    share = report.limit_share(result)
    cells = (
        result.kernel.text if result.kernel else "-",
        result.op.text,
        result.call.short_text if result.call else "-",
        result.row.short_text if result.row else "-",
        _gbps(result.logical_gbps),
        _gbps(result.wire_gbps),
        f"{share:.0%}" if share is not None else "-",
    )
    text = f"{result.num_tokens:>6}{result.shown_sms or '-':>4} {name or result.operation:<18}"
    end = len(text)
    for cell, width in zip(cells, _WIDTHS.values(), strict=True):
        end += width
        text += f" {cell}".rjust(end - len(text))  # a long one takes room from those behind it
    return text


def _gbps(value: float) -> str:
    return f"{value:.1f}" if value < 1e3 else f"{value:.0f}"


def footer(report: Report) -> list[str]:
    """What the columns mean here, and the notes."""
    is_host = report.machine["backend"] == "host"
    lines = ["", *(_HOST_LEGEND if is_host else _LEGEND)]
    busiest = {
        result.num_tokens: result.traffic.busiest for result in report.results if report.options.exponent
    }
    lines += [
        f"{tokens} tokens: the busiest link carries {busy:.2f} times the mean"
        for tokens, busy in busiest.items()
    ]
    more: dict[tuple[str, int], int] = {}
    for each in report.results:
        if each.num_sms and each.max_sms and each.max_sms > each.num_sms:
            key = each.operation, each.num_sms
            more[key] = max(each.max_sms, more.get(key, 0))
    lines += [
        f"{operation} with --sms {num_sms}: up to {most} SMs, since blocks of their own copy its rows"
        for (operation, num_sms), most in more.items()
    ]
    moved: dict[str, None] = {}  # the same for every number of SMs
    for each in report.results:
        what = f"{each.operation} {each.element}, {each.num_tokens} tokens: a rank"
        if each.network_bytes is not None:
            moved[f"{what} sent over the network {each.network_bytes.text}"] = None
        if each.nvlink_bytes is not None:
            moved[f"{what} moved over NVLink {each.nvlink_bytes.text}"] = None
    lines += moved
    lines += [
        f"{each.operation} {each.element}, {each.num_tokens} tokens: {each.phases.text}"
        for each in report.results
        if each.phases is not None
    ]
    size, num_left_sms = report.options.product, report.options.num_left_sms
    product = f"a {size} x {size} product" + (f" that leaves {num_left_sms} SMs" if num_left_sms else "")
    lines += [
        f"{each.operation} {each.element}, {each.num_tokens} tokens, beside {product}: {each.beside.text}"
        for each in report.results
        if each.beside is not None
    ]
    lines += [
        f"{each.operation} {each.element}, {each.num_tokens} tokens, {each.num_sms or '-'} SMs: "
        f"{each.time_us:.1f} us over the nodes, {each.one_node.time_us:.1f} on one: "
        f"{each.ratio_to_one_node:.2f} times"
        for each in report.results
        if each.one_node is not None
    ]
    lines += [f"note: {note}" for note in report.notes]
    return [*lines, "every result was compared, byte by byte, before it was timed"]


def as_json(report: Report) -> str:
    """Everything, every reading included; one line for each result."""
    whole = {
        "config": asdict(report.options),
        "machine": {**report.machine, "sm_clock_mhz": report.clock_mhz},
        "checked": True,
        "notes": report.notes,
        "barrier_us": None if report.barrier is None else report.barrier.as_json(),
        "wire_limit_best_gbps": report.best_limit,
        "wire_limit": [
            {
                "way": way,
                "sms": sms,
                "gbps": gbps,
                "ranks": [rank[way, sms] for rank in report.wire_limit_ranks],
            }
            for (way, sms), gbps in report.wire_limit.items()
        ],
        "first_calls": [asdict(call) for call in report.first_calls],
        "results": [
            {**result.as_json(), "limit_share": report.limit_share(result)} for result in report.results
        ],
    }
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_listed(value)}" for key, value in whole.items()) + "\n}"


def _listed(value: object) -> str:
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(json.dumps(each) for each in value) + "\n]"
    return json.dumps(value)
