"""`/register-file` and `/check-protected`: which session, dataset and file records a path names."""

# ruff: noqa: S608 - table and column names come from the schema; values are always bound

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from one.alf.exceptions import ALFInvalid
from one.alf.path import filename_parts, folder_parts
from one.alf.spec import COLLECTION_SPEC, QC, is_valid, regex

from regd.sandbox.query import QueryError
from regd.sandbox.schema import MODELS
from regd.sandbox.store import Row, Store
from regd.sandbox.times import parse_day

if TYPE_CHECKING:
    from regd.sandbox.app import Context

_SESSION_PATH = re.compile(regex(spec="{subject}/{date}/{number}").pattern + ".*")
_COLLECTION = regex(spec=COLLECTION_SPEC)
_ODD_FOLDER = (
    "Invalid ALF path. Only letters, numbers, hyphen and underscores allowed. "
    "A revision folder must be surrounded by pound signs (#)."
)
_ODD_REVISION = (
    "Invalid ALF path. There must be only 1 revision and it cannot containsub folders. "
    "A revision folder must be surrounded by pound signs (#)."
)
_CONTENT_TYPES = {
    "actions.session": "session", "subjects.subject": "subject", "subjects.project": "project",
    "data.dataset": "dataset", "data.tag": "tag", "data.revision": "revision", "misc.lab": "lab",
}  # fmt: skip


class Answered(Exception):
    """The request ends here, with this status and body."""

    def __init__(self, status: int, **body: Any) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = {"status_code": status, **body}


@dataclass(frozen=True)
class Place:
    """Where a file belongs: what its path says after the session."""

    base: str
    collection: str
    revision: str
    name: str

    @property
    def path(self) -> str:
        """The path it is registered under; folders ALF does not allow are not part of it."""
        revision = f"#{self.revision}#" if self.revision else ""
        return PurePosixPath(self.base, self.collection, revision, self.name).as_posix()


@dataclass
class Target:
    """What the files belong to: a session, or another object of a content type."""

    session: Row | None = None
    content_type: str | None = None
    object_id: str | None = None
    places: list[Place] = field(default_factory=list)

    @property
    def where(self) -> dict[str, Any]:
        """The columns that say so."""
        session = self.session["id"] if self.session else None
        return {
            "session": session, "content_type": self.content_type, "object_id": self.object_id,
        }  # fmt: skip


# -- the two requests


def check_protected(context: Context, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Say whether any of the files is protected; 200 with the verdict in the body."""
    user = _user(context, asked)
    path = _path(asked).replace("\\", "/").replace("//", "/")
    files = _words(asked.get("filenames", ()))
    target = _other_object(context.store, asked, files, path)
    if target is None:
        session = _session(context.store, *_parse_path(context.store, path), user)
        target = Target(session, places=[_place(path, file) for file in files])
    details = _protected(context.store, target, files)
    if details is None:
        return {"status_code": 200, "details": "None of the datasets are protected"}
    return {"status_code": 403, "error": _PROTECTED, "details": details}


_PROTECTED = "One or more datasets is protected"


def register(context: Context, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Register files. What stands before a bad one stays registered, as it does in Alyx."""
    store = context.store
    user = _user(context, asked)
    repository = _repository(store, asked)
    path = _path(asked).replace("\\", "/").replace("//", "/").strip("/")
    files = _words(asked.get("filenames", ()))
    columns = _Columns.of(asked, len(files))
    server_only = _flag(asked, "server_only", False)
    default = _flag(asked, "default", True)
    check = _flag(asked, "check_protected", False)
    target = _other_object(store, asked, files, path)
    if target is not None:
        if repository is None:
            raise Answered(
                400,
                detail="A valid repository name or hostname must be provided for non-session "
                "datasets.",
            )
        repositories = [repository]
    else:
        target, subject = _session_target(store, path, files, user)
        repositories = _lab_repositories(store, asked, subject, server_only)
    if repository and repository not in repositories:
        repositories.append(repository)
    exists_in = repositories if server_only else [repository]
    if not _flag(asked, "exists", True):
        exists_in = []
    if check and (details := _protected(store, target, files)) is not None:
        raise Answered(403, error=_PROTECTED, details=details)
    batch = _Batch(store, target, user, repositories, exists_in, default)
    return [batch.add(*row) for row in columns.rows(target.places)]


# -- what was asked


def _user(context: Context, asked: Mapping[str, Any]) -> Row:
    name = asked.get("created_by", None)
    if not name:
        return context.user
    user = context.store.first("labmember", username=str(name))
    if user is None:
        raise QueryError("LabMember matching query does not exist.")
    return user


def _path(asked: Mapping[str, Any]) -> str:
    path: str = asked.get("path", "")
    if not path:
        raise QueryError("The path argument is required.")
    return path


def _words(value: Any) -> list[Any]:
    words = value.split(",") if isinstance(value, str) else value
    return [word for word in words if word]


def _flag(asked: Mapping[str, Any], name: str, default: bool) -> Any:
    value = asked.get(name, default)
    return value == "True" if isinstance(value, str) else value


def _repository(store: Store, asked: Mapping[str, Any]) -> str | None:
    for key in ("name", "hostname"):
        if asked.get(key):
            found = store.only("datarepository", **{key: str(asked[key])})
            if found is None:
                raise Answered(400, detail="The specified repository does not exist.")
            return str(found["id"])
    return None


@dataclass
class _Columns:
    """The lists that go with the file names; the shortest decides how many are registered."""

    hashes: Sequence[Any]
    sizes: Sequence[int | None]
    versions: Sequence[Any]
    levels: Sequence[Any]

    @classmethod
    def of(cls, asked: Mapping[str, Any], count: int) -> _Columns:
        nothing = [None] * count
        sizes = _split(asked.get("filesizes", nothing), count, repeat=False)
        sizes = sizes if isinstance(sizes, list | tuple) else [sizes]
        return cls(
            _split(asked.get("hashes", nothing), count, repeat=False),
            [int(size) if size is not None else None for size in sizes],
            _split(asked.get("versions", nothing), count, repeat=True),
            _split(asked.get("qc", nothing) or "NOT_SET", count, repeat=True),
        )

    def rows(self, places: Sequence[Place]) -> list[tuple[Any, ...]]:
        return list(zip(places, self.hashes, self.sizes, self.versions, self.levels, strict=False))


def _split(value: Any, count: int, repeat: bool) -> Any:
    if not isinstance(value, str):
        return value
    words = value.split(",")
    return words * count if repeat and len(words) == 1 else words


# -- what the path names


def _other_object(
    store: Store, asked: Mapping[str, Any], files: Sequence[str], path: str
) -> Target | None:
    """The object that `content_type` and `object_id` name, or None where a session is meant."""
    named, object_id = asked.get("content_type", None), asked.get("object_id", None)
    if not (named or object_id):
        return None
    if not (named and object_id):
        raise Answered(400, error="Both content_type and object_id should be provided together.")
    if named == "session":  # Alyx's web framework has sessions of its own
        raise QueryError("get() returned more than one ContentType -- it returned 2!")
    kinds = {name: table for name, table in _CONTENT_TYPES.items() if named in (name, table)}
    if not kinds:
        raise Answered(400, detail=f"Invalid content type: {named}")
    ((name, table),) = kinds.items()
    if store.first(table, id=str(object_id)) is None:
        raise Answered(400, detail=f"Invalid object ID: {object_id}")
    places = [_loose_place(path, file) for file in files]
    return Target(None, name, str(object_id), places)


def _session_target(store: Store, path: str, files: Sequence[str], user: Row) -> tuple[Target, Row]:
    try:
        subject, day, number = _parse_path(store, path)
        session = _session(store, subject, day, number, user)
    except _NoSubject:
        nickname = path.split("/")[0]
        raise Answered(400, error=f'A subject with nickname "{nickname}" does not exist.') from None
    except _NotThere as missing:
        raise Answered(400, error=str(missing)) from None
    return Target(session, places=[_place(path, file) for file in files]), subject


class _NotThere(QueryError):
    """The path names no session. A QueryError, since /check-protected answers it 500."""


class _NoSubject(QueryError):
    """The path names no subject."""


def _parse_path(store: Store, path: str) -> tuple[Row, str, int]:
    found = _SESSION_PATH.match(path)
    if not found:
        raise _NotThere(f"The path {path} should be `nickname/YYYY-MM-DD/n/...")
    subject = store.only("subject", nickname=found["subject"])
    if subject is None:
        raise _NoSubject("Subject matching query does not exist.")
    return subject, found["date"], int(found["number"])


_SAME_DAY = "subject = ? AND start_time >= ? AND start_time < ? || 'U'"


def _session(store: Store, subject: Row, day: str, number: int, user: Row) -> Row:
    """The session of that day and number; its user and its day's base session are noted on it."""
    _check_day(day)
    held = store.find("session", _SAME_DAY, (subject["id"], day, day))
    held.sort(key=lambda row: row["id"])
    base = next((row for row in held if row["parent_session"] is None), None)
    if base is None:
        raise _NotThere(f"A base session for {subject['nickname']} on {day} does not exist")
    _add_user(store, base, user)
    session = next((row for row in held if row["number"] == number), None)
    if session is None:
        raise _NotThere(f"A session for {subject['nickname']}/{number} on {day} does not exist")
    _add_user(store, session, user)
    if session["parent_session"] is None and base["id"] != session["id"]:
        store.update("session", session["id"], {"parent_session": base["id"]})
    return session


def _check_day(day: str) -> None:
    try:
        parse_day(day)
    except ValueError:
        raise QueryError(
            f"['“{day}” value has the correct format (YYYY-MM-DD) but it is an invalid date.']"
        ) from None


def _add_user(store: Store, session: Row, user: Row) -> None:
    users = store.linked("session", "users", session["id"])
    if user["id"] not in users:
        store.update("session", session["id"], {"users": [*users, user["id"]]})


def _place(path: str, file: str) -> Place:
    full = PurePosixPath(path, file)
    try:
        parts = folder_parts(full.parent.as_posix(), as_dict=True)
    except (ALFInvalid, ValueError):
        raise Answered(400, detail=_ODD_FOLDER) from None
    revision = parts["revision"] or ""
    if revision:
        folders = full.parent.parts
        marked = f"#{revision}#"
        if marked not in folders:
            raise Answered(400, detail=_ODD_FOLDER)
        if folders.index(marked) != len(folders) - 1:
            raise Answered(400, detail=_ODD_REVISION)
    base = "{subject}/{date}/{number}".format(**parts)
    return Place(base, parts["collection"] or "", revision, full.name)


def _loose_place(path: str, file: str) -> Place:
    full = PurePosixPath(path, file)
    folder = "" if len(full.parts) == 1 else full.parent.as_posix()
    parts = _COLLECTION.match(folder + "/").groupdict()
    collection, revision = parts["collection"] or "", parts["revision"] or ""
    expected = len(collection.split("/")) if collection else 0
    if len(full.parent.parts) != expected + bool(revision):
        raise Answered(400, detail=_ODD_FOLDER)
    return Place("", collection, revision, full.name)


def _lab_repositories(
    store: Store, asked: Mapping[str, Any], subject: Row, server_only: Any
) -> list[str]:
    given = (asked.get(key, []) for key in ("labs", "projects"))
    named, more = (value.split(",") if isinstance(value, str) else value for value in given)
    labs = []
    for name in filter(None, named + more):
        lab = store.first("lab", name=str(name))
        if lab is None:
            raise Answered(400, detail="One or more of the specified labs do not exist.")
        labs.append(lab["id"])
    found: list[str] = []
    for lab_id in labs or [subject["lab"]]:
        for repository in store.linked("lab", "repositories", lab_id):
            personal = store.slug("datarepository", "globus_is_personal", repository)
            if repository not in found and not (server_only and personal != 0):
                found.append(repository)
    return found


# -- protection


_PROTECTING = (
    "SELECT EXISTS (SELECT 1 FROM dataset_tags l JOIN tag g ON g.id = l.target "
    "WHERE l.source = ? AND g.protected)"
)


def is_protected(store: Store, dataset_id: str) -> bool:
    """Whether a tag on this dataset forbids to overwrite it."""
    return bool(store.db.execute(_PROTECTING, (dataset_id,)).fetchone()[0])


def _protected(store: Store, target: Target, files: Sequence[str]) -> list[Any] | None:
    """Each file's history, newest revision first; None if nothing is protected."""
    found = [_history(store, target, place) for place in target.places]
    if not any(protected for history in found for one in history for protected in one.values()):
        return None
    return [{file: history} for file, history in zip(files, found, strict=False)]


def _history(store: Store, target: Target, place: Place) -> list[dict[str, bool]]:
    sql = (
        "SELECT t.id, r.name FROM dataset t LEFT JOIN revision r ON r.id = t.revision "
        "WHERE t.session IS ? AND t.content_type IS ? AND t.object_id IS ? AND t.name = ? "
        "AND t.collection = ? ORDER BY r.created_datetime DESC NULLS LAST, t.seq"
    )
    values = (*target.where.values(), place.name, place.collection)
    return [
        {revision or "": is_protected(store, dataset)}
        for dataset, revision in store.db.execute(sql, values)
    ]


# -- registering


_RECORD_PATH = re.compile(MODELS["filerecord"].fields["relative_path"].pattern or "")


@dataclass
class _Batch:
    """The files of one request, registered one after the other."""

    store: Store
    target: Target
    user: Row
    repositories: list[str]
    exists_in: Sequence[str | None]
    default: Any

    def add(
        self, place: Place, digest: Any, size: int | None, version: Any, level: Any
    ) -> dict[str, Any]:
        """Register one file and answer with its record."""
        revision = self._revision(place.revision) if place.revision else None
        kind = dataset_type(self.store, place.name)
        data_format = _data_format(self.store, place.name)
        if self.default:
            drop_default(self.store, self.target.where, place.collection, place.name)
        key = {
            **self.target.where, "collection": place.collection, "name": place.name,
            "dataset_type": kind, "data_format": data_format, "revision": revision,
        }  # fmt: skip
        held = self.store.first("dataset", **key)
        dataset_id = held["id"] if held else self.store.insert("dataset", key)
        self._set_default(dataset_id, level, place)
        if held and is_protected(self.store, dataset_id):
            raise Answered(403, detail=f"Dataset {dataset_id} is protected, cannot patch")
        known = held["hash"] if held else ""
        self._describe(dataset_id, place, digest, size, version)
        patched = not (digest and known and known == digest)
        for repository in self.repositories:
            self._record(dataset_id, repository, place.path, patched)
        return self._answer(dataset_id)

    def _revision(self, name: str) -> str:
        held = self.store.first("revision", name=name)
        return held["id"] if held else self.store.insert("revision", {"name": name})

    def _set_default(self, dataset_id: str, level: Any, place: Place) -> None:
        values: dict[str, Any] = {"default_dataset": self.default is True}
        try:
            values["qc"] = int(QC.validate(level or "NOT_SET"))
        except ValueError:
            raise Answered(
                400, detail=f'Invalid QC value "{level}" for dataset "{place.path}"'
            ) from None
        self.store.update("dataset", dataset_id, values)

    def _describe(
        self, dataset_id: str, place: Place, digest: Any, size: int | None, version: Any
    ) -> None:
        values: dict[str, Any] = {"created_by": self.user["id"]}
        if version:
            values["version"] = str(version)
        if digest:
            values["hash"] = str(digest)
        if size is not None:
            values["file_size"] = size
        errors = _beyond_limits(values)
        if errors:
            raise Answered(400, detail=f'Invalid dataset "{place.path}": {errors}')
        self.store.update("dataset", dataset_id, values)

    def _record(self, dataset_id: str, repository: str, path: str, patched: bool) -> None:
        key = {"data_repository": repository, "relative_path": path}
        held = self.store.first("filerecord", **key)
        if held and held["dataset"] != dataset_id:
            name = self.store.slug("datarepository", "name", repository)
            raise Answered(
                400,
                detail=f'A file record for "{path}" already exists on repository "{name}" for a '
                "different dataset.",
            )
        exists = repository in self.exists_in
        if not _RECORD_PATH.match(path):
            problem = {"relative_path": [MODELS["filerecord"].fields["relative_path"].message]}
            raise Answered(400, detail=f'Invalid file record "{path}": {problem}')
        if held is None:
            self.store.insert("filerecord", {**key, "dataset": dataset_id, "exists": exists})
        elif patched:
            self.store.update("filerecord", held["id"], {"exists": exists, "json": None})

    def _answer(self, dataset_id: str) -> dict[str, Any]:
        store = self.store
        row = store.get("dataset", dataset_id)
        session = self.target.session
        subject = store.slug("subject", "nickname", session["subject"]) if session else None
        if self.target.content_type == "subjects.subject":
            subject = store.slug("subject", "nickname", row["object_id"])
        answer = {
            "id": row["id"], "name": row["name"], "file_size": row["file_size"],
            "subject": subject, "created_by": self.user["username"],
            "created_datetime": row["created_datetime"],
            "dataset_type": store.slug("datasettype", "name", row["dataset_type"]),
            "data_format": store.slug("dataformat", "name", row["data_format"]),
        }  # fmt: skip
        answer |= self._belongs(row)
        records = store.find("filerecord", "dataset = ?", (dataset_id,))
        return answer | {
            "collection": row["collection"],
            "revision": store.slug("revision", "name", row["revision"]) or "",
            "default": row["default_dataset"], "qc": row["qc"],
            "file_records": [
                {
                    "id": record["id"],
                    "data_repository": store.slug(
                        "datarepository", "name", record["data_repository"]
                    ),
                    "relative_path": record["relative_path"], "exists": record["exists"],
                }
                for record in records
            ],
        }  # fmt: skip

    def _belongs(self, row: Row) -> dict[str, Any]:
        session = self.target.session
        if session is None:
            return {"content_type": row["content_type"], "object_id": row["object_id"]}
        users = self.store.linked("session", "users", session["id"])
        return {
            "session": session["id"], "session_number": session["number"],
            "session_users": ",".join(
                self.store.slug("labmember", "username", user) for user in users
            ),
            "session_start_time": session["start_time"],
        }  # fmt: skip


def drop_default(store: Store, where: Mapping[str, Any], collection: str, name: str) -> None:
    """Another dataset of this name becomes the default: the ones that were no longer are."""
    conditions = " AND ".join(f"{column} IS ?" for column in where)
    store.db.execute(
        f"UPDATE dataset SET default_dataset = 0 WHERE {conditions} AND collection = ? "
        "AND name = ? AND default_dataset",
        (*where.values(), collection, name),
    )


def _beyond_limits(values: Mapping[str, Any]) -> dict[str, list[str]]:
    fields = MODELS["dataset"].fields
    errors = {}
    for name, value in values.items():
        most = fields[name].max_length
        if most and len(value) > most:
            errors[name] = [
                f"Ensure this value has at most {most} characters (it has {len(value)})."
            ]
        if name == "file_size" and value >= 2**63:
            errors[name] = [f"Ensure this value is less than or equal to {2**63 - 1}."]
    return errors


def _data_format(store: Store, name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    suffix = dot + extension if stem.strip(".") else ""
    found = store.only("dataformat", file_extension=suffix)
    if found is None:
        raise QueryError("DataFormat matching query does not exist.")
    return str(found["id"])


class TypeMatcher:
    """The dataset types as one set of compiled patterns, made again when they change."""

    def __init__(self, store: Store) -> None:
        """Read the dataset types as they are now."""
        self.version = store.version["datasettype"]
        self.patterns: list[tuple[re.Pattern[str], Row]] = []
        self.names: dict[str, Row] = {}
        for row in store.find("datasettype"):
            pattern = (row["filename_pattern"] or "").strip()
            if pattern:
                self.patterns.append((re.compile(translate(pattern.casefold())), row))
            else:
                self.names[row["name"]] = row

    def match(self, name: str) -> list[Row]:
        """The dataset types that fit a file name, in the order of their names."""
        folded = name.casefold()
        found = [row for pattern, row in self.patterns if pattern.match(folded)]
        if is_valid(name):
            _, thing, attribute, *_ = filename_parts(name)
            plain = f"{thing}.{attribute}"
        else:
            plain = PurePosixPath(name).stem
        if plain in self.names:
            found.append(self.names[plain])
        return sorted(found, key=lambda row: str(row["name"]))


def dataset_type(store: Store, name: str) -> str:
    """The id of the one dataset type that fits a file name. Raises QueryError otherwise."""
    matcher = store.cache.get("types")
    if matcher is None or matcher.version != store.version["datasettype"]:
        matcher = store.cache["types"] = TypeMatcher(store)
    found = matcher.match(name)
    if not found:
        raise QueryError(f'No dataset type found for filename "{name}"')
    if len(found) > 1:
        listed = ", ".join(f"<DatasetType {row['name']}>" for row in found)
        raise QueryError(f'Multiple matching dataset types found for filename "{name}": \n{listed}')
    return str(found[0]["id"])
