"""What people read first, from reports that are made here."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from regd.glance import LISTED, Situation, commands, glance, in_one_line, in_words, statement

RETRY = "create the subject on Alyx, or rename its folder; then: regd retry --all"
AWAY = {"kind": "alyx", "reason": "no connection", "hint": "is it up?", "since": 5.0}


def session(folder: str, state: str, **files: int) -> dict[str, Any]:
    return {"session": folder, "state": state, "files": files, "reason": None, "hint": None}


def report(*sessions: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a report of these sessions, as `regd.status.report` makes it."""
    states = ("waiting", "working", "done", "held", "parked")
    of = {state: [s for s in sessions if s["state"] == state] for state in states}
    facts: dict[str, Any] = {
        "away": None,
        "sessions": {state: len(of[state]) for state in states},
        "files": {"registered": sum(s["files"].get("registered", 0) for s in sessions)},
        "today": list(sessions),
        **{state: of[state] for state in states if state != "done"},
        "waiting_since": 3.0 if of["waiting"] or of["working"] else None,
        "refused": [],
        "unfinished": [],
        "strays": [],
    }
    facts |= more
    problems = [{"what": s["session"], **s} for s in facts["parked"]]
    problems += [{"what": f"{f['session']}/{f['path']}", **f} for f in facts["refused"]]
    problems += [{"what": s["path"], **s} for s in facts["strays"]]
    facts.setdefault("problems", [])
    facts["problems"] += [{k: p[k] for k in ("what", "reason", "hint")} for p in problems]
    facts.setdefault("needs_human", len(facts["problems"]))
    return facts


def said(facts: dict[str, Any]) -> tuple[str, str, str]:
    now = glance(facts)["statement"]
    return now["state"], now["title"], now["text"]


def test_nothing_yet() -> None:
    assert said(report())[:2] == ("good", "Nothing recorded yet")


def test_all_registered() -> None:
    facts = report(session("m/1", "done", registered=1200), session("m/2", "done", registered=1))
    assert said(facts) == ("good", "All registered", "1,201 files in all. Nothing to do.")


def test_what_has_no_flag_is_not_called_registered() -> None:
    facts = report(session("m/1", "done", registered=1), session("m/2", "held", settling=4))
    state, title, text = said(facts)
    assert (state, title) == ("good", "All that is flagged is registered")
    assert "1 session that has no flag yet" in text


def test_at_work() -> None:
    facts = report(
        session("m/1", "working", registered=2, ready=10, placing=1),
        session("m/2", "waiting", settling=30),
    )
    assert said(facts)[:2] == ("busy", "Registering: 2 sessions, 41 files left")
    assert glance(facts)["statement"]["since"] == 3.0
    facts["sessions"]["waiting"] = 900  # of which one is listed
    assert said(facts)[1] == "Registering: 901 sessions, more than 41 files left"
    assert said(report(session("m/1", "waiting")))[1] == "Registering: 1 session left"


def test_alyx_away() -> None:
    facts = report(session("m/1", "waiting", ready=1), away=AWAY)
    assert said(facts)[:2] == ("waiting", "Waiting for Alyx")
    now = glance(facts)["statement"]
    assert (now["since"], now["detail"]) == (5.0, "no connection - is it up?")


@pytest.mark.parametrize(
    ("more", "rest"),
    [
        ([session("m/2", "done", registered=1)], "Everything else is registered."),
        ([session("m/2", "held")], "Everything else that is flagged is registered."),
        ([session("m/2", "waiting", ready=2)], "Everything else goes on: 1 session, 2 files left."),
    ],
)
def test_a_person_is_needed_and_the_rest_goes_on(more: list[Any], rest: str) -> None:
    parked = {**session("m/1", "parked"), "reason": "no such subject", "hint": RETRY}
    assert said(report(parked, *more)) == ("alarm", "1 thing needs you", rest)


def test_nothing_goes_on_without_credentials() -> None:
    away = {**AWAY, "kind": "credentials"}
    problem = {"what": "Alyx", "reason": "wrong token", "hint": "correct alyx.token"}
    state, title, text = said(report(away=away, problems=[problem]))
    assert (state, title) == ("alarm", "1 thing needs you")
    assert "nothing is registered" in text
    assert "Alyx does not work" in said(report(away=AWAY, problems=[problem]))[2]


def refused(folder: str, number: int, hint: str = RETRY) -> list[dict[str, str]]:
    return [
        {"session": folder, "path": f"alf/{n}", "reason": f"{n} is empty", "hint": hint}
        for n in range(number)
    ]


def test_files_of_a_session_that_need_the_same_are_one_thing() -> None:
    files = [*refused("m/1", 60), *refused("m/2", 1), *refused("m/1", 1, hint="remove it")]
    strays = [{"path": f"x{n}", "reason": "in no session", "hint": "move it"} for n in range(2)]
    facts = glance(report(session("m/1", "done"), refused=files, strays=strays))
    assert [(c["what"], c["count"], len(c["items"])) for c in facts["chores"]] == [
        ("60 files of m/1", 60, 50),
        ("m/2/alf/0", 1, 0),
        ("m/1/alf/0", 1, 0),
        ("2 files or folders outside any session", 2, 2),
    ]
    assert facts["chores"][0]["commands"] == ["regd retry --all"]
    assert facts["statement"]["title"] == "4 things need you"
    assert facts["more_chores"] == 0


def test_no_more_is_shown_than_anybody_reads() -> None:
    files = [f for n in range(LISTED + 50) for f in refused(f"m/{n}", 1)]
    facts = glance(report(refused=files))
    assert len(facts["chores"]) == len(facts["problems"]) == len(facts["refused"]) == LISTED
    assert facts["more_chores"] == 50
    assert facts["statement"]["title"] == "250 things need you"
    parked = {**session("m/1", "parked"), "reason": "no such subject", "hint": RETRY}
    facts = glance(report(parked, needs_human=300))
    assert (len(facts["chores"]), facts["more_chores"]) == (1, 299)


@pytest.mark.parametrize(
    ("hint", "typed"),
    [
        (RETRY, ["regd retry --all"]),
        ("start it: sudo systemctl start regd; or, once: regd scan",
         ["sudo systemctl start regd", "regd scan"]),
        ("check the disk of state_dir, then: rm -r '/var/a; rm, b'*", ["rm -r '/var/a; rm, b'*"]),
        ("chmod 700 /var/lib/regd", ["chmod 700 /var/lib/regd"]),
        ("raise it: sysctl fs.inotify.max_user_watches=524288",
         ["sysctl fs.inotify.max_user_watches=524288"]),
        ("rename it, using letters, digits, _ . -", []),
        ("give regd's user the right to read it", []),
        ("", []),
    ],
)  # fmt: skip
def test_commands_in_hints(hint: str, typed: list[str]) -> None:
    assert commands(hint) == typed


@pytest.mark.parametrize(
    ("one", "away", "words"),
    [
        (session("m", "done", registered=2), None, "registered"),
        (session("m", "done", registered=2, refused=1), None, "registered, but for 1 file"),
        (session("m", "working", ready=2), None, "being registered"),
        (session("m", "held", settling=2), None, "on hold: it has no flag yet"),
        (session("m", "parked"), None, "needs you"),
        (session("m", "waiting", settling=2), None, "waits until its files are finished"),
        (session("m", "waiting"), None, "next in line"),
        (session("m", "waiting", settling=2), AWAY, "waits for Alyx"),
        (session("m", "waiting"), {**AWAY, "kind": "root"}, "waits for the data folder"),
        (
            {**session("m", "waiting"), "reason": "disk full", "hint": ""},
            None,
            "tried again: disk full",
        ),
        ({**session("m", "waiting"), "reason": "regd ended"}, None, "waits: regd ended"),
        ({**session("m", "done"), "reason": "gone"}, None, "its folder is gone"),
    ],
)
def test_a_session_in_words(one: dict[str, Any], away: Any, words: str) -> None:
    assert in_words(one, away) == words


def test_a_statement_is_of_all_even_where_little_is_listed() -> None:
    facts = report(session("m/1", "waiting", ready=1))
    assert statement(facts, 0)["state"] == "busy"
    assert statement(facts, 3)["title"] == "3 things need you"


NOON = datetime(2026, 1, 31, 12, 0).timestamp()
AT_10 = {"since": datetime(2026, 1, 31, 10, 2).timestamp()}
YESTERDAY = {"since": datetime(2026, 1, 30, 14, 2).timestamp()}


@pytest.mark.parametrize(
    ("situation", "line"),
    [
        (Situation(doing="scanning"), "nothing recorded yet, scanning"),
        (Situation(registered=7), "all registered, watching"),
        (Situation(held=1, registered=7), "all registered, 1 held without a flag, watching"),
        (Situation(held=2), "all registered, 2 held without a flag, watching"),
        (
            Situation(people=1, registered=7),
            "all else registered, 1 needs a person: regd status, watching",
        ),
        (
            Situation(working=2, files_left=41, people=2),
            "2 sessions in work (41 files left), 2 need a person: regd status, watching",
        ),
        (
            Situation(working=1, waiting=3, files_left=1, doing="going by scans"),
            "1 session in work, 3 waiting (1 file left), going by scans",
        ),
        (
            Situation(waiting=3, away={"kind": "alyx", **AT_10}),
            "3 sessions waiting, Alyx away since 10:02",
        ),
        (
            Situation(waiting=1, away={"kind": "alyx", **YESTERDAY}),
            "1 session waiting, Alyx away since 2026-01-30 14:02",
        ),
        (
            Situation(registered=7, away={"kind": "credentials", **AT_10}),
            "all registered, Alyx refuses the credentials since 10:02",
        ),
        (
            Situation(away={"kind": "root", **AT_10}),
            "nothing recorded yet, data folder away since 10:02",
        ),
        (
            Situation(waiting=2, away={"kind": "owner", **AT_10}),
            "2 sessions waiting, waits for another regd to be gone since 10:02",
        ),
    ],
)
def test_in_one_line(situation: Situation, line: str) -> None:
    assert in_one_line(situation, NOON) == line
