"""What the sandbox holds: the tables of Alyx that registration touches, as one declaration.

The SQL schema, the checks on what is sent, and the filters are all derived from this page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from one.alf.spec import _DEFAULT as _ALF_PARTS
from one.alf.spec import QC

ALF: Final[Mapping[str, str]] = dict(_ALF_PARTS)

Kind = Literal[
    "char", "text", "int", "bigint", "float", "bool", "datetime", "date", "json", "uuid",
    "email", "url", "qc", "link", "links",
]  # fmt: skip

NOW: Final = object()
"""A default: the moment of creation."""
ON_SAVE: Final = object()
"""A default: the moment of the latest write."""

QC_NAMES: Final[Mapping[int, str]] = {int(level): level.name for level in QC}


@dataclass(frozen=True)
class Field:
    """One column, or (kind `links`) one many-to-many table."""

    kind: Kind
    blank: bool = False
    null: bool = False
    default: Any = None
    max_length: int | None = None
    unique: bool = False
    taken: str = ""
    """What is said of a value that must be unique and is not; empty: the usual words."""
    pattern: str | None = None
    message: str | None = None
    minimum: float | None = None
    choices: tuple[str, ...] = ()
    to: str = ""
    on_delete: Literal["CASCADE", "SET NULL", "UNKNOWN"] = "CASCADE"
    reverse: str = ""
    """The name under which the linked table reaches back here in a filter."""


@dataclass(frozen=True)
class Model:
    """One table. `title` is how Alyx calls it in its messages."""

    name: str
    title: str
    fields: Mapping[str, Field]
    ordering: tuple[str, ...] = ()
    unique_together: tuple[tuple[str, ...], ...] = ()
    other_names: tuple[str, ...] = ()
    """Names Alyx knows here and the sandbox does not hold; they appear in its error messages."""
    label: str = ""
    links_back: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def verbose(self) -> str:
        """The table's name in a sentence, as in 'data format with this name already exists'."""
        return self.label or self.name.replace("_", " ")


def _char(length: int = 255, **options: Any) -> Field:
    return Field("char", max_length=length, **options)


def _link(to: str, **options: Any) -> Field:
    return Field("link", to=to, **options)


ID = Field("uuid")
JSON = Field("json", null=True, blank=True)
NAME = _char(blank=True, default="")
BLANK = _char(blank=True, default="")
NOTE = _char(1023, blank=True, default="")
TEXT = Field("text", blank=True, default="")
UNIQUE_NAME = _char(unique=True)
CREATED = Field("datetime", null=True, blank=True, default=NOW)
WRITTEN = Field("datetime", null=True, blank=True, default=ON_SAVE)
DAY = Field("date", null=True, blank=True)
FLAG = Field("bool", default=False)
COUNT = Field("int", null=True, blank=True)
FRACTION = Field("float", default=0.0)


def _model(name: str, title: str, /, **columns: Any) -> Model:
    options = {
        key: columns.pop(key)
        for key in ("ordering", "unique_together", "other_names", "label")
        if key in columns
    }
    return Model(name, title, {"id": ID, **columns}, **options)


def _named(name: str, title: str, **columns: Any) -> Model:
    return _model(name, title, name=UNIQUE_NAME, json=JSON, **columns)


_ALL = (
    _model(
        "labmember", "LabMember", label="user", ordering=("username",),
        username=_char(
            150, unique=True, pattern=r"^[\w.@+-]+\Z",
            message="Enter a valid username. This value may contain only letters, numbers, "
            "and @/./+/-/_ characters.",
            taken="A user with that username already exists."),
        first_name=_char(150, blank=True, default=""), last_name=_char(150, blank=True, default=""),
        last_login=Field("datetime", null=True, blank=True),
        date_joined=Field("datetime", default=NOW),
        email=Field("email", max_length=254, blank=True, default=""),
        password=_char(default=""), token=_char(40, null=True, default=None),
        is_superuser=FLAG, is_staff=FLAG, is_active=Field("bool", default=True),
        is_public_user=FLAG, is_stock_manager=FLAG,
        allowed_users=Field("links", to="labmember", blank=True),
    ),
    _named("datarepositorytype", "DataRepositoryType", label="data repository type",
           ordering=("name",)),
    _named(
        "datarepository", "DataRepository", label="data repository", ordering=("name",),
        repository_type=_link("datarepositorytype", null=True, blank=True),
        hostname=_char(200, blank=True, default="", pattern=r"^[a-zA-Z0-9\.\-\_]+$",
                       message="Invalid hostname"),
        data_url=Field("url", max_length=200, null=True, blank=True),
        timezone=_char(64, blank=True, default="UTC"),
        globus_path=_char(1000, blank=True, default=""),
        globus_endpoint_id=Field("uuid", null=True, blank=True),
        globus_is_personal=Field("bool", null=True, blank=True),
    ),
    _model(
        "lab", "Lab",
        name=_char(unique=True, pattern=f"^{ALF['lab']}$",
                   message="Lab name must only contain letters, numbers, and underscores."),
        json=JSON, institution=BLANK, address=BLANK,
        timezone=_char(64, blank=True, default="UTC"),
        reference_weight_pct=FRACTION, zscore_weight_pct=FRACTION,
        repositories=Field("links", to="datarepository", blank=True, reverse="lab"),
    ),
    _model("lablocation", "LabLocation", label="lab location",
           name=_char(), json=JSON, lab=_link("lab", default="first")),
    _named("project", "Project", description=NOTE,
           users=Field("links", to="labmember", blank=True, reverse="project")),
    _model("species", "Species", nickname=UNIQUE_NAME),
    _model("strain", "Strain", name=UNIQUE_NAME),
    _model("line", "Line", name=UNIQUE_NAME),
    _model("litter", "Litter", name=UNIQUE_NAME),
    _model("source", "Source", name=UNIQUE_NAME),
    _model(
        "subject", "Subject", ordering=("nickname", "-birth_date"),
        unique_together=(("nickname", "lab"), ("nickname", "responsible_user")),
        nickname=_char(
            64, default="-", pattern=f"^{ALF['subject']}$",
            message="Nicknames must only contain letters, numbers, hyphens and underscores. "
            "Dots are reserved for breeding subjects."),
        name=NAME, json=JSON,
        responsible_user=_link("labmember", null=True, blank=True, on_delete="SET NULL",
                               reverse="subjects_responsible"),
        birth_date=DAY, death_date=DAY,
        species=_link("species", null=True, blank=True, on_delete="SET NULL", default="first"),
        sex=_char(1, blank=True, default="U", choices=("M", "F", "U")),
        litter=_link("litter", null=True, blank=True, on_delete="SET NULL"),
        strain=_link("strain", null=True, blank=True, on_delete="SET NULL"),
        source=_link("source", null=True, blank=True, on_delete="SET NULL"),
        line=_link("line", null=True, blank=True, on_delete="SET NULL"),
        lab=_link("lab"), projects=Field("links", to="project", blank=True, reverse="subject"),
        description=TEXT, adverse_effects=TEXT, actual_severity=COUNT,
        cage=_char(64, null=True, blank=True), ear_mark=_char(32, blank=True, default=""),
        protocol_number=_char(1, default="1", choices=("1", "2", "3", "4")),
        to_be_genotyped=FLAG, to_be_culled=FLAG, wean_date=DAY, genotype_date=DAY,
        reduced_date=DAY,
    ),
    _model("proceduretype", "ProcedureType", label="procedure type",
           name=_char(), json=JSON, description=TEXT),
    _model("watertype", "WaterType", label="water type", name=_char(128, unique=True), json=JSON),
    _model(
        "session", "Session",
        other_names=("field_of_view", "probe_insertion", "session", "tasks"),
        subject=_link("subject", reverse="actions_sessions"),
        users=Field("links", to="labmember", blank=True, reverse="session"),
        location=_link("lablocation", null=True, blank=True, on_delete="SET NULL",
                       reverse="session"),
        lab=_link("lab", null=True, blank=True, on_delete="SET NULL", reverse="session"),
        procedures=Field("links", to="proceduretype", blank=True, reverse="session"),
        projects=Field("links", to="project", blank=True, reverse="session"),
        name=NAME, json=JSON,
        type=_char(null=True, blank=True), task_protocol=NOTE, number=COUNT,
        start_time=CREATED, end_time=Field("datetime", null=True, blank=True),
        narrative=TEXT,
        parent_session=_link("session", null=True, blank=True, on_delete="SET NULL"),
        n_correct_trials=COUNT, n_trials=COUNT, qc=Field("qc", default=int(QC.NOT_SET)),
        extended_qc=JSON, auto_datetime=WRITTEN,
    ),
    _named(
        "dataformat", "DataFormat", label="data format", ordering=("name",),
        description=BLANK,
        file_extension=_char(pattern=r"^\.[^\.]+$",
                             message="Invalid file extension, should start with a dot"),
        matlab_loader_function=BLANK, python_loader_function=BLANK,
    ),
    _model(
        "datasettype", "DatasetType", label="dataset type", ordering=("name",),
        name=_char(unique=True, blank=True, default=""), json=JSON,
        created_by=_link("labmember", null=True, blank=True), description=NOTE,
        filename_pattern=_char(unique=True, null=True, blank=True),
    ),
    _model("tag", "Tag", ordering=("name",), name=_char(unique=True, blank=True, default=""),
           json=JSON, description=NOTE, protected=FLAG, public=FLAG,
           hash=_char(64, null=True, blank=True)),
    _model(
        "revision", "Revision", ordering=("name",),
        name=_char(unique=True, blank=True, default="", pattern=f"^{ALF['revision']}$",
                   message="Revisions must only contain letters, numbers, hyphens, underscores "
                   "and forward slashes."),
        json=JSON, description=NOTE, created_datetime=CREATED,
    ),
    _model(
        "dataset", "Dataset", other_names=("data_notices", "download", "field_of_view",
                                           "probe_insertion"),
        name=_char(), json=JSON,
        session=_link("session", null=True, blank=True, reverse="data_dataset_session_related"),
        created_by=_link("labmember", null=True, blank=True),
        created_datetime=CREATED,
        generating_software=BLANK,
        provenance_directory=_link("dataset", null=True, blank=True),
        content_type=_char(null=True, blank=True), object_id=Field("uuid", null=True, blank=True),
        file_size=Field("bigint", null=True, blank=True),
        md5=Field("uuid", null=True, blank=True),
        hash=_char(64, blank=True, default=""), version=_char(64, blank=True, default=""),
        collection=_char(
            blank=True, default="", pattern=f"^{ALF['collection']}$",
            message="Collections must only contain letters, numbers, hyphens, underscores and "
            "forward slashes."),
        dataset_type=_link("datasettype", on_delete="UNKNOWN", default="unknown"),
        data_format=_link("dataformat", on_delete="UNKNOWN", default="unknown"),
        revision=_link("revision", null=True, blank=True, on_delete="SET NULL", reverse="dataset"),
        tags=Field("links", to="tag", blank=True, reverse="datasets"),
        auto_datetime=WRITTEN, default_dataset=Field("bool", default=True),
        qc=Field("qc", default=int(QC.NOT_SET)),
    ),
    _model(
        "filerecord", "FileRecord", label="file record",
        unique_together=(("data_repository", "relative_path"),),
        dataset=_link("dataset", reverse="file_records"),
        data_repository=_link("datarepository", reverse="filerecord"),
        name=NAME, json=JSON,
        relative_path=_char(1000, pattern=r"^[a-zA-Z0-9\_][^\\\:]+$", message="Invalid path"),
        exists=FLAG,
    ),
    _model(
        "weighing", "Weighing",
        subject=_link("subject", reverse="weighings"),
        user=_link("labmember", null=True, blank=True, on_delete="SET NULL"),
        name=NAME, json=JSON, date_time=CREATED, weight=Field("float", minimum=0),
    ),
    _model(
        "wateradministration", "WaterAdministration", label="water administration",
        subject=_link("subject", reverse="water_administrations"),
        user=_link("labmember", null=True, blank=True, on_delete="SET NULL"),
        session=_link("session", null=True, blank=True, on_delete="SET NULL",
                      reverse="wateradmin_session_related"),
        water_type=_link("watertype", null=True, blank=True, on_delete="SET NULL"),
        name=NAME, json=JSON, date_time=CREATED,
        water_administered=Field("float", null=True, blank=True, minimum=0), adlib=FLAG,
    ),
)  # fmt: skip

MODELS: Final[Mapping[str, Model]] = {model.name: model for model in _ALL}

for _owner in _ALL:
    for _name, _field in _owner.fields.items():
        if _field.reverse:
            MODELS[_field.to].links_back[_field.reverse] = (_owner.name, _name)


def through(model: Model, name: str) -> str:
    """The table that holds a many-to-many link; columns `source` and `target`."""
    return f"{model.name}_{name}"


_SQL_TYPES = {
    "int": "INTEGER", "bigint": "INTEGER", "bool": "INTEGER", "qc": "INTEGER", "float": "REAL",
}  # fmt: skip


def _column(name: str, column: Field) -> str:
    if name == "id":
        return "id TEXT NOT NULL UNIQUE"
    sql = f'"{name}" {_SQL_TYPES.get(column.kind, "TEXT")}'
    if not column.null:
        sql += " NOT NULL"
    if column.unique:
        sql += " UNIQUE"
    if column.kind == "link":
        sql += f" REFERENCES {column.to}(id)"
        if column.on_delete != "UNKNOWN":
            sql += f" ON DELETE {column.on_delete}"
    return sql


_FEW = {"labmember", "datarepository", "datasettype", "dataformat"}
"""Tables of few rows, to each of which very many point: these are not found faster by an index."""

_INDEXED = {("dataset", "session"): "session, name, collection"}
"""Links whose index holds more, for what is asked with each file."""


def create_sql() -> str:
    """The whole schema as SQL. `seq` keeps the order of creation, which unordered lists follow."""
    parts = []
    for model in _ALL:
        columns = [_column(n, f) for n, f in model.fields.items() if f.kind != "links"]
        columns += [f"UNIQUE ({', '.join(names)})" for names in model.unique_together]
        parts.append(
            f"CREATE TABLE {model.name} (seq INTEGER PRIMARY KEY AUTOINCREMENT, "
            f"{', '.join(columns)});"
        )
        for name, column in model.fields.items():
            if column.kind == "link" and column.to not in _FEW:
                indexed = _INDEXED.get((model.name, name), name)
                parts.append(f"CREATE INDEX {model.name}_by_{name} ON {model.name}({indexed});")
            elif column.kind == "links":
                table = through(model, name)
                parts.append(
                    f"CREATE TABLE {table} (seq INTEGER PRIMARY KEY AUTOINCREMENT, "
                    f"source TEXT NOT NULL REFERENCES {model.name}(id) ON DELETE CASCADE, "
                    f"target TEXT NOT NULL REFERENCES {column.to}(id) ON DELETE CASCADE, "
                    f"UNIQUE (source, target));"
                    f"CREATE INDEX {table}_back ON {table}(target);"
                )
    parts.append("CREATE INDEX session_by_time ON session(start_time);")
    return "\n".join(parts)
