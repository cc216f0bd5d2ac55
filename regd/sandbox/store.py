"""The sandbox's SQLite database: rows as dicts of Python values, and the lab loaded at first."""

# ruff: noqa: S608 - table and column names come from the schema; values are always bound

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from regd.sandbox.schema import MODELS, NOW, ON_SAVE, Field, Model, create_sql, through
from regd.sandbox.times import utc_now

Row = dict[str, Any]


class LoadError(ValueError):
    """The lab to load, or the database file, is not usable; the message says what to do."""


class DatabaseRefusedError(Exception):
    """A value a column cannot hold, in the words of the database below Alyx."""


def hash_password(password: str) -> str:
    """Salt and hash a password; few rounds, since this guards nothing but a trial."""
    salt = secrets.token_hex(8)
    return f"{salt}${_digest(password, salt)}"


def _digest(password: str, salt: str) -> str:
    return hashlib.scrypt(password.encode(), salt=salt.encode(), n=2, r=8, p=1).hex()


def password_matches(password: str, stored: str) -> bool:
    """Whether `password` is the one that `stored` was made from."""
    salt, _, digest = stored.partition("$")
    return bool(digest) and hmac.compare_digest(_digest(password, salt), digest)


def encode(column: Field, value: Any) -> Any:
    """A Python value as SQLite holds it."""
    if value is None:
        return None
    if column.kind == "json":
        return json.dumps(value)
    if column.kind == "bool":
        return int(value)
    if column.max_length and len(value) > column.max_length:
        raise DatabaseRefusedError(
            f"value too long for type character varying({column.max_length})\n"
        )
    if column.kind == "bigint" and abs(value) >= 2**63:
        raise DatabaseRefusedError("bigint out of range\n")
    return value


def _decode(column: Field, value: Any) -> Any:
    if value is None:
        return None
    if column.kind == "json":
        return json.loads(value)
    if column.kind == "bool":
        return bool(value)
    return value


class Store:
    """One database; used from one thread at a time."""

    def __init__(self, path: str = ":memory:") -> None:
        """Open `path`, and make the tables if it is new. Raises LoadError if it is unusable."""
        try:
            self.db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, cached_statements=512
            )
            self.db.execute("PRAGMA foreign_keys = ON")
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = OFF")  # a trial may lose its last seconds
            self.db.create_function("matches", 2, _matches, deterministic=True)
            self._set_up()
        except sqlite3.Error as error:
            raise LoadError(
                f"the database file {path} cannot be used ({error}): give --db a file that a "
                "sandbox made, a path that does not exist yet in a folder that does, or :memory:"
            ) from None
        self._slugs: dict[tuple[str, str], dict[str, Any]] = {}
        self.version: dict[str, int] = dict.fromkeys(MODELS, 0)
        """How often each table was written; what is derived from a table is kept until then."""
        self.cache: dict[str, Any] = {}
        """Where others keep what they derived."""

    def _set_up(self) -> None:
        tables = {row[0] for row in self.db.execute("SELECT name FROM sqlite_master")}
        if not tables:
            self.db.executescript("BEGIN;" + create_sql() + "COMMIT;")
        elif not {"session", "dataset", "filerecord"} <= tables:
            raise sqlite3.DatabaseError("it holds something else")

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    @property
    def is_empty(self) -> bool:
        """Whether no lab was loaded yet."""
        return self.db.execute("SELECT 1 FROM labmember LIMIT 1").fetchone() is None

    # -- reading

    def rows(self, model: Model, sql: str, values: Iterable[Any] = ()) -> list[Row]:
        """The rows of `model` that a SELECT of its columns (all, in order) gives."""
        columns = _stored(model.name)
        return [
            {n: _decode(f, value) for (n, f), value in zip(columns, row, strict=True)}
            for row in self.db.execute(sql, tuple(values))
        ]

    def find(self, name: str, where: str = "1", values: Iterable[Any] = ()) -> list[Row]:
        """Rows of the table `name`, in the table's own order."""
        model = MODELS[name]
        sql = f"SELECT {columns_sql(model)} FROM {name} t WHERE {where} ORDER BY {order_sql(model)}"
        return self.rows(model, sql, values)

    def first(self, name: str, /, **equal: Any) -> Row | None:
        """The one row whose columns equal what is given (None: NULL), or None."""
        where = " AND ".join(f'"{column}" IS ?' for column in equal) or "1"
        found = self.find(name, where, equal.values())
        return found[0] if found else None

    def only(self, name: str, /, **equal: Any) -> Row | None:
        """The one row, as `first`. Raises DatabaseRefusedError if there are more."""
        where = " AND ".join(f'"{column}" IS ?' for column in equal)
        found = self.find(name, where, equal.values())
        if len(found) > 1:
            title = MODELS[name].title
            raise DatabaseRefusedError(
                f"get() returned more than one {title} -- it returned {len(found)}!"
            )
        return found[0] if found else None

    def get(self, name: str, row_id: str) -> Row:
        """The row with this id; it must exist."""
        return self.find(name, "id = ?", (row_id,))[0]

    def slug(self, name: str, column: str, row_id: str | None) -> Any:
        """One column of one row, remembered until that table is written to."""
        if row_id is None:
            return None
        known = self._slugs.setdefault((name, column), {})
        if row_id not in known:
            sql = f'SELECT "{column}" FROM {name} WHERE id = ?'
            known[row_id] = self.db.execute(sql, (row_id,)).fetchone()[0]
        return known[row_id]

    def linked(self, name: str, field: str, row_id: str) -> list[str]:
        """The ids a many-to-many field of a row points to, in the order Alyx lists them."""
        model = MODELS[name]
        target = MODELS[model.fields[field].to]
        order = order_sql(target) if target.ordering else "l.seq"
        sql = (
            f"SELECT t.id FROM {through(model, field)} l JOIN {target.name} t ON t.id = l.target "
            f"WHERE l.source = ? ORDER BY {order}"
        )
        return [row[0] for row in self.db.execute(sql, (row_id,))]

    # -- writing

    def _touch(self, name: str) -> None:
        self.version[name] += 1
        for key in [key for key in self._slugs if key[0] == name]:
            del self._slugs[key]

    def insert(self, name: str, values: Mapping[str, Any]) -> str:
        """Add a row, filling in defaults; return its id."""
        model = MODELS[name]
        row_id = str(values.get("id") or _new_id(name))
        row: Row = {"id": row_id}
        for column, definition in model.fields.items():
            if column == "id" or definition.kind == "links":
                continue
            value = values[column] if column in values else self._default(definition)
            row[column] = encode(definition, value)
        marks = ", ".join("?" * len(row))
        names = ", ".join(f'"{column}"' for column in row)
        self.db.execute(f"INSERT INTO {name} ({names}) VALUES ({marks})", tuple(row.values()))
        self._touch(name)
        self._set_links(model, row_id, values)
        return row_id

    def update(self, name: str, row_id: str, values: Mapping[str, Any]) -> None:
        """Write columns and many-to-many fields of a row, and the time it was written."""
        model = MODELS[name]
        row = {
            column: encode(definition, values[column])
            for column, definition in model.fields.items()
            if column in values and definition.kind != "links"
        }
        for column, definition in model.fields.items():
            if definition.default is ON_SAVE:
                row[column] = utc_now()
        if row:
            pairs = ", ".join(f'"{column}" = ?' for column in row)
            self.db.execute(f"UPDATE {name} SET {pairs} WHERE id = ?", (*row.values(), row_id))
            self._touch(name)
        self._set_links(model, row_id, values)

    def link(self, name: str, field: str, row_id: str, targets: Sequence[str]) -> None:
        """Make a many-to-many field point to `targets` and nothing else."""
        table = through(MODELS[name], field)
        held = {
            r[0] for r in self.db.execute(f"SELECT target FROM {table} WHERE source=?", (row_id,))
        }
        for target in held.difference(targets):
            self.db.execute(f"DELETE FROM {table} WHERE source=? AND target=?", (row_id, target))
        for target in targets:
            if target not in held:
                self.db.execute(
                    f"INSERT OR IGNORE INTO {table} (source, target) VALUES (?, ?)",
                    (row_id, target),
                )

    def delete(self, name: str, row_id: str) -> None:
        """Remove a row, and what belongs to it."""
        for model in MODELS.values():
            for column, definition in model.fields.items():
                if definition.to == name and definition.on_delete == "UNKNOWN":
                    fallback = self._unknown(name)
                    sql = f"UPDATE {model.name} SET {column} = ? WHERE {column} = ?"
                    self.db.execute(sql, (fallback, row_id))
        self.db.execute(f"DELETE FROM {name} WHERE id = ?", (row_id,))
        for table in MODELS:
            self._touch(table)

    def _set_links(self, model: Model, row_id: str, values: Mapping[str, Any]) -> None:
        for column, targets in values.items():
            if _is_links(model, column):
                self.link(model.name, column, row_id, targets)

    def _default(self, column: Field) -> Any:
        if column.default is NOW or column.default is ON_SAVE:
            return utc_now()
        if column.kind == "link" and column.default == "first":
            found = self.db.execute(f"SELECT id FROM {column.to} ORDER BY seq LIMIT 1").fetchone()
            return found[0] if found else None
        if column.kind == "link" and column.default == "unknown":
            return self._unknown(column.to)
        return column.default

    def _unknown(self, name: str) -> str:
        known = self.first(name, name="unknown")
        return (
            known["id"] if known else self.insert(name, {"name": "unknown", "file_extension": ""})
        )

    # -- the lab

    def load(self, lab: str | Path | Mapping[str, Any] | None) -> dict[str, str]:
        """Fill an empty database with `lab`: a JSON file, its content, or None for the built-in.

        Returns the users with their passwords, of which the database keeps a hash.

        Raises LoadError, with what is wrong, and leaves the database empty.
        """
        content = _read_lab(lab)
        self.db.execute("BEGIN")
        try:
            self._load(content)
        except (KeyError, TypeError, AttributeError, sqlite3.Error) as error:
            self.db.execute("ROLLBACK")
            raise LoadError(
                f"the lab to load is not complete ({type(error).__name__}: {error}): it must be "
                "an object with the lists users, labs, repositories, subjects, projects, "
                "locations, procedures, water_types, dataset_types and data_formats"
            ) from None
        self.db.execute("COMMIT")
        return {user["username"]: user["password"] for user in content["users"]}

    def _load(self, content: Mapping[str, Any]) -> None:
        known = _catalogue()
        for user in content["users"]:
            row = {**user, "password": hash_password(user["password"])}
            self.insert("labmember", {**row, "is_staff": user.get("is_superuser", False)})
        for repository in content["repositories"]:
            kind = repository.get("repository_type")
            self.insert("datarepository", {**repository, "repository_type": self._type_of(kind)})
        for lab in content["labs"]:
            repositories = [self._id("datarepository", name) for name in lab["repositories"]]
            self.insert("lab", {**lab, "repositories": repositories})
        self.insert("species", {"nickname": "Laboratory mouse"})
        owner = self._owner()
        for subject in content["subjects"]:
            lab_id = self._id("lab", subject["lab"])
            self.insert("subject", {"responsible_user": owner, **subject, "lab": lab_id})
        for location in content["locations"]:
            self.insert("lablocation", {**location, "lab": self._id("lab", location["lab"])})
        for key, name in _PLAIN_LISTS.items():
            for entry in content[key]:
                values = {"name": entry} if isinstance(entry, str) else entry
                about = known.get(key, {}).get(values["name"], {})
                pattern = {"filename_pattern": values.get("filename_pattern") or None}
                self.insert(name, {**about, **values, **pattern})

    def _owner(self) -> str | None:
        """Who is responsible for the subjects loaded: the first superuser."""
        boss = self.first("labmember", is_superuser=1) or self.first("labmember")
        return boss["id"] if boss else None

    def _type_of(self, name: str | None) -> str | None:
        if name is None:
            return None
        held = self.first("datarepositorytype", name=name)
        return held["id"] if held else self.insert("datarepositorytype", {"name": name})

    def _id(self, name: str, called: str) -> str:
        row = self.first(name, name=called)
        if row is None:
            raise KeyError(f"{MODELS[name].verbose} {called} is used but not listed")
        return str(row["id"])


_VERY_MANY = {"dataset", "filerecord"}


def _new_id(name: str) -> uuid.UUID:
    """Return an id for a new row: at random, as Alyx's are, but in order where there are very many.

    At random, each new row of a large table changes another page of each index that holds its id,
    and SQLite copies a page before it changes it: registering took 10 % longer with 20,000 datasets
    than with none.
    """
    row_id = uuid.uuid4()
    if name in _VERY_MANY:
        row_id = uuid.UUID(int=time.time_ns() << 64 | row_id.int % 2**64, version=4)
    return row_id


_PLAIN_LISTS = {
    "projects": "project",
    "procedures": "proceduretype",
    "water_types": "watertype",
    "dataset_types": "datasettype",
    "data_formats": "dataformat",
}


def _matches(text: str | None, pattern: str) -> bool:
    return text is not None and re.search(pattern, text) is not None


def _is_links(model: Model, column: str) -> bool:
    return column in model.fields and model.fields[column].kind == "links"


def columns_sql(model: Model) -> str:
    """All columns of `model`, table alias `t`, in the order that `Store.rows` expects."""
    return _columns_sql(model.name)


@cache
def _stored(name: str) -> tuple[tuple[str, Field], ...]:
    return tuple((n, f) for n, f in MODELS[name].fields.items() if f.kind != "links")


@cache
def _columns_sql(name: str) -> str:
    return ", ".join(f't."{column}"' for column, _ in _stored(name))


def order_sql(model: Model) -> str:
    """The model's own order; where Alyx states none, the order of creation."""
    parts = [
        f't."{name.lstrip("-")}"' + (" DESC NULLS FIRST" if name.startswith("-") else "")
        for name in model.ordering
    ]
    return ", ".join([*parts, "t.seq"])


def data_file(name: str) -> bytes:
    """A file of the package's `data` folder."""
    return resources.files("regd.sandbox").joinpath("data", name).read_bytes()


def _catalogue() -> dict[str, dict[str, Row]]:
    """What Alyx ships about well-known dataset types and formats, beyond what a lab file says."""
    content: dict[str, dict[str, Row]] = json.loads(data_file("catalogue.json"))
    return content


def _read_lab(lab: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if isinstance(lab, Mapping):
        return lab
    try:
        content = json.loads(
            data_file("default_lab.json") if lab is None else Path(lab).read_bytes()
        )
    except OSError as error:
        raise LoadError(f"cannot read the lab file {lab}: {error.strerror}") from None
    except ValueError as error:
        raise LoadError(f"the lab file {lab} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"the lab file {lab} must hold one JSON object")
    return content
