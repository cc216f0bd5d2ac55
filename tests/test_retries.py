"""How long is waited before another attempt."""

import datetime
from email.utils import format_datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regd.retries import backoff_s, retry_after_s

steady = settings(deadline=None, derandomize=True, max_examples=150)
NOW = datetime.datetime(2024, 5, 1, 12, 0, 0, tzinfo=datetime.UTC)


def test_the_wait_doubles_up_to_the_longest() -> None:
    waits = [backoff_s(n, 5.0, 900.0, lambda: 0.0) for n in range(1, 11)]
    assert waits == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 900.0, 900.0]


def test_chance_takes_off_a_tenth_at_most() -> None:
    assert backoff_s(1, 10.0, 100.0, lambda: 0.0) == 10.0
    assert backoff_s(1, 10.0, 100.0, lambda: 0.5) == pytest.approx(9.5)
    assert backoff_s(1, 10.0, 100.0, lambda: 0.999999) == pytest.approx(9.0, abs=1e-3)


def test_any_number_of_attempts() -> None:
    for attempt in (-1, 0, 1):
        assert backoff_s(attempt, 5.0, 900.0, lambda: 0.0) == 5.0
    assert backoff_s(10**9, 5.0, 900.0, lambda: 0.0) == 900.0
    assert backoff_s(10**9, 1e-300, 900.0, lambda: 0.0) < 900.0
    assert backoff_s(2000, 0.0, 900.0, lambda: 0.0) == 0.0


@steady
@given(
    st.integers(-5, 10**12),
    st.floats(0.001, 1e5),
    st.floats(1.0, 1e6),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_the_wait_stays_within_its_bounds(
    attempt: int, first: float, longest: float, chance: float
) -> None:
    wait = backoff_s(attempt, first, longest, lambda: chance)
    assert 0.9 * min(first, longest) - 1e-9 <= wait <= longest
    assert backoff_s(attempt + 1, first, longest, lambda: chance) >= wait


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", 0.0),
        ("12", 12.0),
        (" 12 ", 12.0),
        ("1.5", 1.5),
        ("-5", 0.0),
        ("3600", 3600.0),
        ("86400", 3600.0),
        ("9" * 400, 3600.0),
        ("inf", 3600.0),
        ("-inf", 0.0),
        ("nan", None),
        ("soon", None),
        ("12 seconds", None),
        ("Wed, 01 May 2024 12:00:30 GMT", 30.0),
        ("Wed, 01 May 2024 14:00:30 +0200", 30.0),
        ("Wed, 01 May 2024 11:00:00 GMT", 0.0),
        ("Wed, 01 May 2030 12:00:00 GMT", 3600.0),
        ("Wed, 32 May 2024 12:00:00 GMT", None),
        ("Wed, 01 May 99999 12:00:00 GMT", None),
        ("Wed, 01 May 2024 12:00:30 -0000", None),  # a time of no zone
        ("2024-05-01T12:00:30Z", None),
        ("\x00\udcff", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, NOW) == seconds


@pytest.mark.parametrize(
    "digits", ["99999999999999999999:00:00 GMT", "12:00:00 +99999999999999999"]
)
def test_a_date_with_huge_numbers_says_nothing(digits: str) -> None:
    assert retry_after_s(f"Wed, 01 May 2024 {digits}", NOW) is None


@steady
@given(st.integers(-(10**6), 10**6))
def test_every_http_date_is_understood(seconds: int) -> None:
    header = format_datetime(NOW + datetime.timedelta(seconds=seconds), usegmt=True)
    assert retry_after_s(header, NOW) == min(max(seconds, 0), 3600)


@steady
@given(st.one_of(st.text(max_size=40), st.from_regex(r"-?\d+(\.\d*)?(e\d+)?", fullmatch=True)))
@example("1e999")
def test_whatever_a_server_sends_the_wait_is_bounded(value: str) -> None:
    seconds = retry_after_s(value, NOW)
    assert seconds is None or 0.0 <= seconds <= 3600.0
