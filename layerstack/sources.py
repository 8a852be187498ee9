"""Where the parts of a job are: in a folder, in a bucket, or behind a server. Only here the three differ.

| given | is |
|---|---|
| a path, or `file://…` | a job's folder, a folder of parts, or one part |
| `s3://…`, `gs://…` | the same in a bucket |
| `http://HOST:PORT/jobs/ID`, or `…/parts/N` behind it | a job of a server, or one of its parts |
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import BaseModel, ValidationError

from jobs.errors import JobsError, SettingsError
from jobs.layout import JobNames, part_index
from jobs.records import JobRecord, Manifest, PartSummary
from jobs.storage import OBJECT_STORES, Storage, open_storage
from layerstack.errors import ReadError

_R = TypeVar("_R", bound=BaseModel)
SERVERS = ("http://", "https://")


@dataclass(frozen=True)
class PartFile:
    """A part that nobody has looked into yet.

    Attributes:
        name: where it is, as errors call it.
        key: what its source knows it by.
        summary: what the manifest says of it, if there is one.
    """

    name: str
    key: str
    summary: PartSummary | None = None


class Source(Protocol):
    """Some parts of one job, in order. It can be pickled, and used in a process that was forked.

    Attributes:
        where: the place, as errors call it.
        parts: at least one.
        fingerprint: of the encoder, by the manifest; None if there is no manifest.
    """

    where: str
    parts: list[PartFile]
    fingerprint: str | None

    def open(self, part: PartFile) -> Path | IO[bytes]:
        """Return the path of a part on this machine, or a file that can be read at any position.

        Raises:
            ReadError: it has gone, or cannot be read.
        """
        ...


def open_source(path: str | Path, api_key: str | None = None) -> Source:
    """Find the parts that a path or URL means, without looking into one.

    Args:
        path: see the table above.
        api_key: of the server; default the environment variable `LAYERSTACK_API_KEY`.

    Raises:
        ReadError: there are none, or not all of them; the message says what to do.
        ServerError: the server says no.
        ServerUnreachableError: nobody answers at the URL.
    """
    text = str(path)
    if isinstance(path, str) and path.startswith(SERVERS):
        from layerstack.servedparts import served_parts  # noqa: PLC0415 - files need no HTTP client

        return served_parts(path, api_key)
    if isinstance(path, str) and path.startswith(OBJECT_STORES):
        root, _, name = text.rstrip("/").rpartition("/")
        if root.endswith("/"):
            raise ReadError(f"{text} is a whole bucket: name a job's folder in it, such as {text}/jobs/ID")
        return StoredParts(root, name)
    if isinstance(path, str) and re.match(r"file:", path):
        text = url2pathname(urlsplit(path).path)
    elif found := re.match(r"([a-z][a-z0-9+.-]+)://", text):
        raise ReadError(f"{text}: {found[1]}:// cannot be read, only a path, file://, http(s)://, s3:// or gs://")
    local = Path(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100 - links stay as they are, unlike by resolve()
    if not local.exists():
        raise ReadError(f"{text}: no such file or folder")
    return StoredParts(str(local.parent), local.name)


class StoredParts:
    """Parts in a folder of this machine or of a bucket; `name` is that of a job's folder, of another one, or of a part.

    Attributes:
        where, parts, fingerprint: see `Source`.
    """

    def __init__(self, root: str, name: str) -> None:
        self._root = root
        self._open()
        self.where = f"{root.rstrip('/')}/{name}"
        self.fingerprint: str | None = None
        with self._told():
            self.parts = self._found(name)

    def open(self, part: PartFile) -> Path | IO[bytes]:
        """Return a part's path, or open it in the bucket."""
        with self._told():
            storage = self._usable()
            try:
                return storage.local_path(part.key) or storage.open(part.key)
            except FileNotFoundError as exc:
                raise ReadError(f"{part.name} has gone since its folder was opened") from exc

    def __getstate__(self) -> dict[str, object]:
        """Leave the connections behind."""
        return {name: value for name, value in vars(self).items() if name not in {"_storage", "_pid"}}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        try:
            self._storage = open_storage(self._root)
        except SettingsError as exc:
            if isinstance(exc.__cause__, ImportError):
                raise ReadError(f"{self._root} needs the package obstore: pip install obstore") from exc
            raise ReadError(f"{self._root} cannot be read: {str(exc.__cause__).partition(chr(10))[0]}") from exc

    def _usable(self) -> Storage:
        if os.getpid() != self._pid and self._root.startswith(OBJECT_STORES):  # obstore would wait for ever
            raise ReadError(
                f"{self._root} cannot be read in a forked process: "
                "start the workers with DataLoader(..., multiprocessing_context='spawn') or 'forkserver'"
            )
        return self._storage

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except JobsError as exc:
            raise ReadError(str(exc)) from exc

    def _found(self, name: str) -> list[PartFile]:
        if self._storage.size(name) is not None and not self._is_folder(name):
            return [self._part(name)]
        job = JobNames(name)
        sizes = {file.name: file.size for file in self._storage.files(job.parts_folder)}
        if (manifest := self._record(job.manifest, Manifest)) is not None:
            self.fingerprint = manifest.fingerprint
            return self._expected(job, {job.part(part.index): part for part in manifest.parts}, sizes)
        if (record := self._record(job.record, JobRecord)) is not None:
            return self._expected(job, {job.part(chunk): None for chunk in range(record.num_chunks)}, sizes)
        if sizes or self._is_folder(job.parts_folder):
            raise ReadError(
                f"{self.where}: its download is not complete, there is no manifest.json; "
                f"run `layerstack jobs fetch` again, or to read what is there, open {self._shown(job.parts_folder)}"
            )
        return self._listed(name)

    def _is_folder(self, name: str) -> bool:
        path = self._storage.local_path(name)
        return path is not None and path.is_dir()

    def _expected(
        self, job: JobNames, wanted: Mapping[str, PartSummary | None], sizes: Mapping[str, int]
    ) -> list[PartFile]:
        """Return the parts of a job, all of which have to be there."""
        found = {key: sizes.get(key.rpartition("/")[2]) for key in wanted}
        if missing := [key for key, size in found.items() if size is None]:
            raise ReadError(
                f"{self.where}: {len(missing)} of {len(wanted)} parts are missing, the first is "
                f"{missing[0].rpartition('/')[2]}; to read what is there, open {self._shown(job.parts_folder)}"
            )
        for key, summary in wanted.items():
            if summary is not None and summary.bytes != found[key]:
                what = f"{self._shown(key)} has {found[key]} bytes, and {summary.bytes} by the manifest"
                raise ReadError(f"{what}: it is damaged, or of another job; fetch it again")
        if not wanted:
            raise ReadError(f"{self.where}: the job has no parts")
        return [self._part(key, summary) for key, summary in wanted.items()]

    def _listed(self, folder: str) -> list[PartFile]:
        names = (file.name for file in self._storage.files(folder))
        numbered = sorted((number, name) for name in names if (number := part_index(name)) is not None)
        if not numbered:
            raise ReadError(f"{self.where}: no parts (00000.parquet, …) in this folder")
        return [self._part(f"{folder}/{name}") for _, name in numbered]

    def _record(self, key: str, kind: type[_R]) -> _R | None:
        try:
            return parsed(self._storage.read(key), kind, self._shown(key))
        except FileNotFoundError:
            return None

    def _part(self, key: str, summary: PartSummary | None = None) -> PartFile:
        return PartFile(self._shown(key), key, summary)

    def _shown(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}"


def parsed(content: bytes, kind: type[_R], name: str) -> _R:
    """Read a record.

    Raises:
        ReadError: it is damaged; the message calls it `name`.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as exc:
        raise ReadError(f"{name} is damaged, or of another version of layerstack: {exc}") from exc
