"""Whom the ranks name when a kernel gave up."""

from __future__ import annotations

import numpy as np

from ep_rt.cuda.hang import Report, verdict
from ep_rt.cuda.layout import HANG_RECORD, Operation, Reason, signal_word
from ep_rt.errors import CollectiveMismatchError, ConfigError, DeviceError, EpError, PeerTimeoutError

BARRIER = Operation.BARRIER
GAVE_UP = Operation.GAVE_UP


def report(
    rank: int,
    seen: dict[int, tuple[int, int]],
    *,
    reason: Reason = Reason.EXPIRED,
    epoch: int = 5,
    phase: int = 1,
    operation: int = BARRIER,
) -> Report:
    """A report of `rank` that saw (epoch, operation) of each peer in `seen`."""
    waits = {
        peer: (signal_word(epoch, operation), signal_word(*word_parts)) for peer, word_parts in seen.items()
    }
    return Report(rank=rank, reason=reason, operation=operation, phase=phase, epoch=epoch, waits=waits)


def named(error: EpError) -> tuple[int, ...]:
    assert isinstance(error, PeerTimeoutError)
    return error.peers


def test_the_missing_rank_is_named_by_all() -> None:
    reports = [report(0, {2: (4, BARRIER)}), report(1, {2: (4, BARRIER)}), None]
    for rank in range(3):
        error = verdict(reports, rank=rank, timeout_s=1.0)
        assert named(error) == (2,)
        assert isinstance(error, PeerTimeoutError)
        assert (error.seen, error.expected) == (4, 5)


def test_a_rank_that_gave_up_is_not_blamed() -> None:
    # Rank 1 gave up on rank 3 before rank 0 and 2 had heard of it in the next phase.
    reports = [
        report(0, {1: (4, BARRIER), 3: (4, BARRIER)}, phase=2),
        report(1, {3: (4, BARRIER)}, phase=1),
        report(2, {1: (4, BARRIER)}, phase=2),
        None,
    ]
    assert named(verdict(reports, rank=2, timeout_s=1.0)) == (3,)


def test_an_earlier_call_explains_a_later_one() -> None:
    # Rank 2 came just after rank 0 had given up, so rank 1 went on to the next call and waits for rank 0.
    reports = [report(0, {2: (4, BARRIER)}), report(1, {0: (5, GAVE_UP)}, epoch=6), None]
    assert named(verdict(reports, rank=1, timeout_s=1.0)) == (2,)


def test_who_left_on_hearing_is_no_witness() -> None:
    # Rank 1 left at once when it heard from rank 0; it had not heard from rank 2 yet, which rank 0 had.
    reports = [
        report(0, {3: (4, BARRIER)}),
        report(1, {0: (5, GAVE_UP), 2: (4, BARRIER), 3: (4, BARRIER)}, reason=Reason.CONTRADICTED),
        None,
        None,
    ]
    assert named(verdict(reports, rank=1, timeout_s=1.0)) == (3,)


def test_the_late_rank_itself_learns_that_it_was_late() -> None:
    reports = [report(0, {1: (4, BARRIER)}), report(1, {0: (5, GAVE_UP)}, reason=Reason.CONTRADICTED)]
    assert named(verdict(reports, rank=1, timeout_s=1.0)) == (1,)


def test_only_a_farewell_is_known() -> None:
    reports = [None, report(1, {0: (5, GAVE_UP)}, reason=Reason.CONTRADICTED)]
    assert named(verdict(reports, rank=1, timeout_s=1.0)) == (0,)


def test_different_operations_are_named() -> None:
    reports = [
        report(0, {1: (5, 7), 2: (4, BARRIER)}, reason=Reason.CONTRADICTED),
        report(1, {0: (5, GAVE_UP)}, reason=Reason.CONTRADICTED, operation=7),
        None,
    ]
    error = verdict(reports, rank=2, timeout_s=1.0)
    assert isinstance(error, CollectiveMismatchError)
    assert error.operations == ("barrier", "operation 7", None)


def test_different_arguments_are_an_error_on_all() -> None:
    other, same = (4, 0), (5, GAVE_UP)
    reports = [
        report(0, {2: other}, reason=Reason.DISAGREED, operation=Operation.DISPATCH, phase=2),
        report(1, {0: same, 2: other}, reason=Reason.CONTRADICTED, operation=Operation.DISPATCH, phase=2),
        report(2, {0: other, 1: other}, reason=Reason.DISAGREED, operation=Operation.DISPATCH, phase=2),
    ]
    for rank in range(3):
        error = verdict(reports, rank=rank, timeout_s=1.0)
        assert isinstance(error, ConfigError)
        assert error.is_collective
        assert "dispatch (call 5): ranks differ" in str(error)
        assert "0, 1; 2" in str(error)


def test_different_arguments_that_one_rank_alone_reports() -> None:
    reports = [None, report(1, {0: (4, 0)}, reason=Reason.DISAGREED, operation=Operation.COMBINE), None]
    error = verdict(reports, rank=0, timeout_s=1.0)
    assert isinstance(error, ConfigError)
    assert "combine (call 5)" in str(error)
    assert "0; 1, 2" in str(error)


def test_report_of_a_record() -> None:
    record = np.zeros(1, HANG_RECORD)
    assert Report.of(3, record) is None
    record["reason"], record["operation"], record["phase"], record["epoch"] = Reason.EXPIRED, BARRIER, 1, 5
    record["waits"]["expected"][0, 6] = signal_word(5, BARRIER)
    record["waits"]["seen"][0, 6] = signal_word(4, BARRIER)
    assert Report.of(3, record) == report(3, {6: (4, BARRIER)})


def test_a_rank_that_waited_for_its_own_blocks_blames_nobody() -> None:
    # Its peers then found it late in the call after.
    reports = [report(0, {1: (5, GAVE_UP)}), report(1, {}, operation=Operation.EXPAND), None]
    for rank in range(3):
        error = verdict(reports, rank=rank, timeout_s=1.0)
        assert isinstance(error, DeviceError)
        assert "rank 1 did not all run" in str(error)


def test_a_call_that_is_not_named_contradicts_nobody() -> None:
    # Rank 0 never came. Rank 2 had sent in call 5 without an answer, and says in call 6 that rank 0 completed
    # call 5: it does not know.
    dispatch = Operation.LOW_LATENCY_DISPATCH
    reports = [
        None,
        report(1, {0: (4, Operation.NO_OPERATION)}, operation=dispatch),
        report(2, {0: (5, Operation.NO_OPERATION)}, operation=dispatch, epoch=6),
    ]
    assert named(verdict(reports, rank=1, timeout_s=1.0)) == (0,)


def test_too_many_rows_are_said_by_every_rank() -> None:
    reports = [
        report(0, {1: (5, GAVE_UP)}, reason=Reason.CONTRADICTED, operation=Operation.LOW_LATENCY_DISPATCH),
        report(
            1,
            {1: (4, Operation.NO_OPERATION)},
            reason=Reason.OVERFULL,
            operation=Operation.LOW_LATENCY_DISPATCH,
        ),
    ]
    for rank in range(2):
        error = verdict(reports, rank=rank, timeout_s=1.0)
        assert isinstance(error, ConfigError)
        assert "rank 1 sends more" in str(error)
