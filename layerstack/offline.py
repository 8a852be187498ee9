"""Encodes on this machine, without server and broker: a prompt file into the files of a job.

Imports `encoder` and `worker` only when it is called: torch takes seconds to import, and a client does without both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.chunking import ChunkLimits
from jobs.errors import NotEnoughSpaceError, RecordFormatError, StorageError, StorageFullError
from jobs.files import sha256_of
from jobs.records import JobOptions, JobRecord, Manifest
from jobs.results import Verified, finalise
from jobs.settings import Settings
from jobs.store import JobStore
from layerstack.encodingprogress import TELL_EVERY_S, Progress, Watcher
from layerstack.errors import OfflineError, OtherResultsError
from layerstack.jobfolder import JobFolder, Origin, differences
from layerstack.localencoder import check_prompts, check_settings, device_faults_told, kind_of, load, read_prompts

if TYPE_CHECKING:
    from encoder import Encoder
    from worker.chunks import ChunkEncoder

GO_ON = "the same command goes on from here"
# A part that comes out damaged is done anew; if that happens again, it is not by chance.
_ROUNDS = 3


@dataclass(frozen=True)
class Outcome:
    """What `encode_file` left.

    Attributes:
        folder: where the results are.
        manifest: what is in them.
        parts_written: by this call; the others were there when it began.
    """

    folder: Path
    manifest: Manifest
    parts_written: int


def encode_file(
    file: Path, folder: Path, *, settings: Settings, options: JobOptions, watcher: Watcher, read_again: bool = False
) -> Outcome:
    """Encode a prompt file into `folder`, with the files that a job has; goes on where an earlier call was stopped.

    The parts that are there stay, and are checked at the end. If all of it is there and everything is named as it was,
    the model is not loaded; else it is, and has to have the fingerprint of the rows that are there.

    Args:
        file: .txt, .jsonl, .csv or .parquet; .gz or .zst may follow.
        folder: is made if need be.
        settings: name the model, and the limits of a chunk if the options do not.
        options: how the rows are stored.
        watcher: hears how far it is.
        read_again: read all parts also if all of it is there, and do damaged ones anew; else their sizes have to do.

    Raises:
        PromptFileError: the file is bad, or has no prompt in it.
        OtherResultsError: the folder has something else in it; nothing of it has been touched.
        OfflineError: it cannot be done, or not now; what is done stays.
        JobsError: the folder cannot be used.
        OSError: the file cannot be opened.
        KeyboardInterrupt: Ctrl-C; what is done stays.
    """
    run = _Run(file, JobFolder(folder), settings, options, watcher)
    origin = _origin(file, settings, options)
    with run.folder.locked(), _told(run.folder):
        record = run.folder.record()
        return run.begin(origin) if record is None else run.go_on(record, origin, read_again=read_again)


@dataclass(frozen=True)
class _Run:
    """One call of `encode_file`: what it was given, and what it has found out of the parts."""

    file: Path
    folder: JobFolder
    settings: Settings
    options: JobOptions
    watcher: Watcher
    verified: Verified = field(default_factory=Verified)

    @cached_property
    def store(self) -> JobStore:
        return JobStore(self.folder)

    def begin(self, origin: Origin) -> Outcome:
        """Do all of it; what is cheap to find wrong is told before the minutes that loading takes."""
        from worker.rows import describe

        check_prompts(self.file, self.settings)
        check_settings(self.settings)
        encoder = self._loaded()
        self.folder.clear_beginning()
        record = self.store.create(
            read_prompts(self.file, self.settings),
            options=self.options,
            encoder=describe(encoder),
            limits=ChunkLimits(self.settings.chunk_rows, self.settings.chunk_tokens),
            metadata=origin.model_dump(),
            reserve_bytes=self.settings.storage_reserve_bytes,
        )
        return self._outcome(record, self._encode(record, encoder, read_all=False))

    def go_on(self, record: JobRecord, origin: Origin, *, read_again: bool) -> Outcome:
        """Do what is missing.

        Raises:
            OtherResultsError: the folder is of other prompts, of other options or of another encoder.
        """
        is_named_alike = _check_same(self.folder, record, origin, self.settings, self.options)
        whole = self.folder.whole_manifest()
        if whole is None or read_again:
            self.store.num_rows(record.id, 0)  # a damaged chunks.json is told before anything is loaded or changed
        encoder = None if whole and is_named_alike else self._loaded_for(record)
        if whole and not read_again:
            return Outcome(self.folder.root, whole, 0)
        self.folder.remove_manifest()
        parts_written = 0
        if whole is None or self._finalise(record, read_all=True):
            parts_written = self._encode(record, encoder or self._loaded_for(record), read_all=read_again)
        return self._outcome(record, parts_written)

    def _loaded(self) -> Encoder:
        self.watcher.loading(self.settings.model or "")
        return load(self.settings)

    def _loaded_for(self, record: JobRecord) -> Encoder:
        check_settings(self.settings)
        encoder = self._loaded()
        _check_encoder(self.folder, record, self.options, encoder)
        return encoder

    def _outcome(self, record: JobRecord, parts_written: int) -> Outcome:
        return Outcome(self.folder.root, self.store.manifest(record.id), parts_written)

    def _encode(self, record: JobRecord, encoder: Encoder, *, read_all: bool) -> int:
        """Encode what is missing of a job, and check all of it -> how many parts have been written."""
        from encoder import Engine
        from worker.chunks import ChunkEncoder
        from worker.recall import Recall

        settings = self.settings
        self.folder.remove_all_unfinished()
        with Engine(encoder) as engine:
            recall = Recall(engine, settings.deduplicate_rows)
            chunks = ChunkEncoder(self.store, engine, recall, settings.storage_reserve_bytes)
            for _ in range(_ROUNDS):
                _encode_missing(self.store, record, chunks, settings.bulk_threads, self.watcher)
                bad = self._finalise(record, read_all=read_all or settings.verify_parts == "full")
                if not bad:
                    return chunks.written.totals()["written_parts"]
        raise OfflineError(f"the parts {bad} come out damaged each time; is the disk sound? {GO_ON}")

    def _finalise(self, record: JobRecord, *, read_all: bool) -> list[int]:
        """Check all parts that have not been found good, and write the manifest -> the chunks to be done anew."""
        stopping = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="finalise") as pool:
            future: Future[list[int]] = pool.submit(
                finalise, self.store, record.id, read_all=read_all, should_stop=stopping.is_set, verified=self.verified
            )
            try:
                while wait([future], timeout=TELL_EVERY_S).not_done:
                    self.watcher.checking(len(self.verified.parts), record.num_chunks)
            finally:
                stopping.set()
        return future.result()


def _origin(file: Path, settings: Settings, options: JobOptions) -> Origin:
    model = settings.model or ""
    return Origin(
        prompt_file=file.name,
        prompt_kind=kind_of(file),
        prompt_sha256=sha256_of(file),
        model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        revision=settings.model_revision or "",
        subfolder=settings.model_subfolder or "",
        preset=settings.preset,
        encoder_dtype=settings.dtype or "",
        stored_dtype=options.dtype or "",
    )


def _check_same(folder: JobFolder, record: JobRecord, origin: Origin, settings: Settings, options: JobOptions) -> bool:
    """Find out whether a job is of the same prompts and options -> whether the model is named as it was, too.

    Raises:
        OtherResultsError: it is not.
    """
    there = folder.origin(record)
    if not there.has_prompts_of(origin):
        raise OtherResultsError(
            f"{folder.root} holds results of other prompts: of {there.prompt_file} with the SHA-256 "
            f"{there.prompt_sha256[:12]}…, and {origin.prompt_file} has {origin.prompt_sha256[:12]}…; choose another -o"
        )
    wanted = options.model_dump() | {
        "chunk_rows": options.chunk_rows or settings.chunk_rows,
        "chunk_tokens": options.chunk_tokens or settings.chunk_tokens,
        "dtype": options.dtype or record.dtype,
    }
    if different := differences(record, wanted):
        raise _other_options(folder, different)
    return there.is_as(origin)


def _check_encoder(folder: JobFolder, record: JobRecord, options: JobOptions, encoder: Encoder) -> None:
    from worker.rows import describe

    info = describe(encoder)
    if info.fingerprint != record.fingerprint:
        there = folder.origin(record)
        raise OtherResultsError(
            f"{folder.root} holds rows of another encoder: fingerprint {record.fingerprint} ({there.model}, "
            f"{there.preset}) there, {info.fingerprint} ({info.model}, {info.preset}, {info.dtype}) now; name the "
            "model and dtype of then, or choose another -o"
        )
    if different := differences(record, {"dtype": options.dtype or info.dtype}):
        raise _other_options(folder, different)


def _other_options(folder: JobFolder, different: Sequence[str]) -> OtherResultsError:
    return OtherResultsError(
        f"{folder.root} holds results with other options: {'; '.join(different)}; repeat the options of then, or "
        "choose another -o"
    )


def _encode_missing(store: JobStore, record: JobRecord, chunks: ChunkEncoder, threads: int, watcher: Watcher) -> None:
    """Encode the chunks without a part, several at a time: the encoder is busy while a part is hashed and synced."""
    from worker.errors import ChunkStoppedError

    files, stopping = store.files(record.id), threading.Event()
    progress = Progress({chunk: store.num_rows(record.id, chunk) for chunk in files.parts}, record.num_prompts, watcher)
    missing = (chunk for chunk in range(record.num_chunks) if chunk not in files.parts)
    guard = threading.Lock()

    def encode_some() -> None:
        while not stopping.is_set():
            with guard:
                chunk = next(missing, None)
            if chunk is None:
                return
            with device_faults_told(GO_ON):
                chunks.encode(record.id, chunk, _ChunkWatch(chunk, progress, stopping))
            progress.note(chunk, store.num_rows(record.id, chunk), at_once=True)

    with ThreadPoolExecutor(threads, thread_name_prefix="chunks") as pool:
        futures: list[Future[None]] = []
        try:
            futures += [pool.submit(encode_some) for _ in range(threads)]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # Ctrl-C, or one has failed: the others stop between two batches
            stopping.set()
    faults = [fault for future in futures if (fault := future.exception())]
    for fault in sorted(faults, key=lambda fault: isinstance(fault, ChunkStoppedError)):  # what made the others stop
        raise fault


@dataclass(frozen=True)
class _ChunkWatch:
    """Looks after one chunk: counts its rows, and stops it between two batches."""

    chunk: int
    rows: Progress
    stopping: threading.Event

    def check(self) -> None:
        if self.stopping.is_set():
            from worker.errors import HandedBackError

            raise HandedBackError("stopped")

    def progress(self, rows: int) -> None:
        self.rows.note(self.chunk, rows)


@contextmanager
def _told(folder: JobFolder) -> Iterator[None]:
    """Turn what the other rooms raise on purpose into errors of this one, which say what to do next."""
    from worker.errors import PromptFailedError, WorkerError

    try:
        yield
    except PromptFailedError as exc:
        raise OfflineError(
            f"{exc}; with --on-error continue, into another -o, it is noted and the rest goes on"
        ) from exc
    except StorageFullError as exc:
        raise OfflineError(f"{exc}; make room, and {GO_ON}") from exc
    except (RecordFormatError, NotEnoughSpaceError) as exc:
        raise folder.told(exc) from exc
    except (WorkerError, StorageError) as exc:
        raise OfflineError(f"{exc}; {GO_ON}") from exc
