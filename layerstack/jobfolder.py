"""A folder that holds the files of one job, as `layerstack encode` leaves it: `docs/file-format.md` names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from jobs.errors import NotEnoughSpaceError, RecordFormatError
from jobs.layout import JOBS, job_names
from jobs.local_storage import LocalStorage
from jobs.records import JobRecord, Manifest, Record
from layerstack.errors import OfflineError, OtherResultsError
from layerstack.sizes import size_text

_LOCK = ".encode.lock"
# Written before `job.json`, which says that all of them are there.
_BEGINNING = {"prompts", "chunks.json"}
_SHOWN = 3
_MADE_BY = "layerstack encode"


class Origin(Record):
    """What the rows of a folder were made of, by the names that were given; kept as metadata in its `job.json`.

    Attributes:
        made_by: tells these folders from those of a server's job.
        prompt_file: its name.
        prompt_kind: how it was read.
        prompt_sha256: of its bytes.
        model: folder, with its full path, or hub id.
        revision: of a hub id; "" for none.
        subfolder: where the model is; "" for none.
        preset: of the encoder.
        encoder_dtype: that was asked for; "" for the default.
        stored_dtype: likewise, of the rows.
    """

    made_by: str = _MADE_BY
    prompt_file: str
    prompt_kind: str
    prompt_sha256: str
    model: str
    revision: str
    subfolder: str
    preset: str
    encoder_dtype: str
    stored_dtype: str

    def has_prompts_of(self, other: Origin) -> bool:
        """Whether the same bytes were read in the same way."""
        return (self.prompt_sha256, self.prompt_kind) == (other.prompt_sha256, other.prompt_kind)

    def is_as(self, other: Origin) -> bool:
        """Whether all but the name of the prompt file is the same."""
        return self == other.model_copy(update={"prompt_file": self.prompt_file})


class JobFolder(LocalStorage):
    """Storage for one job, whatever its id: `jobs/{id}/parts` is `parts` in the folder."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep others out of it; a folder that stays empty goes again, if it was made here.

        Raises:
            OtherResultsError: it is there, and has files in it that we did not write; they stay as they are.
            OfflineError: somebody else is at it.
            StorageError: it cannot be used.
        """
        self._check_content()
        made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            self.check()
            with FileLock(self.root / _LOCK, timeout=0):
                try:
                    self._check_content()
                    yield
                finally:
                    self._remove_lone_lock()
        except Timeout as exc:
            raise OfflineError(f"{self.root} is being written to by another `layerstack encode`") from exc
        finally:
            with suppress(OSError):  # something is in it
                for folder in made:
                    folder.rmdir()

    def record(self) -> JobRecord | None:
        """Return what was asked; None if nothing is there, or only the beginning of it.

        Raises:
            OtherResultsError: `job.json` is damaged, or of a later version.
        """
        try:
            return JobRecord.model_validate_json((self.root / "job.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as exc:
            raise OtherResultsError(
                f"{self.root}/job.json is damaged, or of a later version; choose another -o"
            ) from exc

    def origin(self, record: JobRecord) -> Origin:
        """Return what the rows are made of.

        Raises:
            OtherResultsError: the folder is of a server's job.
        """
        try:
            return Origin.model_validate(record.metadata)
        except ValidationError as exc:
            raise OtherResultsError(
                f"{self.root} holds the job {record.id}, which `{_MADE_BY}` did not make; choose another -o"
            ) from exc

    def told(self, exc: RecordFormatError | NotEnoughSpaceError) -> OfflineError:
        """Return an error that says what is wrong with this folder, and what to do."""
        if isinstance(exc, NotEnoughSpaceError):
            return OfflineError(
                f"{self.root}: the results would take about {size_text(exc.needed_bytes)} or more, "
                f"{size_text(exc.free_bytes)} are free there, and {size_text(exc.reserve_bytes)} have to stay free "
                "(LAYERSTACK_STORAGE_RESERVE_BYTES); make room, or choose an -o on another disk"
            )
        message = re.sub(rf"(?<!\S){JOBS}/[^/\s]+/", lambda _: f"{self.root}/", str(exc))  # names in a storage
        return OfflineError(
            f"{message}; what {self.root} holds cannot go on from here: delete it, or choose another -o"
        )

    def whole_manifest(self) -> Manifest | None:
        """Return what came out, if each part is there, as long as it should be; no part is read.

        A manifest that is damaged counts for none: it is made anew when all parts have been checked.
        """
        try:
            manifest = Manifest.model_validate_json((self.root / "manifest.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        names = job_names(manifest.job_id)
        return manifest if all(self.size(names.part(part.index)) == part.bytes for part in manifest.parts) else None

    def remove_manifest(self) -> None:
        """Remove the manifest, so that all parts are checked before there is one again."""
        self.delete(_below("manifest.json"))

    def clear_beginning(self) -> None:
        """Remove what was written of a job before it was one, and what writers that died left."""
        for name in sorted(_BEGINNING):
            path = self.root / name
            if path.is_dir():
                super().delete_folder(_below(name))
            else:
                self.delete(_below(name))
        self.remove_unfinished(_below(""))

    def remove_all_unfinished(self) -> None:
        """Remove what writers that died left of a job."""
        for name in ("", "prompts", "parts"):
            if (self.root / name).is_dir():
                self.remove_unfinished(_below(name))

    def delete_folder(self, folder: str) -> None:
        """Delete a folder of the job; of the job's own folder, only what the beginning of a job is."""
        if self._path(folder) == self.root:
            self.clear_beginning()
        else:
            super().delete_folder(folder)

    def _path(self, name: str) -> Path:
        _jobs, _id, *rest = name.split("/")
        return self.root.joinpath(*rest)

    def _check_content(self) -> None:
        try:
            found = {path.name for path in self.root.iterdir()}
        except FileNotFoundError:
            return
        except NotADirectoryError as exc:
            raise OtherResultsError(f"{self.root} is no folder; choose another -o") from exc
        if (record := self.record()) is not None:
            self.origin(record)
            return
        foreign = sorted(name for name in found if not name.startswith("."))
        if _LOCK in found:
            foreign = [name for name in foreign if name not in _BEGINNING]
        if foreign:
            shown = ", ".join(foreign[:_SHOWN]) + (" …" if len(foreign) > _SHOWN else "")
            raise OtherResultsError(
                f"{self.root} has other files in it ({shown}); choose another -o, or an empty folder"
            )

    def _remove_lone_lock(self) -> None:
        """Remove our lock if there is nothing else; whoever waits for it sees that it is gone, and makes another."""
        with suppress(OSError):  # what cannot be tidied up stays
            if [path.name for path in self.root.iterdir()] == [_LOCK]:
                (self.root / _LOCK).unlink()


def differences(record: JobRecord, wanted: Mapping[str, object]) -> list[str]:
    """Say which of the options that a job was made with are not those that are `wanted`, by the record's names."""
    return [
        f"{name} is {there} there, {value} is asked for"
        for name, value in wanted.items()
        if (there := getattr(record, name)) != value
    ]


def _below(name: str) -> str:
    """Return what a job's storage calls a name in the folder."""
    return f"jobs/any/{name}" if name else "jobs/any"
