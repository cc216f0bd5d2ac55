"""When a file is finished; every time is given, nothing waits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from regd.model import Signature
from regd.settle import Steadiness, Stillness

steady = settings(deadline=None, derandomize=True, max_examples=150)

A, B, C = (Signature(size, size) for size in (1, 2, 3))


def fresh() -> Stillness:
    return Stillness(quiet_s=30.0, closed_quiet_s=2.0)


def test_a_file_is_settled_when_it_stood_still_for_quiet_s() -> None:
    still = fresh()
    assert still.remaining_s("f", A, None, 100.0) == 30.0
    assert still.remaining_s("f", A, None, 110.0) == 20.0
    assert still.remaining_s("f", A, None, 130.0) == 0.0
    assert still.remaining_s("f", A, None, 1000.0) == 0.0


def test_a_change_of_size_or_time_starts_the_wait_again() -> None:
    still = fresh()
    still.remaining_s("f", Signature(1, 1), None, 0.0)
    assert still.remaining_s("f", Signature(2, 1), None, 29.0) == 30.0
    assert still.remaining_s("f", Signature(2, 2), None, 58.0) == 30.0
    assert still.remaining_s("f", Signature(2, 2), None, 88.0) == 0.0


def test_a_change_back_is_a_change() -> None:
    still = fresh()
    still.remaining_s("f", A, None, 0.0)
    still.remaining_s("f", B, None, 10.0)
    assert still.remaining_s("f", A, None, 40.0) == 30.0


def test_a_file_untouched_for_long_needs_no_waiting() -> None:
    still = fresh()
    assert still.remaining_s("old", A, 3600.0, 0.0) == 0.0
    assert still.remaining_s("newer", A, 12.0, 0.0) == 18.0


def test_stamps_that_lag_do_not_shorten_what_was_seen() -> None:
    still = fresh()
    still.remaining_s("f", A, 0.0, 0.0)
    assert still.remaining_s("f", A, 5.0, 20.0) == 10.0


def test_a_close_shortens_the_wait() -> None:
    still = fresh()
    still.closed("f", 100.0)
    assert still.remaining_s("f", A, 0.0, 100.0) == 2.0
    assert still.remaining_s("f", A, 1.5, 101.5) == 0.5
    assert still.remaining_s("f", A, 2.0, 102.0) == 0.0


def test_a_close_never_lengthens_the_wait() -> None:
    still = Stillness(quiet_s=1.0, closed_quiet_s=60.0)
    still.closed("f", 0.0)
    assert still.remaining_s("f", A, None, 0.0) == 1.0


def test_a_close_of_one_file_says_nothing_of_another() -> None:
    still = fresh()
    still.closed("f", 0.0)
    assert still.remaining_s("g", A, 0.0, 0.0) == 30.0


def test_a_write_after_the_close_cancels_it() -> None:
    still = fresh()
    still.closed("f", 0.0)
    assert still.remaining_s("f", A, 0.0, 0.0) == 2.0
    # 10 s later its stamps say that it was touched 1 s ago, so after the close
    assert still.remaining_s("f", B, 1.0, 10.0) == 29.0
    assert still.remaining_s("f", B, 3.0, 12.0) == 27.0  # and it stays cancelled
    still.closed("f", 12.5)
    assert still.remaining_s("f", B, 3.5, 12.5) == 0.0


def test_a_stamp_that_lags_a_tick_behind_the_close_cancels_nothing() -> None:
    still = fresh()
    still.closed("f", 0.0)
    assert still.remaining_s("f", A, 0.75, 1.0) == 1.25


def test_a_change_seen_after_the_close_cancels_it_where_stamps_cannot_be_compared() -> None:
    still = fresh()
    still.closed("f", 0.0)
    assert still.remaining_s("f", A, None, 1.0) == 2.0
    assert still.remaining_s("f", B, None, 1.5) == 30.0  # it was A after the close


def test_forget() -> None:
    still = fresh()
    still.closed("f", 0.0)
    still.remaining_s("f", A, None, 0.0)
    still.forget("f")
    still.forget("f")
    still.forget("never seen")
    assert still.remaining_s("f", A, None, 100.0) == 30.0


def test_a_file_held_open_is_asked_about_again_after_quiet_s_or_when_it_is_closed() -> None:
    still = fresh()
    assert still.remaining_s("f", A, 3600.0, 0.0) == 0.0
    still.held("f", 0.0)
    assert still.remaining_s("f", A, 3600.0, 0.0) == 30.0
    assert still.remaining_s("f", A, 3620.0, 20.0) == 10.0
    assert still.remaining_s("f", A, 3630.0, 30.0) == 0.0
    still.held("f", 30.0)
    still.closed("f", 31.0)
    assert still.remaining_s("f", A, 3631.0, 31.0) == 0.0  # it had not been written to for long


def test_a_file_held_open_and_written_to_waits_for_both() -> None:
    still = fresh()
    still.held("f", 0.0)
    assert still.remaining_s("f", B, 0.0, 10.0) == 30.0
    still.held("g", 0.0)
    still.forget("g")
    assert still.remaining_s("g", A, 3600.0, 0.0) == 0.0


def test_a_file_held_open_is_not_asked_about_without_pause() -> None:
    still = Stillness(0.0, 0.0)
    still.held("f", 0.0)
    assert still.remaining_s("f", A, 3600.0, 0.0) == 1.0


def test_no_wait_at_all_can_be_asked_for() -> None:
    assert Stillness(0.0, 0.0).remaining_s("f", A, None, 0.0) == 0.0


# --- properties ----------------------------------------------------------------------------------

steps = st.lists(st.floats(0.001, 29.0), min_size=1, max_size=30)
seconds = st.floats(0.0, 1e6)


@steady
@given(steps, st.booleans())
def test_a_growing_file_is_never_settled_however_long_it_grows(
    gaps: list[float], stamped: bool
) -> None:
    still, now = fresh(), 0.0
    for size, gap in enumerate(gaps):
        now += gap
        # it was written to just now, or the clocks cannot be compared
        assert still.remaining_s("f", Signature(size, size), 0.0 if stamped else None, now) == 30.0


@steady
@given(steps, st.lists(st.booleans(), min_size=30, max_size=30))
def test_closing_between_writes_settles_no_file_that_is_still_written(
    gaps: list[float], closes: list[bool]
) -> None:
    still, now = fresh(), 0.0
    for size, (gap, close) in enumerate(zip(gaps, closes, strict=False)):
        now += gap
        if close:
            still.closed("f", now)
        assert still.remaining_s("f", Signature(size, size), 0.0, now) > 0


@steady
@given(seconds, steps, st.one_of(st.none(), st.floats(0.0, 100.0)), st.booleans())
def test_for_a_still_file_the_wait_only_shrinks_and_ends(
    start: float, gaps: list[float], untouched: float | None, closed: bool
) -> None:
    still, now = fresh(), start
    if closed and untouched is not None:
        still.closed("f", start - untouched)
    last = still.remaining_s("f", A, untouched, now)
    for gap in gaps:
        now += gap
        at = None if untouched is None else untouched + (now - start)
        left = still.remaining_s("f", A, at, now)
        assert left <= last + 1e-6
        last = left
    at = None if untouched is None else untouched + (now - start) + 30.0
    assert still.remaining_s("f", A, at, now + 30.0 + 1e-6) == 0.0


@steady
@given(st.floats(0.0, 60.0), st.floats(0.0, 60.0))
def test_with_a_close_the_wait_is_never_longer_than_without(at: float, untouched: float) -> None:
    plain, closed = fresh(), fresh()
    closed.closed("f", at)
    now = at + untouched
    assert closed.remaining_s("f", A, untouched, now) <= plain.remaining_s("f", A, untouched, now)


@steady
@given(st.floats(0.0, 1e4), st.floats(0.0, 1e4), st.one_of(st.none(), st.floats(-10.0, 1e4)))
def test_the_wait_is_never_negative_nor_longer_than_quiet_s(
    first: float, second: float, untouched: float | None
) -> None:
    still = fresh()
    for now in (first, first + second):
        assert 0.0 <= still.remaining_s("f", A, untouched, now) <= 30.0


# --- a clock that is set -------------------------------------------------------------------------

HOUR = 3600.0


def test_a_clock_that_is_set_is_noticed_once() -> None:
    clocks = Steadiness()
    assert clocks.jump_s(1000.0, 5.0) == 0.0
    assert clocks.jump_s(1010.0, 15.0) == 0.0
    assert clocks.jump_s(1010.0 + HOUR, 15.0) == HOUR
    assert clocks.jump_s(1020.0 + HOUR, 25.0) == 0.0
    assert clocks.jump_s(1030.0 - HOUR, 35.0) == -2 * HOUR


@given(st.lists(st.floats(-1.9, 1.9), max_size=50))
@steady
def test_a_clock_that_is_drawn_straight_is_not_set(steps: list[float]) -> None:
    clocks, wall = Steadiness(), 1e9
    for n, step in enumerate(steps):
        wall += 1.0 + step
        assert clocks.jump_s(wall, float(n)) == 0.0


def test_after_a_jump_a_file_has_to_be_seen_standing_still() -> None:
    still = fresh()
    wall, now = 1e9, 50.0
    touched_at = wall - 1.0  # it is being written
    assert still.untouched_s(touched_at, wall, now) == 1.0
    wall += HOUR
    assert still.untouched_s(touched_at, wall, now) is None
    assert still.untouched_s(touched_at, wall + 29.9, now + 29.9) is None
    # whoever wrote to it since did so by the new clock
    assert still.untouched_s(touched_at, wall + 30.0, now + 30.0) == HOUR + 31.0


def test_a_clock_seen_before_any_file() -> None:
    still = fresh()
    still.see_clocks(100.0, 5.0)  # 1970, as a computer without a battery starts
    assert still.untouched_s(99.0, 1.7e9, 10.0) is None


def test_a_file_whose_stamps_are_of_another_clock_must_be_seen_standing_still() -> None:
    still, same = fresh(), Signature(1, 1)
    assert still.untouched_s(None, 1e9, 0.0) is None
    assert still.remaining_s("f", same, None, 0.0) == 30.0
    assert still.remaining_s("f", same, None, 29.0) == 1.0
    assert still.remaining_s("f", Signature(2, 1), None, 29.5) == 30.0
    assert still.remaining_s("f", Signature(2, 1), None, 59.5) == 0.0


def test_a_stamp_of_the_future_tells_nothing() -> None:
    assert fresh().untouched_s(1e9 + 1, 1e9, 0.0) is None


@given(
    jump=st.floats(-1e9, 1e9).filter(lambda s: abs(s) > 2.1),
    pause=st.floats(0.01, 29.0),
    writes=st.integers(1, 20),
    jump_at=st.integers(0, 20),
)
@steady
def test_no_jump_makes_a_file_that_is_written_to_look_finished(
    jump: float, pause: float, writes: int, jump_at: int
) -> None:
    still, wall, now = fresh(), 1.7e9, 0.0
    still.see_clocks(wall, now)
    for n in range(writes):
        touched_at = wall
        if n == jump_at:
            wall += jump
        wall, now = wall + pause, now + pause
        at = still.untouched_s(touched_at, wall, now)
        assert still.remaining_s("f", Signature(n + 1, n), at, now) > 0
