"""Which thread is stuck: the one with work in hand that does not advance, and no other."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from regd.pulse import Pulse

ALLOWED_S = 10.0


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


steps = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.floats(0.0, 30.0)),
        st.tuples(st.just("beat"), st.sampled_from([0.0, 5.0, 100.0])),
        st.tuples(st.sampled_from(["rest", "wake", "enter", "leave"]), st.just(0.0)),
    ),
    max_size=40,
)


@given(steps)
def test_stuck_is_who_has_work_and_was_silent_for_longer_than_allowed(steps) -> None:
    """Held to a model that only adds up the silence since the last sign of life."""
    time = Time()
    pulse = Pulse(time)
    watched = resting = None
    silent_s, granted_s = 0.0, 0.0
    for what, number in steps:
        if what == "pass":
            time.now += number
            silent_s += number
        elif what == "beat" and resting is None:
            pulse.beat(number)
            silent_s, granted_s = 0.0, number
        elif what == "enter" and watched is None and resting is None:
            watched = pulse.watched()
            watched.__enter__()
            silent_s, granted_s = 0.0, 0.0
        elif what == "leave" and watched is not None and resting is None:
            watched.__exit__(None, None, None)
            watched = None
        elif what == "rest" and resting is None:
            resting = pulse.resting()
            resting.__enter__()
        elif what == "wake" and resting is not None:
            resting.__exit__(None, None, None)
            resting = None
            silent_s, granted_s = 0.0, 0.0
        late_s = silent_s - granted_s - ALLOWED_S
        if abs(late_s) < 1e-6:
            continue  # which of the two it is, is a matter of rounding
        expected = watched is not None and resting is None and late_s > 0
        assert bool(pulse.stuck(ALLOWED_S)) == expected


def test_one_thread_says_nothing_of_another() -> None:
    time = Time()
    pulse = Pulse(time)
    at_work, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with pulse.watched(), pulse.on("mouse/2026-01-31/001"):
            at_work.set()
            go_on.wait(10)

    thread = threading.Thread(target=work, name="worker-7")
    thread.start()
    assert at_work.wait(10)
    with pulse.watched():
        time.now += 60
        pulse.beat()
        (stuck,) = pulse.stuck(ALLOWED_S)
    assert (stuck.thread, stuck.ident) == ("worker-7", thread.ident)
    assert (stuck.on, stuck.silent_s) == ("mouse/2026-01-31/001", 60.0)
    go_on.set()
    thread.join()
    assert pulse.stuck(ALLOWED_S) == [], "a thread that ended has no work"


def test_who_waits_for_a_lock_is_not_stuck_but_its_holder_may_be() -> None:
    time = Time()
    pulse = Pulse(time)
    lock = threading.Lock()
    asks = threading.Event()

    def wait() -> None:
        with pulse.watched():
            asks.set()
            with pulse.holding(lock):
                pass

    with pulse.watched(), pulse.holding(lock):
        thread = threading.Thread(target=wait, name="second")
        thread.start()
        assert asks.wait(10)
        while pulse._hands[thread.ident or 0].at < 1e300:
            pass  # until it has come to the lock
        time.now += 60
        assert [s.thread for s in pulse.stuck(ALLOWED_S)] == [threading.current_thread().name]
    thread.join()


def test_a_thread_that_is_not_watched_costs_nothing_and_is_never_stuck() -> None:
    time = Time()
    pulse = Pulse(time)
    pulse.beat()
    with pulse.resting(), pulse.on("mouse/2026-01-31/001"):
        time.now += 1e6
        assert pulse.stuck(ALLOWED_S) == []
