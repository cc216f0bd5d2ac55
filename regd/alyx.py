"""The HTTP side: one client for the Alyx REST server. No httpx exception leaves this module."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import random
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import TypeAdapter
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from regd import __version__
from regd.counts import Counts
from regd.errors import (
    AlyxAway,
    AlyxFault,
    AlyxOdd,
    AlyxRefused,
    AlyxThrottled,
    DatasetsProtected,
    FileRefused,
    InvalidInput,
    MemberNotFound,
    RevisionProtected,
    SessionNotFound,
    Stopping,
    SubjectNotFound,
    Unauthorized,
)
from regd.logs import get_logger
from regd.pulse import Pulse
from regd.records import HISTORIES, PAGE, RECORD, is_a
from regd.retries import backoff_s, retry_after_s
from regd.settings import credentials

if TYPE_CHECKING:
    from pathlib import Path

    from regd.settings import Settings

_log = get_logger()
Params = Mapping[str, Any] | list[tuple[str, Any]]

_PAGE = 1000  # Alyx's own maximum
_MOST_PAGES = 1000
_LARGEST_BODY = 64 * 2**20  # bytes; a session of 100,000 datasets is told in less
_LONGEST_ANSWER = 10.0  # times timeout_s: a byte now and then must not hold a worker for ever
_LONGEST_TEXT = 1000  # characters of what Alyx says of an error
_BLIP_ATTEMPTS = 4
_BLIP_FIRST_S = 0.25
_BLIP_LONGEST_S = 60.0  # as long as a minute's rate limit can ask for
_REFUSED_S = 10.0  # a password that was refused is not sent again sooner: accounts get locked
_NO_CREDENTIALS = ("Authentication credentials", "Invalid token", "User inactive")
_HEADERS = {
    "User-Agent": f"regd/{__version__}",
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
}
_PROTECTED = "One or more datasets is protected"


class RateLimit:
    """Lets at most `per_minute` requests through in any 60 s, as Alyx counts them.

    Args:
        per_minute: The limit; None for none.
        clock: Monotonic seconds.
        sleep: Waits that many seconds; may raise to give up.
    """

    def __init__(
        self,
        per_minute: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if per_minute is not None and per_minute < 1:
            raise InvalidInput("requests_per_minute must be at least 1")
        self._sent: deque[float] = deque(maxlen=per_minute)
        self._limited = per_minute is not None
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return as soon as one more request may be sent."""
        while self._limited:
            with self._lock:
                now = self._clock()
                full = len(self._sent) == self._sent.maxlen
                wait_s = self._sent[0] + 60.0 - now if full else 0.0
                if wait_s <= 0:
                    self._sent.append(now)
                    return
            self._sleep(wait_s)


@dataclass(slots=True, eq=False)
class _Login:
    """Who asks Alyx. Replaced as a whole, so that no thread sees half of the old one."""

    user: str | None
    password: str | None = field(repr=False)
    token: str | None = field(repr=False)
    refused_until: float = -math.inf
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


@dataclass(frozen=True, slots=True)
class Contact:
    """What the answer to one request tells of the server and the way to it.

    Attributes:
        date: What its clock said, to the second; None if it does not say.
        certificate_until: When its certificate ends; None without TLS.
    """

    date: datetime.datetime | None
    certificate_until: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to a request, read to its end: making another `httpx.Response` takes long.

    Attributes:
        where: The request, as errors name it: ``POST https://alyx.test/sessions``.
        status: Of HTTP.
        headers: As they were sent.
        body: Unpacked.
    """

    where: str
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Return what it holds; None where that is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class AlyxClient:
    """A connection to Alyx: JSON in, JSON out, safe to share between threads.

    Connections are kept and reused, TLS is always verified, and what time mends within seconds is
    tried again here: a request that never reached Alyx, a read whose answer got lost, and a 429
    after the time its Retry-After names. A write whose outcome is unknown is never sent again.

    Args:
        base_url: The server's address, such as ``https://alyx.example.org``.
        username: The user to log in as; with `token`, only the name to put on records.
        password: Needed where there is no token, or to get a new one when it is refused.
        token: An API token, as Alyx shows it to its user.
        ca_file: A PEM file of the authorities to trust instead of the system's.
        timeout_s: Seconds without a byte after which a request is given up; ten times that for
            the whole of it.
        requests_per_minute: Never ask faster than this; Alyx allows a user 550 by default.
        transport: Where requests go instead of the network; for tests.
        clock: Monotonic seconds.
        sleep: Waits that many seconds; may raise to give up.
        chance: A number in [0, 1), for jitter.
        pulse: Told that an answer advances.

    Attributes:
        counts: Where requests are counted.

    Raises:
        InvalidInput: The address is no HTTP address, or the CA file cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        username: str | None = None,
        password: str | None = None,
        *,
        token: str | None = None,
        ca_file: str | Path | None = None,
        timeout_s: float = 60.0,
        requests_per_minute: int | None = 500,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
        pulse: Pulse | None = None,
    ) -> None:
        self.base_url = _checked_url(base_url)
        self._pulse = pulse or Pulse()
        self.counts = Counts()
        self.use_credentials(username, password, token)
        self._clock = clock
        self._longest_s = _LONGEST_ANSWER * timeout_s
        self._limit = RateLimit(requests_per_minute, clock=clock, sleep=sleep)
        self._chance = chance
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0))
        self._closed = False
        self._extensions = {"timeout": timeout.as_dict()}
        # not an httpx.Client: cookies, redirects and logins are of no use, and take time with each
        self._transport = transport or httpx.HTTPTransport(
            verify=_trust(ca_file),
            limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
            proxy=_proxy(self.base_url),
        )
        self._reading, self._writing = (
            Retrying(
                before_sleep=_tell_retry,
                sleep=sleep,
                stop=stop_after_attempt(_BLIP_ATTEMPTS),
                wait=self._blip_s,
                retry=retry_if_exception(again),
                reraise=True,
            )
            for again in (_is_blip, _is_blip_before_any_effect)
        )

    @classmethod
    def from_settings(cls, settings: Settings, **injected: Any) -> AlyxClient:
        """Return a client for the `alyx` section of the settings.

        Raises:
            InvalidInput: `alyx.url` is not set.
        """
        alyx = settings.alyx
        if not alyx.url:
            raise InvalidInput(
                "alyx.url is not set", hint="set it in the settings file, or REGD_ALYX__URL"
            )
        username, password, token = credentials(settings)
        return cls(
            alyx.url,
            username,
            password,
            token=token,
            ca_file=alyx.ca_file,
            timeout_s=alyx.timeout_s,
            requests_per_minute=alyx.requests_per_minute,
            **injected,
        )

    def __repr__(self) -> str:
        return f"AlyxClient({self.base_url!r}, username={self.user!r})"

    def __enter__(self) -> AlyxClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def has_credentials(self) -> bool:
        """Whether there is a token, or a user name and password to get one with."""
        login = self._login
        return login.token is not None or (bool(login.user) and login.password is not None)

    @property
    def user(self) -> str | None:
        """The user's name, where it was given."""
        return self._login.user

    def use_credentials(
        self, username: str | None, password: str | None, token: str | None
    ) -> None:
        """Ask as this user from now on; requests under way end as the one before.

        Raises:
            InvalidInput: That can be no token.
        """
        token = (token or "").strip() or None  # a file of it ends in a newline
        if token and not (token.isascii() and token.isprintable()):
            raise InvalidInput("alyx.token has a character that no token has", hint="correct it")
        self._login = _Login(username, password, token)

    def close(self) -> None:
        """Close the connections; nothing is sent from then on."""
        self._closed = True  # the transport would open new ones
        self._transport.close()

    # --- requests --------------------------------------------------------------------------------

    def get(
        self,
        path: str,
        params: Params | None = None,
        data: Mapping[str, Any] | None = None,
        form: TypeAdapter[Any] = RECORD,
    ) -> Any:
        """Return what `GET path` answers; a lost answer is asked for again.

        Args:
            path: Below the server's address, such as '/sessions'.
            params: The query.
            data: Sent as JSON in the body, which Alyx reads where a query would be too long.
            form: What the answer must hold.

        Raises:
            AlyxAway: Alyx cannot be reached, or answers with something else.
        """
        return self._checked(self._request("GET", path, params=params, json=data), path, form)

    def ping(self) -> None:
        """Return if Alyx answers, whether or not it knows who asks.

        Raises:
            AlyxAway: It does not.
        """
        with contextlib.suppress(Unauthorized):
            answer = _read(self._send("GET", "/data-formats", params={"limit": 1}))
            self._checked(answer, "/data-formats", PAGE)

    def contact(self) -> Contact:
        """Ask once, as nobody, and return what the answer tells beside that it is Alyx's.

        Raises:
            AlyxAway: It does not answer, or something else does.
            AlyxRefused: It refuses what every Alyx answers.
        """
        until: list[datetime.datetime | None] = []

        def look(answer: httpx.Response) -> None:
            until.append(_certificate_until(answer))  # gone with the connection, maybe

        answer = self._send("GET", "/data-formats", params={"limit": 1}, look=look)
        with contextlib.suppress(Unauthorized):
            self._checked(_read(answer), "/data-formats", PAGE)
        return Contact(_date_of(answer), until[0])

    def options(self, path: str) -> Any:
        """Return what `OPTIONS path` answers: what this user may do there. It changes nothing.

        Raises:
            AlyxRefused: This user may do nothing there but look.
        """
        return self._request("OPTIONS", path)

    def log_in(self) -> str:
        """Return the user's token, which Alyx gives for the password.

        Raises:
            Unauthorized: It does not accept the password.
            AlyxAway: It does not answer.
        """
        return self._log_in(self._login, refused=None)

    def greet(self) -> None:
        """Return if Alyx answers, and takes the credentials; a lost answer is asked for again.

        Raises:
            AlyxAway: It does not answer, or something else does.
            Unauthorized: It refuses the credentials.
        """
        self.get("/data-formats", {"limit": 1}, form=PAGE)

    def post(self, path: str, data: Mapping[str, Any], form: TypeAdapter[Any] = RECORD) -> Any:
        """Return what `POST path` answers; it is sent once, unless it surely never arrived.

        Raises:
            AlyxAway: With `unknown_outcome` set if the request may have taken effect.
        """
        return self._write("POST", path, data, form)

    def patch(self, path: str, data: Mapping[str, Any], form: TypeAdapter[Any] = RECORD) -> Any:
        """Return what `PATCH path` answers: the record with `data` changed and the rest kept."""
        return self._write("PATCH", path, data, form)

    def pages(
        self,
        path: str,
        params: Mapping[str, Any] | None = None,
        form: TypeAdapter[Any] = RECORD,
    ) -> Iterator[dict[str, Any]]:
        """Yield every record of a list, page after page; each must have that form."""
        query: Params | None = {"limit": _PAGE, **(params or {})}
        seen: list[Params] = []
        while query is not None:
            if query in seen:
                raise AlyxOdd(f"{self.base_url}{path} lists its pages in a circle")
            seen.append(query)
            if len(seen) > _MOST_PAGES:
                raise AlyxOdd(f"{self.base_url}{path} lists pages without end")
            answer = self._request("GET", path, params=query)
            paged = isinstance(answer, dict)
            records = answer.get("results") if paged else answer
            if not isinstance(records, list):
                raise AlyxOdd(f"{self.base_url}{path} answered with something that is no list")
            for record in records:
                yield self._checked(record, path, form)
            if not paged:
                return
            # only the query of `next` is taken: behind a proxy its host may be the wrong one
            after = answer.get("next")
            if after and not records:
                raise AlyxOdd(f"{self.base_url}{path} names a next page after an empty one")
            query = _query_of(after) if after else None

    def rest(
        self,
        url: str,
        action: str,
        id: Any = None,
        data: Mapping[str, Any] | None = None,
        no_cache: bool = True,  # noqa: ARG002 - see below
        **filters: Any,
    ) -> Any:
        """Do as `one.webclient.AlyxClient.rest` does, so that a script need not change.

        Args:
            url: The endpoint, such as 'sessions'.
            action: One of list, read, create, partial_update.
            id: The record, for read and partial_update.
            data: The record's fields, for create and partial_update.
            no_cache: Nothing is ever cached here; accepted for compatibility.
            filters: Query parameters, for list.
        """
        path = f"/{url.strip('/')}"
        if action == "list":
            return list(self.pages(path, filters))
        if action == "create":
            return self.post(path, data or {})
        if id is None:
            raise InvalidInput(f"{action} needs the id of a record of {url}")
        record = f"{path}/{quote(str(id).rsplit('/', 1)[-1], safe='')}"
        if action == "read":
            return self.get(record)
        if action == "partial_update":
            return self.patch(record, data or {})
        raise InvalidInput(f"{action!r} is none of list, read, create, partial_update")

    def _checked(self, answer: Any, path: str, form: TypeAdapter[Any]) -> Any:
        if is_a(form, answer):
            return answer
        raise AlyxOdd(
            f"{self.base_url}{path} answered with something that Alyx does not say",
            hint="is alyx.url the address of an Alyx of version 3?",
        )

    def _write(
        self, method: str, path: str, data: Mapping[str, Any], form: TypeAdapter[Any]
    ) -> Any:
        try:
            return self._checked(self._request(method, path, json=data), path, form)
        except AlyxOdd as error:
            error.unknown_outcome = True
            raise

    def _request(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        json: Mapping[str, Any] | None = None,
    ) -> Any:
        # most succeed at once, and asking tenacity takes a tenth as long as a request
        try:
            return self._once(method, path, params, json)
        except AlyxAway as error:
            failed = [error]

        def once() -> Any:
            if failed:
                raise failed.pop()
            return self._once(method, path, params, json)

        return (self._reading if method == "GET" else self._writing)(once)

    def _blip_s(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked_s = error.after_s if isinstance(error, AlyxAway) else None
        jittered_s = backoff_s(state.attempt_number, _BLIP_FIRST_S, _BLIP_LONGEST_S, self._chance)
        return max(asked_s or 0.0, jittered_s)

    def _once(
        self,
        method: str,
        path: str,
        params: Params | None,
        json: Mapping[str, Any] | None,
    ) -> Any:
        login = self._login
        try:
            return self._once_as(login, method, path, params, json)
        except Unauthorized:
            if login is self._login:
                raise
        return self._once_as(self._login, method, path, params, json)  # mended meanwhile

    def _once_as(
        self,
        login: _Login,
        method: str,
        path: str,
        params: Params | None,
        json: Mapping[str, Any] | None,
    ) -> Any:
        token = self._log_in(login, refused=None)
        try:
            return _read(self._send(method, path, params=params, json=json, token=token))
        except Unauthorized:
            if login.password is None:
                raise
            token = self._log_in(login, refused=token)
        return _read(self._send(method, path, params=params, json=json, token=token))

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        token: str | None = None,
        look: Callable[[httpx.Response], None] = lambda _: None,
        **content: Any,
    ) -> _Answer:
        """Send one request and return the answer, whatever its status; `look` sees how it begins.

        Raises:
            AlyxAway: No whole answer came.
        """
        if self._closed:
            raise Stopping("the connection to Alyx is closed")
        self._limit.wait()
        headers = {**_HEADERS, "Authorization": f"Token {token}"} if token else _HEADERS
        where = f"{method} {self.base_url}{path}"
        began_at = self._clock()
        late_at = began_at + self._longest_s
        whole = None
        self._pulse.beat()
        try:
            query = f"?{httpx.QueryParams(params)}" if params else ""
            url = _parsed(f"{self.base_url}{path}{query}")
            request = httpx.Request(
                method, url, headers=headers, extensions=self._extensions, **content
            )
            with contextlib.closing(self._transport.handle_request(request)) as answer:
                look(answer)
                whole = _whole(where, answer, lambda: self._clock() > late_at, self._pulse.beat)
                return whole
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol):
            # its text would repeat the header, and with it the token
            raise InvalidInput(f"{where} cannot be sent: check alyx.url and alyx.token") from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise AlyxAway(
                f"{where}: no connection: {error}", hint=_connection_hint(error)
            ) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            what = str(error) or type(error).__name__
            raise AlyxOdd(f"{where}: the answer was lost: {what}") from None
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise InvalidInput(f"{where} cannot be sent: {error}") from None
        finally:
            self._pulse.beat()
            status = None if whole is None else whole.status
            took_s = self._clock() - began_at
            good = whole is not None and _is_alyx(whole)
            self.counts.requested(method, path, status, took_s, good=good)
            took_s = round(took_s, 3)
            _log.debug("request.sent", method=method, path=path, status=status, took_s=took_s)

    # --- credentials -----------------------------------------------------------------------------

    def _log_in(self, login: _Login, refused: str | None) -> str:
        """Return the token to use, fetching one where there is none or it was `refused`."""
        with self._pulse.holding(login.lock):
            if login.token is not None and login.token != refused:
                return login.token
            if not login.user or login.password is None:
                raise Unauthorized(
                    f"no credentials for {self.base_url}",
                    hint="set alyx.token, or alyx.username and alyx.password",
                )
            wrong = Unauthorized(
                f"{self.base_url} does not accept the password of user {login.user!r}",
                hint="correct alyx.username and alyx.password",
            )
            if self._clock() < login.refused_until:  # by another thread's request
                raise wrong
            form = {"username": login.user, "password": login.password}
            try:
                answer = self._send("POST", "/auth-token", data=form)
                if answer.status == 400 and answer.json() is not None:
                    login.refused_until = self._clock() + _REFUSED_S
                    raise wrong
                body = _read(answer)
            except (AlyxOdd, AlyxFault) as error:  # of no use to anybody; what was asked is unsent
                raise AlyxAway(error.reason, hint=error.hint, after_s=error.after_s) from None
            token = body.get("token") if isinstance(body, dict) else None
            # anything else cannot stand in a header
            if not isinstance(token, str) or not re.fullmatch(r"[!-~]{1,1000}", token):
                raise AlyxAway(f"{self.base_url}/auth-token answered without a token")
            login.token = token
            return token


@lru_cache(maxsize=64)
def _parsed(address: str) -> httpx.URL:
    """Return an address taken apart: most are asked again and again."""
    return httpx.URL(address)


def _is_blip(error: BaseException) -> bool:
    """Say whether time mends an error within seconds."""
    if not isinstance(error, AlyxAway):
        return False
    return error.after_s is None or error.after_s <= _BLIP_LONGEST_S


def _is_blip_before_any_effect(error: BaseException) -> bool:
    """Say the same where a request must not take effect twice."""
    return _is_blip(error) and not isinstance(error, AlyxOdd)


def _tell_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    # at debug: an outage is told once, by whoever finds that it is one
    _log.debug("request.retried", reason=str(error), wait_s=round(state.upcoming_sleep, 2))


# --- what an answer means ------------------------------------------------------------------------


def _whole(
    where: str, answer: httpx.Response, is_late: Callable[[], bool], beat: Callable[[], None]
) -> _Answer:
    """Return an answer with its body, read and unpacked piece by piece up to a limit.

    Raises:
        AlyxOdd: It is too large to be held in memory, or does not end in time.
    """
    body = bytearray()
    for piece in answer.iter_bytes():
        beat()
        body += piece
        if is_late():
            raise httpx.ReadTimeout("it came too slowly")
        if len(body) > _LARGEST_BODY:
            raise AlyxOdd(
                f"{where} answered with more than {_LARGEST_BODY} bytes",
                hint="is alyx.url the address of Alyx?",
            )
    return _Answer(where, answer.status_code, answer.headers, bytes(body))


def _read(answer: _Answer) -> Any:
    """Return the JSON of a good answer.

    Raises:
        AlyxOdd: What answered is not a working Alyx.
        AlyxFault: Alyx failed on this request.
        NeedsHuman: Alyx refused it; the subclass says how.
    """
    if answer.status == 204:
        return None
    body = answer.json()
    if answer.is_success and body is not None:
        return body
    if answer.is_success:
        raise AlyxOdd(
            f"{answer.where} answered {answer.status} with something other than JSON",
            hint="is alyx.url the address of Alyx, and is there a login page in between?",
        )
    raise _failure(answer, body if isinstance(body, dict) else None)


def _is_alyx(answer: _Answer) -> bool:
    """Say whether Alyx did what it was asked: a login page in between answers 200, too."""
    is_json = "json" in answer.headers.get("Content-Type", "")
    return answer.is_success and (is_json or answer.status == 204)


def _failure(answer: _Answer, body: dict[str, Any] | None) -> Exception:
    """Return the exception that an answer other than 2xx stands for."""
    where, status = answer.where, answer.status
    if status == 429:
        return AlyxThrottled(f"{where}: too many requests (429)", after_s=_asked_s(answer))
    if 300 <= status < 400:
        return AlyxOdd(
            f"{where} was redirected ({status}) to {answer.headers.get('Location', '?')[:200]}",
            hint="is alyx.url right, and is there a login page in between?",
        )
    if status in (502, 503, 504) or (status >= 500 and body is None):
        return AlyxOdd(f"{where} answered {status}", after_s=_asked_s(answer))
    if body is None:  # Alyx says what it refuses in JSON: this is the word of something in between
        return AlyxOdd(
            f"{where} answered {status} with something other than JSON",
            hint="is alyx.url right? Else ask Alyx's keeper what stands between",
        )
    text = _sentence(body)
    if status in (401, 403):
        return _forbidden(where, status, body, text)
    if status == 404:
        return MemberNotFound(f"{where}: {text}", hint="create it on Alyx, or correct the name")
    if status >= 500:
        return _server_error(where, status, text)
    return _bad_request(where, status, text)


def _forbidden(where: str, status: int, body: dict[str, Any], text: str) -> Exception:
    if body.get("error") == _PROTECTED and is_a(HISTORIES, body.get("details")):
        return DatasetsProtected(f"{where}: {_PROTECTED}", details=body["details"])
    if "is protected, cannot patch" in text:
        return RevisionProtected(f"{where}: {text}", status=403)
    if text.startswith(_NO_CREDENTIALS):
        return Unauthorized(
            f"{where}: {text}",
            hint="correct alyx.token, or alyx.username and alyx.password",
        )
    return AlyxRefused(
        f"{where}: {text}", status=status, hint="ask Alyx's keeper to give this user the right to"
    )


_NAMED_FILE = re.compile(r'(?:filename|dataset|file record|record for) "([^"]+)"')
_PERMANENT = re.compile(
    r"dataset types? found for|matching dataset types found|query does not exist|"
    r"get\(\) returned more than one|argument is required"
)


def _server_error(where: str, status: int, text: str) -> Exception:
    """Return the error of a JSON 500: Alyx answers many a bad value with one."""
    missing_session = _missing_session(where, text)
    if missing_session:
        return missing_session
    named = _NAMED_FILE.search(text)
    if named:
        hint = "mend the dataset types on Alyx, or rename the file; then: regd retry --all"
        return FileRefused(f"Alyx: {text}", status=status, name=named[1], hint=hint)
    if re.search(r"(DataFormat|DatasetType) matching query|more than one Data", text):
        hint = "add the file's extension to Alyx's data formats, once; then: regd retry --all"
        return FileRefused(f"Alyx: {text}", status=status, name=None, hint=hint)
    if "LabMember matching query" in text:
        hint = "correct register.created_by, or create that user on Alyx; then: regd retry --all"
        return MemberNotFound(f"{where}: {text}", hint=hint)
    if _PERMANENT.search(text):
        return AlyxRefused(f"{where}: {text}", status=status, hint="then: regd retry --all")
    return AlyxFault(f"{where} failed on the server ({status}): {text}")


def _missing_session(where: str, text: str) -> Exception | None:
    if re.match(r"A (base )?session for", text):
        hint = "create the session on Alyx: put a flag file in its folder"
        return SessionNotFound(f"{where}: {text}", hint=hint)
    if "/datasets" in where and "session: Select a valid choice" in text:
        hint = "was it deleted there, or a database restored? Put a flag file in its folder"
        return SessionNotFound(f"{where}: Alyx no longer has this session", hint=hint)
    if text.startswith("Subject matching query does not exist"):
        return SubjectNotFound(
            f"{where}: {text}", hint="create the subject on Alyx, or rename its folder"
        )
    return None


def _bad_request(where: str, status: int, text: str) -> Exception:
    if "repository does not exist" in text:
        return MemberNotFound(
            f"{where}: {text}",
            hint="correct `repository`, or create it on Alyx; then: regd retry --all",
        )
    missing_session = _missing_session(where, text)
    if missing_session:
        return missing_session
    subject = re.search(r"nickname[ =]\"?([^\s\"]+)\"? does not exist", text)
    if subject:
        return SubjectNotFound(
            f"subject {subject[1]!r} does not exist on Alyx",
            hint="create the subject on Alyx, or rename its folder; then: regd retry --all",
        )
    missing = re.search(r"Object with \w+=(.+?) does not exist", text)
    if missing or "labs do not exist" in text:
        return MemberNotFound(f"{where}: {text}", hint="create it on Alyx, or correct the name")
    named = _NAMED_FILE.search(text)
    if named:
        return FileRefused(
            f"Alyx: {text}",
            status=status,
            name=named[1],
            hint="rename the file; then: regd retry --all",
        )
    return AlyxRefused(f"{where}: {text}", status=status, hint="correct it; then: regd retry --all")


def _sentence(body: dict[str, Any]) -> str:
    """Return what an error answer says, on one line."""
    for key in ("detail", "error"):
        if isinstance(body.get(key), str):
            return " ".join(body[key].split())[:_LONGEST_TEXT]
    fields = {k: v for k, v in body.items() if k != "status_code"}
    return "; ".join(
        f"{k}: {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in fields.items()
    )[:_LONGEST_TEXT]


def _asked_s(answer: _Answer) -> float | None:
    now = datetime.datetime.now(datetime.UTC)
    return retry_after_s(answer.headers.get("Retry-After"), now)


def _date_of(answer: _Answer) -> datetime.datetime | None:
    try:
        return parsedate_to_datetime(answer.headers["Date"]).astimezone(datetime.UTC)
    except (KeyError, ValueError):
        return None


def _certificate_until(answer: httpx.Response) -> datetime.datetime | None:
    stream = answer.extensions.get("network_stream")
    tls = stream.get_extra_info("ssl_object") if stream is not None else None
    certificate = tls.getpeercert() if tls is not None else None
    if not certificate or "notAfter" not in certificate:
        return None
    until_s = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    return datetime.datetime.fromtimestamp(until_s, datetime.UTC)


def _query_of(address: object) -> Params:
    """Return the query of the next page's address.

    Raises:
        AlyxOdd: It is no address of a page.
    """
    try:
        query = parse_qsl(urlsplit(address).query) if isinstance(address, str) else []
    except ValueError:
        query = []
    if not query:
        raise AlyxOdd("Alyx named a next page that has no address")
    return query


def _checked_url(url: str) -> str:
    """Return the server's address without a trailing slash.

    Raises:
        InvalidInput: It is none, or holds a user name or password; these are not repeated.
    """
    hint = "give it as https://host, and the user in alyx.username"
    try:
        parts = urlsplit(url)
        httpx.URL(url)
        _ = parts.port
    except (ValueError, httpx.InvalidURL):
        raise InvalidInput("alyx.url is not an address of an Alyx server", hint=hint) from None
    if parts.username is not None or parts.password is not None:
        raise InvalidInput("alyx.url must not hold a user name or password", hint=hint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = "" if "@" in url else f" {url!r}"
        raise InvalidInput(f"alyx.url{shown} is not an address of an Alyx server", hint=hint)
    return url.rstrip("/")


def _connection_hint(error: BaseException) -> str:
    """Return what to do where no connection came about."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return "is Alyx up, is the network, is alyx.url right?"
    if cause.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, …_HAS_EXPIRED
        return "is this computer's clock right? Else have Alyx's certificate renewed"
    if cause.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, …_IP_ADDRESS_MISMATCH
        return "set alyx.url to the name that Alyx's certificate is for, then restart regd"
    return "if it is the lab's own certificate: name its file in alyx.ca_file, then restart regd"


def _proxy(url: str) -> httpx.Proxy | None:
    """Return the proxy that the environment names for an address (HTTPS_PROXY, NO_PROXY)."""
    parts = urlsplit(url)
    proxies = getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    names = {parts.netloc, parts.hostname or parts.netloc}  # with and without the port
    # `proxy_bypass` knows neither a star among others nor an entry with its scheme, as httpx does
    known_to_httpx = {"*", *(f"{parts.scheme}://{name}" for name in names)}
    unproxied = {entry.strip() for entry in proxies.get("no", "").split(",")}
    if not address or any(map(proxy_bypass, names)) or unproxied & known_to_httpx:
        return None
    try:
        return httpx.Proxy(address if "://" in address else f"http://{address}")
    except (ValueError, httpx.InvalidURL):
        raise InvalidInput(
            f"{parts.scheme}_proxy in the environment is not the address of a proxy",
            hint="give it as http://host:port, or unset it",
        ) from None


def _trust(ca_file: str | Path | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(
            f"alyx.ca_file {ca_file} cannot be used: {error}",
            hint="give a readable PEM file with the certificate of the authority",
        ) from None
