"""The status page in a real browser: Chromium without a window, driven by selenium.

Skipped where Debian's `chromium` and `chromium-driver` are not installed; nothing is downloaded.
REGD_TEST_SHOTS names a folder for a picture of each test's end.
"""

from __future__ import annotations

import datetime
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from regd import web
from regd.journal import FILE_NAME, FileRow, Journal
from regd.model import FileState, SessionState, Signature
from regd.paths import parse_session
from regd.service import lock
from regd.web import Page, Reporter
from tests.rig import DATASETS, Lab, Rig, until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs chromium and chromedriver (apt install chromium-driver)",
)
os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}  # whatever selenium is asked for
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --disable-dev-shm-usage"
)
RETRY = "create the subject on Alyx, or rename its folder; then: regd retry --all"


class Browser:
    """What a person has in front of them."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for option in (*OPTIONS.split(), f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def cdp(self, command: str, **arguments: Any) -> Any:
        """Send a command of the Chrome DevTools Protocol."""
        return self.driver.execute_cdp_cmd(command, arguments)

    def size(self, width: int, height: int = 900) -> None:
        """Have a window so large, in CSS pixels."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def prefer(self, **features: str) -> None:
        """Set media features, such as prefers_color_scheme."""
        named = [{"name": n.replace("_", "-"), "value": v} for n, v in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=named)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """Return what is read there; nothing, if it is not seen."""
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return str(self.run(script, selector)).replace("\N{NO-BREAK SPACE}", " ")

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        return [str(text) for text in self.run(script, selector)]

    def press(self, key: str) -> None:
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver).send_keys(getattr(Keys, key)).perform()

    def complaints(self) -> list[str]:
        """Return what the browser complains of, such as of a script that the policy forbids."""
        return [str(line["message"]) for line in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[Browser]:
    chromium.size(1280)
    chromium.prefer(prefers_color_scheme="light")
    chromium.complaints()
    yield chromium
    if shots := os.environ.get("REGD_TEST_SHOTS"):
        chromium.driver.save_screenshot(f"{shots}/{request.node.name}.png")
    chromium.driver.get("about:blank")


@pytest.fixture
def rig(tmp_path: Path, lab: Lab) -> Rig:
    rig = Rig(tmp_path, lab, web={"port": 0})
    rig.date = datetime.date.today().isoformat()
    return rig


class Told:
    """The page of a journal that is written here."""

    def __init__(self, rig: Rig, journal: Journal) -> None:
        self.rig, self.journal = rig, journal
        self.today = rig.date
        self._due_at = 0

    def session(
        self,
        number: int,
        state: SessionState = SessionState.DONE,
        *,
        subject: str = "KS005",
        date: str = "",
        reason: str | None = None,
        hint: str | None = None,
        **files: int,
    ) -> None:
        """Have a session be known with so many files in each state."""
        path = parse_session((subject, date or self.today, f"{number:03d}"))
        journal = self.journal
        with journal.together():
            self._due_at -= 1  # it is claimed next
            journal.note(path, due_at=self._due_at)
            row = journal.session(path.folder)
            assert row is not None
            rows = []
            for kind, count in files.items():
                for n in range(count):
                    name = f"alf/{kind}/_ibl_thing{n}.times.npy"
                    if kind == FileState.REFUSED:
                        (self.rig.root / path.folder / name).parent.mkdir(
                            parents=True, exist_ok=True
                        )
                        (self.rig.root / path.folder / name).touch()
                    rows.append(
                        FileRow(
                            name,
                            FileState(kind),
                            Signature(40_000_000 + n, 1),
                            reason="no dataset type" if kind == "refused" else None,
                            hint=RETRY if kind == "refused" else None,
                        )
                    )
            gone = journal.files(row.id).keys() - {known.path for known in rows}
            journal.write_files(row.id, rows, gone)
            if state is not SessionState.WAITING:
                claimed = journal.claim()
                assert claimed is not None
                assert claimed.id == row.id
                if state is not SessionState.WORKING:
                    journal.release(row.id, state, due_at=1e11, reason=reason, hint=hint)

    def parked(self, number: int, **about: Any) -> None:
        self.session(
            number, SessionState.PARKED, **{"reason": "no such subject", "hint": RETRY, **about}
        )


@pytest.fixture
def told(rig: Rig) -> Iterator[Told]:
    with lock(rig.settings.state_dir):
        path = rig.settings.state_dir / FILE_NAME
        with closing(Journal(path, now=time.time)) as journal:
            journal.bind_root(rig.root)
            (rig.root / rig.lab.subject).mkdir()  # an empty data root is taken for one not mounted
            yield Told(rig, journal)


@pytest.fixture
def show(rig: Rig, browser: Browser) -> Iterator[Callable[[], Page]]:
    """A way to open the page."""
    with ExitStack() as opened:

        def show() -> Page:
            page = opened.enter_context(Page(rig.settings, threading.Event()))
            browser.driver.get(until(lambda: page.url))
            until(lambda: browser.text("#title") not in ("", "regd"))
            return page

        yield show


# --- what is seen --------------------------------------------------------------------------------


def test_a_session_gets_registered_before_ones_eyes(
    rig: Rig, browser: Browser, show: Callable[[], Page]
) -> None:
    with rig.running():
        show()
        assert browser.text("#title") == "Nothing recorded yet"
        assert "No session is dated" in browser.text("#today .nothing")
        icon = browser.run("return document.querySelector('link[rel=icon]').href")
        rig.record()
        until(lambda: browser.texts("#today .rows > li"))
        browser.run("window.row = document.querySelector('#today .rows > li')")
        until(lambda: browser.text("#title") == "All registered")
        until(lambda: f"6 of {len(DATASETS)} files registered" in browser.text("#today .far"))
        assert browser.run("return window.row.isConnected"), "it is the row of before"
        assert browser.text("#today .name").splitlines()[0] == f"{rig.lab.subject} 001"
        assert browser.text("#today .words").startswith("registered")
        assert "just now" in browser.text("#today .words")
        assert browser.driver.title.startswith("✓ All registered · ")
        assert browser.run("return document.querySelector('link[rel=icon]').href") == icon
        (rig.folder() / "alf" / "no.such.npy").write_bytes(b"x")
        until(lambda: browser.text("#title") == "1 thing needs you")
        assert browser.run("return document.querySelector('link[rel=icon]').href") != icon
        assert browser.driver.title.startswith("! 1 thing needs you · ")
        assert "regd retry --all" in browser.text("#chores code")
    assert browser.complaints() == []


def test_an_outage(rig: Rig, browser: Browser, show: Callable[[], Page]) -> None:
    alyx = rig.settings.alyx.model_copy(update={"url": "http://127.0.0.1:9"})
    rig.settings = rig.settings.model_copy(update={"alyx": alyx})
    rig.record()
    with rig.running():
        show()
        until(lambda: browser.text("#title") == "Waiting for Alyx")
        assert browser.text("#since").startswith("Since ")
        assert "Recordings are safe" in browser.text("#text")
        until(lambda: "waits for Alyx" in browser.text("#today .words"))
        assert browser.driver.title.startswith("… Waiting for Alyx")


def test_regd_stops_and_comes_back(
    rig: Rig, told: Told, browser: Browser, show: Callable[[], Page]
) -> None:
    told.session(1, registered=3)
    page = show()
    port = int(str(page.url).rsplit(":", 1)[1])
    browser.run("window.same = true")
    page.__exit__()
    until(lambda: browser.text("#title") == "regd does not answer")
    assert browser.text("#since").startswith("Since ")
    assert "systemctl status regd" in browser.text("#detail")
    assert browser.driver.title.startswith("✕ ")
    assert "3 of 3 files" in browser.text("#today")
    again = rig.settings.model_copy(
        update={"web": rig.settings.web.model_copy(update={"port": port})}
    )
    told.session(2, registered=4)
    with Page(again, threading.Event()):
        until(lambda: browser.text("#title") == "All registered", 30)
        assert "4 of 4 files" in browser.text("#today")
        assert browser.run("return window.same")


def test_figures_that_are_old_are_told_as_such(
    told: Told, browser: Browser, show: Callable[[], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "BEAT_S", 0.2)
    told.session(1, registered=3)
    page = show()
    assert browser.text("#title") == "All registered"

    def fails(_reporter: Reporter) -> bool:
        raise OSError("the disk does not answer")

    monkeypatch.setattr(Reporter, "step", fails)

    def is_told() -> bool:
        page.news.checked_at = time.time() - 900  # one look may still have been under way
        return browser.text("#title") == "regd has no news"

    until(is_told)
    assert "15 min ago" in browser.text("#since")
    assert browser.driver.title.startswith("✕ ")


def test_too_many_pages(
    told: Told, browser: Browser, show: Callable[[], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MOST_PAGES", 0)
    show()
    assert browser.text("#title") == "Too many of these pages are open"
    monkeypatch.undo()
    until(lambda: browser.text("#title") == "Nothing recorded yet", 30)


def test_a_new_version_brings_its_page(
    told: Told, browser: Browser, show: Callable[[], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    show()
    browser.run("window.same = true")
    monkeypatch.setattr(web, "__version__", "9.9.9")
    told.session(1, registered=1)
    until(lambda: browser.run("return window.same !== true"))
    until(lambda: "9.9.9" in browser.text("footer"))


def test_without_scripts_it_says_what_to_type(told: Told, rig: Rig, browser: Browser) -> None:
    with Page(rig.settings, threading.Event()) as page:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
        try:
            browser.driver.get(until(lambda: page.url))
            assert "regd status" in browser.driver.find_element("tag name", "body").text
        finally:
            browser.cdp("Emulation.setScriptExecutionDisabled", value=False)


def test_five_hundred_sessions(told: Told, browser: Browser, show: Callable[[], Page]) -> None:
    with told.journal.together():
        for number in range(1, 501):
            told.session(number, registered=1)
    show()
    assert len(browser.texts("#today .rows > li")) == 200
    assert browser.text("#today .more") == "And 300 sessions more of today: regd status"


def test_what_waits_from_earlier_days(
    told: Told, browser: Browser, show: Callable[[], Page]
) -> None:
    told.session(1, registered=1)
    told.session(1, SessionState.HELD, date="2026-01-30", reason="no flag", settling=2)
    told.session(2, SessionState.WAITING, date="2026-01-30", settling=2)
    show()
    assert browser.text("#title") == "Registering: 1 session, 2 files left"
    (earlier,) = browser.texts("#earlier .rows > li")
    assert "KS005/2026-01-30/002" in earlier
    assert "waits until its files are finished" in earlier
    (held,) = browser.texts("#held .rows > li")
    assert "KS005/2026-01-30/001" in held
    assert "create_me.flag" in browser.text("#held")


def test_names_are_text(told: Told, browser: Browser, show: Callable[[], Page]) -> None:
    name = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    told.journal.write_strays(1, [(name, f"{name} is in no session folder", "move it")])
    (told.rig.root / name.replace("/", "_")).touch()
    name_on_disk = name.replace("/", "_")
    told.journal.write_strays(1, [(name_on_disk, "in no session folder", "move it")])
    show()
    assert name_on_disk in browser.texts("#chores h3")
    assert browser.run("return document.querySelectorAll('img, h3 b').length") == 0
    assert "owned" not in browser.driver.title
    assert browser.complaints() == []


def test_a_page_open_for_weeks_holds_no_more_than_at_first(
    told: Told, browser: Browser, show: Callable[[], Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "EVERY_S", 0.01)

    def held() -> dict[str, int]:
        browser.cdp("HeapProfiler.collectGarbage")
        kinds = browser.cdp("Memory.getDOMCounters")
        return {kind: kinds[kind] for kind in ("nodes", "jsEventListeners")}

    def change(times: int) -> None:
        for number in range(times):
            told.session(1, registered=number % 7 + 1, refused=number % 3)
            told.session(2, SessionState.WAITING, settling=number % 5 + 1)
            files = f"{number % 5 + 1} file"
            until(lambda files=files: files in browser.text("#whole"))
        told.session(1, registered=1)
        told.session(2, registered=1)
        until(lambda: browser.text("#title") == "All registered")

    show()
    change(6)
    before = held()
    change(40)
    after = held()
    assert after["jsEventListeners"] <= before["jsEventListeners"]
    assert after["nodes"] <= before["nodes"] + 20


# --- who cannot see it, or not well --------------------------------------------------------------


def crowded(told: Told) -> None:
    """Have everything be there, with names as long as they get."""
    long = "a_subject_whose_name_is_as_long_as_any_that_a_lab_has_ever_thought_of"
    told.session(1, subject=long, registered=20, refused=3)
    told.parked(2, subject=long)
    told.parked(3, subject="ZM_1085", hint="rename it")
    told.session(4, SessionState.HELD, date="2026-01-30", reason="no flag", settling=2)
    told.session(5, SessionState.WAITING, settling=2)
    told.session(6, SessionState.WAITING, date="2026-01-29", settling=2)


@pytest.mark.parametrize("width", [320, 640, 1280, 1920, 3840])
def test_nothing_is_cut_off(
    width: int, told: Told, browser: Browser, show: Callable[[], Page]
) -> None:
    """320 is a phone, and what is left of a window of 1280 at 400 %, as WCAG 1.4.10 asks for."""
    browser.size(width, 900)
    crowded(told)
    show()
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    too_wide = """
        const most = document.documentElement.clientWidth;
        return [...document.querySelectorAll('body *')].filter(e => !e.closest('.unseen, svg')
            && (e.getBoundingClientRect().right > most + 1 || e.scrollWidth > e.clientWidth + 1
                && getComputedStyle(e).display !== 'inline')).map(e => e.outerHTML.slice(0, 80))
    """
    assert browser.run(too_wide) == []
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_the_statement_is_large(told: Told, browser: Browser, show: Callable[[], Page]) -> None:
    """Letters of a hand's breadth on a wall: 4 % of a screen's width, 28 pixels on a phone."""
    told.session(1, registered=1)
    show()
    for width, least in ((320, 28), (1280, 60), (1920, 90)):
        browser.size(width)
        size = browser.run("return getComputedStyle(document.querySelector('h1')).fontSize")
        assert float(size.removesuffix("px")) >= least


def test_the_keyboard_reaches_all_and_leaves_again(
    told: Told, browser: Browser, show: Callable[[], Page]
) -> None:
    crowded(told)
    show()
    browser.run("document.activeElement.blur(); scrollTo(0, 0)")
    name = """
        const e = document.activeElement;
        if (e === document.body) return null;
        const outline = getComputedStyle(e);
        return [e.tagName, e.getAttribute('aria-label') ?? e.innerText,
                outline.outlineStyle !== 'none' && parseFloat(outline.outlineWidth) >= 2];
    """
    reached = []
    for _ in range(20):
        browser.press("TAB")
        if (at := browser.run(name)) is None:
            break
        reached.append(at)
    copy = "Copy the command regd retry --all"
    assert [r[:2] for r in reached] == [
        ["BUTTON", copy],
        ["BUTTON", copy],
        ["SUMMARY", "All of them"],
    ]
    assert all(seen for *_, seen in reached)
    browser.press("TAB")
    browser.press("TAB")
    browser.run("document.querySelector('button').focus()")
    browser.press("ENTER")
    until(lambda: browser.text("#chores button") in ("Copied", "Press Ctrl+C"))


def test_what_one_is_at_stays_while_things_change(
    told: Told, browser: Browser, show: Callable[[], Page]
) -> None:
    browser.size(1000, 500)
    told.session(1, registered=1, refused=3)
    told.session(2, registered=1)
    show()
    browser.run("""
        window.button = document.querySelector('#chores button');
        document.querySelector('#chores summary').click();
        button.focus();
        scrollTo(0, button.getBoundingClientRect().top - 20);
        getSelection().selectAllChildren(document.querySelector('#chores h3'));
        button.focus({preventScroll: true});
    """)
    before = browser.run("return button.getBoundingClientRect().top")
    told.parked(3)  # it stands above, out of sight
    until(lambda: browser.text("#title") == "2 things need you")
    assert len(browser.texts("#chores .cards > li")) == 2
    assert browser.run("return document.activeElement === button")
    assert browser.run("return document.querySelector('#chores details[open]') !== null")
    assert browser.run("return String(getSelection())") == "3 files of KS005/" + told.today + "/001"
    assert browser.run("return button.getBoundingClientRect().top") == pytest.approx(before, abs=2)


def tree(browser: Browser) -> list[dict[str, Any]]:
    """Return what a screen reader is given, in its order: role, name and more of each thing."""
    nodes = {n["nodeId"]: n for n in browser.cdp("Accessibility.getFullAXTree")["nodes"]}
    found, ahead = [], [next(iter(nodes.values()))]
    while ahead:
        node = ahead.pop()
        ahead += [nodes[child] for child in reversed(node.get("childIds", ())) if child in nodes]
        if not node.get("ignored"):
            more = {p["name"]: p["value"].get("value") for p in node.get("properties", ())}
            name = node.get("name", {}).get("value", "").replace("\N{NO-BREAK SPACE}", " ")
            found.append({"role": node["role"]["value"], "name": name, **more})
    return found


def test_a_screen_reader_gets_it_all(
    told: Told, browser: Browser, show: Callable[[], Page]
) -> None:
    crowded(told)
    show()
    things = tree(browser)
    roles = [thing["role"] for thing in things]
    assert [roles.count(role) for role in ("banner", "main", "contentinfo")] == [1, 1, 1]
    headings = [(t["level"], t["name"]) for t in things if t["role"] == "heading"]
    assert headings[0] == (1, "3 things need you")
    assert [name for level, name in headings if level == 2] == [
        "What needs you",
        "Today",
        "Earlier sessions that wait",
        "On hold",
        "About this computer",
    ]
    levels = [level for level, _ in headings]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    regions = [t["name"] for t in things if t["role"] == "region"]
    assert regions == [name for level, name in headings if level == 2][:4]
    assert all(
        t["name"] for t in things if t["role"] in ("button", "heading", "DisclosureTriangle")
    )
    assert "image" not in roles, "what is drawn is said in words beside it"
    assert "progressbar" not in roles
    assert roles.count("listitem") >= 6
    live = [t for t in things if t.get("live") == "polite"]
    assert [t["role"] for t in live] == ["status"]
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert browser.run("return document.documentElement.lang") == "en"


def test_a_screen_reader_is_not_talked_to_all_the_time(
    told: Told, browser: Browser, show: Callable[[], Page]
) -> None:
    told.session(1, SessionState.WAITING, settling=1)
    show()
    browser.run("""
        window.spoken = [];
        new MutationObserver(() => spoken.push(document.getElementById('spoken').textContent))
            .observe(document.getElementById('spoken'), {childList: true, characterData: true,
                                                         subtree: true});
    """)
    for files in (2, 3):
        told.session(1, SessionState.WAITING, settling=files)
        until(lambda files=files: f"{files} files left" in browser.text("#title"))
    assert browser.run("return spoken") == []
    told.session(1, registered=3)
    until(lambda: browser.run("return spoken"))
    (said,) = browser.run("return spoken")
    assert said.startswith("All registered")


def test_light_dark_still_and_in_the_systems_own_colours(
    told: Told, browser: Browser, show: Callable[[], Page]
) -> None:
    told.session(1, SessionState.WAITING, settling=1)
    show()
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert browser.run(style, "html", "backgroundColor") == "rgb(244, 245, 247)"
    assert browser.run(style, "[data-icon=busy]", "animationName") == "rise"
    browser.prefer(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    assert browser.run(style, "html", "backgroundColor") == "rgb(14, 16, 19)"
    assert browser.run(style, "[data-icon=busy]", "animationName") == "none"
    browser.prefer(forced_colors="active")
    border = browser.run(style, "#whole", "borderTopColor")
    assert border != browser.run(style, "#whole", "backgroundColor")
    assert browser.run(style, "#whole", "color") != browser.run(style, "#whole", "backgroundColor")
