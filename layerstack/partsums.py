"""Whether parts are, byte for byte, what their manifest says; and what to do with those that are not."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from jobs.layout import JobNames, is_job_id, part_index
from jobs.records import Manifest, PartSummary, View
from layerstack.errors import OtherResultsError, ReadError
from layerstack.jobfolder import JobFolder
from layerstack.sources import PartFile, Source, open_source, parsed

_PIECE_BYTES = 2**20
_EXPORT_MARK = "export.json"


class DamagedPart(View):
    """A part that is not what the manifest says."""

    part: str
    reason: str


@dataclass(frozen=True)
class PartToVerify:
    """A part, what the manifest says of it, and how to open it."""

    name: str
    summary: PartSummary
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class PartsToVerify:
    """What there is to be verified.

    Attributes:
        parts: those that the manifest lists. Whether they are there is not known yet.
        unknown: names of parts beside them that the manifest does not list.
        repair: what makes damaged parts anew, in words.
    """

    parts: list[PartToVerify]
    repair: str
    unknown: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all parts, by the manifest."""
        return sum(part.summary.bytes for part in self.parts)


def parts_to_verify(path: str) -> PartsToVerify:
    """Return the parts that a path or URL means, as their manifest lists them.

    Raises:
        ReadError: there is no manifest, it does not know the part, or it cannot be read.
        ServerError, ServerUnreachableError: of a server's job, as `layerstack.read` raises them.
    """
    local = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - links stay as they are, unlike by resolve()
    if not local.exists():
        return _of_source(open_source(path), path)
    if (folder := _job_folder(local)) is None:
        raise ReadError(f"{path} has no manifest.json, so there are no sums to compare its parts with")
    names = JobNames(str(folder))
    manifest = parsed(Path(names.manifest).read_bytes(), Manifest, names.manifest)
    paths = [(Path(names.part(part.index)), part) for part in manifest.parts]
    listed = [PartToVerify(path.name, part, partial(_open_file, path)) for path, part in paths]
    repair = _repair(folder, manifest.job_id)
    if local.is_dir():
        known = {part.name for part in listed}
        there = sorted(each.name for each in Path(names.parts_folder).glob("*.parquet"))
        unknown = [name for name in there if part_index(name) is not None and name not in known]
        return PartsToVerify(listed, repair, unknown)
    wanted = [part for part in listed if part.name == local.name]
    if not wanted:
        raise ReadError(f"the manifest does not know {local.name}: {names.manifest} lists {len(listed)} parts")
    return PartsToVerify(wanted, repair)


def damaged_parts(found: PartsToVerify, on_bytes: Callable[[int], None] = lambda _: None) -> list[DamagedPart]:
    """Read parts whole, and compare size and SHA-256 with those of the manifest.

    Args:
        found: which.
        on_bytes: told of bytes as they have been read.

    Raises:
        ReadError: a part of a bucket or a server cannot be read.
    """
    wrong = ((part, _what_is_wrong(part, on_bytes)) for part in found.parts)
    damaged = [DamagedPart(part=part.name, reason=reason) for part, reason in wrong if reason is not None]
    return damaged + [DamagedPart(part=name, reason="the manifest does not know it") for name in found.unknown]


def check_sum(source: Source, part: PartFile) -> None:
    """Read a part whole, and find out whether it is what the manifest says, if there is one.

    Raises:
        ReadError: it is not; the message names it.
    """
    if part.summary is not None:
        reason = _what_is_wrong(PartToVerify(part.name, part.summary, partial(_open, source, part)), lambda _: None)
        if reason is not None:
            raise ReadError(f"{part.name} is damaged: {reason}")


def _of_source(source: Source, path: str) -> PartsToVerify:
    """Return the parts of a bucket or a server."""
    parts = [(part, part.summary) for part in source.parts]
    if any(summary is None for _, summary in parts):
        raise ReadError(f"{path} has no manifest to compare with: name the job's folder")
    opened = [PartToVerify(part.name, summary, partial(_open, source, part)) for part, summary in parts if summary]
    job_id = next((word for word in re.split(r"/+", source.where) if is_job_id(word)), "ID")
    return PartsToVerify(opened, _retry(job_id))


def _job_folder(local: Path) -> Path | None:
    """Return the folder of the job that a path is part of: of that folder, its `parts`, or a file in those."""
    candidates = [local] if local.is_dir() else []
    parts_folder = local if local.is_dir() else local.parent
    if parts_folder == Path(JobNames(str(parts_folder.parent)).parts_folder):
        candidates.append(parts_folder.parent)
    return next((folder for folder in candidates if Path(JobNames(str(folder)).manifest).is_file()), None)


def _repair(folder: Path, job_id: str) -> str:
    """Say what makes damaged parts of a job's folder anew: whatever wrote them."""
    if (folder / _EXPORT_MARK).is_file():
        return "delete them, and the same `layerstack export` writes them anew"
    job, shown = JobFolder(folder), shlex.quote(str(folder))
    try:
        record = job.record()
    except OtherResultsError:
        record = None
    if record is None:
        return f"`layerstack jobs fetch {job_id} -o {shown}` downloads them again"
    try:
        job.origin(record)
    except OtherResultsError:  # of a server's job: the folder is the server's own storage
        return _retry(record.id)
    return f"`layerstack encode ... -o {shown} --check` does them anew"


def _retry(job_id: str) -> str:
    return f"`layerstack jobs retry {job_id}` has the server make them anew"


def _what_is_wrong(part: PartToVerify, on_bytes: Callable[[int], None]) -> str | None:
    digest, size = hashlib.sha256(), 0
    try:
        with part.open() as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
                on_bytes(len(piece))
    except FileNotFoundError:
        return "it is missing"
    except OSError as exc:
        return f"it cannot be read: {exc.strerror}"
    if size != part.summary.bytes:
        return f"it has {size} bytes, and {part.summary.bytes} by the manifest"
    return None if digest.hexdigest() == part.summary.sha256 else "its SHA-256 is not the manifest's"


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open(source: Source, part: PartFile) -> IO[bytes]:
    found = source.open(part)
    return found.open("rb") if isinstance(found, Path) else found
