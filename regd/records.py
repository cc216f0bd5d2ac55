"""What regd relies on in Alyx's answers. Pure.

Whatever else a record holds is kept and passed on; what is missing here means that what answered
is no Alyx, or one that regd does not know.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError


class _Session(BaseModel):
    id: str
    url: str


class _FoundSession(_Session):
    subject: str
    number: int | None
    start_time: str | None


class _Dataset(BaseModel):
    url: str
    name: str
    collection: str | None
    revision: str | None
    hash: str | None
    file_size: int | None


class _Registered(BaseModel):
    id: str


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
        form.validate_python(value)
    except (ValidationError, RecursionError):
        return False
    return True
