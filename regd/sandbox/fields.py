"""The fields of Alyx's answers, and its checks on what is sent, word for word in their results."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote, urlsplit

from regd.sandbox.query import QueryError, parse_uuid
from regd.sandbox.schema import MODELS, QC_NAMES, Field, Model
from regd.sandbox.store import Row
from regd.sandbox.times import parse_day, parse_moment

if TYPE_CHECKING:
    from regd.sandbox.app import Context

ABSENT: Final = object()
"""A field that was not sent."""
CALLER: Final = object()
"""A default: the user who asks."""


class Invalid(Exception):
    """A field's value is refused, for these reasons."""

    def __init__(self, *messages: str) -> None:
        super().__init__(*messages)
        self.messages = list(messages)


@dataclass(frozen=True)
class Item:
    """One field of an answer: how it is read from a row, and how what is sent is checked."""

    name: str
    read: Callable[[Context, Row], Any] | None
    parse: Callable[[Context, Any], Any] | None = None
    required: bool = False
    null: bool = False
    blank: bool = False
    default: Any = ABSENT
    many: bool = False
    linked: bool = False
    """A link to one row: sent empty means null."""
    json: bool = False
    """A form holds it as text."""
    checkbox: bool = False
    """In a form, a box not ticked is not sent: absent means False."""
    check: Callable[[Context, Any, Row | None], list[str]] | None = None

    def sent(self, body: Mapping[str, Any], form: bool, partial: bool) -> Any:
        """The value sent for this field, or ABSENT; a form cannot say null."""
        if not form:
            return body.get(self.name, ABSENT)
        if self.name not in body:
            if partial:
                return ABSENT
            if self.many:
                return []
            return (None if self.null else False) if self.checkbox else ABSENT
        values = body[self.name]
        if self.many:
            return values
        value = values[-1]
        if self.json:
            return _form_json(value)
        if value == "" and not self.blank:
            return None if self.null else ABSENT if not self.required else value
        return value


def _form_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Invalid("Value must be valid JSON.") from None


def refuse_null(value: Any, null: bool) -> None:
    """Raise Invalid for a null that may not be."""
    if value is None and not null:
        raise Invalid("This field may not be null.")


# -- plain columns


def plain(model_name: str, name: str, *, limits: bool = True, **override: Any) -> Item:
    """A column with the checks its declaration implies; without `limits`, only its kind's."""
    model = MODELS[model_name]
    column = model.fields[name]
    if not limits:
        column = Field(column.kind, column.blank, column.null, column.default)
    required = column.default is None and not (column.blank or column.null)
    options: dict[str, Any] = {
        "required": required and column.kind not in ("bool",),
        "null": column.null,
        "blank": column.blank and column.kind in _TEXTS,
        "checkbox": column.kind == "bool",
        "json": column.kind == "json",
        "check": (lambda c, v, row: _check(c, model, name, v, row))
        if _has_checks(column)
        else None,
    }
    options.update(override)
    parse = _PARSERS[column.kind]
    return Item(name, lambda _, row: row[name], lambda _, v: parse(column, v, options), **options)


def read_only(name: str, read: Callable[[Context, Row], Any]) -> Item:
    """A field that is only ever answered; what is sent for it is ignored."""
    return Item(name, read)


_TEXTS = ("char", "text", "email", "url")


def _has_checks(column: Field) -> bool:
    return (
        column.unique
        or column.kind in ("email", "url")
        or column.pattern is not None
        or (column.minimum is not None)
    )


def _check(context: Context, model: Model, name: str, value: Any, row: Row | None) -> list[str]:
    column = model.fields[name]
    if value is None:
        return []
    found = []
    if column.unique:
        held = context.store.first(model.name, **{name: value})
        if held and (row is None or held["id"] != row["id"]):
            label = name.replace("_", " ")
            usual = f"{model.verbose} with this {label} already exists."
            found.append(column.taken or usual)
    if value == "":
        return found
    pattern, message = _FORMATS.get(column.kind, (column.pattern, column.message))
    if pattern and not re.search(pattern, value, re.IGNORECASE if column.kind == "url" else 0):
        found.append(message or "Enter a valid value.")
    if column.minimum is not None and value < column.minimum:
        found.append(f"Ensure this value is greater than or equal to {column.minimum}.")
    return found


_FORMATS: Mapping[str, tuple[str | None, str | None]] = {
    "email": (r"^[^@\s]+@([A-Za-z0-9-]+\.)+[A-Za-z0-9-]{2,63}$|^[^@\s]+@localhost$",
              "Enter a valid email address."),
    "url": (r"^(https?|ftps?)://[^\s/?#]*(localhost|[\w-]\.[\w-]{2,}|\d+\.\d+\.\d+\.\d+|\[[0-9a-f:]+\])"
            r"\.?(:\d{1,5})?([/?#]\S*)?\Z", "Enter a valid URL."),
}  # fmt: skip


def _text(column: Field, value: Any, options: Mapping[str, Any]) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Invalid("Not a valid string.")
    text = str(value).strip()
    if text == "":
        if options.get("blank"):
            return ""
        raise Invalid("This field may not be blank.")
    found = []
    if column.max_length and len(text) > column.max_length:
        found.append(f"Ensure this field has no more than {column.max_length} characters.")
    if "\x00" in text:
        found.append("Null characters are not allowed.")
    if found:
        raise Invalid(*found)
    return text


def _integer(column: Field, value: Any, _: Mapping[str, Any]) -> int:
    if isinstance(value, str) and len(value) > 1000:
        raise Invalid("String value too large.")
    try:
        number = int(re.sub(r"\.0*\s*$", "", str(value)))
    except ValueError:
        raise Invalid("A valid integer is required.") from None
    most = {"int": 2**31 - 1}.get(column.kind, math.inf)
    if number > most:
        raise Invalid(f"Ensure this value is less than or equal to {most}.")
    if number < -most - 1:
        raise Invalid(f"Ensure this value is greater than or equal to {-most - 1}.")
    return number


def _float(_: Field, value: Any, __: Mapping[str, Any]) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Invalid("A valid number is required.") from None


_TRUE = {"t", "y", "yes", "true", "on", "1"}
_FALSE = {"f", "n", "no", "false", "off", "0"}
_NULL = {"null", ""}


def _boolean(_: Field, value: Any, options: Mapping[str, Any]) -> bool | None:
    if isinstance(value, str | int | float):
        word = str(int(value) if isinstance(value, bool | float) and value in (0, 1) else value)
        word = word.strip().lower()
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
        if word in _NULL and options.get("null"):
            return None
    raise Invalid("Must be a valid boolean.")


def _moment(_: Field, value: Any, __: Mapping[str, Any]) -> str:
    try:
        return parse_moment(value)
    except (TypeError, ValueError):
        raise Invalid(
            "Datetime has wrong format. Use one of these formats instead: "
            "YYYY-MM-DDThh:mm[:ss[.uuuuuu]][+HH:MM|-HH:MM|Z]."
        ) from None


def _day(_: Field, value: Any, __: Mapping[str, Any]) -> str:
    try:
        return parse_day(value)
    except (TypeError, ValueError):
        raise Invalid(
            "Date has wrong format. Use one of these formats instead: YYYY-MM-DD."
        ) from None


def _any(_: Field, value: Any, __: Mapping[str, Any]) -> Any:
    return value


def _uuid(_: Field, value: Any, __: Mapping[str, Any]) -> str:
    try:
        return str(uuid.UUID(int=value) if isinstance(value, int) else uuid.UUID(value))
    except (AttributeError, TypeError, ValueError):
        raise Invalid("Must be a valid UUID.") from None


def _choice(column: Field, value: Any, _: Mapping[str, Any]) -> str:
    if value == "" and column.blank:
        return ""
    if str(value) not in column.choices:
        raise Invalid(f'"{value}" is not a valid choice.')
    return str(value)


def _char(column: Field, value: Any, options: Mapping[str, Any]) -> str:
    return (_choice if column.choices else _text)(column, value, options)


_PARSERS: Mapping[str, Callable[[Field, Any, Mapping[str, Any]], Any]] = {
    "char": _char, "text": _text, "email": _text, "url": _text, "int": _integer,
    "bigint": _integer, "float": _float, "bool": _boolean, "datetime": _moment, "date": _day,
    "json": _any, "uuid": _uuid,
}  # fmt: skip


def qc(name: str = "qc") -> Item:
    """A quality-control level, by its name."""

    def parse(_: Context, value: Any) -> int:
        for level, label in QC_NAMES.items():
            if label == value:
                return level
        raise Invalid(f"Invalid {name}, choices are: {', '.join(QC_NAMES.values())}")

    return Item(name, lambda _, row: QC_NAMES[row[name]], parse)


# -- links


def _find(context: Context, table: str, slug: str, value: Any) -> str:
    if slug == "id":
        try:
            wanted: Any = parse_uuid(value)
        except QueryError as error:
            raise Invalid(str(error).removeprefix("['").removesuffix("']")) from None
    else:
        wanted = str(value)
    found = context.store.only(table, **{slug: wanted})
    if found is None:
        raise Invalid(f"Object with {slug}={value} does not exist.")
    return str(found["id"])


def slug(model_name: str, name: str, by: str = "name", **options: Any) -> Item:
    """A link to one row of another table, by that row's `by`."""
    table = MODELS[model_name].fields[name].to

    def read(context: Context, row: Row) -> Any:
        return context.store.slug(table, by, row[name])

    def parse(context: Context, value: Any) -> str:
        return _find(context, table, by, value)

    return Item(name, read, parse, linked=True, **options)


def slugs(model_name: str, name: str, by: str = "name", **options: Any) -> Item:
    """Links to many rows of another table."""
    table = MODELS[model_name].fields[name].to

    def read(context: Context, row: Row) -> list[Any]:
        ids = context.store.linked(model_name, name, row["id"])
        return [context.store.slug(table, by, found) for found in ids]

    return Item(name, read, many_of(table, by), many=True, **options)


def many_of(table: str, by: str) -> Callable[[Context, Any], list[str]]:
    """The check of a list of rows of `table`, each named by its `by`."""

    def parse(context: Context, value: Any) -> list[str]:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            kind = type(value).__name__
            raise Invalid(f'Expected a list of items but got type "{kind}".')
        return [_find(context, table, by, one) for one in value]

    return parse


def link(model_name: str, name: str, path: str, **options: Any) -> Item:
    """A link to one row of another table, as the address of its page below `path`."""
    table = MODELS[model_name].fields[name].to

    def read(context: Context, row: Row) -> str | None:
        return f"{context.base}/{path}/{row[name]}" if row[name] else None

    def parse(context: Context, value: Any) -> str:
        return _follow(context, table, path, value)

    return Item(name, read, parse, linked=True, **options)


def _follow(context: Context, table: str, path: str, value: Any) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise Invalid(f"Incorrect type. Expected URL string, received {kind}.")
    parts = unquote(urlsplit(value).path).strip("/").split("/")
    if not context.is_address(parts):
        raise Invalid("Invalid hyperlink - No URL match.")
    if parts[0] != path or len(parts) != 2:
        raise Invalid("Invalid hyperlink - Incorrect URL match.")
    if context.store.first(table, id=parts[1]) is None:
        raise Invalid("Invalid hyperlink - Object does not exist.")
    return parts[1]


def url(path: str, by: str = "id") -> Item:
    """The address of the row's own page."""
    return read_only("url", lambda context, row: f"{context.base}/{path}/{quote(str(row[by]))}")


# -- a whole object


def clean(
    context: Context, items: tuple[Item, ...], body: Any, row: Row | None, partial: bool
) -> dict[str, Any]:
    """Check what was sent against `items` and return the values to store.

    Raises Refused with a list of reasons a field, as Alyx answers them.
    """
    if body is None:
        raise Refused({"non_field_errors": ["No data provided"]})
    if not isinstance(body, Mapping):
        kind = type(body).__name__
        raise Refused(
            {"non_field_errors": [f"Invalid data. Expected a dictionary, but got {kind}."]}
        )
    values: dict[str, Any] = {}
    errors: dict[str, list[str]] = {}
    for item in items:
        if item.parse is None:
            continue
        try:
            value = _value(context, item, item.sent(body, context.form, partial), row, partial)
        except Invalid as refused:
            errors[item.name] = refused.messages
        else:
            if value is not ABSENT:
                values[item.name] = value
    if errors:
        raise Refused(errors)
    return values


def _value(context: Context, item: Item, sent: Any, row: Row | None, partial: bool) -> Any:
    if sent is ABSENT:
        if partial or (item.default is ABSENT and not item.required):
            return ABSENT
        if item.required:
            raise Invalid("This field is required.")
        return context.user["id"] if item.default is CALLER else item.default
    if sent == "" and item.linked:
        sent = None
    refuse_null(sent, item.null)
    if sent is None or item.parse is None:
        return None
    value = item.parse(context, sent)
    if isinstance(value, float) and not math.isfinite(value):
        raise Invalid("A valid number is required.")
    messages = item.check(context, value, row) if item.check else []
    if messages:
        raise Invalid(*messages)
    return value


class Refused(Exception):
    """What was sent is refused: 400, with reasons a field."""

    def __init__(self, errors: Mapping[str, Any]) -> None:
        super().__init__(errors)
        self.errors = dict(errors)
