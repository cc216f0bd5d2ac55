"""Django's lookups (`subject__nickname__icontains`) as SQL, and its filters' value rules."""

from __future__ import annotations

import ast
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from regd.sandbox import times
from regd.sandbox.schema import MODELS, QC_NAMES, Field, Model, through
from regd.sandbox.store import Row, Store, columns_sql, order_sql


class QueryError(Exception):
    """What Alyx answers 500 to, with this text."""


COMPARE = {
    "exact": "{c} = ?", "iexact": "{c} LIKE ? ESCAPE '\\'",
    "contains": "instr({c}, ?) > 0", "icontains": "{c} LIKE '%' || ? || '%' ESCAPE '\\'",
    "startswith": "instr({c}, ?) = 1", "istartswith": "{c} LIKE ? || '%' ESCAPE '\\'",
    "endswith": "substr({c}, -length(?)) = ?", "iendswith": "{c} LIKE '%' || ? ESCAPE '\\'",
    "gt": "{c} > ?", "gte": "{c} >= ?", "lt": "{c} < ?", "lte": "{c} <= ?",
    "regex": "matches({c}, ?)", "iregex": "matches({c}, '(?i)' || ?)",
    "in": "", "isnull": "", "range": "",
}  # fmt: skip
_TEXTUAL = {"iexact", "contains", "icontains", "startswith", "istartswith", "endswith",
            "iendswith", "regex", "iregex"}  # fmt: skip
_LIKE = {"iexact", "icontains", "istartswith", "iendswith"}
_DATE_PARTS = {
    "date": "substr({c}, 1, 10)", "year": "CAST(substr({c}, 1, 4) AS INTEGER)",
    "month": "CAST(substr({c}, 6, 2) AS INTEGER)", "day": "CAST(substr({c}, 9, 2) AS INTEGER)",
    "hour": "CAST(substr({c}, 12, 2) AS INTEGER)",
    "minute": "CAST(substr({c}, 15, 2) AS INTEGER)",
}  # fmt: skip
_DATE = Field("date")
_INT = Field("int")
_JSON_VALUE = Field("json")


@dataclass
class Query:
    """A SELECT of one model's rows, built up filter by filter."""

    model: Model
    joins: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    distinct: bool = False
    order: str = ""
    _aliases: int = 0

    def filter(self, lookup: str, value: Any) -> None:
        """Keep the rows where `lookup` holds; a link to many may repeat a row, as in Django."""
        condition, values = self._condition(lookup, value)
        self.add(condition, *values)

    def exclude(self, lookup: str, value: Any) -> None:
        """Drop the rows where `lookup` holds for any linked row."""
        inner = Query(self.model)
        inner.filter(lookup, value)
        self.add(f"t.id NOT IN ({inner.ids()})", *inner.values)

    def add(self, condition: str, *values: Any) -> None:
        """Keep the rows for which an SQL condition on alias `t` holds."""
        self.where.append(condition)
        self.values.extend(values)

    def ids(self) -> str:
        """The SELECT of the ids alone; its values are `values`."""
        return f"SELECT t.id {self._from()}"

    def count(self, store: Store) -> int:
        """How many rows it gives."""
        what = "COUNT(DISTINCT t.id)" if self.distinct else "COUNT(*)"
        row = store.db.execute(f"SELECT {what} {self._from()}", self.values).fetchone()
        return int(row[0])

    def rows(self, store: Store, limit: int, offset: int) -> list[Row]:
        """One page of the rows."""
        group = " GROUP BY t.id" if self.distinct else ""
        sql = (
            f"SELECT {columns_sql(self.model)} {self._from()}{group} "
            f"ORDER BY {self.order or order_sql(self.model)} LIMIT ? OFFSET ?"
        )
        return store.rows(self.model, sql, (*self.values, limit, offset))

    def _from(self) -> str:
        conditions = " AND ".join(self.where) or "1"
        return f"FROM {self.model.name} t {' '.join(self.joins)} WHERE {conditions}"

    def _join(self, table: str, on: str) -> str:
        self._aliases += 1
        alias = f"j{self._aliases}"
        self.joins.append(f"LEFT JOIN {table} {alias} ON {on.format(a=alias)}")
        return alias

    def _condition(self, lookup: str, value: Any) -> tuple[str, list[Any]]:
        model, alias, parts = self.model, "t", lookup.split("__")
        while True:
            name = parts.pop(0)
            if name in model.links_back:
                source, column = model.links_back[name]
                model, alias = self._back(alias, source, column)
                parts = parts if parts and parts[0] not in COMPARE else ["id", *parts]
                continue
            name, column_field = _resolve(model, name)
            onward = bool(parts) and parts[0] not in COMPARE
            if onward and column_field.to and not _leads_on(MODELS[column_field.to], parts[0]):
                raise _unsupported(parts[0], column_field)
            if column_field.kind == "links":
                table = through(model, name)
                link = self._join(table, f"{{a}}.source = {alias}.id")
                model, alias = MODELS[column_field.to], link
                if not onward or parts[0] in ("pk", "id"):
                    return _compare(f"{link}.target", Field("uuid"), parts[int(onward) :], value)
                alias = self._join(model.name, f"{{a}}.id = {link}.target")
                continue
            if column_field.kind == "link" and onward:
                model = MODELS[column_field.to]
                alias = self._join(model.name, f'{{a}}.id = {alias}."{name}"')
                continue
            return _compare(f'{alias}."{name}"', column_field, parts, value)

    def _back(self, alias: str, source: str, column: str) -> tuple[Model, str]:
        owner = MODELS[source]
        if owner.fields[column].kind == "links":
            link = self._join(through(owner, column), f"{{a}}.target = {alias}.id")
            return owner, self._join(owner.name, f"{{a}}.id = {link}.source")
        return owner, self._join(owner.name, f'{{a}}."{column}" = {alias}.id')


def _leads_on(model: Model, name: str) -> bool:
    return name == "pk" or name.removesuffix("_id") in model.fields or name in model.links_back


def _resolve(model: Model, name: str) -> tuple[str, Field]:
    if name == "pk":
        name = "id"
    if name.endswith("_id") and name not in model.fields:
        name = name.removesuffix("_id")
    if name not in model.fields or name == "token":
        choices = {*model.fields, *model.links_back, *model.other_names}
        choices |= {f"{n}_id" for n, f in model.fields.items() if f.kind == "link"}
        raise QueryError(
            f"Cannot resolve keyword '{name}' into field. Choices are: {', '.join(sorted(choices))}"
        )
    return name, model.fields[name]


def _compare(column: str, kind: Field, parts: Sequence[str], value: Any) -> tuple[str, list[Any]]:
    """The SQL that compares `column` with `value` by the transforms and lookup left in `parts`."""
    parts = list(parts)
    if kind.kind == "json":
        column, kind, parts = _json_path(column, kind, parts)
    if kind.kind in ("datetime", "date") and parts and parts[0] in _DATE_PARTS:
        part = parts.pop(0)
        column = _DATE_PARTS[part].format(c=column)
        kind = _DATE if part == "date" else _INT
    lookup = parts.pop(0) if parts else "exact"
    if parts or lookup not in COMPARE:
        raise _unsupported(parts[0] if parts else lookup, kind)
    if lookup == "isnull" or (lookup in ("exact", "iexact") and value is None):
        return f"{column} IS {'' if value in (True, None) else 'NOT '}NULL", []
    if lookup in ("in", "range"):
        return _compare_many(column, kind, lookup, value)
    if lookup in _TEXTUAL:
        text = str(value)
        sql = COMPARE[lookup].format(c=column)
        return sql, [_escape(text) if lookup in _LIKE else text] * sql.count("?")
    return COMPARE[lookup].format(c=column), [prepare(kind, value, column)]


_DJANGO_NAMES = {
    "int": "IntegerField", "qc": "IntegerField", "bigint": "BigIntegerField",
    "bool": "BooleanField", "datetime": "DateTimeField", "url": "URLField",
    "json": "JSONField", "uuid": "UUIDField",
    "link": "ForeignKey", "links": "ForeignKey",
}  # fmt: skip


def _unsupported(lookup: str, kind: Field) -> QueryError:
    called = _DJANGO_NAMES.get(kind.kind, f"{kind.kind.capitalize()}Field")
    return QueryError(
        f"Unsupported lookup '{lookup}' for {called} or join on the field not permitted."
    )


def _compare_many(column: str, kind: Field, lookup: str, value: Any) -> tuple[str, list[Any]]:
    items = [prepare(kind, item, column) for item in value]
    if lookup == "range":
        return f"{column} BETWEEN ? AND ?", items
    return f"{column} IN ({', '.join('?' * len(items))})", items


def _json_path(column: str, kind: Field, parts: list[str]) -> tuple[str, Field, list[str]]:
    path = []
    while parts and parts[0] not in COMPARE:
        path.append(parts.pop(0))
    if not path:
        return column, kind, parts
    keys = "".join(f"[{key}]" if key.isdigit() else f'."{key}"' for key in path)
    return f"json_extract({column}, '${keys.replace(chr(39), '')}')", _JSON_VALUE, parts


def _escape(text: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", text)


def prepare(kind: Field, value: Any, column: str = "") -> Any:
    """A filter's value as the column holds it. Raises QueryError as Alyx does where it is not."""
    match kind.kind:
        case "uuid" | "link" | "links":
            return parse_uuid(value)
        case "int" | "bigint" | "qc":
            return _number(value, int, column)
        case "float":
            return _number(value, float, column)
        case "bool":
            return int(bool(value))
        case "date":
            return parse_day(value)
        case "datetime":
            return _moment(value)
        case "json":
            return json.dumps(value) if isinstance(value, dict | list) else value
    return str(value)


def _number(value: Any, number: type[int] | type[float], column: str) -> float:
    try:
        return number(value)
    except (TypeError, ValueError):
        name = column.rpartition(".")[2].strip('"')
        raise QueryError(f"Field '{name}' expected a number but got {value!r}.") from None


def parse_uuid(value: Any) -> str:
    """A UUID in the form stored. Raises QueryError with Django's words."""
    try:
        return str(uuid.UUID(int=value) if isinstance(value, int) else uuid.UUID(value))
    except (AttributeError, TypeError, ValueError):
        raise QueryError(f"['“{value}” is not a valid UUID.']") from None


def parse_day(value: Any) -> str:
    """A date in the form stored. Raises QueryError with Django's words."""
    try:
        return times.parse_day(str(value))
    except ValueError:
        raise QueryError(
            f"['“{value}” value has an invalid date format. It must be in YYYY-MM-DD format.']"
        ) from None


def _moment(value: Any) -> str:
    try:
        return times.parse_moment(str(value))
    except ValueError:
        raise QueryError(
            f"['“{value}” value has an invalid format. It must be in YYYY-MM-DD "
            "HH:MM[:ss[.uuuuuu]][TZ] format.']"
        ) from None


def parse_pairs(text: str, prefix: str = "") -> dict[str, Any]:
    """Parse `field,value,field,value` as the `django`, `json` and `extended_qc` filters do."""
    words = re.findall(r"((?:\[[^\]]*\]|\([^)]*\)|[^,])*)(?:,|$)", text)
    words = words[:-1] if text and not text.endswith(",") else words
    found: dict[str, Any] = {}
    for index in range(0, len(words), 2):
        if index + 1 >= len(words):
            raise QueryError("list index out of range")
        if prefix + words[index] in found:
            raise QueryError(f'Duplicated fields in "{text}"')
        found[prefix + words[index]] = _literal(words[index + 1])
    return found


def _literal(text: str) -> Any:
    named = {"true": True, "false": False}
    if text == "None":
        return None
    if text.lower() in named:
        return named[text.lower()]
    if text.replace(".", "", 1).isdigit():
        return float(text)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        return ast.literal_eval(text)
    return text


def qc_value(name: str, text: str) -> int:
    """The level a `qc` filter names, in any case. Raises QueryError as Alyx does."""
    for value, label in QC_NAMES.items():
        if label.lower() == text.lower().strip():
            return value
    raise QueryError(f"Invalid{name}, choices are: {', '.join(QC_NAMES.values())}")
