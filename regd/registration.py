"""The library: what ONE's `RegistrationClient` does, by the same names, arguments and results.

A lab's script moves over by changing its import. What differs is safer or faster: every session
stands alone, nothing waits for ever, a record that exists is changed only in what was given, an
unchanged protected file stays where it is, and no move ever overwrites a file.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from uuid import UUID

from iblutil.util import Bunch, ensure_list
from one.alf.spec import QC

from regd import files
from regd.alyx import AlyxClient
from regd.datasettypes import DatasetTypes
from regd.errors import (
    AlyxAway,
    AlyxOdd,
    DatasetsProtected,
    InvalidInput,
    InvalidPath,
    MemberNotFound,
    NeedsHuman,
    NoDatasetType,
    RegdError,
    SessionNotFound,
    SubjectNotFound,
)
from regd.logs import get_logger
from regd.model import Dataset, DatasetPath, FileToPost, Revision, SessionPath
from regd.paths import find_session, parse_dataset
from regd.records import (
    DATA_FORMAT,
    DATASET,
    DATASET_TYPE,
    FOUND_SESSION,
    REGISTERED,
    SESSION,
)
from regd.revisions import choose_destination
from regd.settings import Settings

_CATALOGUE_S = 600.0  # how long Alyx's dataset types and data formats are taken as known
_TAKEN = 65536  # names that are remembered as fitting them
_DOUBTED_S = 10.0  # how old they may be when they are why a file is refused
_REFERENCE = re.compile(r"(?P<date>\d{4}-\d{2}-\d{2})_(?P<number>\d{1,3})_(?P<subject>.+)")
_log = get_logger()

Record = dict[str, Any]


class _Catalogue(NamedTuple):
    """What Alyx can hold.

    Attributes:
        asked_at: When Alyx was asked for it, in monotonic seconds.
        types: Its dataset types.
        extensions: Those of its data formats, with their dots.
        taken: Names of files that were seen to fit: the same in one session after the other.
    """

    asked_at: float
    types: DatasetTypes
    extensions: list[str]
    taken: set[str]


class RegistrationClient:
    """Creates sessions on Alyx and registers files to them.

    Args:
        one: An `AlyxClient`; or a ONE instance, whose server and login are taken over; or None to
            use the settings (environment, secret files, `$REGD_CONFIG`).
        data_root: Where `create_new_session` makes folders; by default the settings' `data_root`,
            or the ONE instance's cache folder.
        chunk_files: The most files in one request; Alyx takes about 44 ms for each.
        today: The rig's local date, which names new revisions.
        clock: Monotonic seconds.

    Raises:
        InvalidInput: There is nothing that says which Alyx to use.
    """

    def __init__(
        self,
        one: Any = None,
        *,
        data_root: str | Path | None = None,
        chunk_files: int = 100,
        today: Callable[[], datetime.date] = datetime.date.today,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.one = one
        self._owns_alyx = not isinstance(one, AlyxClient)
        if isinstance(one, AlyxClient):
            self.alyx = one
        elif one is None:
            settings = Settings()
            self.alyx = AlyxClient.from_settings(settings)
            data_root = data_root or settings.data_root
        else:
            self.alyx = _client_of_one(one)
            data_root = data_root or one.alyx.cache_dir
        self.data_root = Path(data_root) if data_root else None
        self.failures: list[tuple[Path, RegdError]] = []
        self._chunk_files = chunk_files
        self._today = today
        self._clock = clock
        self._catalogue_lock = threading.Lock()
        self._catalogue: _Catalogue | None = None

    def __enter__(self) -> RegistrationClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, unless they are those of an `AlyxClient` that was given."""
        if self._owns_alyx:
            self.alyx.close()

    # --- what Alyx can hold ----------------------------------------------------------------------

    @property
    def dtypes(self) -> list[Any]:
        """Alyx's dataset types, with their fields as attributes."""
        return [Bunch(record) for record in self._known().types.types]

    @property
    def registration_patterns(self) -> list[str]:
        """The file name patterns of the dataset types that have one."""
        return [t["filename_pattern"] for t in self._known().types.types if t["filename_pattern"]]

    @property
    def file_extensions(self) -> list[str]:
        """The extensions of Alyx's data formats, with their dots."""
        return self._known().extensions

    def _known(self, not_older_s: float = _CATALOGUE_S) -> _Catalogue:
        with self._catalogue_lock:
            known = self._catalogue
            if known is None or self._clock() - known.asked_at > not_older_s:
                types = DatasetTypes(self.alyx.pages("/dataset-types", form=DATASET_TYPE))
                listed = self.alyx.pages("/data-formats", form=DATA_FORMAT)
                formats = [record["file_extension"] for record in listed]
                known = self._catalogue = _Catalogue(self._clock(), types, formats, set())
            return known

    def forget_types(self) -> None:
        """Ask Alyx again for its dataset types and data formats when they are next needed."""
        self._catalogue = None

    def check_name(self, relative: str) -> DatasetPath:
        """Return the place of a file below its session folder, if Alyx can take it.

        Raises:
            InvalidPath: ALF does not allow the path.
            NoDatasetType: No data format, or not exactly one dataset type, fits the name.
        """
        place = parse_dataset(relative)
        try:
            self._check_type(place, _CATALOGUE_S)
        except NoDatasetType:
            # somebody may just have mended it on Alyx
            self._check_type(place, _DOUBTED_S)
        return place

    def _check_type(self, place: DatasetPath, not_older_s: float) -> None:
        known = self._known(not_older_s)
        if place.name in known.taken:
            return
        extensions = known.extensions
        extension = PurePosixPath(place.name).suffix
        if not extension:
            raise NoDatasetType(
                f'"{place.name}" has no extension, so Alyx cannot tell its data format',
                hint="give it its extension, or name it in watch.ignore if it is no dataset; "
                "then: regd retry --all",
            )
        if extensions.count(extension) != 1:
            raise NoDatasetType(
                f'No data format on Alyx has the extension "{extension}" of "{place.name}"'
                if extension not in extensions
                else f'Several data formats on Alyx have the extension "{extension}"',
                hint="add the data format on Alyx, "
                "or name the file in watch.ignore if it is no dataset; then: regd retry --all",
            )
        known.types.match(place.name)
        if len(known.taken) < _TAKEN:
            known.taken.add(place.name)

    # --- sessions --------------------------------------------------------------------------------

    def create_sessions(
        self,
        root_data_folder: str | Path,
        glob_pattern: str = "**/create_me.flag",
        register_files: bool = False,
        dry: bool = False,
    ) -> tuple[list[Path], list[Record | None]]:
        """Create a session for each flag file below a folder, and remove the flag.

        What fails does not keep the others from being created: it is logged, its flag stays, and
        `failures` lists it with the error.

        Args:
            root_data_folder: Where to look.
            glob_pattern: What the flags are called.
            register_files: Whether to register the files of the session folders, too.
            dry: Only print the flags found.

        Returns:
            The paths of the sessions created, and for each its record (None if dry).
        """
        flags = sorted(Path(root_data_folder).glob(glob_pattern))
        if dry:
            for flag in flags:
                print(flag)
            return [flag.parent for flag in flags], [None] * len(flags)
        self.failures = []
        paths: list[Path] = []
        records: list[Record | None] = []
        for flag in flags:
            try:
                record, _ = self.register_session(flag.parent, file_list=register_files)
                flag.unlink()
            except (RegdError, OSError) as error:
                failure = error if isinstance(error, RegdError) else NeedsHuman(str(error))
                self.failures.append((flag.parent, failure))
                _log.error(
                    "session.failed",
                    session=str(flag.parent),
                    reason=failure.reason,
                    hint=failure.hint,
                )
                continue
            paths.append(flag.parent)
            records.append(record)
        return paths, records

    def create_new_session(
        self,
        subject: str,
        session_root: str | Path | None = None,
        date: str | datetime.date | None = None,
        register: bool = True,
        **kwargs: Any,
    ) -> tuple[Path, UUID | None]:
        """Make the next session folder of a subject's day, and optionally create it on Alyx.

        Args:
            subject: The subject's nickname, which Alyx must know.
            session_root: The folder that holds the subjects; `data_root` by default.
            date: The day, or a time on it; now by default.
            register: Whether to create the session on Alyx.
            kwargs: For `register_session`.

        Returns:
            The new folder, and the session's UUID if it was registered.

        Raises:
            SubjectNotFound: Alyx has no such subject.
            InvalidInput: The date is none, or the day has 999 sessions.
        """
        day = self.ensure_ISO8601(date)[:10]
        self.assert_exists(subject, "subjects")
        root = session_root or self.data_root
        if root is None:
            raise InvalidInput("no session_root given", hint="give it, or set data_root")
        folder = _make_next_number(Path(root) / subject / day)
        if not register:
            return folder, None
        session, _ = self.register_session(folder, **kwargs)
        return folder, UUID(session["url"][-36:])

    def register_session(
        self,
        ses_path: str | Path,
        users: str | Sequence[str] | None = None,
        file_list: bool | str | Path | Iterable[str | Path] = True,
        **kwargs: Any,
    ) -> tuple[Record, Any]:
        """Create a session on Alyx, or add to one that is there, and register its files.

        Args:
            ses_path: The session folder.
            users: The users to attribute it to; whoever is logged in by default.
            file_list: The file or files to register; True for all of the folder, False for none.
            kwargs: Further fields of the record: location, procedures, n_correct_trials,
                n_trials, json, projects, type, task_protocol, lab, start_time, end_time. A lab
                must be that of the path, if the path has one; start_time must be on the path's
                date, in the rig's local time (an offset in it is dropped).

        Returns:
            The session's record, and those of the files (None if none were to be registered).

        Raises:
            SubjectNotFound: Alyx has no such subject.
            MemberNotFound: Alyx lacks a user, lab, project, procedure or location given.
            InvalidPath: The folder is no ALF session.
            InvalidInput: The lab or start time contradict the path.
            AlyxRefused: Alyx does not take a value.
            AlyxAway: Alyx cannot be reached.
        """
        ses_path = Path(ses_path)
        _, session = _session_of(ses_path)
        fields = self._session_fields(session, users, kwargs)
        found = self.search_sessions(session)
        if found:
            eid = found[0]["id"]
            record = self._update_session(eid, fields)
        else:
            record = self.create_session(session, fields)
        _log.info("session.registered", session=session.folder, url=record["url"])
        if not file_list:
            return record, None
        listed = self.find_files(ses_path) if file_list is True else file_list
        records = self.register_files(listed)
        if records:
            record["data_dataset_session_related"] = ensure_list(records)
        return record, records

    def _session_fields(
        self, session: SessionPath, users: str | Sequence[str] | None, given: Mapping[str, Any]
    ) -> Record:
        """Return the fields of a session's record that were given, checked against its path."""
        for name in ("subject", "number"):
            if name in given:
                raise InvalidInput(f"{name} is taken from the path and cannot be given")
        fields = dict(given)
        if users:
            fields["users"] = ensure_list(users)
        for name in ("procedures", "projects"):
            if fields.get(name):
                fields[name] = ensure_list(fields[name])
        for name in ("start_time", "end_time"):
            if fields.get(name):
                fields[name] = _local(self.ensure_ISO8601(fields[name]))
            else:
                fields.pop(name, None)
        if fields.get("start_time", session.date)[:10] != session.date:
            raise InvalidInput(
                f"start_time {fields['start_time']} is not on {session.date}, the path's date"
            )
        if session.lab and (fields.get("lab") or session.lab) != session.lab:
            raise InvalidInput(
                f'lab kwarg "{fields["lab"]}" does not match lab name in path ("{session.lab}")'
            )
        return fields

    def search_sessions(self, session: SessionPath) -> list[Record]:
        """Return Alyx's short records of all sessions of that subject, date and number."""
        query = {
            "subject": session.subject,
            "date_range": f"{session.date},{session.date}",
            "number": int(session.number),
        }
        found = list(self.alyx.pages("/sessions", query, FOUND_SESSION))
        # only this very subject is meant, whatever the server's filter takes for equal
        found = [record for record in found if record["subject"] == session.subject]
        for record in found:
            if (str(record["start_time"])[:10], record["number"]) != session.key[1:]:
                raise AlyxOdd(f"{self.alyx.base_url}/sessions lists others than were asked for")
        return found

    def create_session(self, session: SessionPath, fields: Mapping[str, Any]) -> Record:
        """Create a session that a search has not found, and return its record.

        If the outcome of the request is unknown, Alyx is searched before anything else is done.

        Raises:
            AlyxAway: Alyx cannot be reached, or the session may yet appear.
        """
        data = {
            "subject": session.subject,
            "type": "Experiment",
            "number": session.number,
            "start_time": f"{session.date}T00:00:00",
            **({"users": [self.alyx.user]} if self.alyx.user else {}),
            **({"lab": session.lab} if session.lab else {}),
            **fields,
        }
        try:
            return dict(self.alyx.post("/sessions", data, SESSION))
        except AlyxAway as error:
            if not error.unknown_outcome:
                raise
            try:
                found = self.search_sessions(session)
            except RegdError:  # whatever it is: that the outcome is unknown is what counts
                raise error from None
            if not found:
                raise
            return dict(self.alyx.get(f"/sessions/{found[0]['id']}", form=SESSION))

    def _update_session(self, eid: str, fields: Mapping[str, Any]) -> Record:
        path = f"/sessions/{eid}"
        if fields:
            return dict(self.alyx.patch(path, fields, SESSION))
        return dict(self.alyx.get(path, form=SESSION))

    # --- files -----------------------------------------------------------------------------------

    def find_files(self, session_path: str | Path) -> Iterator[Path]:
        """Yield the files below a session folder that Alyx can take, in the order of their paths.

        Args:
            session_path: The folder to search.
        """
        for path in sorted(Path(session_path).rglob("*.*.*")):
            if path.is_file() and self._takes(path) is not None:
                yield path

    def _takes(self, path: Path) -> tuple[Path, SessionPath] | None:
        """Return the session folder of a file that Alyx can take, or None."""
        try:
            folder, session = _session_of(path)
            self.check_name(path.relative_to(folder).as_posix())
        except (InvalidPath, NoDatasetType) as error:
            _log.debug("file.skipped", path=str(path), reason=error.reason)
            return None
        return folder, session

    def prepare_files(
        self,
        file_list: str | Path | Iterable[str | Path],
        versions: str | Sequence[str | None] | None = None,
    ) -> tuple[dict[Path, list[Path]], dict[Path, list[str | None]], list[Path], bool]:
        """Sort files by session, leaving out what Alyx cannot take.

        Args:
            file_list: One file, or many.
            versions: One version for all, or as many as files (repeated if they are fewer).

        Returns:
            For each session folder its files, relative to it; for each its files' versions; all
            files as paths; and whether a single one was given.
        """
        single = isinstance(file_list, (str, Path))
        given = [file_list] if isinstance(file_list, (str, Path)) else file_list
        paths = [Path(p) for p in given]
        if versions is None or isinstance(versions, str):
            each: Iterator[str | None] = itertools.repeat(versions)
        else:
            each = itertools.cycle(versions)
        by_session: dict[Path, list[Path]] = defaultdict(list)
        their_versions: dict[Path, list[str | None]] = defaultdict(list)
        for path, version in zip(paths, each, strict=False):
            taken = self._takes(path)
            if taken is not None:
                folder, _ = taken
                by_session[folder].append(path.relative_to(folder))
                their_versions[folder].append(version)
        return by_session, their_versions, paths, single

    def check_protected_files(
        self, file_list: str | Path | Iterable[str | Path], created_by: str | None = None
    ) -> Any:
        """Ask Alyx whether any of the files are protected.

        Args:
            file_list: One file, or many.
            created_by: The user to ask for; whoever is logged in by default.

        Returns:
            For each session Alyx's answer, whose ``status_code`` is 403 if any of its files is
            protected and 200 otherwise; for a single file, its session's.
        """
        by_session, _, _, single = self.prepare_files(file_list)
        answers = []
        for folder, paths in by_session.items():
            _, session = _session_of(folder)
            data = {
                "path": session.alyx_path,
                "filenames": [path.as_posix() for path in paths],
                **self._creator(created_by),
            }
            answers.append(self.alyx.get("/check-protected", data=data))
        return _single(answers) if single else answers

    def register_files(
        self,
        file_list: str | Path | Iterable[str | Path],
        versions: str | Sequence[str | None] | None = None,
        default: bool = True,
        created_by: str | None = None,
        server_only: bool = False,
        repository: str | None = None,
        exists: bool = True,
        dry: bool = False,
        max_md5_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Register files to their sessions on Alyx.

        A protected file whose content changed is moved into a revision folder first, so look at
        the paths of the records returned. One that did not change stays, and its record is
        returned as it is on Alyx.

        Args:
            file_list: One file, or many; of any number of sessions.
            versions: One version for all, or as many as files.
            default: Whether they become the default revision.
            created_by: The user to attribute them to; whoever is logged in by default.
            server_only: Whether to leave out the file records of personal repositories.
            repository: The name of the repository they are in.
            exists: Whether they are there already.
            dry: Only return what would be posted, one dict a session; protection is not checked.
            max_md5_size: The size in bytes from which a file is not hashed; None to hash all.
            kwargs: Further fields of the request.

        Returns:
            One record a file in the order given, None for each that Alyx cannot take; the record
            itself for a single file.

        Raises:
            FileChanged: A file was written to while it was read.
            SessionNotFound: Alyx does not know the session.
            FileRefused: Alyx does not take a file; those before it are registered.
            MemberNotFound: Alyx lacks the repository, lab or user.
            AlyxRefused: Alyx does not take a value.
            AlyxAway: Alyx cannot be reached.
        """
        by_session, versions_of, paths, single = self.prepare_files(file_list, versions)
        options = {
            "name": repository,
            "exists": exists,
            "server_only": server_only,
            "default": default,
            **self._creator(created_by),
            **kwargs,
        }
        record_of: dict[Path, Record] = {}
        bodies = []
        for folder, relative in by_session.items():
            _, session = _session_of(folder)
            once = dict(zip(reversed(relative), reversed(versions_of[folder]), strict=True))
            items = [
                _look_at(folder, path, once[path], max_md5_size) for path in dict.fromkeys(relative)
            ]
            items = _share_out(items, options)
            if dry:
                bodies.append(registration_body(session, items, checked=True, options=options))
                continue
            for start in range(0, len(items), self._chunk_files):
                chunk = items[start : start + self._chunk_files]
                records = self._register(folder, session, chunk, options)
                record_of.update({folder / path: record for path, record in records.items()})
        if dry:
            return _single(bodies) if single else bodies
        results = [record_of.get(path) for path in paths]
        return results[0] if single else results

    def _register(
        self,
        folder: Path,
        session: SessionPath,
        items: Sequence[FileToPost],
        options: Mapping[str, Any],
    ) -> dict[str, Record]:
        """Register files of one session, moving those that must move; return records by path."""
        try:
            return self.post_files(session, items, checked=True, options=options)
        except DatasetsProtected as refusal:
            histories = read_histories(refusal)
        free = [item for item in items if not is_protected(histories.get(item.path, []))]
        fixed = [item for item in items if item not in free]
        records: dict[str, Record] = {}
        if free:  # before anything is moved: one of them may be refused
            records |= self.post_files(session, free, checked=True, options=options)
        unchanged = self._unchanged(session, fixed)
        moved_from: dict[str, str] = {}
        to_post = []
        for item in fixed:
            occupied = files.occupied_revisions(folder, "", item.path)
            target = choose_destination(
                PurePosixPath(item.path), histories[item.path], self._today(), occupied
            ).as_posix()
            if target != item.path and item.path in unchanged:
                records[item.path] = unchanged[item.path]
                continue
            if target != item.path:
                files.move(folder, "", item.path, target)
                _log.info("file.moved", path=item.path, target=target, session=session.folder)
            moved_from[target] = item.path
            to_post.append(replace(item, path=target))
        if to_post:
            posted = self.post_files(session, to_post, checked=False, options=options)
            records |= {moved_from[path]: record for path, record in posted.items()}
        return records

    def post_files(
        self,
        session: SessionPath,
        items: Sequence[FileToPost],
        *,
        checked: bool,
        options: Mapping[str, Any],
    ) -> dict[str, Record]:
        """Register files where they are, in one request; return their records by path.

        Args:
            session: Their session, which Alyx must know.
            items: The files.
            checked: Whether Alyx is to refuse all of them if one is protected.
            options: Further fields of the request.

        Raises:
            DatasetsProtected: `checked`, and at least one is protected; none is registered.
            RevisionProtected: Not `checked`, and one is protected; those before it are registered.
            FileRefused: Alyx does not take a file; those before it are registered.
            AlyxAway: With `unknown_outcome` set if some may be registered.
        """
        body = registration_body(session, items, checked=checked, options=options)
        answer = self.alyx.post("/register-file", body, REGISTERED)
        if [_place(record).path for record in answer] != [item.path for item in items]:
            raise AlyxOdd(
                f"{self.alyx.base_url}/register-file did not answer with a record for each file",
                unknown_outcome=True,
            )
        if _log.isEnabledFor(logging.DEBUG):
            for item, record in zip(items, answer, strict=True):
                _log.debug("file.posted", session=session.folder, path=item.path, id=record["id"])
        return {item.path: record for item, record in zip(items, answer, strict=True)}

    def _unchanged(self, session: SessionPath, items: Sequence[FileToPost]) -> dict[str, Record]:
        """Return the records of those files that Alyx holds at that place with that very hash."""
        found = self.search_sessions(session)
        if not found or not items:
            return {}
        by_place = {_place(record): record for record in self._datasets_of(found[0]["id"])}
        unchanged = {}
        for item in items:
            record = by_place.get(parse_dataset(item.path))
            if record is not None and item.md5 and record["hash"] == item.md5:
                whole = self.alyx.get(f"/sessions/{found[0]['id']}", form=SESSION)
                unchanged[item.path] = _as_registered(record, whole)
        return unchanged

    def datasets(self, eid: str) -> list[Dataset]:
        """Return all datasets of a session, whether or not they exist in any repository."""
        return [read_dataset(record) for record in self._datasets_of(eid)]

    def _datasets_of(self, eid: str) -> Iterator[Record]:
        for record in self.alyx.pages("/datasets", {"session": eid}, DATASET):
            if str(record["session"])[-36:] != eid:
                raise AlyxOdd(f"{self.alyx.base_url}/datasets lists those of another session")
            yield record

    def _creator(self, created_by: str | None) -> dict[str, str]:
        user = created_by or self.alyx.user
        return {"created_by": user} if user else {}

    # --- members, water, weight ------------------------------------------------------------------

    def assert_exists(self, member: Any, endpoint: str) -> Any:
        """Return the record(s) of a member, or of a list of them.

        Args:
            member: A name or UUID, or a list of them.
            endpoint: Where to look it up, such as 'subjects', 'users', 'data-repository'.

        Raises:
            SubjectNotFound: Alyx has no such subject.
            MemberNotFound: Alyx has no such member there.
        """
        if not isinstance(member, (str, UUID)):
            return [self.assert_exists(each, endpoint) for each in member]
        try:
            return self.alyx.rest(endpoint, "read", id=member)
        except MemberNotFound:
            hint = "create it on Alyx, or correct the name"
            if endpoint == "subjects":
                raise SubjectNotFound(
                    f"subject {str(member)!r} does not exist on Alyx", hint=hint
                ) from None
            raise MemberNotFound(
                f'Member "{member}" doesn\'t exist in {endpoint}', hint=hint
            ) from None

    @staticmethod
    def ensure_ISO8601(date: str | datetime.date | None) -> str:  # noqa: N802 - ONE's name for it
        """Return a date or time as an ISO 8601 string; now if it is None.

        Args:
            date: A date, a time (with a zone or not), or an ISO 8601 string of either.

        Raises:
            InvalidInput: It is none of those (a ValueError).
        """
        if isinstance(date, str):
            try:
                date = datetime.datetime.fromisoformat(date)
            except ValueError as error:
                raise InvalidInput(str(error), hint="give it as YYYY-MM-DDThh:mm:ss") from None
        elif date is None:
            date = datetime.datetime.now()
        elif not isinstance(date, datetime.date):
            raise InvalidInput(f"{date!r} is no date", hint="give it as YYYY-MM-DDThh:mm:ss")
        elif not isinstance(date, datetime.datetime):
            date = datetime.datetime.combine(date, datetime.time())
        return date.isoformat()

    def register_water_administration(
        self,
        subject: str,
        volume: float,
        *,
        date_time: str | datetime.date | None = None,
        water_type: str = "Water",
        user: str | None = None,
        session: Any = None,
        adlib: bool = False,
    ) -> Record:
        """Write down that a subject was given water, and return the record.

        Args:
            subject: The subject's nickname.
            volume: Millilitres in all; kept to 4 significant figures.
            date_time: When; now by default.
            water_type: One that Alyx knows.
            user: Who gave it; whoever is logged in by default.
            session: The session it belongs to: its UUID, folder, URL or record.
            adlib: Whether the subject could drink as it liked.

        Raises:
            SubjectNotFound: Alyx has no such subject.
            MemberNotFound: Alyx has no such user, water type or session.
            InvalidInput: The volume is not above zero, or the session is none (a ValueError).
        """
        if not volume > 0:
            raise InvalidInput("Water volume must be greater than zero")
        data = {
            "subject": subject,
            "date_time": self.ensure_ISO8601(date_time),
            "water_administered": float(f"{volume:.4g}"),
            "water_type": water_type,
            **self._user(user),
            "adlib": adlib,
        }
        if session:
            data["session"] = self.to_eid(session)
        return dict(self.alyx.post("/water-administrations", data))

    def register_weight(
        self,
        subject: str,
        weight: float,
        date_time: str | datetime.date | None = None,
        user: str | None = None,
    ) -> Record:
        """Write down a subject's weight, and return the record.

        Args:
            subject: The subject's nickname.
            weight: Grams; kept to 4 significant figures.
            date_time: When; now by default.
            user: Who weighed it; whoever is logged in by default.

        Raises:
            SubjectNotFound: Alyx has no such subject.
            MemberNotFound: Alyx has no such user.
            InvalidInput: The weight is not above zero (a ValueError).
        """
        if not weight > 0:
            raise InvalidInput("Weight must be greater than zero")
        data = {
            "subject": subject,
            "date_time": self.ensure_ISO8601(date_time),
            "weight": float(f"{weight:.4g}"),
            **self._user(user),
        }
        return dict(self.alyx.post("/weighings", data))

    def _user(self, user: str | None) -> dict[str, str]:
        name = user or self.alyx.user
        return {"user": name} if name else {}

    def to_eid(self, session: Any) -> str:
        """Return the UUID of a session.

        Args:
            session: Its UUID, URL, record, folder, or reference such as '2026-01-31_1_KS005'.

        Raises:
            InvalidInput: It is none of those (a ValueError).
            SessionNotFound: Alyx does not know the session folder.
        """
        if isinstance(session, Mapping):
            session = session.get("id") or session.get("url") or _reference(session)
        text = str(session)
        if reference := _REFERENCE.fullmatch(text):
            text = "{subject}/{date}/{number}".format(**reference.groupdict())
        try:
            return str(UUID(text.rstrip("/")[-36:]))
        except ValueError:
            pass
        try:
            found = find_session(Path(text))
        except InvalidPath:
            found = None
        if found is None:
            raise InvalidInput(f"{text!r} is no session", hint="give its UUID or its folder")
        records = self.search_sessions(found[1])
        if not records:
            raise SessionNotFound(f"Alyx has no session {found[1].alyx_path}")
        return str(records[0]["id"])


def registration_body(
    session: SessionPath,
    items: Sequence[FileToPost],
    *,
    checked: bool,
    options: Mapping[str, Any],
) -> Record:
    """Return the body of a request to /register-file."""
    return {
        "path": session.alyx_path,
        "filenames": [item.path for item in items],
        "hashes": [item.md5 for item in items],
        "filesizes": [item.size for item in items],
        "versions": [item.version for item in items],
        "check_protected": checked,
        **({"labs": session.lab} if session.lab else {}),
        **options,
        **{
            name: [dict(item.more)[name] for item in items]
            for name in dict.fromkeys(name for item in items for name, _ in item.more)
        },
    }


def read_histories(refusal: DatasetsProtected) -> dict[str, list[Revision]]:
    """Return each file's revisions, newest first, from Alyx's refusal."""
    return {
        path: [Revision(name, bool(p)) for entry in history for name, p in entry.items()]
        for detail in refusal.details
        for path, history in detail.items()
    }


def is_protected(history: Iterable[Revision]) -> bool:
    """Say whether Alyx protects a dataset: any protected revision of its name is enough."""
    return any(revision.protected for revision in history)


def read_dataset(record: Mapping[str, Any]) -> Dataset:
    """Return the dataset of a record of `GET /datasets`."""
    return Dataset(
        id=str(record["url"])[-36:],
        place=_place(record),
        md5=record["hash"] or "",
        size=record["file_size"],
        protected=bool(record.get("protected")),
    )


def _place(record: Mapping[str, Any]) -> DatasetPath:
    return DatasetPath(record["collection"] or "", record["revision"] or "", record["name"])


def _as_registered(record: Mapping[str, Any], session: Mapping[str, Any]) -> Record:
    """Return a record of `GET /datasets` in the form in which /register-file answers."""
    keys = ("name", "file_size", "created_by", "created_datetime", "dataset_type", "data_format")
    return {
        "id": str(record["url"])[-36:],
        "subject": session.get("subject"),
        **{key: record.get(key) for key in keys},
        "session": session["id"],
        "session_number": session.get("number"),
        "session_users": ",".join(session.get("users", ())),
        "session_start_time": session.get("start_time"),
        "collection": record["collection"],
        "revision": record["revision"] or "",
        "default": record.get("default_dataset"),
        "qc": int(QC.validate(record.get("qc") or 0)),
        "file_records": [
            {key: entry.get(key) for key in ("id", "data_repository", "relative_path", "exists")}
            for entry in record.get("file_records", ())
        ],
    }


def _share_out(items: Sequence[FileToPost], options: Mapping[str, Any]) -> list[FileToPost]:
    """Give each file its own value of the options that are lists of one value a file."""
    names = [
        name
        for name, value in options.items()
        if isinstance(value, (list, tuple)) and len(value) == len(items)
    ]
    return [
        replace(item, more=tuple((name, options[name][n]) for name in names))
        for n, item in enumerate(items)
    ]


def _reference(record: Mapping[str, Any]) -> str:
    """Return the reference of a session given by its subject, number and start time."""
    day = str(record.get("date") or record.get("start_time"))[:10]
    return f"{day}_{record.get('number')}_{record.get('subject')}"


def _session_of(path: Path) -> tuple[Path, SessionPath]:
    found = find_session(path)
    if found is None:
        raise InvalidPath(f"{path} is in no session folder", hint="<subject>/<YYYY-MM-DD>/<NNN>")
    return Path(found[0]), found[1]


def _look_at(folder: Path, path: Path, version: str | None, max_md5_size: int | None) -> FileToPost:
    status = (folder / path).stat()
    signature = files.signature_of(status)
    hashed = max_md5_size is None or signature.size < max_md5_size
    md5 = files.md5_of(folder / path, signature) if hashed else None
    return FileToPost(path.as_posix(), signature.size, md5, version)


def _make_next_number(day: Path) -> Path:
    """Make and return the next session folder of a day."""
    day.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name) for p in day.iterdir() if p.name.isdecimal() and p.is_dir()]
    for number in range(max(taken, default=0) + 1, 1000):
        folder = day / f"{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process was faster
            continue
        return folder
    raise InvalidInput(f"{day} has no session number left below 1000")


def _local(moment: str) -> str:
    """Drop the offset of a time: Alyx would convert it to UTC, and with it maybe the date."""
    return datetime.datetime.fromisoformat(moment).replace(tzinfo=None).isoformat()


def _single(values: Sequence[Any]) -> Any:
    return values[0] if values else None


def _client_of_one(one: Any) -> AlyxClient:
    """Return a client for the server and login of a ONE instance."""
    alyx = getattr(one, "alyx", None)
    url = getattr(alyx, "base_url", None)
    if not url:
        raise InvalidInput(
            f"{type(one).__name__} is neither an AlyxClient nor an online ONE instance",
            hint="give RegistrationClient an AlyxClient, or ONE in online mode",
        )
    token = next(iter((getattr(alyx, "_token", None) or {}).values()), None)
    return AlyxClient(url, getattr(alyx, "user", None), token=token)
