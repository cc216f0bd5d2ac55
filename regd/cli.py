"""The command line. Thin: it reads arguments, calls one thing, and shows what came of it."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import sys
import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from regd import __version__, screen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import RenderableType

    from regd.install import Computer, Step
    from regd.journal import Journal
    from regd.service import Service
    from regd.settings import Loaded, Settings
    from regd.status import Report

app = typer.Typer(
    help="Registers every session recorded on this computer on the lab's Alyx database.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# emoji: a file called a:dog:b is shown as it is
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="The settings file; by default $REGD_CONFIG, or /etc/regd/regd.yaml if it is there.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it for a program.")]
_COMPLETED = 1000  # names that a shell is given, the latest
_UNBROKEN = 100_000  # columns
_DEFAULT_CONFIG = Path("/etc/regd/regd.yaml")


def _show(shown: RenderableType) -> None:
    """Print what `regd.screen` has made; where no terminal asks for it, no line is broken."""
    import os

    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _UNBROKEN
    out.print(shown, crop=False)


def _print_json(facts: Report) -> None:
    print(json.dumps(facts, indent=2))


def main() -> None:
    """Run the command line; every failure is one line with what to do, and a status above 0."""
    from regd.errors import RegdError, SettingsError

    try:
        app(prog_name="regd")
    except (RegdError, SettingsError, OSError, sqlite3.Error) as error:
        from regd.logs import priority

        before = priority(sys.stderr, "error")
        for line in str(error).splitlines():
            err.print(f"{before}[red]regd:[/red] {screen.escape(line)}", soft_wrap=True)
        sys.exit(2)


def complete_session(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the sessions that a shell may complete a word to."""
    return _completed(ctx, incomplete, lambda journal: journal.names(_COMPLETED))


def complete_problem(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return what a person may want to be forgotten."""
    return _completed(ctx, incomplete, lambda journal: journal.problems(_COMPLETED))


def _completed(
    ctx: typer.Context, incomplete: str, names: Callable[[Journal], list[str]]
) -> list[str]:
    """Return the names that begin so, or whose subject does; nothing if that cannot be told."""
    with contextlib.suppress(Exception):  # a shell shows whatever is said
        settings = _load(ctx.params.get("config")).settings
        with _journal(settings, read_only=True) as journal:
            found = names(journal)
        shown = [name for name in found if name.startswith(incomplete)]
        return shown or [
            short for name in found if (short := screen.short(name)).startswith(incomplete)
        ]
    return []


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"regd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def _load(config: Path | None) -> Loaded:
    from regd.settings import load

    return load(_file(config))


def _file(config: Path | None) -> Path | None:
    """Return the settings file to read, or None where there is none."""
    import os

    if config is None and (named := os.environ.get("REGD_CONFIG")):
        return Path(named)
    return _DEFAULT_CONFIG if config is None and _DEFAULT_CONFIG.exists() else config


def _daemon_settings(config: Path | None) -> Settings:
    from regd.logs import configure
    from regd.settings import check_for_daemon

    loaded = _load(config)
    check_for_daemon(loaded.settings, loaded.origins)
    settings = loaded.settings
    configure(settings.log.level, settings.log.format, secrets=_secrets(settings))
    return settings


def _secrets(settings: Settings) -> set[str]:
    return {s.get_secret_value() for s in (settings.alyx.token, settings.alyx.password) if s}


def _reader(config: Path | None, settings: Settings) -> Callable[[], Settings]:
    """Return what reads the settings again, and keeps secrets that are new there out of logs."""
    from regd.logs import configure
    from regd.settings import check_credentials

    known = _secrets(settings)

    def reread() -> Settings:
        fresh = _load(config).settings
        check_credentials(fresh)
        if new := _secrets(fresh) - known:
            known.update(new)
            configure(settings.log.level, settings.log.format, secrets=known)
        return fresh

    return reread


@contextmanager
def _journal(settings: Settings, *, read_only: bool = False) -> Iterator[Journal]:
    from regd.journal import FILE_NAME, Journal
    from regd.service import check_state_dir

    if not read_only:
        check_state_dir(settings.state_dir)
    journal = Journal(settings.state_dir / FILE_NAME, now=time.time, read_only=read_only)
    try:
        yield journal
    finally:
        journal.close()


# --- run, scan -----------------------------------------------------------------------------------


@app.command()
def run(config: Config = None) -> None:
    """Watch the data folder and register what appears there, until told to stop."""
    import os

    from regd.files import let_others_first
    from regd.health import LOCK
    from regd.notify import Lifeline, Systemd
    from regd.pulse import Pulse
    from regd.service import Service, lock
    from regd.status import Summary

    let_others_first()
    pulse = Pulse()
    with Lifeline(Systemd(os.environ), pulse) as lifeline:
        settings = _daemon_settings(config)
        reread = _reader(config, settings)
        with (
            lock(settings.state_dir),
            lifeline.renewing(settings.state_dir / LOCK),
            Service(settings, threading.Event(), reread=reread, pulse=pulse) as service,
            _page(settings, service.stop),
            _metrics(settings, service),
            lifeline.saying(Summary(service), settings.alyx.timeout_s),
        ):
            _on_signal(service.end)
            service.run(lifeline.ready)


def _page(settings: Settings, stop: threading.Event) -> AbstractContextManager[object]:
    """Return the status page, if there is to be one: only then is what it needs loaded."""
    if settings.web.port is None:
        return nullcontext()
    from regd.web import Page

    return Page(settings, stop)


def _metrics(settings: Settings, service: Service) -> AbstractContextManager[object]:
    """Return what tells Prometheus of the daemon, if that is wanted: it is not loaded otherwise."""
    if settings.metrics.port is None and settings.metrics.textfile is None:
        return nullcontext()
    from regd.metrics import Exporter

    return Exporter(settings, service.client.alyx.counts)


def _on_signal(end: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end())


@app.command()
def scan(
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Register old sessions, too, that nobody has flagged.")
    ] = False,
) -> None:
    """Go through the data folder once and register what is there.

    Waits for files that are still being written. The exit status is 0 when nothing is left, 1 when
    something is left or needs a person (`regd status` says what), 2 when it could not run.
    """
    from regd.files import let_others_first
    from regd.logs import configure
    from regd.service import AlreadyRunning, Service, lock
    from regd.status import is_running

    let_others_first()
    settings = _load(config).settings
    if dry_run:
        _show_dry_run(settings, everything)
        return
    if not is_running(settings.state_dir):  # a daemon has what is needed to reach Alyx
        settings = _daemon_settings(config)
    if out.is_terminal:
        configure("error", settings.log.format)  # the bar says the rest
    stop = threading.Event()
    _on_signal(stop.set)
    try:
        with lock(settings.state_dir), Service(settings, stop) as service, _bar() as report:
            service.run_once(everything=everything, report=report)
    except AlreadyRunning:
        with _journal(settings) as journal, _bar() as report:
            _ask_daemon(journal, stop, everything, report)
    with _journal(settings, read_only=True) as journal:
        facts = _scan_facts(journal)
    _show(screen.scanned(facts))
    raise typer.Exit(1 if facts["people"] or facts["left"] else 0)


def _ask_daemon(journal: Journal, stop: threading.Event, everything: bool, report: Any) -> None:
    """Have the running daemon scan, and wait until it has done what it found."""
    from regd.service import unfinished

    err.print("a daemon is running: it does the scan", style="dim")
    request = journal.ask_scan(everything=everything)
    while not stop.wait(0.2):
        report(*journal.left())
        if journal.scan_done(request) and not unfinished(journal):
            return


@contextmanager
def _bar() -> Iterator[Any]:
    """Yield a function that shows on the terminal what is left, as `Journal.left` says it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("scanning", total=None)
        most = 0

        def report(sessions: int, files: int) -> None:
            nonlocal most
            most = max(most, files)
            bar.update(
                task, description=f"{sessions} sessions left", completed=most - files, total=most
            )

        yield report


def _show_dry_run(settings: Settings, everything: bool) -> None:
    """Print what a scan would take on, without a daemon's lock and without writing anything."""
    from regd.errors import InvalidInput
    from regd.paths import Ignored
    from regd.scan import Scanner

    if settings.data_root is None or not settings.data_root.is_dir():
        raise InvalidInput(
            f"data_root {settings.data_root or ''} is no folder", hint="set it in the settings file"
        )
    ignored = Ignored(settings.watch.ignore)
    with _scratch_or_real_journal(settings) as journal:
        scanner = Scanner(
            settings.data_root.resolve(), settings, journal, ignored, threading.Event()
        )
        result = scanner.scan(time.time(), everything=everything, dry=True)
    for folder in result.noted:
        out.print(f"has work       {screen.escape(folder)}", soft_wrap=True)
    for _, reason, hint in result.strays:
        out.print(f"needs a person {screen.escape(reason)}: {screen.escape(hint)}", soft_wrap=True)
    out.print(
        f"{result.sessions} sessions with {result.files} files seen; "
        f"{len(result.noted)} have work; "
        f"{result.backlog_sessions} old ones left alone (--all takes them)",
        soft_wrap=True,
    )


@contextmanager
def _scratch_or_real_journal(settings: Settings) -> Iterator[Journal]:
    """Yield the journal for reading, or an empty one where there is none yet."""
    import tempfile

    from regd.journal import FILE_NAME, Journal

    if (settings.state_dir / FILE_NAME).exists():
        with _journal(settings, read_only=True) as journal:
            yield journal
        return
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / FILE_NAME, now=time.time)
        try:
            yield journal
        finally:
            journal.close()


def _scan_facts(journal: Journal) -> Report:
    """Return what has come of a scan, as `screen.scanned` shows it."""
    from regd.model import FileState, SessionState

    sessions, in_files = journal.counts()
    sessions_left, _ = journal.left()
    backlog = journal.fact("backlog") or {"sessions": 0}
    return {
        "known": sum(sessions.values()),
        "registered": in_files[FileState.REGISTERED],
        "backlog": backlog["sessions"],
        "held": sessions[SessionState.HELD],
        "left": sessions_left,
        "people": sessions[SessionState.PARKED]
        + in_files[FileState.REFUSED]
        + len(journal.strays()),
    }


# --- status, retry -------------------------------------------------------------------------------


@app.command()
def status(
    config: Config = None,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep it on the screen, up to date.")
    ] = False,
) -> None:
    """Say what is registered, what waits, and what needs a person."""
    from regd.errors import InvalidInput
    from regd.status import report

    settings = _load(config).settings
    if watch:
        from regd.live import watch as watch_status

        if as_json or not out.is_terminal:
            raise InvalidInput("--watch needs a terminal", hint="for programs: regd status --json")
        stop = threading.Event()
        _on_signal(stop.set)
        watch_status(settings, out, stop)
        return
    with _journal(settings, read_only=True) as journal:
        facts = report(settings, journal)
    if as_json:
        _print_json(facts)
    else:
        _show(screen.status(facts, screen.FITTING[1] if out.is_terminal else screen.ALL))


@app.command()
def show(
    session: Annotated[
        str,
        typer.Argument(
            help="Its folder or a file in it, here or below the data folder; its id on Alyx; or a"
            " part of its folder that no other has.",
            autocompletion=complete_session,
            show_default=False,
        ),
    ],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Tell all of one session: what happened to it, and each of its files."""
    from regd.manage import find
    from regd.status import story

    settings = _load(config).settings
    with _journal(settings, read_only=True) as journal:
        facts = story(settings, journal, find(settings, journal, session))
    if as_json:
        _print_json(facts)
    else:
        _show(screen.story(facts))


@app.command()
def retry(
    sessions: Annotated[
        list[str] | None,
        typer.Argument(
            help="Named as for `regd show`.",
            metavar="SESSION...",
            autocompletion=complete_session,
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every parked or held session, and every refused file.")
    ] = False,
    config: Config = None,
) -> None:
    """Put sessions back to work after a person has mended what was wrong.

    All of a session that is named is compared with Alyx.
    """
    from regd import manage
    from regd.errors import InvalidInput
    from regd.status import is_running

    if bool(sessions) == everything:
        raise InvalidInput("say which session to retry, or --all")
    settings = _load(config).settings
    with _journal(settings) as journal:
        count = manage.retry(settings, journal, sessions) if sessions else journal.retry(None)
        away = journal.fact("away")
    _show(screen.retried(count, is_running(settings.state_dir), away))


@app.command()
def forget(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Sessions named as for `regd show`, or what `regd status` names beside them.",
            metavar="SESSION...",
            autocompletion=complete_problem,
            show_default=False,
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Even if the next scan will find it again.")
    ] = False,
    config: Config = None,
) -> None:
    """Have regd report a session no longer whose data was removed, or that shall not be registered.

    Nothing is removed, neither from the disk nor from Alyx. For data that stays on the disk and
    shall never be registered, add its folder to `watch.ignore`, restart regd, and then forget it.
    """
    from regd import manage

    settings = _load(config).settings
    with _journal(settings) as journal:
        for name in names:
            path = manage.forget(settings, journal, name, force=force)
            _show(screen.forgotten(path, stays=manage.stays(settings, path)))


# --- check ---------------------------------------------------------------------------------------


@app.command()
def check(
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for a program.")] = False,
) -> None:
    """Say whether this computer, the settings and Alyx are as regd needs them, and what to do.

    Changes nothing. The exit status is that of monitoring plugins: 0 all is well, 1 a warning, 2
    something is wrong, 3 the check itself failed. With sudo it sees all that the service sees.
    """
    try:
        code = _check(config, as_json=as_json)
    except Exception as error:
        err.print(f"[red]regd:[/red] the check failed: {screen.escape(str(error))}", soft_wrap=True)
        code = 3
    raise typer.Exit(code)


def _check(config: Path | None, *, as_json: bool) -> int:
    """Look at everything, show it, and return the exit status."""
    from regd.check import Checkup, report_of, run
    from regd.host import read_unit

    found = []
    checkup = Checkup(_file(config), read_unit())
    with err.status("settings") as bar:
        checks = checkup.checks()
        for number, (name, finding) in enumerate(run(checks), 1):
            found.append((name, finding))
            bar.update(checks[number].name if number < len(checks) else "")
    checkup.close()
    facts = report_of(found, checkup.judged_for)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        width = out.width if out.is_terminal else None
        _show(screen.checked(facts, width=width, plain=_is_plain()))
    return int(facts["exit"])


def _is_plain() -> bool:
    """Say whether the terminal is one for ASCII alone, whatever Python makes of it."""
    import os

    ctype = os.environ.get("LC_CTYPE", "")
    if ctype == "C.UTF-8":  # under LANG=C it is Python that puts it there
        ctype = ""
    named = os.environ.get("LC_ALL") or ctype or os.environ.get("LANG", "")
    return "utf" not in named.lower() or "utf" not in out.encoding.lower()


# --- install, uninstall --------------------------------------------------------------------------

_Root = Annotated[
    Path,
    typer.Option("--root", help="A folder that stands for /, to put regd into an image."),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show all that would be done.")]


@app.command()
def install(
    data_root: Annotated[
        str | None, typer.Option(help="The folder that the recordings are written below.")
    ] = None,
    alyx_url: Annotated[str | None, typer.Option(help="The address of Alyx.")] = None,
    username: Annotated[str | None, typer.Option(help="The Alyx user that regd works as.")] = None,
    repository: Annotated[
        str | None, typer.Option(help="The Alyx name of this disk's data repository.")
    ] = None,
    user: Annotated[
        str, typer.Option(help="The user of this computer that the service runs as.")
    ] = "regd",
    token_file: Annotated[
        str | None, typer.Option(help="A file with the Alyx token; - for standard input.")
    ] = None,
    from_one: Annotated[
        bool,
        typer.Option("--from-one", help="Take over address, user and token that ONE has, unasked."),
    ] = False,
    one_home: Annotated[
        Path | None,
        typer.Option(help="The home folder with ONE's settings.", show_default="the caller's"),
    ] = None,
    no_start: Annotated[
        bool, typer.Option("--no-start", help="Leave the start of the service to you.")
    ] = False,
    dry_run: _DryRun = False,
    root: _Root = Path("/"),
) -> None:
    """Install regd as a service of this computer: user, settings, token, systemd unit.

    What is missing is asked for on a terminal. Run again, it does what is left to do; a file that
    a person has changed is left alone. `regd uninstall` undoes it.
    """
    from regd import install as how
    from regd.errors import NeedsHuman

    _need_root(dry_run, root, "install")
    computer = how.Computer(root.resolve())
    held = how.settings_in(computer.read(how.CONFIG))
    given = {
        "data_root": data_root,
        "alyx.url": alyx_url,
        "alyx.username": username,
        "repository": repository,
    }
    values, token = how.gather(
        given,
        _read_token(token_file),
        held,
        bool(computer.look(user).token),
        how.read_one(one_home or how.home_of_caller()),
        _Person() if sys.stdin.isatty() else None,
        from_one=from_one,
    )
    program = how.program_of_this()
    seen = computer.look(user, values["data_root"], program)
    for reason, hint in seen.obstacles:
        _show(screen.step("wrong", reason, hint))
    if seen.obstacles and not dry_run:
        raise NeedsHuman("nothing was done", hint="mend that, then run it again")
    wanted = how.Wanted(values, token, user, start=not no_start)
    _carry_out(how.plan(wanted, seen, program=program, root=computer.root), computer, dry_run)
    if dry_run or no_start or computer.is_image:
        return
    raise typer.Exit(min(1, _check(how.CONFIG, as_json=False) // 2))


@app.command()
def uninstall(
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove settings, token, journal and user, too.")
    ] = False,
    dry_run: _DryRun = False,
    root: _Root = Path("/"),
) -> None:
    """Undo `regd install`. Recorded data is never touched; settings, token and journal stay."""
    from regd import install as how
    from regd.errors import NeedsHuman

    _need_root(dry_run, root, "uninstall")
    computer = how.Computer(root.resolve())
    if not computer.was_installed:
        raise NeedsHuman(
            f"`regd install` was not used here: there is no {how.MANIFEST}",
            hint="remove what was put there by hand, by hand",
        )
    seen = computer.look(computer.user_made or "regd")
    steps = how.plan_removal(seen, purge=purge, user=computer.user_made)
    _carry_out(steps, computer, dry_run)


def _need_root(dry_run: bool, root: Path, command: str) -> None:
    import os

    from regd.errors import NeedsHuman

    if os.geteuid() != 0 and not dry_run and root == Path("/"):
        raise NeedsHuman(f"regd {command} changes the system", hint=f"sudo {sys.argv[0]} {command}")


def _read_token(file: str | None) -> str | None:
    """Return the token in a file, or on standard input."""
    from regd.errors import InvalidInput

    if file is None:
        return None
    text = sys.stdin.read() if file == "-" else Path(file).read_text()
    if len(text.split()) != 1:
        raise InvalidInput(f"{file} holds no token", hint="it is one word, as Alyx shows it")
    return text.strip()


class _Person:
    """Who sits at the terminal."""

    def ask(self, question: str, default: str) -> str:
        return str(typer.prompt(question, default=default, show_default=bool(default), err=True))

    def confirm(self, question: str) -> bool:
        return typer.confirm(question, default=True, err=True)

    def secret(self, question: str) -> str:
        return str(
            typer.prompt(question, default="", show_default=False, hide_input=True, err=True)
        )


def _carry_out(steps: Sequence[Step], computer: Computer, dry_run: bool) -> None:
    """Show the steps of a plan, and do them."""
    from regd.errors import RegdError
    from regd.install import describe

    for step in steps:
        action = step.action
        if dry_run and action is not None:
            _show(screen.step("would do", step.what, describe(action), step.shown))
        if action is not None and not dry_run:
            try:
                computer.do(action)
            except (RegdError, OSError) as error:
                _show(screen.step("failed", step.what, str(error)))
                hint = "what is done stays; mend that, then run it again"
                err.print(f"[red]regd:[/red] not all was done ({hint})", soft_wrap=True)
                raise typer.Exit(2) from None
            if not step.by_hand:
                _show(screen.step("done", step.what))
        if step.by_hand:
            _show(screen.step("to do", step.what, step.note))
        elif action is None:
            _show(screen.step("kept", step.what, step.note))


# --- config, sandbox, demo -----------------------------------------------------------------------


@app.command(name="config")
def show_config(config: Config = None) -> None:
    """Print the settings in force and where each comes from; secrets are hidden."""
    from regd.settings import rows

    loaded = _load(config)
    out.print(screen.table("Settings in force", ("key", "value", "from"), rows(loaded)))


@app.command()
def sandbox(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    db: Annotated[str, typer.Option(help="An SQLite file, or :memory:.")] = ":memory:",
    load: Annotated[
        Path | None,
        typer.Option(help="A JSON file with the lab to start from.", show_default="a built-in lab"),
    ] = None,
    rate_limit: Annotated[
        str, typer.Option(help="Requests a user may make, such as 550/minute, or none.")
    ] = "550/minute",
) -> None:
    """Run an Alyx stand-in to try things on. Not a database to keep data in."""
    from regd.errors import InvalidInput
    from regd.sandbox.server import serve

    try:
        serve(host, port, db, load, None if rate_limit.lower() == "none" else rate_limit)
    except ValueError as error:
        raise InvalidInput(str(error)) from None


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo keeps everything.")] = Path("demo"),
    remove_after: Annotated[
        bool, typer.Option("--remove-after", help="Remove that folder at the end.")
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Only remove what an earlier demo left.")
    ] = False,
) -> None:
    """Show regd at work in half a minute: a stand-in for Alyx, a rig and the daemon.

    Needs no network and no settings, and stops by itself.
    """
    from regd import demo as show

    if not clean:
        show.run(folder, out, remove_after=remove_after)
    else:
        out.print(f"{folder} {'is removed' if show.remove(folder) else 'is not there'}")
