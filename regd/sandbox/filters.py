"""The query parameters of the lists: what each may hold, and which rows it keeps."""

# ruff: noqa: S608 - table and column names come from the schema; values are always bound

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any

from one.alf.spec import QC

from regd.sandbox.fields import Invalid, Refused
from regd.sandbox.query import Query, QueryError, parse_pairs, qc_value
from regd.sandbox.schema import MODELS, Field
from regd.sandbox.store import Store
from regd.sandbox.times import parse_day, parse_moment

Params = Mapping[str, str]
Apply = Callable[[Query, Any, Params], None]
Parse = Callable[[Store, str], Any]


@dataclass(frozen=True)
class Filter:
    """One query parameter: `parse` refuses with Invalid (400), `apply` with QueryError (500)."""

    parse: Parse
    apply: Apply


def _text(_: Store, value: str) -> str | None:
    return value.strip() or None


def _decimal(_: Store, value: str) -> float | None:
    if not value.strip():
        return None
    try:
        number = Decimal(value.strip())
    except InvalidOperation:
        raise Invalid("Enter a number.") from None
    if not number.is_finite():
        raise Invalid("Enter a number.")
    return float(number)


def _boolean(_: Store, value: str) -> bool | None:
    return {"true": True, "false": False}.get(value.lower())


def _uuid(_: Store, value: str) -> str | None:
    if not value.strip():
        return None
    try:
        return str(uuid.UUID(value.strip()))
    except ValueError:
        raise Invalid("Enter a valid UUID.") from None


def _moment(_: Store, value: str) -> str | None:
    if not value.strip():
        return None
    try:
        return parse_moment(value.strip())
    except ValueError:
        raise Invalid("Enter a valid date/time.") from None


def _day(_: Store, value: str) -> str | None:
    if not value.strip():
        return None
    try:
        return parse_day(value.strip())
    except ValueError:
        raise Invalid("Enter a valid date.") from None


_PARSERS: Mapping[str, Parse] = {
    "char": _text, "text": _text, "email": _text, "url": _text, "int": _decimal,
    "bigint": _decimal, "float": _decimal, "qc": _decimal, "bool": _boolean, "uuid": _uuid,
    "datetime": _moment, "date": _day, "json": _text,
}  # fmt: skip


def by(lookup: str, parse: Parse = _text) -> Filter:
    """Keep the rows where a Django lookup holds for the value."""
    return Filter(parse, lambda query, value, _: query.filter(lookup, value))


def flag(lookup: str) -> Filter:
    """Keep the rows where a lookup is true, or false; anything else is no filter."""
    return by(lookup, _boolean)


def ruled(apply: Callable[[Query, Any], None], parse: Parse = _text) -> Filter:
    """A filter with a rule of its own."""
    return Filter(parse, lambda query, value, _: apply(query, value))


def _choice(column: Field) -> Parse:
    def parse(store: Store, value: str) -> str | None:
        if not value:
            return None
        try:
            wanted = str(uuid.UUID(value))
        except ValueError:
            raise Invalid(f"“{value}” is not a valid UUID.") from None
        if store.first(column.to, id=wanted) is None:
            raise Invalid("Select a valid choice. That choice is not one of the available choices.")
        return wanted

    return parse


def _one_of(choices: tuple[str, ...]) -> Parse:
    def parse(_: Store, value: str) -> str | None:
        if value and value not in choices:
            raise Invalid(f"Select a valid choice. {value} is not one of the available choices.")
        return value or None

    return parse


def columns(model_name: str, *leave_out: str) -> dict[str, Filter]:
    """A filter for each column of a table, by its kind, as django-filter makes them."""
    found = {}
    for name, column in MODELS[model_name].fields.items():
        if name in leave_out or name == "token":
            continue
        if column.kind in ("link", "links"):
            found[name] = by(name, _choice(column))
        elif column.choices:
            found[name] = by(name, _one_of(column.choices))
        else:
            found[name] = by(name, _PARSERS[column.kind])
    return found


# -- rules of their own


def _django(query: Query, text: str) -> None:
    for lookup, value in parse_pairs(text).items():
        if lookup.startswith("~"):
            query.exclude(lookup[1:], value)
        else:
            query.filter(lookup, value)
        query.distinct = True


def _json(column: str) -> Filter:
    def apply(query: Query, text: str) -> None:
        for lookup, value in parse_pairs(text, f"{column}__").items():
            query.filter(lookup, value)

    return ruled(apply)


def _users(query: Query, text: str) -> None:
    names = text.split(",")
    inner = Query(query.model)
    inner.filter("users__username__in", names)
    query.add(
        f"t.id IN ({inner.ids()} GROUP BY t.id HAVING COUNT(*) >= ?)", *inner.values, len(names)
    )


def _date_range(query: Query, text: str) -> None:
    days = text.split(",")
    if len(days) < 2:
        raise QueryError("list index out of range")
    query.filter("start_time__date__gte", days[0])
    query.filter("start_time__date__lte", days[1])


def _dataset_types(query: Query, text: str) -> None:
    names = text.split(",")
    marks = ", ".join("?" * len(names))
    query.add(
        "t.id IN (SELECT d.session FROM dataset d JOIN datasettype y ON y.id = d.dataset_type "
        f"WHERE y.name IN ({marks}) GROUP BY d.session HAVING COUNT(DISTINCT y.id) >= ?)",
        *names, len(names),
    )  # fmt: skip


ON_SERVER = (
    "SELECT f.dataset FROM filerecord f JOIN datarepository p ON p.id = f.data_repository "
    'WHERE p.globus_is_personal = 0 AND f."exists" = {exists}'
)


def _datasets(query: Query, text: str, params: Params) -> None:
    names = text.split(",")
    marks = ", ".join("?" * len(names))
    level = int(QC.validate(params.get("dataset_qc_lte", QC.FAIL)))
    query.add(
        f"t.id IN (SELECT d.session FROM dataset d WHERE d.name IN ({marks}) AND d.qc <= ? "
        f"AND d.id IN ({ON_SERVER.format(exists=1)}) "
        "GROUP BY d.session HAVING COUNT(DISTINCT d.name) >= ?)",
        *names, level, len(names),
    )  # fmt: skip


def _dataset_qc(query: Query, text: str, params: Params) -> None:
    if "datasets" not in params:
        query.filter("data_dataset_session_related__qc__lte", int(QC.validate(text)))


def _performance(sign: str) -> Filter:
    def apply(query: Query, percent: float) -> None:
        query.add(
            f"t.n_trials IS NOT NULL AND 100 * t.n_correct_trials / t.n_trials {sign} ?", percent
        )

    return ruled(apply, _decimal)


def _tag(query: Query, text: str) -> None:
    query.filter("data_dataset_session_related__tags__name__icontains", text)
    query.distinct = True


def _histology(query: Query, wanted: bool) -> None:
    lookup = "subject__actions_sessions__procedures__name"
    (query.filter if wanted else query.exclude)(lookup, "Histology")
    query.distinct = True


def _nothing(query: Query, _: Any) -> None:
    """Brain regions: the sandbox has no channels, so no session has one there."""
    query.add("0")


def _qc(query: Query, text: str) -> None:
    query.filter("qc", qc_value("qc", text))


def _exists(query: Query, wanted: bool) -> None:
    query.add(
        "(NOT EXISTS (SELECT 1 FROM datarepository WHERE globus_is_personal = 0) "
        f"OR t.id IN ({ON_SERVER.format(exists=int(wanted))}))"
    )


def _tagged(column: str) -> Filter:
    def apply(query: Query, wanted: bool) -> None:
        (query.filter if wanted else query.exclude)(f"tags__{column}", True)
        query.distinct = query.distinct or wanted

    return ruled(apply, _boolean)


def _created(sign: str) -> Filter:
    def apply(query: Query, moment: str) -> None:
        query.filter(f"created_datetime__date__{sign}", moment[:10])

    return ruled(apply, _moment)


def _unknown_choice(_: Store, value: str) -> None:
    if value:
        raise Invalid("Select a valid choice. That choice is not one of the available choices.")


def _probe(_: Query, __: str) -> None:
    raise QueryError("ProbeInsertion matching query does not exist.")


def _alive(query: Query, wanted: bool) -> None:
    today = date.today().isoformat()
    (query.filter if not wanted else query.exclude)("death_date__lte", today)


def _stock(query: Query, wanted: bool) -> None:
    (query.filter if wanted else query.exclude)("responsible_user__is_stock_manager", True)


def _restricted(query: Query, wanted: bool) -> None:
    """Water restriction is nothing the sandbox holds: no subject is under it."""
    query.exclude("death_date__lte", date.today().isoformat())
    if wanted:
        query.add("0")


DJANGO = {"django": ruled(_django)}

_ACTION = {
    **DJANGO,
    "subject": by("subject__nickname__iexact"), "nickname": by("subject__nickname__iexact"),
    "users": ruled(_users), "date_range": ruled(_date_range), "lab": by("lab__name__iexact"),
    "location": by("location__name__icontains"), "json": _json("json"),
}  # fmt: skip

SESSIONS = {
    **columns("session"), **_ACTION,
    "dataset_types": ruled(_dataset_types), "datasets": Filter(_text, _datasets),
    "dataset_qc_lte": Filter(_text, _dataset_qc),
    "performance_gte": _performance(">="), "performance_lte": _performance("<="),
    "type": by("type__iexact"), "task_protocol": by("task_protocol__icontains"),
    "qc": ruled(_qc), "extended_qc": _json("extended_qc"),
    "procedures": by("procedures__name__icontains"),
    "projects": by("projects__name__icontains"), "project": by("projects__name__icontains"),
    "atlas_name": ruled(_nothing), "atlas_acronym": ruled(_nothing),
    "atlas_id": ruled(_nothing, _decimal), "histology": ruled(_histology, _boolean),
    "tag": ruled(_tag),
}  # fmt: skip

DATASETS = {
    **columns("dataset", "json", "content_type"), **DJANGO,
    "subject": by("session__subject__nickname"), "lab": by("session__lab__name"),
    "created_date": by("created_datetime__date"), "date": by("session__start_time__date"),
    "created_by": by("created_by__username"), "dataset_type": by("dataset_type__name"),
    "experiment_number": by("session__number"),
    "created_date_gte": _created("gte"), "created_date_lte": _created("lte"),
    "content_type": ruled(_nothing, _unknown_choice),
    "exists": ruled(_exists, _boolean), "probe_insertion": ruled(_probe, _uuid),
    "public": _tagged("public"), "protected": _tagged("protected"), "tag": by("tags__name"),
    "revision": by("revision__name"), "qc": ruled(_qc),
}  # fmt: skip

FILES = {
    **columns("filerecord", "json"), **DJANGO,
    "lab": by("dataset__session__lab__name"), "data_repository": by("data_repository__name"),
    "globus_is_personal": flag("data_repository__globus_is_personal"),
}  # fmt: skip

SUBJECTS = {
    **columns("subject"), **DJANGO,
    "alive": ruled(_alive, _boolean), "responsible_user": by("responsible_user__username"),
    "stock": ruled(_stock, _boolean), "water_restricted": ruled(_restricted, _boolean),
    "lab": by("lab__name"), "project": by("projects__name"),
}  # fmt: skip

LABS = {**columns("lab", "json"), **DJANGO}
USERS = {**columns("labmember"), **DJANGO}
WEIGHINGS = {**columns("weighing"), **_ACTION}
WATER = {**columns("wateradministration"), **_ACTION}
NAME_ONLY = {"name": by("name")}
REPOSITORIES = {
    **NAME_ONLY, "globus_is_personal": flag("globus_is_personal"),
    "globus_endpoint_id": by("globus_endpoint_id", _uuid),
}  # fmt: skip


def narrow(query: Query, store: Store, filters: Mapping[str, Filter], params: Params) -> None:
    """Apply the parameters that are filters. Raises Refused where a value makes no sense."""
    values: dict[str, Any] = {}
    errors: dict[str, list[str]] = {}
    for name in filters.keys() & params.keys():
        try:
            values[name] = filters[name].parse(store, params[name])
        except Invalid as refused:
            errors[name] = refused.messages
    if errors:
        raise Refused(errors)
    for name, value in values.items():
        if value is not None:
            filters[name].apply(query, value, params)
