"""The HTTP side: who asks, whether they may, which endpoint it is, and the answer as JSON."""

from __future__ import annotations

import email
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from regd import __version__
from regd.sandbox.fields import Item, Refused, clean
from regd.sandbox.filters import narrow
from regd.sandbox.query import Query, QueryError
from regd.sandbox.register import Answered, check_protected, register
from regd.sandbox.resources import RESOURCES, Resource
from regd.sandbox.schema import MODELS
from regd.sandbox.store import Row, Store, data_file, password_matches
from regd.sandbox.throttle import Throttle

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PAGE, _LONGEST_PAGE = 250, 1000
_WRITES = {"POST", "PUT", "PATCH", "DELETE"}


class ApiError(Exception):
    """An answer other than success, in the form Django REST framework gives it."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


@dataclass
class Context:
    """One request, as the endpoints see it."""

    store: Store
    method: str
    parts: list[str]
    base: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: Row = field(default_factory=dict)
    form: bool = False

    @property
    def params(self) -> dict[str, str]:
        """The query parameters; of a repeated one, the last."""
        return {name: values[-1] for name, values in self.query.items()}

    def show(self, items: tuple[Item, ...], row: Row) -> dict[str, Any]:
        """A row as these fields answer it."""
        return {item.name: item.read(self, row) for item in items if item.read is not None}

    def is_address(self, parts: list[str]) -> bool:
        """Whether a path is one that Alyx serves."""
        return _endpoint(parts) is not None

    def data(self) -> Any:
        """What was sent, decoded by its content type. Raises ApiError where it cannot be."""
        kind = self.headers.get("content-type", "")
        name = kind.split(";")[0].strip().lower()
        if not self.body:
            return {}
        if name == "application/json":
            return self._json()
        self.form = True
        if name == "application/x-www-form-urlencoded":
            return parse_qs(self.body.decode(errors="replace"), keep_blank_values=True)
        if name == "multipart/form-data":
            return _multipart(kind, self.body)
        raise ApiError(415, f'Unsupported media type "{kind}" in request.')

    def flat_data(self) -> Any:
        """What was sent, each name with one value, as a form's fields are read singly."""
        data = self.data()
        return {name: values[-1] for name, values in data.items()} if self.form else data

    def _json(self) -> Any:
        found = re.search(r'charset="?([\w-]+)', self.headers.get("content-type", ""))
        try:
            return json.loads(self.body.decode(found[1] if found else "utf-8"))
        except (ValueError, LookupError) as error:
            raise ApiError(400, f"JSON parse error - {error}") from None


def _multipart(kind: str, body: bytes) -> dict[str, list[str]]:
    message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
    found: dict[str, list[str]] = {}
    for part in message.walk():
        name = part.get_param("name", header="content-disposition")
        payload = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(payload, bytes):
            found.setdefault(name, []).append(payload.decode(errors="replace"))
    return found


@dataclass(frozen=True)
class Answer:
    """A status, a body to be sent as JSON, and further headers."""

    status: int
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """One address: what it does by method, and who may ask."""

    calls: Mapping[str, Callable[[Context], Answer]]
    is_open: bool = False
    """Nobody need log in. So it is in Alyx for the two endpoints of registration, too."""
    is_limited: bool = True

    @property
    def allow(self) -> str:
        """The `Allow` header, in Django REST framework's order."""
        named = [m for m in ("GET", "POST", "PUT", "PATCH", "DELETE") if m in self.calls]
        return ", ".join([*named, *(["HEAD"] if "GET" in named else []), "OPTIONS"])


# -- lists and pages of rows


def _list(resource: Resource, context: Context) -> Answer:
    query = Query(MODELS[resource.model], order=resource.order)
    narrow(query, context.store, resource.filters, context.params)
    count = query.count(context.store)
    limit = _whole(context.params.get("limit"), 1) or _PAGE
    limit = min(limit, _LONGEST_PAGE)
    offset = _whole(context.params.get("offset"), 0) or 0
    rows = query.rows(context.store, limit, offset) if offset <= count else []
    following = offset + limit if offset + limit < count else None
    earlier = max(offset - limit, 0) if offset > 0 else None
    return Answer(
        200,
        {
            "count": count,
            "next": _page(context, limit, following),
            "previous": _page(context, limit, earlier),
            "results": [context.show(resource.shown, row) for row in rows],
        },
    )


def _whole(text: str | None, least: int) -> int | None:
    try:
        number = int(text or "")
    except ValueError:
        return None
    return number if number >= least else None


def _page(context: Context, limit: int, offset: int | None) -> str | None:
    if offset is None:
        return None
    query = {**context.query, "limit": [str(limit)], "offset": [str(offset)]}
    if offset == 0:
        del query["offset"]
    pairs = urlencode(sorted(query.items()), doseq=True)
    return f"{context.base}/{'/'.join(context.parts)}?{pairs}"


def _row(resource: Resource, context: Context) -> Row:
    row = context.store.only(resource.model, **{resource.by: context.parts[1]})
    if row is None:
        raise ApiError(404, f"No {resource.title} matches the given query.")
    return row


def _read(resource: Resource, context: Context) -> Answer:
    return Answer(200, context.show(resource.items, _row(resource, context)))


def _create(resource: Resource, context: Context) -> Answer:
    items = resource.items if resource.list_reads_only else resource.shown
    values = clean(context, items, context.data(), None, partial=False)
    resource.before(context, values, None)
    row_id = context.store.insert(resource.model, values)
    resource.after(context, row_id, values)
    shown = context.show(items, context.store.get(resource.model, row_id))
    return Answer(201, shown, {"location": shown["url"]} if "url" in shown else {})


def _update(resource: Resource, context: Context) -> Answer:
    row = _row(resource, context)
    partial = context.method == "PATCH"
    values = clean(context, resource.items, context.data(), row, partial)
    resource.before(context, values, row)
    context.store.update(resource.model, row["id"], values)
    resource.after(context, row["id"], values)
    return Answer(200, context.show(resource.items, context.store.get(resource.model, row["id"])))


def _delete(resource: Resource, context: Context) -> Answer:
    row = _row(resource, context)
    resource.before_delete(context, row)
    context.store.delete(resource.model, row["id"])
    return Answer(204)


_LIST_CALLS = {"GET": _list, "POST": _create}
_ROW_CALLS = {"GET": _read, "PUT": _update, "PATCH": _update, "DELETE": _delete}


def _bound(resource: Resource, calls: Mapping[str, Any], methods: tuple[str, ...]) -> Endpoint:
    return Endpoint({method: partial(calls[method], resource) for method in methods})


_LISTS = {path: _bound(one, _LIST_CALLS, one.list_methods) for path, one in RESOURCES.items()}
_ROWS = {path: _bound(one, _ROW_CALLS, one.methods) for path, one in RESOURCES.items()}
_ROWS["water-type"] = _LISTS["water-type"]  # Alyx serves the whole list under each name


# -- the other endpoints


def _token(context: Context) -> Answer:
    asked = context.flat_data()
    if not isinstance(asked, Mapping):
        clean(context, (), asked, None, partial=False)
    errors = {
        name: reason for name in ("username", "password") if (reason := _missing(asked, name))
    }
    if errors:
        raise Refused(errors)
    user = context.store.first("labmember", username=str(asked["username"]).strip())
    matches = user and password_matches(str(asked["password"]), user["password"])
    if user is None or not matches or not user["is_active"]:
        raise Refused({"non_field_errors": ["Unable to log in with provided credentials."]})
    if user["token"] is None:
        user["token"] = secrets.token_hex(20)
        context.store.update("labmember", user["id"], {"token": user["token"]})
    return Answer(200, {"token": user["token"]})


def _missing(asked: Any, name: str) -> list[str]:
    if not isinstance(asked, Mapping) or name not in asked:
        return ["This field is required."]
    if asked[name] is None:
        return ["This field may not be null."]
    if isinstance(asked[name], bool) or not isinstance(asked[name], str | int | float):
        return ["Not a valid string."]
    return ["This field may not be blank."] if str(asked[name]).strip() == "" else []


def _register(context: Context) -> Answer:
    return Answer(201, register(context, context.flat_data()))


def _check_protected(context: Context) -> Answer:
    return Answer(200, check_protected(context, context.flat_data() or context.params))


def _schema(_: Context) -> Answer:
    described = json.loads(data_file("openapi.json"))
    return Answer(200, described, {"content-type": "application/vnd.oai.openapi+json"})


def _no_cache_file(name: str) -> Callable[[Context], Answer]:
    def call(_: Context) -> Answer:
        raise QueryError(f"[Errno 2] No such file or directory: '{name}'")

    return call


_OTHERS = {
    ("auth-token",): Endpoint({"POST": _token}, is_open=True, is_limited=False),
    ("register-file",): Endpoint({"POST": _register}, is_open=True),
    ("check-protected",): Endpoint({"GET": _check_protected}, is_open=True),
    ("api", "schema"): Endpoint({"GET": _schema}, is_open=True),
    ("cache.zip",): Endpoint({"GET": _no_cache_file("cache.zip")}),
    ("cache", "info", ""): Endpoint({"GET": _no_cache_file("cache_info.json")}),
}


def _endpoint(parts: list[str]) -> Endpoint | None:
    if tuple(parts) in _OTHERS:
        return _OTHERS[tuple(parts)]
    if len(parts) == 1:
        return _LISTS.get(parts[0])
    if len(parts) != 2 or not parts[1] or parts[0] not in _ROWS:
        return None
    if RESOURCES[parts[0]].by == "id" and not _UUID.fullmatch(parts[1]):
        return None
    found = _ROWS[parts[0]]
    return found if found.calls else None


# -- one request


def _authenticate(context: Context) -> None:
    words = context.headers.get("authorization", "").split()
    if not words or words[0].lower() != "token":
        return
    if len(words) == 1:
        raise ApiError(403, "Invalid token header. No credentials provided.")
    if len(words) > 2:
        raise ApiError(403, "Invalid token header. Token string should not contain spaces.")
    user = context.store.first("labmember", token=words[1])
    if user is None:
        raise ApiError(403, "Invalid token.")
    if not user["is_active"]:
        raise ApiError(403, "User inactive or deleted.")
    context.user = user


def _check_accept(context: Context) -> None:
    accept = context.headers.get("accept", "*/*")
    wanted = {part.split(";")[0].strip() for part in accept.split(",")}
    usable = {"*/*", "", "application/*", "application/json", "text/html", "text/*"}
    if context.parts[0] == "api":
        usable |= {"application/vnd.oai.openapi+json", "application/vnd.oai.openapi"}
    if not wanted & usable:
        raise ApiError(406, "Could not satisfy the request Accept header.")
    if context.params.get("format", "json") not in ("json", "api"):
        raise ApiError(404, "Not found.")


def _admit(context: Context, endpoint: Endpoint, throttle: Throttle, client: str) -> None:
    """Let the request in, or raise ApiError; in the order Alyx does it."""
    _check_accept(context)
    _authenticate(context)
    if not endpoint.is_open:
        if not context.user:
            raise ApiError(403, "Authentication credentials were not provided.")
        if context.method != "GET" and context.user["is_public_user"]:
            raise ApiError(403, "You do not have permission to perform this action.")
    wait = throttle.wait(context.user.get("id", client)) if endpoint.is_limited else None
    if wait is not None:
        unit = "second" if wait == 1 else "seconds"
        raise ApiError(
            429,
            f"Request was throttled. Expected available in {wait} {unit}.",
            **{"retry-after": str(wait)},
        )


def _call(context: Context, endpoint: Endpoint) -> Answer:
    if context.method == "OPTIONS":
        return Answer(200, {"name": context.parts[0], "renders": ["application/json"]})
    method = "GET" if context.method == "HEAD" else context.method
    if method not in endpoint.calls:
        raise ApiError(405, f'Method "{context.method}" not allowed.')
    if method not in _WRITES:
        return endpoint.calls[method](context)
    context.store.db.execute("BEGIN")
    try:
        return endpoint.calls[method](context)
    finally:
        context.store.db.execute("COMMIT")  # also after an error: Alyx keeps what came before it


def _answer(context: Context, endpoint: Endpoint, throttle: Throttle, client: str) -> Answer:
    try:
        _admit(context, endpoint, throttle, client)
        return _call(context, endpoint)
    except ApiError as error:
        body = {"detail": error.detail, "status_code": error.status}
        return Answer(error.status, body, error.headers)
    except Refused as refused:
        return Answer(400, {**refused.errors, "status_code": 400})
    except Answered as answered:
        return Answer(answered.status, answered.body)
    except Exception as error:
        return Answer(500, {"status_code": 500, "detail": str(error)})


_NOT_FOUND = Response(
    '<!doctype html>\n<html lang="en"><head><title>Not Found</title></head>'
    "<body><h1>Not Found</h1></body></html>\n",
    404,
    media_type="text/html",
)
_WELCOME = f"""<!doctype html>
<html lang="en"><head><title>regd sandbox</title></head><body>
<h1>regd sandbox {__version__}</h1>
<p>This stands in for an Alyx database, for trials and tests. Keep no data here.</p>
<p>Clients talk to this address as they would to Alyx; there is nothing to see in a browser.</p>
</body></html>
"""


def make_app(
    store: Store,
    throttle: Throttle,
    middleware: tuple[Middleware, ...] = (),
    seen: Callable[[str, str, int], None] | None = None,
) -> Starlette:
    """The ASGI application. `seen` is told method, path and status of each request."""

    async def handle(request: Request) -> Response:
        try:
            response = await _respond(store, throttle, request)
        except ClientDisconnect:  # in the middle of what it sent: nobody waits for an answer
            return Response(status_code=400)
        if seen is not None:
            seen(request.method, request.url.path, response.status_code)
        return response

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
    return Starlette(routes=[Route("/{path:path}", handle, methods=methods)], middleware=middleware)


async def _respond(store: Store, throttle: Throttle, request: Request) -> Response:
    path = request.url.path
    if request.scope["path"] == "/":
        return Response(_WELCOME, media_type="text/html")
    if path == "/cache/info":
        return Response(status_code=301, headers={"location": "/cache/info/"})
    parts = request.scope["path"].removeprefix("/").split("/")
    endpoint = _endpoint(parts)
    if endpoint is None:
        return _NOT_FOUND
    context = Context(
        store, request.method, parts, f"{request.url.scheme}://{request.url.netloc}",
        parse_qs(request.url.query, keep_blank_values=True), request.headers,
        await request.body(),
    )  # fmt: skip
    client = request.client.host if request.client else ""
    answer = _answer(context, endpoint, throttle, client)
    headers = {"allow": endpoint.allow, "vary": "Accept, Cookie", **answer.headers}
    if answer.status == 204:
        return Response(status_code=204, headers=headers)
    content = json.dumps(answer.body, ensure_ascii=False, separators=(",", ":"))
    kind = headers.pop("content-type", "application/json")
    return Response(content, answer.status, headers, media_type=kind)
