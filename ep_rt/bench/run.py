"""From options to a report."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, TextIO

from ..errors import ConfigError, EpError, on_all_ranks
from ..exchange import Group
from ..groups import as_group
from . import first_call, machine, one_node, plot, report, wire
from .check import CheckError, check_against_reference, check_call, count_over_nvlink
from .console import Console, say
from .layer import Call, Layer, open_buffer
from .library import Library, Packed
from .low_latency import LowLatencyLayer, open_low_latency_buffer
from .measure import CudaTimer, HostTimer, Times, open_timer
from .nccl import Nccl
from .options import ONE_NODE, OPERATIONS, SUMMED_AT_SOURCE, Options
from .places import CudaPlace, Place, Setting, on_every_rank
from .product import Product
from .ragged import Ragged
from .report import Beside, OneNode, Phases, Reading, Report, Result
from .workload import BF16, ELEMENTS, Element, NvlinkBytes, Routing

CHECK_FAILED = 1
CANNOT_RUN = 2

LIBRARY_TYPES: Final[dict[str, type[Library]]] = {library.option: library for library in (Nccl, Ragged)}


def main(options: Options, arguments: Sequence[str]) -> int:
    """Measure, print, write; the exit status.

    Args:
        arguments: what the options came from, for processes that are started with the same.
    """
    try:
        if options.plot:
            plot.require()
        if options.is_first_call and not options.is_in_place and as_group().size == 1:
            found: Report | None = _first_calls(options, arguments)
        else:
            found = on_every_rank(options, lambda group, place: _on_rank(group, place, options))
    except EpError as error:
        # What every rank raises one of them says.
        if not error.is_collective or as_group().rank == 0:
            say(f"error: {type(error).__name__}: {error}", sys.stderr)
        return CHECK_FAILED if isinstance(error, CheckError) else CANNOT_RUN
    if found is not None:
        _write(found, options)
    return 0


def _on_rank(group: Group, place: Place, options: Options) -> Report | None:
    """Everything that one rank does; rank 0 has the report."""
    problem = _problem(place.setting, options)
    if problem is None and ONE_NODE in options.compare:
        reason = one_node.problem(group, place)
        problem = None if reason is None else f"--compare {ONE_NODE}: {reason}"
    if problem is not None:
        raise on_all_ranks(ConfigError(problem))
    facts = machine.facts(place) if group.rank == 0 else None
    found = Report(options=options, machine=group.allgather(facts, op="bench machine")[0])
    backend = place.setting.backend
    steps = len(options.tokens) * (len(options.sms) if backend == "cuda" else 1)
    steps *= sum(len(options.operations_of(name, backend)) for name in options.dtypes)
    steps += len(options.tokens) * sum(len(options.low_latency_of(name)) for name in options.dtypes)
    with Console(_stream(options) if group.rank == 0 else None, steps) as console:
        console.lines(report.header(found))
        if options.is_first_call:
            found.first_calls.append(first_call.measure_here(group, place, options))
            console.lines([call.text for call in found.first_calls])
            return found if group.rank == 0 else None
        check_against_reference(group, place, options)
        timer = open_timer(group, place, options.repeat)
        _limits(group, place, timer, found)
        console.lines(report.limit_lines(found))
        routings = {num_tokens: Routing.of(options, group.size, num_tokens) for num_tokens in options.tokens}
        for name in options.dtypes:
            element = ELEMENTS[name]
            console.lines(report.title(name, element.row_bytes(options.hidden)))
            for routing in routings.values():
                if options.operations_of(name, backend):
                    _measure(group, place, timer, element, routing, found, console)
                if options.low_latency_of(name):
                    _measure_low_latency(group, place, timer, element, routing, found, console)
        if isinstance(timer, CudaTimer):
            timer.close()
        for library_type in (LIBRARY_TYPES[name] for name in options.compare if name != ONE_NODE):
            _compare(library_type, group, place, routings, found, console)
        console.lines(report.footer(found))
    return found if group.rank == 0 else None


def _problem(setting: Setting, options: Options) -> str | None:
    """Why these ranks cannot run what was asked for; None if they can. The same on every rank."""
    if options.num_experts % setting.num_ranks:
        return f"{options.num_experts} experts cannot be divided by {setting.num_ranks} ranks"
    is_over_network = setting.backend == "cuda" and (setting.num_nodes > 1 or options.with_puts)
    if is_over_network and SUMMED_AT_SOURCE in options.operations:
        return f"--operations {SUMMED_AT_SOURCE}: GPUs serve it within one node alone, and without --puts"
    if ONE_NODE in options.compare and not set(OPERATIONS) & set(options.operations):
        return f"--compare {ONE_NODE} is for operations of the normal mode, and --operations names none"
    return None


def _limits(group: Group, place: Place, timer: CudaTimer | HostTimer, found: Report) -> None:
    if not (isinstance(place, CudaPlace) and isinstance(timer, CudaTimer)):
        return
    found.barrier = Reading(tuple(group.allgather(timer.barrier_us, op="bench barrier")))
    if group.size == 1:
        found.notes.append("one rank has no links to measure")
        return
    if place.setting.is_shared:
        found.notes.append(
            "all ranks share one GPU: 'wire' is its own memory, and SMs are divided by the ranks"
        )
    limits = wire.measure_limit(group, place, timer, found.options.sms)
    found.wire_limit_ranks = group.allgather(limits, op="bench wire limit")
    found.wire_limit = wire.limits(found.wire_limit_ranks)
    if group.rank == 0:
        found.clock_mhz = machine.clock_mhz(place)
    if place.setting.ranks_are == "threads":
        found.notes.append("threads share one interpreter: their call times hold waits for each other")


def _measure(
    group: Group,
    place: Place,
    timer: CudaTimer | HostTimer,
    element: Element,
    routing: Routing,
    found: Report,
    console: Console,
) -> None:
    """All operations with all SM counts, for one element and number of tokens."""
    nvlink_bytes = count_over_nvlink(group, place, element, routing, found.options)
    given = group, place, routing, element, found.options
    with open_buffer(*given) as buffer, contextlib.ExitStack() as others:
        layer, beside = Layer(group, buffer, place, element, routing, found.options), None
        if ONE_NODE in found.options.compare:
            one = others.enter_context(open_buffer(*given, ranks_per_node=group.size))
            beside = Layer(group, one, place, element, routing, found.options)
        for num_sms in found.options.sms if buffer.backend == "cuda" else (None,):
            layer.use_sms(num_sms)
            if beside is not None:
                beside.use_sms(num_sms)
            _measure_calls(
                layer,
                timer,
                found,
                console,
                num_sms=num_sms,
                nvlink_bytes=nvlink_bytes,
                on_one_node=beside,
            )
        del layer, beside  # their arrays, before the buffers that they lie in
        group.barrier()


def _measure_low_latency(
    group: Group,
    place: Place,
    timer: CudaTimer | HostTimer,
    element: Element,
    routing: Routing,
    found: Report,
    console: Console,
) -> None:
    """The operations of the low-latency mode, for one element and number of tokens."""
    with open_low_latency_buffer(group, place, routing, found.options) as buffer:
        layer = LowLatencyLayer(group, buffer, place, element, routing, found.options)
        num_sms = found.options.num_low_latency_sms if buffer.backend == "cuda" else None
        _measure_calls(layer, timer, found, console, num_sms=num_sms)
        del layer  # its arrays, before the buffer that they lie in
        group.barrier()


def _measure_calls(
    layer: Layer | LowLatencyLayer,
    timer: CudaTimer | HostTimer,
    found: Report,
    console: Console,
    *,
    num_sms: int | None,
    nvlink_bytes: Mapping[str, NvlinkBytes] = MappingProxyType({}),
    on_one_node: Layer | None = None,
) -> None:
    """Each call of a layer, and the same of a layer on one node right after it."""
    same_calls = {} if on_one_node is None else {call.name: call for call in on_one_node.calls()}
    num_tokens = len(layer.tokens)
    product = _product(layer, timer, found)
    for call in layer.calls():
        console.step(f"{layer.element.name} {num_tokens} {call.name}")
        moved = check_call(layer, call)
        result = Result.of(
            _gathered(layer.group, timer.measure(call)),
            element=layer.element.name,
            num_tokens=num_tokens,
            num_sms=num_sms,
            max_sms=layer.max_sms(call.name) if isinstance(layer, Layer) else None,
            operation=call.name,
            row_bytes=layer.element.row_bytes(found.options.hidden),
            traffic=layer.routing.traffic(by_column=call.name == SUMMED_AT_SOURCE),
            network_bytes=moved.network,
            nvlink_bytes=nvlink_bytes.get(call.name),
            phases=_phases(layer.group, timer, call),
            beside=None
            if product is None or not call.can_be_captured
            else Beside.of(layer.group.allgather(product.measure(call.run), op="bench product times")),
        )
        if on_one_node is not None:
            check_call(on_one_node, same_calls[call.name])
            times = _gathered(layer.group, timer.measure(same_calls[call.name]))
            result = replace(result, one_node=OneNode.of(times, max_sms=on_one_node.max_sms(call.name)))
        found.results.append(result)
        console.lines([report.line(found, result)])


def _phases(group: Group, timer: CudaTimer | HostTimer, call: Call) -> Phases | None:
    times = timer.phases(call)
    return None if times is None else Phases.of(group.allgather(times, op="bench phases"))


def _product(layer: Layer | LowLatencyLayer, timer: CudaTimer | HostTimer, found: Report) -> Product | None:
    options, place = found.options, layer.place
    if not options.product:
        return None
    if not (isinstance(place, CudaPlace) and isinstance(timer, CudaTimer)) or place.setting.is_shared:
        note = "not measured beside a product: that needs ranks with a GPU each"
        found.notes += [] if note in found.notes else [note]
        return None
    return Product(
        layer.group,
        place,
        timer,
        options.product,
        num_left_sms=options.num_left_sms,
        repeat=options.repeat,
    )


def _compare(
    library_type: type[Library],
    group: Group,
    place: Place,
    routings: dict[int, Routing],
    found: Report,
    console: Console,
) -> None:
    """The same rows through another library."""
    absence = library_type.absence(place)
    if absence is not None or not isinstance(place, CudaPlace):
        found.notes.append(f"not compared with {library_type.label}: {absence}")
        return
    options = found.options
    library = library_type(group, place, options.repeat)
    console.lines(["", library.title, report.COLUMNS])
    if library.note is not None:
        found.notes.append(library.note)
    for num_tokens, routing in routings.items():
        operations = [("dispatch", ELEMENTS[name]) for name in options.dtypes]
        operations += [("combine", BF16)] if BF16.name in options.dtypes else []
        for operation, element in operations:
            if operation == "dispatch":
                packed = Packed.dispatch(element, options.hidden, routing, group.rank)
            else:
                packed = Packed.combine(options.hidden, routing, group.rank)
            result = Result.of(
                _gathered(group, library.measure(packed)),
                element=element.name,
                num_tokens=num_tokens,
                num_sms=None,
                operation=f"{library.option}-{operation}",
                row_bytes=element.row_bytes(options.hidden),
                traffic=routing.traffic(),
            )
            found.results.append(result)
            name = f"{operation} {element.name}"
            console.lines([report.line(found, result, name=name)])
    library.close()


def _gathered(group: Group, times: Times) -> list[Times]:
    return group.allgather(times, op="bench times")


def _first_calls(options: Options, arguments: Sequence[str]) -> Report:
    documents = first_call.measure_in_processes(arguments)
    found = Report(
        options=options,
        machine=documents[0].machine,
        first_calls=[document.call for document in documents],
    )
    with Console(_stream(options), 0) as console:
        console.lines([*report.header(found), *(call.text for call in found.first_calls)])
    return found


def _write(found: Report, options: Options) -> None:
    if options.json == "-":
        say(report.as_json(found), sys.stdout)
    elif options.json:
        Path(options.json).write_text(report.as_json(found) + "\n")
    if options.plot and found.results:
        plot.draw(found, Path(options.plot))


def _stream(options: Options) -> TextIO:
    """Where the tables go."""
    return sys.stderr if options.json == "-" else sys.stdout
