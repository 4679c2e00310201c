"""``python -m ep_rt bench`` without a GPU: what it moves, what it says, and that it notices wrong results."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import MpiRun

from ep_rt import __main__ as program
from ep_rt import reference
from ep_rt.bench import check, low_latency, machine, one_node, options, places, plot, report, run, wire
from ep_rt.bench.check import CheckError, check_against_reference
from ep_rt.bench.layer import Call, Layer
from ep_rt.bench.measure import CudaTimer, HostTimer, PhaseTimes, Times
from ep_rt.bench.options import LOW_LATENCY, OPERATIONS, Options
from ep_rt.bench.product import BesideTimes
from ep_rt.bench.workload import BF16, ELEMENTS, FP8, Payload, Routing, Traffic
from ep_rt.buffer import Buffer
from ep_rt.errors import ConfigError
from ep_rt.groups import thread_groups
from ep_rt.host.engine import HostEngine
from ep_rt.topology import GpuPlace

ROOT = Path(__file__).parents[1]
SMALL = ["--backend=host", "--tokens", "5", "9", "--hidden=64", "--experts=12", "--topk=3", "--repeat=2"]


def draw(**changes: Any) -> Routing:
    sizes = {"num_ranks": 4, "num_tokens": 37, "num_experts": 16, "num_topk": 5, **changes}
    return Routing.draw(**sizes)


# What is moved.


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("zipf_exponent", [0.0, 1.2])
def test_what_is_expected_is_what_the_oracle_says(element: Any, zipf_exponent: float) -> None:
    routing = draw(zipf_exponent=zipf_exponent)
    routing.topk_idx[2][::3, 1] = -1
    routing = Routing(routing.topk_idx, routing.num_experts)
    payload, tokens, salt = Payload(element, 256), np.arange(37), 8
    ranks = range(routing.num_ranks)
    x = [payload.rows(rank, tokens, salt) for rank in ranks]
    sf = [payload.scales(rank, tokens, salt) for rank in ranks] if element.block else None
    weights = [routing.weights(rank) for rank in ranks]
    expected = reference.dispatch(
        x, routing.topk_idx, num_experts=routing.num_experts, topk_weights=weights, sf=sf
    )
    for rank, part in enumerate(expected):
        src_rank, src_token = routing.received(rank)
        assert (src_rank.tolist(), src_token.tolist()) == (part.src_rank.tolist(), part.src_token.tolist())
        assert payload.rows(src_rank, src_token, salt).tobytes() == part.recv_x.tobytes()
        assert np.array_equal(routing.received_idx(rank), part.recv_topk_idx)
        assert part.recv_topk_weights is not None
        assert np.array_equal(routing.received_weights(rank), part.recv_topk_weights)
        if part.recv_sf is not None:
            assert payload.scales(src_rank, src_token, salt).tobytes() == part.recv_sf.tobytes()
    if element is BF16:
        y = [payload.rows(*routing.received(rank), salt + rank) for rank in ranks]
        sums = reference.combine(y, expected, num_tokens=[37] * routing.num_ranks)
        for rank, total in enumerate(sums):
            mine = payload.combined(rank, tokens, routing.destinations[rank], salt)
            assert mine.tobytes() == total.x.tobytes()


def test_rows_differ_by_rank_token_and_salt_and_say_so() -> None:
    payload = Payload(BF16, 32)
    tokens = np.arange(3000)
    rows = [payload.rows(rank, tokens, salt) for rank in range(3) for salt in range(3)]
    names = {row.tobytes() for part in rows for row in part}
    assert len(names) == 9 * 3000
    assert payload.origin(rows[7][1234]) == "token 1234, rank 2, salt 1"
    assert payload.origin(np.full(32, 0.3, ml_dtypes.bfloat16)) == "no row of this run"


def test_experts_of_a_token_are_distinct_and_every_rank_draws_the_same() -> None:
    first, second = draw(num_tokens=200), draw(num_tokens=200)
    for mine, other in zip(first.topk_idx, second.topk_idx, strict=True):
        assert np.array_equal(mine, other)
        assert all(len(set(row)) == 5 for row in mine.tolist())
    assert not np.array_equal(first.topk_idx[0], first.topk_idx[1])


def test_zipf_is_skewed_as_the_exponent_says() -> None:
    def popularity(exponent: float) -> list[int]:
        routing = draw(num_tokens=4000, num_experts=64, num_topk=1, zipf_exponent=exponent)
        counts = np.bincount(np.concatenate(routing.topk_idx).ravel(), minlength=64)
        return sorted(counts.tolist(), reverse=True)

    uniform, skewed = popularity(0.0), popularity(1.0)
    assert uniform[0] < 1.3 * 16000 / 64
    harmonic = sum(1 / n for n in range(1, 65))
    for n in (1, 2, 4):
        assert skewed[n - 1] == pytest.approx(16000 / harmonic / n, rel=0.1)
    assert draw(zipf_exponent=1.5).traffic().busiest > draw().traffic().busiest


def test_traffic_is_what_counting_gives() -> None:
    routing = draw(num_ranks=3, num_experts=9, num_topk=2)
    received, sent_away, from_others = [0] * 3, [0] * 3, [0] * 3
    for src, ids in enumerate(routing.topk_idx):
        for row in ids.tolist():
            for dst in {expert // 3 for expert in row}:
                received[dst] += 1
                if dst != src:
                    sent_away[src] += 1
                    from_others[dst] += 1
    traffic = routing.traffic()
    assert traffic == Traffic(
        received=tuple(received), sent_away=tuple(sent_away), received_from_others=tuple(from_others)
    )
    assert traffic.logical_rows == pytest.approx(sum(received) / 3)
    assert traffic.wire_rows == pytest.approx(sum(sent_away) / 3)
    assert traffic.busiest == pytest.approx(max(sent_away + from_others) / (sum(sent_away) / 3))


def test_rows_of_every_column_are_more() -> None:
    ids = [np.array([[0, 1, 5], [2, 3, -1]]), np.array([[4, 0, 1], [-1, -1, -1]])]
    routing = Routing(ids, num_experts=6)
    assert routing.traffic() == Traffic(received=(3, 3), sent_away=(2, 1), received_from_others=(1, 2))
    by_column = routing.traffic(by_column=True)
    assert by_column == Traffic(received=(5, 3), sent_away=(2, 2), received_from_others=(2, 2))


def test_row_bytes() -> None:
    assert (BF16.row_bytes(7168), FP8.row_bytes(7168)) == (14336, 7168 + 56 * 4)
    assert FP8.num_scales(200) == 2


# What it says.


def result(**changes: Any) -> report.Result:
    times = [
        Times(kernel_us=(99.0, 100.0, 109.0), op_us=(120.0, 121.0, 122.0), call_us=(9.0, 8.0), row_us=(4.0,)),
        Times(
            kernel_us=(101.0, 102.0, 103.0), op_us=(120.0, 124.0, 126.0), call_us=(7.0, 8.0), row_us=(5.0,)
        ),
    ]
    traffic = Traffic(received=(10, 30), sent_away=(10, 20), received_from_others=(20, 10))
    facts = {"element": "bf16", "num_tokens": 40, "num_sms": 16, "operation": "dispatch", "row_bytes": 1000}
    return replace(report.Result.of(times, traffic=traffic, **facts), **changes)


def a_report(*results: report.Result, backend: str = "cuda") -> report.Report:
    found = report.Report(
        options=Options(),
        machine={
            **dict.fromkeys(("links", "driver", "cuda_driver", "cuda_runtime", "cupy")),
            "ep_rt": "1.0",
            "host": "h",
            "time": "now",
            "ranks": "2 ranks",
            "backend": backend,
            "gpu": "H200",
            "gpu_sms": 132,
        },
        results=list(results),
    )
    if backend == "cuda":
        found.wire_limit = {("push", 16): 0.3, ("push", 132): 0.5, ("pull", 16): 0.4}
        found.wire_limit_ranks = [{("push", 16): (0.3,), ("push", 132): (0.5,), ("pull", 16): (0.4,)}] * 2
    return found


def test_bandwidth_and_share_of_the_limit() -> None:
    found = result()
    assert found.kernel is not None
    assert (found.kernel.median, found.time_us) == (101.0, 101.0)
    assert found.logical_gbps == pytest.approx(20 * 1000 / 101.0 / 1e3)
    assert found.wire_gbps == pytest.approx(15 * 1000 / 101.0 / 1e3)
    assert a_report(found).limit_share(found) == pytest.approx(found.wire_gbps / 0.5)
    assert replace(found, kernel=None).time_us == 122.5


def test_line_fits_its_columns_and_a_terminal() -> None:
    found = a_report(result())
    printed = report.line(found, result())
    assert "101.0 (100.0-102.0)" in printed
    assert "122.5 (121.0-124.0)" in printed
    assert printed.split()[-7:] == ["8.0", "(7.5-8.5)", "4.5", "(4.0-5.0)", "0.2", "0.1", "30%"]
    assert len(printed) == len(report.COLUMNS) <= 120
    slow = report.Reading(((123456.7,), (234567.8,)))
    wide = result(kernel=None, call=None, op=slow, num_sms=None, operation=max(OPERATIONS, key=len))
    assert len(report.line(found, wide)) == len(report.COLUMNS)
    texts = [*report.header(found), *report.limit_lines(found), *report.footer(found)]
    assert all(len(text) <= 120 for text in texts)


@pytest.mark.parametrize(
    ("num_tokens", "facts", "copied", "others"),
    [
        (4096, {}, 64, 16),
        (10, {}, 18, 16),  # two pieces of rows
        (4096, {"num_sms": 40}, 20, 16),
        (4096, {"is_shared": True}, 33, 16),
        (4096, {"is_shared": True, "num_ranks": 8}, 16, 16),
        (4096, {"is_shared": True, "num_ranks": 16}, 8, 8),
        (4096, {"num_nodes": 2}, None, None),
    ],
)
def test_sms_that_an_operation_may_take(
    num_tokens: int, facts: dict[str, Any], copied: int | None, others: int | None
) -> None:
    sizes = {"backend": "cuda", "num_ranks": 2, "ranks_are": "threads", "is_shared": False}
    facts = dict(facts)
    place = places.CudaPlace.__new__(places.CudaPlace)
    place.num_sms = facts.pop("num_sms", 132)
    place.setting = places.Setting(**{**sizes, **facts})
    layer: Any = Layer.__new__(Layer)
    layer.buffer = SimpleNamespace(topology=SimpleNamespace(num_nodes=place.setting.num_nodes))
    layer.place, layer.element, layer.payload = place, BF16, Payload(BF16, 7168)
    # All tokens go to both ranks.
    layer.routing = Routing([np.tile([0, 1], (num_tokens, 1))] * 2, num_experts=2)
    layer.use_sms(16)
    assert layer.max_sms("combine-copied") == copied
    assert layer.max_sms("combine") == layer.max_sms("dispatch") == others
    layer.place = places.HostPlace(place.setting)
    assert layer.max_sms("combine") is None


def test_sms_that_are_taken_are_reported() -> None:
    copied = [
        result(operation="combine-copied", num_tokens=size, max_sms=sms) for size, sms in ((8, 50), (9, 64))
    ]
    found = a_report(result(max_sms=16), *copied, result(num_sms=None), result(max_sms=8))
    shown = [report.line(found, each).split()[1] for each in found.results]
    assert shown == ["16", "50", "64", "-", "16"]
    (said,) = [text for text in report.footer(found) if "--sms" in text]
    assert said == "combine-copied with --sms 16: up to 64 SMs, since blocks of their own copy its rows"
    read = json.loads(report.as_json(found))["results"]
    assert [(each["sms"], each["max_sms"]) for each in read[:4]] == [
        (16, 16),
        (16, 50),
        (16, 64),
        (None, None),
    ]


@pytest.mark.parametrize("operation", OPERATIONS + LOW_LATENCY)
@pytest.mark.parametrize(
    ("kernel", "op", "call", "row"),
    [
        (999.9, 999.9, 99.9, 99.9),
        (99999.9, 99999.9, 999.0, 999.0),
        (None, 9999.9, 99999.0, None),  # a call that waits for numbers of rows
        (8.1, 9.2, 2000.0, 90.0),
        (None, 1e7, None, None),
    ],
)
def test_large_numbers_keep_a_line_in_its_columns(
    operation: str, kernel: float | None, op: float, call: float | None, row: float | None
) -> None:
    moved = (4 * 10**4,) * 2
    given = {"operation": operation, "num_tokens": 32768, "num_sms": 132}
    readings = {
        name: None if each is None else report.Reading(((each,),) * 3)
        for name, each in (("kernel", kernel), ("op", op), ("call", call), ("row", row))
    }
    traffic = Traffic(received=moved, sent_away=moved, received_from_others=moved)
    found = a_report()
    found.wire_limit = {("push", 132): 5e3}
    printed = report.line(found, result(**given, **readings, traffic=traffic))
    assert len(printed) == len(report.COLUMNS)
    texts = [
        each.text if name in ("kernel", "op") else each.short_text for name, each in readings.items() if each
    ]
    assert all(f" {text} " in printed for text in texts)
    assert len(printed.split()) == 6 + 4 + len(texts)


def test_readings_in_few_digits() -> None:
    texts = {}
    for readings in ((7.0, 8.0, 9.4), (26.1, 28.34, 31.4), (120.1, 128.4, 140.0), (1001.0, 1038.3, 1100.0)):
        reading = report.Reading(tuple((each,) for each in readings))
        texts[reading.text] = reading.short_text
    assert texts == {
        "8.0 (7.0-9.4)": "8.0 (7.0-9.4)",
        "28.3 (26.1-31.4)": "28.3 (26-31)",
        "128.4 (120.1-140.0)": "128 (120-140)",
        "1038.3 (1001-1100)": "1038 (1001-1100)",
    }


def test_json_holds_every_reading() -> None:
    read = json.loads(report.as_json(a_report(result(), result(operation="combine", kernel=None))))
    assert read["config"]["hidden"] == 7168
    assert [entry["operation"] for entry in read["results"]] == ["dispatch", "combine"]
    first, second = read["results"]
    assert first["kernel_us"]["ranks"] == [[99.0, 100.0, 109.0], [101.0, 102.0, 103.0]]
    assert (first["op_us"]["min"], first["op_us"]["max"]) == (121.0, 124.0)
    assert second["kernel_us"] is None
    assert read["wire_limit_best_gbps"] == 0.5
    limits = [("push", 16), ("push", 132), ("pull", 16)]
    assert [(entry["way"], entry["sms"]) for entry in read["wire_limit"]] == limits


def test_what_a_product_beside_costs() -> None:
    times = [
        BesideTimes(
            op_alone_us=(8.0, 9.0), op_us=(15.0, 17.0), product_alone_us=(100.0,), product_us=(110.0 + rank,)
        )
        for rank in range(2)
    ]
    found = a_report(result(operation="ll-dispatch-packed", beside=report.Beside.of(times), num_tokens=1024))
    found.options = Options(product=4096)
    lines = [line for line in report.footer(found) if "beside" in line]
    assert lines == [
        "ll-dispatch-packed bf16, 1024 tokens, beside a 4096 x 4096 product: 16.0 us, not 8.5; "
        "the product 110.5, not 100.0"
    ]
    assert len(lines[0]) <= 120
    found.options = Options(product=4096, num_left_sms=16)
    (line,) = (line for line in report.footer(found) if "beside" in line)
    assert ", beside a 4096 x 4096 product that leaves 16 SMs: 16.0 us, not 8.5; " in line
    read = json.loads(report.as_json(found))["results"][0]["beside_product"]
    assert read["op_us"]["ranks"] == [[15.0, 17.0]] * 2
    assert read["product_us"]["median"] == 110.5
    assert json.loads(report.as_json(a_report(result())))["results"][0]["beside_product"] is None


def test_what_the_phases_of_a_call_take() -> None:
    times = [PhaseTimes(send_us=(4.0, 5.0, 4.0), receive_us=(2.0 + rank,) * 3) for rank in range(2)]
    found = a_report(result(operation="ll-combine-split", phases=report.Phases.of(times)), result())
    assert [line for line in report.footer(found) if "phase" in line] == [
        "ll-combine-split bf16, 40 tokens: the send phase 4.0 (4.0-4.0) us, the hook 2.5 (2.0-3.0) us "
        "once all has landed"
    ]
    split, whole = json.loads(report.as_json(found))["results"]
    assert split["phases"]["send_us"]["ranks"] == [[4.0, 5.0, 4.0]] * 2
    assert split["phases"]["receive_us"]["median"] == 2.5
    assert whole["phases"] is None


class FakeDevice:
    """One stream, and the host that fills it: it takes 7 us for whatever it enqueues."""

    def __init__(self) -> None:
        self.host_us = self.device_us = 0.0

    def enqueue(self, us: float) -> float:
        """When the device is done with it. It begins when the device has it, and is free."""
        self.host_us += 7
        self.device_us = max(self.device_us, self.host_us) + us
        return self.device_us

    def synchronize(self) -> None:
        self.host_us = max(self.host_us, self.device_us)


def test_phases_are_timed_when_all_that_they_need_is_enqueued(monkeypatch: pytest.MonkeyPatch) -> None:
    device, (group,) = FakeDevice(), thread_groups(1)

    class Event:
        def record(self, stream: Any) -> None:
            self.at_us = device.enqueue(0.5)

        @property
        def done(self) -> bool:
            return device.host_us >= self.at_us

    held = SimpleNamespace(memset_async=lambda value, size, stream: device.enqueue(20))
    cuda = SimpleNamespace(
        Event=Event,
        alloc=lambda size: held,
        get_elapsed_time=lambda first, last: (last.at_us - first.at_us) / 1e3,
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    timer = object.__new__(CudaTimer)
    place = SimpleNamespace(stream=None, synchronize=device.synchronize)
    meeting = SimpleNamespace(enqueue=lambda stream: device.enqueue(3), check=lambda: None)
    timer.__dict__.update(_group=group, _place=place, _meeting=meeting)

    def begin() -> Any:
        device.enqueue(5)
        return SimpleNamespace(hook=lambda: device.enqueue(4))

    found = timer.phases(Call(name="split", run=begin, can_be_captured=True, begin=begin))
    assert found is not None
    assert found.send_us == pytest.approx([5] * len(found.send_us))
    assert found.receive_us == pytest.approx([4] * len(found.send_us))
    assert len(found.send_us) == 20
    assert timer.phases(Call(name="whole", run=begin, can_be_captured=True)) is None


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = a_report(result(), result(num_tokens=8), result(operation="combine"))
    assert [len(points) for points in plot.curves(found).values()] == [2, 1]
    assert [tokens for tokens, _ in plot.curves(found)["dispatch bf16, 16 SMs"]] == [8, 40]
    plot.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_links_are_read_from_the_matrix() -> None:
    matrix = (
        "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tPIX\t0-47\nGPU1\tNV18\t X \tSYS\t0-47\nNIC0\tPIX\tSYS\t X\n\nLegend:\n  SYS = ..."
    )
    assert machine.links_of(matrix) == "NV18"
    assert machine.links_of("\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X \n") == "PHB"
    assert machine.links_of("") is None


def test_the_limit_is_swept_over_what_is_asked_and_all() -> None:
    assert wire.sweep([16, 24], 132) == [8, 16, 24, 56, 132]
    assert wire.sweep([16], 16) == [8, 16]
    case = ("pull", 8)
    assert wire.limits([{case: (1.0, 3.0, 2.0)}, {case: (4.0, 4.0, 4.0)}]) == {case: 3.0}
    words = wire.outbox(3, 4, 64)
    assert words.shape == (4, 8)
    assert len({int(word) for src in range(4) for word in wire.outbox(src, 4, 64).ravel()}) == 4 * 4 * 8


# The command line.


def parsed(*arguments: str) -> Options:
    parser = argparse.ArgumentParser()
    options.add_parser(parser.add_subparsers())
    return options.options_of(parser.parse_args(["bench", *arguments]))


def test_defaults_of_the_command_line_are_those_of_the_options() -> None:
    assert parsed() == Options()
    assert parsed("--dtype", "both", "--operations", "combine", "dispatch").dtypes == ("bf16", "fp8")
    assert parsed("--operations", "combine", "dispatch").operations == ("dispatch", "combine")
    assert parsed("--routing", "zipf").exponent == 1.0


def test_operations_that_there_are() -> None:
    assert Options().operations_of("bf16", "cuda") == OPERATIONS
    assert Options().operations_of("fp8", "cuda") == OPERATIONS[:3]
    assert Options().operations_of("bf16", "host") == OPERATIONS[:4]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--topk", "300"),
        ("--hidden", "7170"),
        ("--zipf-exponent", "-1"),
        ("--leave-sms", "16"),
        ("--beside-product", "64", "--leave-sms", "-1"),
    ],
)
def test_options_that_cannot_work(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        parsed(*arguments)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ep_rt", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_low_latency_mode_is_measured_when_named(dtype: str) -> None:
    arguments = [
        "bench",
        "--backend=host",
        "--ranks=2",
        "--tokens=5",
        "--hidden=256",
        "--experts=8",
        "--topk=2",
    ]
    arguments += ["--repeat=1", f"--dtype={dtype}", "--json=-", "--operations", *LOW_LATENCY]
    ran = subprocess.run(
        [sys.executable, "-m", "ep_rt", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [result["operation"] for result in json.loads(ran.stdout)["results"]]
    assert found == [name for name in LOW_LATENCY if dtype == "bf16" or not name.startswith("ll-combine")]


LOW_LATENCY_RUN = [
    *("bench", "--backend=host", "--ranks=2", "--tokens=5", "--hidden=256", "--experts=24", "--topk=24"),
    *("--repeat=1", "--json=-", "--operations"),
]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("operation", "layout"),
    [("ll-pair", "rank"), ("ll-pair-packed", "expert"), ("ll-dispatch-packed", "expert")],
)
def test_layout_of_what_is_measured(
    operation: str,
    layout: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = []
    honest = Buffer.low_latency_dispatch

    def spied(buffer: Buffer, *arguments: Any, **given: Any) -> Any:
        seen.append((given["layout"], given["use_fp8"]))
        return honest(buffer, *arguments, **given)

    monkeypatch.setattr(Buffer, "low_latency_dispatch", spied)
    assert program.main([*LOW_LATENCY_RUN, operation, f"--dtype={dtype}"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["results"]
    assert (entry["operation"], entry["dtype"]) == (operation, dtype)
    # The first of each rank makes the handle of combines.
    assert seen[2:] == [(layout, dtype == "fp8")] * (len(seen) - 2)
    assert len(seen) > 4


def test_masks_and_statistics_take_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest_buffer, honest_dispatch, made = Buffer.__init__, Buffer.low_latency_dispatch, []

    def spied(buffer: Buffer, *arguments: Any, **given: Any) -> None:
        made.append(given.get("enable_shrink", False))
        honest_buffer(buffer, *arguments, **given)

    def miscounting(buffer: Buffer, *arguments: Any, **given: Any) -> Any:
        given["cumulative_local_expert_recv_stats"][3] += 1
        return honest_dispatch(buffer, *arguments, **given)

    monkeypatch.setattr(Buffer, "__init__", spied)
    given = [*LOW_LATENCY_RUN, "ll-pair", "ll-combine-fp8", "--masks", "--stats"]
    assert program.main(given) == 0
    assert any(made)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["config"]["with_masks"]
    assert "low-latency calls with masks, statistics" in shown.err
    made.clear()
    assert program.main([*LOW_LATENCY_RUN, "ll-pair", "--stats"]) == 0
    assert not any(made)
    monkeypatch.setattr(Buffer, "low_latency_dispatch", miscounting)
    assert program.main(given) == run.CHECK_FAILED
    assert "were added to their count" in capsys.readouterr().err


@pytest.mark.parametrize("num_sms", [16, None])
def test_the_buffer_is_told_of_the_sms_of_low_latency_calls(
    num_sms: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, made = Buffer.__init__, set()

    def spied(buffer: Buffer, *arguments: Any, **given: Any) -> None:
        if given.get("low_latency_mode"):
            made.add(given["num_low_latency_sms"])
        honest(buffer, *arguments, **given)

    monkeypatch.setattr(Buffer, "__init__", spied)
    asked = [] if num_sms is None else [f"--low-latency-sms={num_sms}"]
    assert program.main([*LOW_LATENCY_RUN, "ll-pair", *asked]) == 0
    assert made == {num_sms}


@pytest.mark.parametrize("operation", ["ll-pair", "ll-pair-packed"])
def test_both_results_of_a_pair_are_compared(
    operation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest_dispatch, honest_combine = Buffer.low_latency_dispatch, Buffer.low_latency_combine

    def wrong_dispatch(buffer: Buffer, *arguments: Any, **given: Any) -> Any:
        out = honest_dispatch(buffer, *arguments, **given)
        out.recv_x[...] = 0
        return out

    def wrong_combine(buffer: Buffer, *arguments: Any, **given: Any) -> Any:
        out = honest_combine(buffer, *arguments, **given)
        one_bit(out.combined_x)
        return out

    for name, wrong, text in (
        ("low_latency_dispatch", wrong_dispatch, "not what was sent"),
        ("low_latency_combine", wrong_combine, "the sum of token 4 differs"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Buffer, name, wrong)
            assert program.main([*LOW_LATENCY_RUN, operation]) == run.CHECK_FAILED
        assert text in capsys.readouterr().err


def test_the_sum_that_a_hook_makes_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Buffer.low_latency_combine

    def wrong(buffer: Buffer, *arguments: Any, **given: Any) -> Any:
        out = honest(buffer, *arguments, **given)
        receive = out.hook
        if receive is None:
            return out

        def hook() -> None:
            receive()
            one_bit(out.combined_x)

        return out._replace(hook=hook)

    monkeypatch.setattr(Buffer, "low_latency_combine", wrong)
    assert program.main([*LOW_LATENCY_RUN, "ll-combine"]) == 0
    assert program.main([*LOW_LATENCY_RUN, "ll-combine-split"]) == run.CHECK_FAILED
    assert "ll-combine-split, 5 tokens: the sum of token 4 differs" in capsys.readouterr().err


def next_of(rows: Any) -> None:
    rows[0, 0] += 1


WRONG_PARTS = {
    "one bit of a row": (lambda out: one_bit(out.recv_x[0][0, :1]), "row 0 of local expert 0"),
    "a scale factor": (
        lambda out: one_bit(out.recv_x[1][0, :1, -1:]),
        "the scale factors of row 0 of local expert 0, token 0 of rank 0",
    ),
    "src_info": (lambda out: next_of(out.handle.src_info), "src_info of the handle"),
    "layout_range": (lambda out: next_of(out.handle.layout_range), "layout_range of the handle"),
    "expert_rows": (
        lambda out: None if out.handle.expert_rows is None else next_of(out.handle.expert_rows),
        "expert_rows of the handle",
    ),
}


@pytest.mark.parametrize(
    "operation", ["ll-dispatch", "ll-dispatch-packed", "ll-dispatch-split", "ll-pair", "ll-pair-packed"]
)
@pytest.mark.parametrize(("spoil", "text"), WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_a_wrong_part_of_a_dispatch_cast_to_fp8_fails_the_run(
    operation: str, spoil: Any, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every expert takes every token, so the first row of each is there."""
    honest = Buffer.low_latency_dispatch
    num_calls = [0, 0]

    def wrong(buffer: Buffer, *arguments: Any, **given: Any) -> Any:
        out = honest(buffer, *arguments, **given)
        num_calls[buffer.rank] += 1
        if num_calls[buffer.rank] == 1:  # the handle of combines
            return out
        receive = out.hook
        if receive is None:
            spoil(out)
            return out

        def hook() -> None:
            receive()
            spoil(out)

        return out._replace(hook=hook)

    monkeypatch.setattr(Buffer, "low_latency_dispatch", wrong)
    is_right = text.startswith("expert_rows") and operation.endswith("packed")
    status = program.main([*LOW_LATENCY_RUN, operation, "--dtype=fp8"])
    assert status == (0 if is_right else run.CHECK_FAILED)
    said = capsys.readouterr().err
    assert is_right or f"{operation}, 5 tokens: {text}" in said


def test_sums_at_the_source_are_told_from_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 12 experts of a token on each rank, these sums are not exact in bfloat16."""
    operations = ["ll-combine", "ll-combine-source"]
    assert program.main([*LOW_LATENCY_RUN, *operations]) == 0
    by_rank, by_column = json.loads(capsys.readouterr().out)["results"]
    assert (by_rank["rows"]["sent_away"], by_column["rows"]["sent_away"]) == ([5, 5], [60, 60])
    honest = Buffer.low_latency_combine
    for name, other in (("ll-combine", "source"), ("ll-combine-source", "rank")):
        with monkeypatch.context() as patch:
            patch.setattr(
                Buffer,
                "low_latency_combine",
                lambda *given, reduce="rank", other=other, **how: honest(*given, reduce=other, **how),
            )
            assert program.main([*LOW_LATENCY_RUN, name]) == run.CHECK_FAILED
        assert f"{name}, 5 tokens: the sum of token" in capsys.readouterr().err


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_buffer_has_room_for_sums_at_the_source(is_packed: bool) -> None:
    sizes: Any = {"num_tokens": 16, "num_experts": 24, "num_topk": 4, "num_ranks": 2}
    asked = []

    class Sized:
        get_low_latency_rdma_size_hint = staticmethod(Buffer.get_low_latency_rdma_size_hint)

        def __init__(self, _: object, *, num_rdma_bytes: int, **__: Any) -> None:
            asked.append(num_rdma_bytes)

    setting = places.Setting(backend="cuda", num_ranks=2, ranks_are="processes", is_shared=False)
    place: Any = places.HostPlace(setting)
    names = ("ll-pair-packed",) if is_packed else ("ll-combine-logfmt", "ll-combine-source")
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(low_latency, "Buffer", Sized)
            group: Any = SimpleNamespace(size=2)
            given = Options(hidden=256, num_experts=24, num_topk=4, operations=(name,))
            low_latency.open_low_latency_buffer(group, place, draw(**sizes), given)
    hint = Buffer.get_low_latency_rdma_size_hint(16, 256, 2, 24, num_topk=4, with_columns=not is_packed)
    assert asked == [2 * hint] * len(names)


@pytest.mark.parametrize(
    ("changes", "with_puts", "is_served"),
    [
        ({}, False, True),
        ({"num_nodes": 2}, False, False),
        ({}, True, False),
        ({"num_nodes": 2, "backend": "host"}, False, True),
    ],
)
def test_sums_at_the_source_are_refused_over_the_network(
    changes: dict[str, Any], with_puts: bool, is_served: bool
) -> None:
    facts = {"backend": "cuda", "num_ranks": 4, "ranks_are": "processes", "is_shared": False, **changes}
    given = Options(operations=("ll-combine", "ll-combine-source"), with_puts=with_puts)
    problem = run._problem(places.Setting(**facts), given)
    assert (problem is None) == is_served
    assert problem is None or "--operations ll-combine-source: " in problem
    assert run._problem(places.Setting(**facts), replace(given, operations=("ll-combine",))) is None


def test_a_run_of_threads_with_json_on_stdout() -> None:
    several = ["--ranks", "3", *SMALL, "--dtype", "both", "--routing", "zipf"]
    done = bench(*several, "--beside-product", "64", "--json", "-")
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["machine"]["ranks"] == "3 ranks (threads)"
    found = {(entry["dtype"], entry["tokens"], entry["operation"]) for entry in read["results"]}
    assert found == {("bf16", tokens, name) for tokens in (5, 9) for name in OPERATIONS[:4]} | {
        ("fp8", tokens, name) for tokens in (5, 9) for name in OPERATIONS[:3]
    }
    for entry in read["results"]:
        assert np.shape(entry["op_us"]["ranks"]) == (3, 2)
        assert entry["logical_gbps"] > entry["wire_gbps"] > 0
    assert "every result was compared" in done.stderr
    assert done.stderr.count("not measured beside a product") == 1


def test_a_run_of_processes(mpirun: MpiRun, tmp_path: Path) -> None:
    code = "import sys; from ep_rt.__main__ import main; sys.exit(main(sys.argv[1:]))"
    path = tmp_path / "figures.json"
    done = mpirun(3, code, "bench", *SMALL, "--operations", "combine", "--json", str(path))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("BF16: rows of 128 bytes") == 1
    assert json.loads(path.read_text())["machine"]["ranks"] == "3 ranks (processes)"


def test_first_call() -> None:
    done = bench("--ranks", "2", *SMALL, "--first-call", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert [call["cache"] for call in json.loads(done.stdout)["first_calls"]] == ["none", "none"]


def test_what_cannot_run_is_said_once() -> None:
    done = bench("--ranks", "5", *SMALL)
    assert done.returncode == run.CANNOT_RUN
    assert done.stderr == "error: ConfigError: 12 experts cannot be divided by 5 ranks\n"


def test_help_names_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ep_rt", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "bench" in done.stdout


def test_the_program_loads_nothing_heavy() -> None:
    code = (
        "import sys, ep_rt.__main__\n"
        "heavy = {'cupy', 'mpi4py', 'torch', 'jax', 'cuda', 'matplotlib', 'tqdm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# A wrong result is noticed, whatever is wrong.


def swap_rows(rows: Any) -> None:
    rows[[0, 1]] = rows[[1, 0]]


def one_bit(rows: Any) -> None:
    rows.view(np.uint8)[-1, -1] ^= 1


@pytest.mark.parametrize("operation", ["dispatch", "dispatch-cached", "dispatch-exact", "combine"])
@pytest.mark.parametrize("spoil", [swap_rows, one_bit])
def test_a_wrong_row_fails_the_run(
    operation: str, spoil: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "check_against_reference", lambda *_: None)
    name = "combine" if operation == "combine" else "dispatch"
    honest = getattr(HostEngine, name)

    def wrong(engine: HostEngine, *arguments: Any) -> Any:
        out = honest(engine, *arguments)
        count = out[0].shape[0] if name == "combine" else out.handle.num_recv_tokens
        spoil(out[0][:count])
        return out

    monkeypatch.setattr(HostEngine, name, wrong)
    status = program.main(["bench", "--ranks", "2", *SMALL, "--operations", operation])
    assert status == run.CHECK_FAILED
    assert f"{operation}, 5 tokens: " in capsys.readouterr().err


@pytest.mark.parametrize("part", [1, 2])
def test_wrong_metadata_fails_the_run(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HostEngine.dispatch

    def wrong(engine: HostEngine, *arguments: Any) -> Any:
        out: Any = honest(engine, *arguments)
        if out[part] is not None:
            out[part][0] += 1
        return out

    monkeypatch.setattr(HostEngine, "dispatch", wrong)
    with pytest.raises(CheckError, match=r"ep_rt\.reference"):
        places.on_every_rank(
            parsed("--ranks", "2", *SMALL),
            lambda group, place: check_against_reference(group, place, Options()),
        )
    monkeypatch.setattr(run, "check_against_reference", lambda *_: None)
    assert program.main(["bench", "--ranks", "2", *SMALL]) == run.CHECK_FAILED


@pytest.mark.parametrize(
    ("dtype", "operation", "record_bytes"),
    [
        ("bf16", "dispatch", 128 + 32 + 16),
        ("bf16", "dispatch-exact", 128 + 32 + 16),
        ("bf16", "dispatch-cached", 128),
        ("bf16", "combine", 128),
        ("fp8", "dispatch", 64 + 16 + 32 + 16),
        ("fp8", "dispatch-cached", 64 + 16),
    ],
)
def test_bytes_over_the_network_must_be_those_planned(
    dtype: str,
    operation: str,
    record_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four ranks stand for two nodes of GPUs, which count."""
    num_asked = [0] * 4
    surplus = 0

    def sent_so_far(layer: Any) -> tuple[int, ...]:
        rank, ids = layer.group.rank, layer.routing.topk_idx
        num_asked[rank] += 1
        if num_asked[rank] % 2:  # before a call
            return (0, 0)
        node, other = rank // 2, 1 - rank // 2
        # A combine sends back what the rank of the same place on the other node sent here.
        src, to = (2 * other + rank % 2, node) if operation == "combine" else (rank, other)
        layout = reference.dispatch_layout(ids[src], num_experts=12, num_ranks=4, ranks_per_node=2)
        assert layout.num_tokens_per_node is not None
        sent = [0, 0]
        sent[other] = int(layout.num_tokens_per_node[to]) * record_bytes + (surplus if rank == 3 else 0)
        return tuple(sent)

    monkeypatch.setattr(check, "sent_so_far", sent_so_far)
    arguments = ["bench", "--ranks=4", *SMALL, f"--dtype={dtype}", "--operations", operation, "--json=-"]
    assert program.main(arguments) == 0
    out = capsys.readouterr()
    for result, num_tokens in zip(json.loads(out.out)["results"], (5, 9), strict=True):
        crossing = result["network_bytes"]
        assert crossing["counted"] == crossing["planned"]
        total = sum(map(sum, crossing["counted"]))
        assert total > 0
        text = f"{total / 4e6:.3f} MB counted, {total / 4e6:.3f} MB planned"
        assert f"{operation} {dtype}, {num_tokens} tokens: a rank sent over the network {text}" in out.err
    surplus = 16
    assert program.main(arguments) == run.CHECK_FAILED
    assert f"rank 3: {operation}, 5 tokens: bytes sent to the nodes are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "operation", "row_bytes"),
    [
        ("bf16", "dispatch", 128 + 3 * 12),
        ("bf16", "dispatch-exact", 128 + 3 * 12),
        ("bf16", "dispatch-cached", 128),
        ("bf16", "combine", 128),
        ("fp8", "dispatch", 64 + 4 + 3 * 12),
        ("fp8", "dispatch-cached", 64 + 4),
    ],
)
def test_bytes_over_nvlink_must_be_those_planned(
    dtype: str,
    operation: str,
    row_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four ranks stand for two nodes of GPUs. Buffers that count are made for that, and are not timed."""
    num_asked = [0] * 4
    surplus = 0
    events: list[str] = []
    opened = Buffer.__init__

    def open_one(buffer: Any, *given: Any, counts_bytes: bool = False, **options: Any) -> None:
        buffer.counts = counts_bytes
        opened(buffer, *given, counts_bytes=counts_bytes, **options)

    def nvlink_so_far(layer: Any) -> int | None:
        if not layer.buffer.counts:
            return None
        rank, ids = layer.group.rank, layer.routing.topk_idx
        num_asked[rank] += 1
        if num_asked[rank] % 2:  # before a call
            return 1000
        if rank == 0:
            events.append("counted")
        # To the other rank of the node: its own tokens, and those of its counterpart on the other node.
        goes = [
            reference.dispatch_layout(ids[src], num_experts=12, num_ranks=4).is_token_in_rank[:, rank ^ 1]
            for src in (rank, (rank + 2) % 4)
        ]
        return 1000 + sum(int(each.sum()) for each in goes) * row_bytes + (surplus if rank == 3 else 0)

    def measure(timer: Any, call: Any) -> Times:
        events.append("timed")
        return Times(kernel_us=None, op_us=(1.0,), call_us=None)

    def of_nvlink_alone(moved: check.MovedBytes, rank: int) -> str | None:
        return honest(replace(moved, network=None), rank)

    honest = check.MovedBytes.problem
    monkeypatch.setattr(check.MovedBytes, "problem", of_nvlink_alone)
    monkeypatch.setattr(Buffer, "__init__", open_one)
    monkeypatch.setattr(check, "is_counted", lambda _: True)
    monkeypatch.setattr(check, "sent_so_far", lambda _: (0, 0))
    monkeypatch.setattr(check, "nvlink_so_far", nvlink_so_far)
    monkeypatch.setattr(HostTimer, "measure", measure)
    arguments = ["bench", "--ranks=4", *SMALL, f"--dtype={dtype}", "--operations", operation, "--json=-"]
    assert program.main(arguments) == 0
    assert events == ["counted", *["timed"] * 4] * 2
    out = capsys.readouterr()
    for result, num_tokens in zip(json.loads(out.out)["results"], (5, 9), strict=True):
        moved = result["nvlink_bytes"]
        assert moved["counted"] == moved["planned"]
        total = sum(moved["counted"])
        assert total > 0
        text = f"{total / 4e6:.3f} MB counted, {total / 4e6:.3f} MB planned"
        assert f"{operation} {dtype}, {num_tokens} tokens: a rank moved over NVLink {text}" in out.err
    surplus = 4
    assert program.main(arguments) == run.CHECK_FAILED
    assert f"rank 3: {operation}, 5 tokens: bytes over NVLink are" in capsys.readouterr().err


# Over nodes and on one.


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_same_calls_on_one_node(
    spoilt: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second operation takes half as long there as over two nodes."""
    seen = []

    def measure(timer: Any, call: Any) -> Times:
        layer = call.run.__self__
        num_nodes = layer.buffer.topology.num_nodes
        seen.append((layer.group.rank, call.name, num_nodes))
        is_half = call.name == "dispatch-cached" and num_nodes == 1
        return Times(kernel_us=(10.0 if is_half else 20.0,), op_us=(30.0,), call_us=(5.0,))

    honest = HostEngine.dispatch

    def wrong(engine: HostEngine, *arguments: Any) -> Any:
        out = honest(engine, *arguments)
        if spoilt and engine._topology.num_nodes == 1:
            one_bit(out[0][: out.handle.num_recv_tokens])
        return out

    monkeypatch.setenv("EP_RT_RANKS_PER_NODE", "2")
    monkeypatch.setattr(HostEngine, "dispatch", wrong)
    monkeypatch.setattr(one_node, "problem", lambda *_: None)
    monkeypatch.setattr(HostTimer, "measure", measure)
    names = ["dispatch", "dispatch-cached"]
    arguments = ["bench", "--ranks=4", *SMALL, "--operations", *names, "--compare=one-node", "--json=-"]
    status = program.main(arguments)
    out = capsys.readouterr()
    assert status == (run.CHECK_FAILED if spoilt else 0)
    if spoilt:
        assert "dispatch, 5 tokens: row" in out.err
        return
    in_turn = [(name, num_nodes) for name in names for num_nodes in (2, 1)]
    assert [(name, num_nodes) for rank, name, num_nodes in seen if rank == 0] == in_turn * 2
    results = json.loads(out.out)["results"]
    assert [result["operation"] for result in results] == names * 2
    assert [result["ratio_to_one_node"] for result in results] == [1.0, 2.0] * 2
    assert results[1]["one_node"]["kernel_us"]["ranks"] == [[10.0]] * 4
    said = "dispatch-cached bf16, 9 tokens, - SMs: 20.0 us over the nodes, 10.0 on one: 2.00 times\n"
    assert said in out.err


def test_without_that_comparison_there_is_one_buffer(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["bench", "--ranks=2", *SMALL, "--operations=dispatch", "--json=-"]) == 0
    for entry in json.loads(capsys.readouterr().out)["results"]:
        assert entry["one_node"] is entry["ratio_to_one_node"] is None


@pytest.mark.parametrize(
    ("changes", "lacking", "nvlink", "text"),
    [
        ({}, frozenset(), "", None),
        ({}, frozenset(), "0", None),
        ({"num_ranks": 8, "num_nodes": 4}, frozenset(), "", None),
        ({"num_ranks": 16, "num_nodes": 4}, frozenset(), "", "16 ranks; one node serves 8 at most"),
        ({"num_nodes": 1}, frozenset(), "", "one node already"),
        ({"backend": "host"}, frozenset(), "", "the host backend"),
        ({}, frozenset({"bus 3"}), "", "NVLink does not join"),
        ({}, frozenset({"bus 3"}), "1", None),
        ({}, None, "", "NVLink does not join"),  # several hosts
    ],
)
def test_where_one_node_can_be_compared_with(
    changes: dict[str, Any],
    lacking: frozenset[str] | None,
    nvlink: str,
    text: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = {"backend": "cuda", "num_ranks": 4, "ranks_are": "processes", "is_shared": False, "num_nodes": 2}
    setting = places.Setting(**{**facts, **changes})
    gpus = [
        GpuPlace(f"host {rank // 2 if lacking is None else 0}", rank, f"bus {rank}", lacking or frozenset())
        for rank in range(setting.num_ranks)
    ]
    group: Any = SimpleNamespace(allgather=lambda value, op: gpus)
    place: Any = places.HostPlace(setting)
    monkeypatch.setenv("EP_RT_NVLINK", nvlink)
    monkeypatch.setattr(one_node, "gpu_place", lambda: gpus[0])
    said = one_node.problem(group, place)
    assert (said is None) == (text is None)
    assert said is None or str(text) in said


def test_one_node_is_not_compared_with_on_the_host() -> None:
    done = bench("--ranks=2", *SMALL, "--compare", "one-node")
    assert done.returncode == run.CANNOT_RUN
    assert done.stderr.startswith("error: ConfigError: --compare one-node: the host backend")
    assert not done.stdout
    done = bench("--ranks=2", *SMALL, "--compare", "one-node", "--operations", "ll-pair")
    assert done.returncode == run.CANNOT_RUN
    assert "--compare one-node is for operations of the normal mode" in done.stderr


def test_on_the_host_nothing_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["bench", "--ranks=2", *SMALL, "--operations=dispatch", "--json=-"]) == 0
    out = capsys.readouterr()
    for entry in json.loads(out.out)["results"]:
        assert entry["network_bytes"] is entry["nvlink_bytes"] is None
    assert "network" not in out.err
    assert "NVLink" not in out.err
