"""Alyx's endpoints as a table: each one's fields, filters, methods, and what a write does."""

# ruff: noqa: S608 - table and column names come from the schema; values are always bound

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

from one.alf.path import add_uuid_string

from regd.sandbox import filters
from regd.sandbox.fields import (
    CALLER,
    Item,
    Refused,
    link,
    many_of,
    plain,
    qc,
    read_only,
    slug,
    slugs,
    url,
)
from regd.sandbox.filters import ON_SERVER, Filter
from regd.sandbox.query import QueryError
from regd.sandbox.register import Answered, drop_default, is_protected
from regd.sandbox.schema import MODELS
from regd.sandbox.store import Row
from regd.sandbox.times import utc_now

if TYPE_CHECKING:
    from regd.sandbox.app import Context

Values = dict[str, Any]
Items = tuple[Item, ...]


def _no_change(_: Context, __: Values, ___: Row | None) -> None:
    return None


def _nothing_more(_: Context, __: str, ___: Values) -> None:
    return None


@dataclass(frozen=True)
class Resource:
    """One endpoint: a list at `path`, and a page for each row by its `by`."""

    path: str
    model: str
    items: Items
    listed: Items | None = None
    """The fields in the list and in the answer to its POST, where they differ."""
    list_reads_only: bool = False
    """The POST answers all `items` though the list shows `listed`."""
    by: str = "id"
    filters: Mapping[str, Filter] = field(default_factory=dict)
    order: str = ""
    list_methods: tuple[str, ...] = ("GET", "POST")
    methods: tuple[str, ...] = ("GET", "PUT", "PATCH", "DELETE")
    before: Callable[[Context, Values, Row | None], None] = _no_change
    """Changes what will be written, or refuses it; the row is None when one is created."""
    after: Callable[[Context, str, Values], None] = _nothing_more
    before_delete: Callable[[Context, Row], None] = lambda _, __: None

    @property
    def title(self) -> str:
        """What Alyx calls one of these in a 404."""
        return MODELS[self.model].title

    @property
    def shown(self) -> Items:
        """The fields of a row in the list."""
        return self.listed or self.items


def _id() -> Item:
    return _column("id")


def _columns(model: str, *names: str) -> Items:
    return tuple(_id() if name == "id" else plain(model, name) for name in names)


def _shown(*names: str) -> Items:
    return tuple(_column(name) for name in names)


def _column(name: str) -> Item:
    return read_only(name, lambda _, row: row[name])


def _constant(name: str, value: Any) -> Item:
    return read_only(name, lambda _, __: value)


# -- sessions


def _related(context: Context, row: Row) -> list[Values]:
    """The session's datasets that exist on a server; all, where the lab has no server."""
    store = context.store
    servers = store.first("datarepository", globus_is_personal=0)
    where = f"session = ? AND id IN ({ON_SERVER.format(exists=1)})" if servers else "session = ?"
    return [context.show(_RELATED, found) for found in store.find("dataset", where, (row["id"],))]


def _data_url(context: Context, dataset: Row) -> str | None:
    """Where the file can be downloaded: the first repository with an address that has it."""
    found = context.store.db.execute(
        "SELECT p.data_url, f.relative_path FROM filerecord f "
        "JOIN datarepository p ON p.id = f.data_repository "
        'WHERE f.dataset = ? AND f."exists" AND p.data_url IS NOT NULL '
        "ORDER BY p.globus_is_personal NULLS LAST, p.name DESC LIMIT 1",
        (dataset["id"],),
    ).fetchone()
    return _address(found[0], found[1], dataset["id"]) if found else None


def _address(root: str | None, path: str, dataset_id: str) -> str | None:
    return root + add_uuid_string(path, dataset_id).as_posix() if root else None


def _revision_name(context: Context, row: Row) -> str:
    return context.store.slug("revision", "name", row["revision"]) or ""


_RELATED: Items = (
    *_shown("id", "name"), slug("dataset", "dataset_type"), read_only("data_url", _data_url),
    url("datasets"), *_shown("file_size", "hash", "version", "collection"),
    read_only("revision", _revision_name),
    read_only("default_revision", lambda _, row: str(row["default_dataset"])), qc(),
)  # fmt: skip

_GIVEN: Items = (
    *_shown("id", "name"), slug("wateradministration", "water_type"),
    *_shown("water_administered"),
)  # fmt: skip


def _water_of(context: Context, row: Row) -> list[Values]:
    found = context.store.find("wateradministration", "session = ?", (row["id"],))
    return [context.show(_GIVEN, one) for one in found]


_SUBJECT = slug("session", "subject", "nickname", required=True)
_LAB = slug("session", "lab")

_SESSION: Items = (
    _SUBJECT, slugs("session", "users", "username"), slug("session", "location", null=True),
    slugs("session", "procedures"), _LAB, slugs("session", "projects"),
    *_columns("session", "type", "task_protocol", "number", "start_time", "end_time",
              "narrative"),
    link("session", "parent_session", "sessions", null=True),
    *_columns("session", "n_correct_trials", "n_trials"), url("sessions"),
    *_columns("session", "extended_qc"), qc(),
    read_only("wateradmin_session_related", _water_of),
    read_only("data_dataset_session_related", _related),
    *_shown("auto_datetime"), *_columns("session", "id", "json"),
    _constant("probe_insertion", []), _constant("field_of_view", []), _constant("notes", []),
)  # fmt: skip

_SESSION_LISTED: Items = (
    *_shown("id"), _SUBJECT, *_shown("start_time", "number"), _LAB, slugs("session", "projects"),
    url("sessions"), *_shown("task_protocol"),
)  # fmt: skip


def _before_session(context: Context, values: Values, row: Row | None) -> None:
    if row is None and not values.get("users"):
        values["users"] = [context.user["id"]]
    if not values.get("lab", row and row["lab"]):
        subject = values.get("subject") or (row or {})["subject"]
        values["lab"] = context.store.get("subject", subject)["lab"]


# -- datasets


def _records(context: Context, row: Row) -> list[Values]:
    return [
        context.show(_RECORD, record)
        for record in context.store.find("filerecord", "dataset = ?", (row["id"],))
    ]


def _repository(context: Context, row: Row, column: str) -> Any:
    return context.store.slug("datarepository", column, row["data_repository"])


_RECORD: Items = (
    *_shown("id"), slug("filerecord", "data_repository"),
    read_only("data_repository_path", lambda c, row: _repository(c, row, "globus_path")),
    *_shown("relative_path"),
    read_only("data_url", lambda c, row: _address(
        _repository(c, row, "data_url"), row["relative_path"], row["dataset"])),
    *_shown("exists"),
)  # fmt: skip


def _tag_count(column: str) -> Item:
    def read(context: Context, row: Row) -> int:
        sql = (
            "SELECT COUNT(*) FROM dataset_tags l JOIN tag g ON g.id = l.target "
            f"WHERE l.source = ? AND g.{column}"
        )
        return int(context.store.db.execute(sql, (row["id"],)).fetchone()[0])

    return read_only(column, read)


def _written_only(item: Item) -> Item:
    return Item(item.name, None, item.parse, item.required, item.null, linked=item.linked)


_DATASET: Items = (
    url("datasets"), plain("dataset", "name"),
    slug("dataset", "created_by", "username", default=CALLER),
    plain("dataset", "created_datetime"),
    slug("dataset", "dataset_type", required=True), slug("dataset", "data_format"),
    plain("dataset", "collection", limits=False, null=True),
    link("dataset", "session", "sessions"), plain("dataset", "file_size"),
    plain("dataset", "hash", limits=False, null=True, blank=False),
    plain("dataset", "version", limits=False, null=True, blank=False),
    read_only("experiment_number",
              lambda c, row: c.store.slug("session", "number", row["session"])),
    read_only("file_records", _records),
    _written_only(slug("session", "subject", "nickname")),
    _written_only(Item("date", None, plain("subject", "birth_date").parse)),
    _written_only(plain("session", "number", null=False)),
    *_shown("auto_datetime"),
    Item("revision", _revision_name, slug("dataset", "revision").parse, linked=True),
    plain("dataset", "default_dataset", null=True), slugs("dataset", "tags"), qc(),
    plain("dataset", "json"),
)  # fmt: skip

_DATASET_LISTED: Items = (
    *_DATASET[:-3], _tag_count("protected"), _tag_count("public"), *_DATASET[-3:],
)  # fmt: skip


def _before_dataset(context: Context, values: Values, row: Row | None) -> None:
    if row is not None:
        return
    subject, day = values.pop("subject", None), values.pop("date", None)
    number = values.pop("number", None)
    if "session" not in values and subject and day:
        values.pop("created_by", None)
        values["session"] = _session_of(context, subject, day, number)
    elif number is not None:
        raise QueryError("Dataset() got unexpected keyword arguments: 'number'")
    if values.get("session") and values.get("default_dataset") is not False:
        where = {"session": values["session"]}
        drop_default(context.store, where, values.get("collection", ""), values["name"])
        values["default_dataset"] = True


_COLLECTION = MODELS["dataset"].fields["collection"]


def _after_dataset(context: Context, row_id: str, _: Values) -> None:
    """Alyx looks at the collection when it was stored already; a bad one stays, and fails again."""
    collection = context.store.get("dataset", row_id)["collection"]
    if collection and not re.search(_COLLECTION.pattern or "", collection):
        raise QueryError(str({"collection": [_COLLECTION.message]}))


def _session_of(context: Context, subject: str, day: str, number: int | None) -> str:
    held = context.store.find(
        "session", "subject = ? AND substr(start_time, 1, 10) = ?", (subject, day)
    )
    nickname = context.store.slug("subject", "nickname", subject)
    if not any(row["parent_session"] is None for row in held):
        raise QueryError(f"A base session for {nickname} on {day} does not exist")
    for row in sorted(held, key=lambda row: str(row["id"])):
        if row["number"] == number:
            return str(row["id"])
    if number is None:
        raise QueryError("%d format: a real number is required, not NoneType")
    raise QueryError(f"A session for {nickname}/{number} on {day} does not exist")


def _keep_protected(context: Context, row: Row) -> None:
    if is_protected(context.store, row["id"]):
        linked = context.store.linked("dataset", "tags", row["id"])
        tags = [
            tag["name"]
            for tag in (context.store.get("tag", tag_id) for tag_id in linked)
            if tag["protected"]
        ]
        listed = '"' + '", "'.join(tags) + '"'
        raise Answered(
            403, detail=f"Failed to delete dataset {row['name']} due to protected tag(s) {listed}"
        )


def _after_file(context: Context, row_id: str, _: Values) -> None:
    """Writing a file record is writing its dataset, too."""
    dataset = context.store.get("filerecord", row_id)["dataset"]
    context.store.update("dataset", dataset, {})
    _after_dataset(context, dataset, {})


_FILE: Items = (
    url("files"), link("filerecord", "dataset", "datasets", required=True),
    slug("filerecord", "data_repository", required=True),
    *_columns("filerecord", "name", "json", "relative_path", "exists"),
)  # fmt: skip


# -- subjects and users


def _today() -> date:
    return date.today()


def _alive(_: Context, row: Row) -> bool:
    return row["death_date"] is None or date.fromisoformat(row["death_date"]) > _today()


def _age_weeks(_: Context, row: Row) -> int:
    if row["birth_date"] is None:
        return 0
    end = date.fromisoformat(row["death_date"]) if row["death_date"] else _today()
    return (end - date.fromisoformat(row["birth_date"])).days // 7


def _expected_water(context: Context, row: Row) -> float:
    """Four per cent of the latest weight: what Alyx asks for without a water restriction."""
    found = context.store.db.execute(
        "SELECT weight FROM weighing WHERE subject = ? AND substr(date_time, 1, 10) <= ? "
        "ORDER BY date_time DESC LIMIT 1",
        (row["id"], _today().isoformat()),
    ).fetchone()
    return 0.04 * found[0] if found else 0.0


def _remaining_water(context: Context, row: Row) -> float:
    given = context.store.db.execute(
        "SELECT TOTAL(water_administered) FROM wateradministration WHERE subject = ? "
        "AND substr(date_time, 1, 10) = ?",
        (row["id"], _today().isoformat()),
    ).fetchone()
    return _expected_water(context, row) - float(given[0])


def _session_projects(context: Context, row: Row) -> list[str]:
    sql = (
        "SELECT DISTINCT p.name FROM project p JOIN session_projects l ON l.target = p.id "
        "JOIN session s ON s.id = l.source WHERE s.subject = ? ORDER BY p.seq"
    )
    return [found[0] for found in context.store.db.execute(sql, (row["id"],))]


_SUBJECT_LISTED: Items = (
    plain("subject", "nickname", default="-"), url("subjects", "nickname"), _id(),
    slug("subject", "responsible_user", "username", default=CALLER),
    plain("subject", "birth_date"), read_only("age_weeks", _age_weeks),
    plain("subject", "death_date"), slug("subject", "species", "nickname", null=True),
    plain("subject", "sex"), slug("subject", "litter", null=True),
    slug("subject", "strain", null=True), slug("subject", "source", null=True),
    slug("subject", "line", null=True), slugs("subject", "projects"),
    read_only("session_projects", _session_projects), slug("subject", "lab", required=True),
    _constant("genotype", []), plain("subject", "description"), read_only("alive", _alive),
    _constant("reference_weight", 0.0), _constant("last_water_restriction", None),
    read_only("expected_water", _expected_water), read_only("remaining_water", _remaining_water),
    plain("subject", "json"),
)  # fmt: skip

_WEIGHING: Items = (
    slug("weighing", "subject", "nickname", required=True),
    *_columns("weighing", "date_time", "weight"),
    slug("weighing", "user", "username", default=CALLER), url("weighings"),
)  # fmt: skip

_WATER: Items = (
    slug("wateradministration", "subject", "nickname", required=True),
    *_columns("wateradministration", "date_time", "water_administered"),
    slug("wateradministration", "water_type"),
    slug("wateradministration", "user", "username", default=CALLER),
    url("water-administrations"), slug("wateradministration", "session", "id"),
    plain("wateradministration", "adlib"),
)  # fmt: skip


def _of_subject(table: str, items: Items) -> Callable[[Context, Row], list[Values]]:
    return lambda context, row: [
        context.show(items, one) for one in context.store.find(table, "subject = ?", (row["id"],))
    ]


_SUBJECT_PAGE: Items = (
    *_SUBJECT_LISTED, read_only("weighings", _of_subject("weighing", _WEIGHING)),
    read_only("water_administrations", _of_subject("wateradministration", _WATER)),
)  # fmt: skip


def _before_subject(context: Context, values: Values, row: Row | None) -> None:
    merged = {**(row or {}), **values}
    clashes = []
    for names in MODELS["subject"].unique_together:
        held = context.store.first("subject", **{name: merged[name] for name in names})
        if held and (row is None or held["id"] != row["id"]):
            clashes.append(f"The fields {', '.join(names)} must make a unique set.")
    if clashes:
        raise Refused({"non_field_errors": clashes})
    if row is not None:
        _keep_history(values, row)


def _keep_history(values: Values, row: Row) -> None:
    """Note a former nickname or responsible user in the subject's JSON."""
    for name in ("nickname", "responsible_user"):
        if name in values and values[name] != row[name]:
            about = dict(values.get("json", row["json"]) or {})
            history = dict(about.get("history", {}))
            former = {"date_time": utc_now(), "value": str(row[name])}
            history[name] = [*history.get(name, []), former]
            values["json"] = {**about, "history": history}


def _default_water(context: Context, values: Values, row: Row | None) -> None:
    if not values.get("water_type", row and row["water_type"]):
        water = context.store.first("watertype", name="Water")
        if water is None:
            raise QueryError("WaterType matching query does not exist.")
        values["water_type"] = water["id"]


def _responsible(context: Context, row: Row) -> list[str]:
    subjects = context.store.find("subject", "responsible_user = ?", (row["id"],))
    return [subject["nickname"] for subject in subjects]


def _set_responsible(context: Context, row_id: str, values: Values) -> None:
    if "subjects_responsible" not in values:
        return
    wanted = set(values["subjects_responsible"])
    for subject in context.store.find("subject", "responsible_user = ?", (row_id,)):
        if subject["id"] not in wanted:
            context.store.update("subject", subject["id"], {"responsible_user": None})
    for subject_id in wanted:
        context.store.update("subject", subject_id, {"responsible_user": row_id})


_USER: Items = (
    *_columns("labmember", "id", "username", "email"),
    Item("subjects_responsible", _responsible,
         many_of("subject", "nickname"), required=True, many=True),
    _constant("lab", []), slugs("labmember", "allowed_users", "username", required=True),
    plain("labmember", "is_stock_manager"),
)  # fmt: skip


# -- small tables


def _lower_pattern(_: Context, values: Values, __: Row | None) -> None:
    if "filename_pattern" in values:
        values["filename_pattern"] = (values["filename_pattern"] or "").lower() or None


def _pattern(context: Context, row: Row) -> str | None:
    """Alyx shows a missing pattern as empty, but as null in the answer that created it."""
    return row["filename_pattern"] or (None if context.method == "POST" else "")


def _one_user(_: Context, values: Values, __: Row | None) -> None:
    """Alyx's default for a project's users is one user where it needs a list."""
    if isinstance(values.get("users"), str):
        values["one_user"] = values.pop("users")


def _refuse_one_user(_: Context, __: str, values: Values) -> None:
    """Alyx fails over it only when the project is stored."""
    if "one_user" in values:
        raise QueryError("'LabMember' object is not iterable")


_ALL = (
    Resource(
        "sessions", "session", _SESSION, listed=_SESSION_LISTED, list_reads_only=True,
        filters=filters.SESSIONS, order="t.start_time DESC NULLS FIRST, t.seq",
        before=_before_session,
    ),
    Resource(
        "datasets", "dataset", _DATASET, listed=_DATASET_LISTED, list_reads_only=True,
        filters=filters.DATASETS, before=_before_dataset, after=_after_dataset,
        before_delete=_keep_protected,
    ),
    Resource("files", "filerecord", _FILE, filters=filters.FILES, after=_after_file),
    Resource(
        "revisions", "revision",
        _columns("revision", "id", "json", "name", "description", "created_datetime"),
        by="name", filters=filters.NAME_ONLY,
    ),
    Resource(
        "tags", "tag",
        _columns("tag", "id", "json", "name", "description", "protected", "public", "hash"),
        by="name", filters=filters.NAME_ONLY,
    ),
    Resource(
        "dataset-types", "datasettype",
        (*_columns("datasettype", "id", "name"),
         slug("datasettype", "created_by", "username", null=True, default=CALLER),
         plain("datasettype", "description"),
         Item("filename_pattern", _pattern,
              plain("datasettype", "filename_pattern").parse, null=True, blank=True,
              check=plain("datasettype", "filename_pattern").check)),
        by="name", before=_lower_pattern,
    ),
    Resource(
        "data-formats", "dataformat",
        _columns("dataformat", "id", "json", "name", "description", "file_extension",
                 "matlab_loader_function", "python_loader_function"),
        by="name",
    ),
    Resource(
        "data-repository-type", "datarepositorytype",
        (url("data-repository-type", "name"), *_columns("datarepositorytype", "json", "name")),
        by="name",
    ),
    Resource(
        "data-repository", "datarepository",
        (*_columns("datarepository", "name", "timezone", "globus_path", "hostname", "data_url"),
         slug("datarepository", "repository_type", null=True),
         *_columns("datarepository", "globus_endpoint_id", "globus_is_personal", "json")),
        by="name", filters=filters.REPOSITORIES,
    ),
    Resource(
        "labs", "lab",
        (*_columns("lab", "name", "institution", "address", "timezone"),
         slugs("lab", "repositories"),
         *_columns("lab", "reference_weight_pct", "zscore_weight_pct", "json")),
        by="name", filters=filters.LABS,
    ),
    Resource("users", "labmember", _USER, by="username", filters=filters.USERS,
             after=_set_responsible),
    Resource(
        "subjects", "subject", _SUBJECT_PAGE, listed=_SUBJECT_LISTED, by="nickname",
        filters=filters.SUBJECTS, before=_before_subject,
    ),
    Resource(
        "projects", "project",
        (*_columns("project", "name", "description"),
         slugs("project", "users", "username", default=CALLER)),
        by="name", before=_one_user, after=_refuse_one_user,
    ),
    Resource(
        "procedures", "proceduretype",
        _columns("proceduretype", "id", "name", "json", "description"), methods=(),
    ),
    Resource(
        "locations", "lablocation",
        (plain("lablocation", "name"), slug("lablocation", "lab"), plain("lablocation", "json")),
        by="name", list_methods=("GET",), methods=("GET", "PUT", "PATCH"),
    ),
    Resource(
        "water-type", "watertype",
        (url("water-type", "name"), *_columns("watertype", "json", "name")), by="name",
    ),
    Resource("weighings", "weighing", _WEIGHING, filters=filters.WEIGHINGS,
             methods=("GET", "DELETE")),
    Resource("water-administrations", "wateradministration", _WATER, filters=filters.WATER,
             before=_default_water),
)  # fmt: skip

RESOURCES: Mapping[str, Resource] = {resource.path: resource for resource in _ALL}
