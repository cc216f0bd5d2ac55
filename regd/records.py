"""What regd relies on in Alyx's answers. Pure.

Whatever else a record holds is kept and passed on; what is missing here means that what answered
is no Alyx, or one that regd does not know.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

# an id goes into addresses and into the journal: it may be nothing else
_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_Id = Annotated[str, Field(pattern=f"^{_UUID}$")]
_Url = Annotated[str, Field(pattern=f"(^|/){_UUID}$")]


class _Session(BaseModel):
    id: _Id
    url: _Url


class _FoundSession(_Session):
    subject: str
    number: int | None
    start_time: str | None


class _Dataset(BaseModel):
    url: _Url
    session: _Url
    name: str
    collection: str | None
    revision: str | None
    hash: str | None
    file_size: int | None


class _Registered(BaseModel):
    id: _Id
    name: str
    collection: str | None
    revision: str | None


class _DatasetType(BaseModel):
    name: str
    filename_pattern: str | None


class _DataFormat(BaseModel):
    file_extension: str


class _Page(BaseModel):
    results: list[Any]


RECORD = TypeAdapter(dict[str, Any])
PAGE = TypeAdapter(_Page | list[Any])
SESSION = TypeAdapter(_Session)
FOUND_SESSION = TypeAdapter(_FoundSession)
DATASET = TypeAdapter(_Dataset)
REGISTERED = TypeAdapter(list[_Registered])
DATASET_TYPE = TypeAdapter(_DatasetType)
DATA_FORMAT = TypeAdapter(_DataFormat)
HISTORIES = TypeAdapter(list[dict[str, list[dict[str, bool]]]])


def is_a(form: TypeAdapter[Any], value: object) -> bool:
    """Say whether an answer has that form."""
    try:
        form.validate_python(value, strict=True)  # "false" would be true where it is used
    except (ValidationError, RecursionError):
        return False
    return True
