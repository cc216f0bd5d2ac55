"""What regd is told: arguments over environment over secret files over a YAML file.

pydantic-settings reads and merges; what is added here is where each value came from, so that
a mistake can be named with its file and line, and so that `regd config` can show it. An unknown
name is refused wherever it stands: a misspelt setting that is quietly ignored costs data.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import pydantic_settings
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from regd.errors import SettingsError, encodable

PREFIX = "REGD_"
_SHORT = reprlib.Repr()
_SHORT.maxstring = 200  # a path is to be seen whole
MASK = "********"

# Names that are never data: hidden, temporary, half-copied, or put there by an operating system.
NEVER_DATA = (
    ".*",
    "*~",
    "*.tmp",
    "*.temp",
    "*.part",
    "*.partial",
    "*.filepart",
    "*.crdownload",
    "*.swp",
    "*.lock",
    "*.flag",
    "Thumbs.db",
    "desktop.ini",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "__pycache__",
)


# --- kinds of value --------------------------------------------------------------------------


def _blank_is_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _strip(value: str | None) -> str | None:
    return value if value is None else value.strip()


def _no_bool(value: object) -> object:
    # YAML reads `yes` and `on` as true, which would otherwise count as 1.
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004  # pydantic wants a ValueError
    return value


def _as_path(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise ValueError("begins with ~, but there is no such home folder") from None
    if "\0" in value:
        raise ValueError("must be a path")
    return path


def _as_list(value: object) -> object:
    """Return the list in a text such as `a, b` or `["a", "b"]`: variables hold only text."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json_list(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def _json_list(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError('must be a list, such as ["a", "b"]') from None


def _as_version(value: object) -> object:
    if value is not None and not isinstance(value, str):
        raise ValueError('must be text; write a number in quotes, as "1.0"')
    return value.strip() or None if value else None


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _server_url(value: str | None) -> str | None:
    if value is None:
        return None
    example = "must be an http or https address, such as https://alyx.example.org"
    try:
        parts = urlsplit(value.strip())
        parts.port  # noqa: B018  # it is the reading that checks the number
    except ValueError:
        raise ValueError(example) from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or re.search(r"\s", value.strip())
    ):
        raise ValueError(example)
    if "@" in parts.netloc:
        raise ValueError("must not hold a password; set alyx.username and alyx.password instead")
    if parts.query or parts.fragment:
        raise ValueError("must end before any ? or #")
    return value.strip().rstrip("/")


def _token(value: SecretStr | None) -> SecretStr | None:
    text = value.get_secret_value().strip() if value else ""
    if not re.fullmatch(r"[!-~]*", text):  # anything else cannot stand in an HTTP header
        raise ValueError("must be the token alone, one word without spaces")
    return SecretStr(text) if text else None


def _password(value: SecretStr | None) -> SecretStr | None:
    return value if value and value.get_secret_value() else None


def _existing_file(value: Path | None) -> Path | None:
    # os.path and os.access answer; Path.is_file raises where a folder may not be entered.
    if value is not None and not os.path.isfile(value):  # noqa: PTH113
        raise ValueError("must name an existing file")
    if value is not None and not os.access(value, os.R_OK):
        raise ValueError("must be a file that this user may read")
    return value


def _plain_name(value: str) -> str:
    if not value or value in (".", "..") or re.search(r"[/\\\0]", value):
        raise ValueError("must be a plain file name, without a folder")
    return value


def _host(value: str) -> str:
    host = value.strip().removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"[\w.:%-]+", host, re.ASCII):
        raise ValueError("must be an address or a name, without port, such as 127.0.0.1")
    return host


def _prom_file(value: Path | None) -> Path | None:
    # node_exporter looks at no other names
    if value is not None and not (value.is_absolute() and value.suffix == ".prom"):
        raise ValueError("must be a whole path that ends in .prom")
    return value


OptionalText = Annotated[str | None, BeforeValidator(_blank_is_none), AfterValidator(_strip)]
OptionalPath = Annotated[Path | None, BeforeValidator(_as_path)]
Texts = Annotated[list[str], BeforeValidator(_as_list)]
# Thirty years: what waits for longer than the system can count would fail when it is used.
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False, le=1e9)]
# Python refuses to print integers of more than 4300 digits: a limit, so that all can be shown.
Count = Annotated[int, BeforeValidator(_no_bool), Field(le=2**63 - 1)]
OneOrMore = Annotated[Count, Field(ge=1)]


def default_state_dir() -> Path:
    """Return where the journal goes when nothing says so.

    systemd's $STATE_DIRECTORY, else /var/lib/regd for root, else regd below $XDG_STATE_HOME
    (~/.local/state when that is not set or not absolute).
    """
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])  # systemd lists several with colons
    if os.geteuid() == 0:
        return Path("/var/lib/regd")
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local/state") / "regd"


# --- the settings ----------------------------------------------------------------------------


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class AlyxSettings(_Section):
    """The lab database: where it is and who regd is there."""

    url: Annotated[OptionalText, AfterValidator(_server_url)] = Field(
        default=None, description="Address of Alyx, such as `https://alyx.example.org`."
    )
    username: OptionalText = Field(
        default=None, description="Alyx user that regd works as; name it beside a token too."
    )
    password: Annotated[SecretStr | None, AfterValidator(_password)] = Field(
        default=None,
        description="That user's password; not needed with a token. Better in a secret file.",
    )
    token: Annotated[SecretStr | None, AfterValidator(_token)] = Field(
        default=None, description="That user's Alyx token. Better in a secret file."
    )
    ca_file: Annotated[OptionalPath, AfterValidator(_existing_file)] = Field(
        default=None,
        description="Certificate file (PEM) to trust, for an Alyx with the lab's own certificate.",
    )
    timeout_s: Annotated[Seconds, Field(gt=0, le=86400)] = Field(
        default=60, description="Seconds to wait for an answer of Alyx."
    )
    requests_per_minute: Annotated[OneOrMore | None, BeforeValidator(_blank_is_none)] = Field(
        default=500,
        description="Most requests a minute; null for no limit. Alyx itself allows 550 a user.",
    )


class RegisterSettings(_Section):
    """What is registered of a session, and how."""

    files: bool = Field(
        default=True, description="Register the session's files; false only creates the sessions."
    )
    users: Texts = Field(
        default_factory=list,
        description="Alyx users named on new sessions; `alyx.username` when empty.",
    )
    created_by: OptionalText = Field(
        default=None,
        description="Alyx user named as the maker of the datasets; `alyx.username` when empty.",
    )
    versions: Annotated[str | None, BeforeValidator(_as_version)] = Field(
        default=None,
        description="Version of the software that made the files, written on each dataset.",
    )
    default: bool = Field(
        default=True,
        description="Mark registered revisions as the default ones, loaded unless asked else.",
    )
    server_only: bool = Field(
        default=False,
        description="Make file records in the lab's online repositories only, not in local ones.",
    )
    exists: bool = Field(
        default=True,
        description="Tell Alyx that the files exist in `repository`; needs a repository.",
    )
    max_md5_size: Annotated[
        Annotated[Count, Field(ge=0)] | None, BeforeValidator(_blank_is_none)
    ] = Field(
        default=None,
        description="Bytes; files of this size and more get no MD5. Null: all get one.",
    )
    chunk_files: OneOrMore = Field(default=100, description="Most files in one request.")


class SettleSettings(_Section):
    """When a file counts as finished."""

    quiet_s: Annotated[Seconds, Field(ge=0)] = Field(
        default=30,
        description="Seconds a file must keep its size and time before it is registered.",
    )
    closed_quiet_s: Annotated[Seconds, Field(ge=0)] = Field(
        default=2,
        description="The same, in seconds, for a file seen closed by the program that wrote it.",
    )
    max_wait_s: Annotated[Seconds, Field(gt=0)] = Field(
        default=86400,
        description="Seconds after which a file that still grows, or is held open, is reported.",
    )


class ScanSettings(_Section):
    """The walk through the whole data folder that finds what no event told of."""

    every_s: Annotated[Seconds, Field(gt=0)] = Field(
        default=600,
        description="Most seconds from one scan of the data folder to the next. Where the kernel "
        "does not tell of all changes (network drives, FUSE), scans come sooner: after 30 s, or "
        "ten times as long as the last one took.",
    )
    backlog_days: Annotated[Seconds, Field(ge=0)] = Field(
        default=14,
        description="Days; older data without a flag that regd has not seen before is reported, "
        "not registered.",
    )


class WatchSettings(_Section):
    """How changes below the data folder are noticed."""

    observer: Annotated[Literal["auto", "inotify", "polling", "none"], BeforeValidator(_lower)] = (
        Field(
            default="auto",
            description="How changes are noticed: `inotify` (the kernel tells), `polling` "
            "(listings are compared every 5 s, for small folders), `none` (scans alone), or "
            "`auto`: `inotify` on local disks, scans alone on network drives and FUSE.",
        )
    )
    ignore: Texts = Field(
        default_factory=lambda: list(NEVER_DATA),
        description="Names of files and folders that are never data, as patterns; upper and lower "
        "case are the same. A pattern with a `/` is held against the path below `data_root`. "
        "Replaces the default list.",
    )


class RetrySettings(_Section):
    """How often a session that fails is tried again. An outage of Alyx counts as no attempt."""

    first_s: Annotated[Seconds, Field(gt=0)] = Field(
        default=5, description="Seconds before a failed session is tried again; doubled each time."
    )
    longest_s: Annotated[Seconds, Field(gt=0, validate_default=True)] = Field(
        default=900, description="Most seconds between two attempts."
    )
    attempts: OneOrMore = Field(
        default=12, description="Attempts before a session is parked for a person to look at."
    )

    @field_validator("longest_s")
    @classmethod
    def _not_below_first(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("first_s", 0):
            raise ValueError("must be at least retry.first_s")
        return value


class WebSettings(_Section):
    """The page that shows in a browser how things stand."""

    port: Annotated[
        Annotated[Count, Field(ge=0, le=65535)] | None, BeforeValidator(_blank_is_none)
    ] = Field(
        default=None,
        description="TCP port of the status page, such as 8765; without one there is no page. "
        "0 takes a free one, which the log names.",
    )
    host: Annotated[str, AfterValidator(_host)] = Field(
        default="127.0.0.1",
        description="Address or name of this computer that the page listens on. By default only "
        "this computer reaches it; with any other, whoever is in that network sees the names of "
        "sessions.",
    )


class MetricsSettings(_Section):
    """Numbers for Prometheus. None are made unless a port or a file is named."""

    port: Annotated[
        Annotated[Count, Field(ge=0, le=65535)] | None, BeforeValidator(_blank_is_none)
    ] = Field(
        default=None,
        description="Port that `/metrics` is served on; 0: a free one, which the log names. Null: "
        "on none.",
    )
    host: Annotated[str, AfterValidator(_host)] = Field(
        default="127.0.0.1",
        description="Address that this port is on; by default only this computer can ask.",
    )
    textfile: Annotated[OptionalPath, AfterValidator(_prom_file)] = Field(
        default=None,
        description="File that the metrics are written to for node_exporter's textfile collector, "
        "such as `/var/lib/prometheus/node-exporter/regd.prom`. Null: none.",
    )
    every_s: Annotated[Seconds, Field(ge=1)] = Field(
        default=15,
        description="Seconds from one writing of that file to the next; the journal is read no "
        "more often for the port, either.",
    )


class LogSettings(_Section):
    """What is logged, and in what form."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="info", description="Least severe line shown: `debug`, `info`, `warning`, `error`."
    )
    format: Annotated[Literal["auto", "json", "console"], BeforeValidator(_lower)] = Field(
        default="auto",
        description="`json`, `console` (readable), or `auto`: readable on a terminal.",
    )


class Settings(BaseSettings):
    """All settings of regd; immutable.

    Read from keyword arguments, over the environment (`REGD_ALYX__TOKEN`), over the secret files
    in $CREDENTIALS_DIRECTORY (`alyx__token`), over the YAML file named by $REGD_CONFIG.
    Raises SettingsError if any of these is wrong.
    """

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        serialize_by_alias=True,
        env_prefix=PREFIX,
        env_prefix_target="all",  # the section `register` is known by its alias
        env_nested_delimiter="__",
        env_ignore_empty=True,
        env_parse_none_str="null",
        enable_decoding=False,  # lists are taken from text by the fields themselves
    )

    data_root: OptionalPath = Field(
        default=None,
        description="Folder that the recordings are written below. Required by the daemon.",
    )
    state_dir: Annotated[Path, BeforeValidator(_as_path)] = Field(
        default_factory=default_state_dir,
        description="Folder of regd's journal, on a local disk outside `data_root`. By default "
        "systemd's `$STATE_DIRECTORY`, `/var/lib/regd` for root, or else `~/.local/state/regd`.",
    )
    repository: OptionalText = Field(
        default=None,
        description="Alyx name of the data repository that `data_root` is. Without it Alyx marks "
        "the files as existing nowhere.",
    )
    alyx: AlyxSettings = Field(default_factory=AlyxSettings)
    flag: Annotated[str, AfterValidator(_plain_name)] = Field(
        default="create_me.flag",
        description="Name of the file that asks for a session to be registered.",
    )
    # pydantic warns of a field called `register` (every class has ABCMeta.register): hence the
    # alias for those who write settings and the property for those who read them.
    register_: RegisterSettings = Field(default_factory=RegisterSettings, alias="register")
    settle: SettleSettings = Field(default_factory=SettleSettings)
    scan: ScanSettings = Field(default_factory=ScanSettings)
    watch: WatchSettings = Field(default_factory=WatchSettings)
    retry: RetrySettings = Field(default_factory=RetrySettings)
    workers: Annotated[OneOrMore, Field(le=32)] = Field(
        default=4, description="Sessions worked on at the same time, 1 to 32."
    )
    web: WebSettings = Field(default_factory=WebSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    log: LogSettings = Field(default_factory=LogSettings)

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        *,
        _config: Path | None = None,
        _secrets: Mapping[str, Path] | None = None,
        **values: Any,
    ) -> None:
        given = _gather(values, _config, _secrets or {})
        try:
            super().__init__(**_nested(given))
        except ValidationError as error:
            raise SettingsError(_in_plain_words(error, given)) from None
        self._origins = {key: value.origin for key, value in given.items()}

    @property
    def register(self) -> RegisterSettings:
        """What is registered of a session, and how."""
        return self.register_

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the one source that is left once `__init__` has read the others."""
        return (init_settings,)


def _leaf_fields() -> dict[str, FieldInfo]:
    """Return every setting by its dotted key, in the order they are written down."""
    leaves: dict[str, FieldInfo] = {}
    for name, info in Settings.model_fields.items():
        key = info.alias or name
        section = info.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            leaves |= {f"{key}.{leaf}": below for leaf, below in section.model_fields.items()}
        else:
            leaves[key] = info
    return leaves


LEAVES = _leaf_fields()
SECTIONS = tuple(dict.fromkeys(key.split(".")[0] for key in LEAVES if "." in key))
SECRETS = frozenset(key for key, info in LEAVES.items() if "SecretStr" in str(info.annotation))


# --- where values come from ------------------------------------------------------------------


class _Value(NamedTuple):
    value: object
    origin: str
    line: int | None = None

    @property
    def where(self) -> str:
        return self.origin if self.line is None else f"{self.origin}, line {self.line}"


@dataclass
class _Layer:
    """What one source holds: nested values, and where the dotted keys among them stand."""

    values: Mapping[Any, object]
    origin: str
    origins: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def found(self, key: str, value: object) -> _Value:
        below = (origin for name, origin in self.origins.items() if name.startswith(f"{key}."))
        origin = self.origins.get(key) or next(below, self.origin)
        return _Value(value, origin, self.lines.get(key))


def _gather(
    arguments: dict[str, Any], config: Path | None, secrets: Mapping[str, Path]
) -> dict[str, _Value]:
    """Return the value in force for each dotted key that is given anywhere.

    Raises SettingsError, with all mistakes of all sources.
    """
    if config is None and (named := os.environ.get(f"{PREFIX}CONFIG")):
        config = Path(named)
    readers: list[Callable[[], Iterable[_Layer]]] = [
        lambda: [_read_yaml(config)] if config is not None else [],
        lambda: [_read_secret(name, path) for name, path in secrets.items()],
        _read_secrets,
        lambda: [_read_environment()],
        lambda: [_Layer(InitSettingsSource(Settings, arguments)(), "argument")],
    ]
    given: dict[str, _Value] = {}
    mistakes: list[str] = []
    for reader in readers:
        try:
            for layer in reader():
                mistakes += layer.mistakes
                given |= _flat(layer, layer.values, mistakes)
        except SettingsError as error:
            mistakes += error.mistakes
    if mistakes:
        raise SettingsError(mistakes)
    return given


def _flat(
    layer: _Layer, values: Mapping[Any, object], mistakes: list[str], above: str = ""
) -> dict[str, _Value]:
    flat: dict[str, _Value] = {}
    for name, value in values.items():
        key = above + (name if isinstance(name, str) else _brief(name))
        found = layer.found(key, value)
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        if key not in (*LEAVES, *SECTIONS) or above + str(name).replace(".", "") != key:
            mistakes.append(_unknown(key, found.where))
        elif key in LEAVES:
            flat[key] = found
        elif isinstance(value, Mapping):
            flat |= _flat(layer, value, mistakes, f"{key}.")
        elif value is not None:  # a section whose keys are all commented out is none at all
            # The value stays unsaid: it may be a token in the wrong place.
            mistakes.append(
                f"{found.where}: {key} is a section and holds keys, such as "
                f"{_first_leaf(key)}, not a value; set these instead"
            )
    return flat


def _first_leaf(section: str) -> str:
    return next(key for key in LEAVES if key.startswith(f"{section}."))


def _nested(given: Mapping[str, _Value]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, (value, *_) in given.items():
        *above, name = key.split(".")
        below = nested
        for part in above:
            below = below.setdefault(part, {})
        below[name] = value
    return nested


def _read_environment() -> _Layer:
    layer = _Layer(EnvSettingsSource(Settings)(), "environment")
    values = dict(layer.values)
    for name in os.environ:
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper == f"{PREFIX}CONFIG":
            continue
        if upper.startswith(f"{PREFIX}TEST_"):  # what regd's own tests are told
            continue
        key = _key_of(name)
        layer.origins[key] = f"environment {name}"
        if key.split(".")[0] not in (*LEAVES, *SECTIONS):
            values[key] = None  # pydantic-settings passes over these; they are to be refused
    layer.values = values
    return layer


def _key_of(name: str) -> str:
    return name.lower().removeprefix(PREFIX.lower()).replace("__", ".")


def _read_secrets() -> Iterator[_Layer]:
    """Yield what the secret files hold, named `alyx__token` or `regd_alyx__token`.

    Files of other names are left alone: the folder may serve other programs as well.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return
    try:
        names = sorted(path.name for path in Path(folder).iterdir())
        exposed = [
            mistake
            for name in names
            if (key := _key_of(name)) in SECRETS
            for mistake in _exposed(Path(folder, name), key)
        ]
        sources = [
            NestedSecretsSettingsSource(
                Settings,  # type: ignore[arg-type]  # a class is taken as well as a source
                secrets_dir=folder,
                secrets_dir_missing="error",
                secrets_prefix=prefix,
                secrets_nested_delimiter="__",
            )
            for prefix in ("", PREFIX)
        ]
        found = [source() for source in sources]
    except OSError as error:
        raise SettingsError(
            [
                f"{error.filename or folder}: cannot be read ({error.strerror}); "
                "check the folder that $CREDENTIALS_DIRECTORY names"
            ]
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(
            [f"{folder}: one of the secret files is not text in UTF-8; correct it or take it out"]
        ) from None
    except pydantic_settings.SettingsError as error:
        raise SettingsError([f"{folder}: {error}; put only secret files there"]) from None
    yield _Layer({}, folder, mistakes=exposed)
    for prefix, values in zip(("", PREFIX.lower()), found, strict=True):
        mine = [name for name in names if name.lower().startswith(prefix)]
        origins = {_key_of(name): f"secret file {Path(folder, name)}" for name in mine}
        unknown = [k for k in origins if prefix and k.split(".")[0] not in (*LEAVES, *SECTIONS)]
        yield _Layer(values | dict.fromkeys(unknown), f"secret files in {folder}", origins)


def _read_secret(name: str, path: Path) -> _Layer:
    """Return what one secret file holds, for the key that `name` stands for (alyx__token)."""
    key = _key_of(name)
    origin = f"secret file {path}"
    if key not in SECRETS:
        return _Layer({}, origin)
    try:
        text = path.read_text()
        exposed = list(_exposed(path, key))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        return _Layer({}, origin, mistakes=[f"{path}: cannot be read ({reason}); correct it"])
    section, leaf = key.split(".")
    return _Layer({section: {leaf: text.removesuffix("\n")}}, origin, mistakes=exposed)


class _Loader(yaml.SafeLoader):
    """YAML without merge keys (`<<`), of which a few lines can stand for billions."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave such a key where it is, to be refused."""


def _exposed(path: Path, key: str) -> Iterator[str]:
    """Yield the mistake that a file with a secret gives rights to everybody, if it does."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IRWXO:
        yield (
            f"{path}: holds {key}, and everybody on this computer has a right to it (mode "
            f"{mode:04o}); chmod o= {shlex.quote(str(path))}"
        )


def _read_yaml(path: Path) -> _Layer:
    """Return what a YAML file holds, with the line of each key.

    pydantic-settings' own YAML source is not used: it takes the last of two equal keys, passes
    over a missing file, and knows no lines. Raises SettingsError.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(
            [f"{path}: is not text in UTF-8 (byte {error.start + 1}); save it as UTF-8"]
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no usable file name"
        raise SettingsError(
            [f"{path}: cannot be read ({reason}); check the path and who may read it"]
        ) from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines, twice = _lines(node)
        values = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise SettingsError([_not_yaml(path, error)]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SettingsError(
            [f"{path}, line {line}: holds a character that no text has; remove it"]
        ) from None
    except Exception:  # PyYAML lets its own KeyError, IndexError, ... out for odd tags and depths
        raise SettingsError(
            [f"{path}: is no YAML that regd can read; compare it with the example file"]
        ) from None
    if twice:
        raise SettingsError(
            f"{path}, line {line}: {_printable(key)} is set a second time "
            f"(first in line {lines[key]}); keep one of the two"
            for key, line in twice
        )
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SettingsError(
            [f"{path}: must hold settings as `key: value`, not a {type(values).__name__}"]
        )
    exposed: list[str] = []
    for key in sorted(SECRETS):
        section, leaf = key.split(".")
        held = values.get(section)
        if isinstance(held, dict) and held.get(leaf):
            exposed += _exposed(path, key)
    return _Layer(values, str(path), lines=lines, mistakes=exposed)


def _lines(
    node: yaml.Node | None, above: str = "", depth: int = 2
) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Return the line of each dotted key, and each further place where it is set again."""
    lines: dict[str, int] = {}
    twice: list[tuple[str, int]] = []
    if not isinstance(node, yaml.MappingNode) or not depth:
        return lines, twice
    for name, below in node.value:
        if not isinstance(name, yaml.ScalarNode):
            continue
        key, line = f"{above}{name.value}", name.start_mark.line + 1
        if key in lines:
            twice.append((key, line))
            continue
        inner_lines, inner_twice = _lines(below, f"{key}.", depth - 1)
        lines |= {key: line} | inner_lines
        twice += inner_twice
    return lines, twice


def _not_yaml(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    # What PyYAML quotes may be a piece of a password (`password: *abc` is taken for an alias).
    problem = re.sub(r"\s*['\"].*['\"]", "", error.problem or "", flags=re.DOTALL)
    return (
        f"{path}{place}: is no valid YAML ({' '.join(problem.split())}); check the indentation, "
        "and put values with special characters in quotes"
    )


# --- mistakes in plain words -----------------------------------------------------------------


def _unknown(key: str, where: str) -> str:
    known = (*LEAVES, *SECTIONS)
    if key in known:
        section, leaf = key.split(".")
        return f"{where}: write {leaf} indented below `{section}:`, not {key}"
    return f"{where}: unknown setting {_printable(key)}; {_suggestion(key.lower())}"


def _suggestion(key: str) -> str:
    near = difflib.get_close_matches(key, (*LEAVES, *SECTIONS), 1)
    if not near:  # perhaps the name alone, without its section
        by_name = {leaf.split(".")[-1]: leaf for leaf in LEAVES}
        near = [by_name[name] for name in difflib.get_close_matches(key.split(".")[-1], by_name, 1)]
    if near:
        return f"did you mean {near[0]}?"
    return "remove it (docs/settings.md lists all settings)"


def _printable(text: str) -> str:
    """Return `text` short and safe for any terminal or log."""
    return text if text.isprintable() and len(text) <= 100 else _SHORT.repr(text)[1:-1]


def _brief(value: object) -> str:
    """Return any value as a short text; `reprlib` alone fails at integers of many digits."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        return "a number too long to show"


def _in_plain_words(error: ValidationError, given: Mapping[str, _Value]) -> list[str]:
    mistakes: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        key = _key_at(detail["loc"])
        # A default can only be wrong beside another key of its section.
        beside = (found for name, found in given.items() if name.startswith(key.split(".")[0]))
        value = given.get(key) or next(beside, _Value(None, "default"))
        context = detail.get("ctx", {})
        expected = _expected(detail["type"], context) or str(detail["msg"])
        if len(detail["loc"]) > key.count(".") + 1:
            expected = "must be a list of texts (put them in quotes)"
        shown = "" if key not in given else f", not {_shown(key, value.value)}"
        mistakes.setdefault(
            key, f"{value.where}: {key} {expected}{shown}; correct it{_or_default(key)}"
        )
    return list(mistakes.values())


def _key_at(loc: tuple[int | str, ...]) -> str:
    """Return the dotted key at pydantic's location, which may go on into a list or a union."""
    two = ".".join(str(part) for part in loc[:2])
    return two if two in LEAVES else str(loc[0])


def _expected(kind: str, context: Mapping[str, Any]) -> str | None:
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be one of {context['expected']}"
    limits = {
        "greater_than": "must be more than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
    }
    if kind in limits:
        return limits[kind].format_map({name: _text(limit) for name, limit in context.items()})
    family = kind.split("_")[0]
    return {
        "int": "must be a whole number",
        "float": "must be a number",
        "finite": "must be a number",
        "bool": "must be true or false",
        "string": "must be text (put it in quotes)",
        "path": "must be a path",
        "list": "must be a list",
    }.get(family)


def _shown(key: str, value: object) -> str:
    if value is None:
        return "empty"
    if key in SECRETS:
        return MASK
    if isinstance(value, str):  # an address may hold a password
        value = re.sub(r"//[^/\s]*@", f"//{MASK}@", value)
    return _brief(value) if isinstance(value, (str, int, float, list)) else _brief(str(value))


def _or_default(key: str) -> str:
    default = _default_of(key)
    return "" if default in ("", None) else f", or remove it for the default, {default}"


# --- what the command line asks --------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """Settings and where each came from: a dotted key to a file, a variable or `default`."""

    settings: Settings
    origins: dict[str, str]


class Row(NamedTuple):
    """One setting in force: its dotted key, its value as it may be shown, where it is from."""

    key: str
    value: str
    origin: str


def load(config: Path | None = None, secrets: Mapping[str, Path] | None = None) -> Loaded:
    """Return the settings, with where each came from.

    `config` is the YAML file; $REGD_CONFIG names it if it is None. `secrets` are secret files by
    their names (alyx__token), beside those in $CREDENTIALS_DIRECTORY.
    Raises SettingsError, one line a mistake.
    """
    settings = Settings(_config=config, _secrets=secrets)
    given = settings._origins
    return Loaded(settings, {key: given.get(key, "default") for key in LEAVES})


def rows(loaded: Loaded) -> Iterator[Row]:
    """Yield every setting, in the order of the documentation, secrets masked."""
    for key in LEAVES:
        value = _text(_get(loaded.settings, key))
        yield Row(key, encodable(value), encodable(loaded.origins[key]))


def markdown_table() -> str:
    """Return the table of all settings for docs/settings.md: key, default, meaning."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, info in LEAVES.items():
        default = _default_of(key)
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{key}` | {shown} | {info.description} |")
    return "\n".join(lines)


def check_for_daemon(settings: Settings, origins: Mapping[str, str]) -> None:
    """Check what only the daemon needs: a data folder, Alyx, credentials, a place for its state.

    `origins` is that of `load`. Raises SettingsError, one line a mistake.
    """
    mistakes = [
        *_check_folders(settings, origins),
        *_check_textfile(settings, origins),
        *_check_credentials(settings),
    ]
    if mistakes:
        raise SettingsError(mistakes)


def check_credentials(settings: Settings) -> None:
    """Check that Alyx's address is there, and who to ask it as. Raises SettingsError."""
    if mistakes := [*_check_credentials(settings)]:
        raise SettingsError(mistakes)


def credentials(settings: Settings) -> tuple[str | None, str | None, str | None]:
    """Return the user name, the password and the token to ask Alyx with."""
    alyx = settings.alyx
    password = alyx.password.get_secret_value() if alyx.password else None
    return alyx.username, password, alyx.token.get_secret_value() if alyx.token else None


def credentials_hint(settings: Settings) -> str:
    """Return what to do where Alyx refuses the credentials in these settings."""
    alyx = settings.alyx
    keys = ["alyx.token"] if alyx.token else []
    if alyx.password or not keys:
        keys += ["alyx.username", "alyx.password"]
    origins = {key: settings._origins[key] for key in keys if key in settings._origins}
    what = ", ".join(f"{key} ({origins[key]})" if key in origins else key for key in keys)
    if any(origin.startswith("environment") for origin in origins.values()):
        return f"correct {what}, then: systemctl restart regd"
    if any(origin.startswith("secret file") for origin in origins.values()):
        # systemd copies what LoadCredential names when it starts the service
        return (
            f"correct {what}; under systemd in the file it is loaded from (LoadCredential), "
            "then: systemctl restart regd"
        )
    return f"correct {what}; regd takes it up by itself"


def _check_folders(settings: Settings, origins: Mapping[str, str]) -> Iterator[str]:
    root, state = settings.data_root, settings.state_dir
    where, state_where = (origins.get(key, "default") for key in ("data_root", "state_dir"))
    if not state.is_absolute():
        yield f"{state_where}: state_dir must begin with /, not {_shown('state_dir', state)}"
    if root is None:
        yield _missing("data_root", "the folder that the recordings are written below")
        return
    shown = _shown("data_root", root)
    if not root.is_absolute():
        yield f"{where}: data_root must begin with /, not {shown}; write the whole path"
    elif not os.path.isdir(root):  # noqa: PTH112  # Path.is_dir raises if it may not look
        yield f"{where}: data_root must be an existing folder, not {shown}; create or mount it"
    elif not os.access(root, os.R_OK | os.X_OK):
        yield f"{where}: data_root {shown} may not be read by this user; change who may"
    elif Path(os.path.realpath(state)).is_relative_to(os.path.realpath(root)):
        yield (
            f"{state_where}: state_dir {_shown('state_dir', state)} must be outside data_root "
            f"{shown}; name another folder on a local disk"
        )


def _check_textfile(settings: Settings, origins: Mapping[str, str]) -> Iterator[str]:
    root, file = settings.data_root, settings.metrics.textfile
    if root and file and Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
        yield (
            f"{origins.get('metrics.textfile', 'default')}: metrics.textfile "
            f"{_shown('metrics.textfile', file)} must be outside data_root; name the folder that "
            "node_exporter reads (--collector.textfile.directory)"
        )


def _check_credentials(settings: Settings) -> Iterator[str]:
    alyx = settings.alyx
    if alyx.url is None:
        yield _missing("alyx.url", "the address of Alyx")
    if alyx.token is not None or (alyx.username and alyx.password):
        return
    if alyx.username or alyx.password:
        other = "password" if alyx.username else "username"
        yield _missing(f"alyx.{other}", f"the {other} that goes with the other one")
    else:
        yield _missing("alyx.token", "a token, or alyx.username and alyx.password,")


def _missing(key: str, what: str) -> str:
    variable = PREFIX + key.replace(".", "__").upper()
    how = "in a secret file or" if key in SECRETS else "in the settings file or"
    return f"{key} is not set anywhere: give {what} {how} as {variable} in the environment"


def _get(settings: Settings, key: str) -> object:
    value: object = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _default_of(key: str) -> str:
    info = LEAVES[key]
    if key == "state_dir":  # differs from machine to machine
        return ""
    return _text(info.get_default(call_default_factory=True))


def _text(value: object) -> str:
    """Return a value as one writes it in YAML; a secret as a mask; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return json.dumps(value)
    return str(value)
