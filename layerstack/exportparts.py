"""Exports rows as parts in the layout `dense`; `layerstack/export.py` shows the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from jobs.files import sha256_of, written_whole
from jobs.layout import JobNames, part_index
from jobs.parts import MAX_LISTED_ERRORS, EncodedRow, PartHeader, PartWriter
from jobs.records import Compression, Manifest, PartReport, as_json
from layerstack.exportoptions import Exported
from layerstack.exportsurvey import Survey
from layerstack.partsums import check_sum
from layerstack.scan import Parts
from layerstack.sources import PartFile

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class DenseParts:
    """Writes parts in the layout `dense`, of the same rows as those of the source."""

    def __init__(self, parts: Parts, folder: Path, header: PartHeader, compression: Compression) -> None:
        self._parts, self._names, self._header = parts, JobNames(str(folder)), header
        self._compression = compression
        self._done = Exported()

    def write(self, survey: Survey, on_rows: Callable[[int], None]) -> Exported:
        """Write the parts, and the manifest once they are there; `export` says how.

        Raises:
            ReadError: a part is damaged.
        """
        reports = []
        for number, part in enumerate(self._parts.parts):
            report = self._found(_index_of(part.file, number))
            if report is None:
                report = self._write(number, _index_of(part.file, number), on_rows)
                self._done.written += report.part.succeeded
            else:
                self._done.kept += report.part.succeeded
                on_rows(part.num_rows)
            self._done.failed += report.part.failed
            reports.append(report)
        self._done.overflowed = survey.succeeded - self._done.written - self._done.kept
        with written_whole(Path(self._names.manifest)) as file:
            file.write(as_json(self._manifest(survey, reports)))
        return self._done

    def _found(self, index: int) -> PartReport | None:
        path, report = Path(self._names.part(index)), Path(self._names.report(index))
        try:
            found = PartReport.model_validate_json(report.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return found if path.is_file() and path.stat().st_size == found.part.bytes else None

    def _write(self, number: int, index: int, on_rows: Callable[[int], None]) -> PartReport:
        path = Path(self._names.part(index))
        check_sum(self._parts.source, self._parts.parts[number].file)
        with written_whole(path) as file, PartWriter(file, self._header, self._compression) as writer:
            for row in self._rows(number):
                writer.write(row)
                on_rows(1)
        report = writer.counts.report(index, path.stat().st_size, sha256_of(path))
        with written_whole(Path(self._names.report(index))) as file:
            file.write(as_json(report))
        return report

    def _rows(self, number: int) -> Iterator[EncodedRow]:
        for group in self._parts.groups_of(number):
            for place, row in enumerate(group.rows):
                own_rows = group.own_rows(place) if row["error"] is None else None
                yield EncodedRow(own_rows=own_rows, **row)

    def _manifest(self, survey: Survey, reports: list[PartReport]) -> Manifest:
        parts = [report.part for report in reports]
        return Manifest(
            job_id=_job_id(survey.source),
            fingerprint=self._header.fingerprint,
            finished_at=datetime.now(UTC),
            parts=parts,
            errors=[error for report in reports for error in report.errors][:MAX_LISTED_ERRORS],
            **{
                name: sum(getattr(part, name) for part in parts)
                for name in ("rows", "bytes", "succeeded", "failed", "truncated", "tokens")
            },
        )


def _index_of(part: PartFile, number: int) -> int:
    """Return which part of its job the one at place `number` is: an export of some parts keeps their names."""
    if part.summary is not None:
        return part.summary.index
    index = part_index(PurePosixPath(part.name).name)
    return number if index is None else index


def _job_id(source: str) -> str:
    """Return a ULID that the same rows always get: an export is no job, but a manifest names one."""
    number = int(source[:32], 16)
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
