"""Encodes on this machine, without server and broker: a prompt file into the files of a job, or a few prompts.

The one file of this room that imports `encoder`, `worker` and `api`, and only when it is called: torch takes seconds to
import, and a client does without all three.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.chunking import ChunkLimits
from jobs.errors import NoPromptsError, StorageError, StorageFullError
from jobs.files import sha256_of
from jobs.layout import job_names
from jobs.records import EncoderInfo, JobOptions, JobRecord, Manifest, Prompt
from jobs.results import Verified, finalise
from jobs.settings import Settings
from jobs.store import JobStore
from jobs.tensors import Array
from layerstack.encodingprogress import TELL_EVERY_S, Progress, Watcher
from layerstack.errors import OfflineError, OtherResultsError, PromptFileError
from layerstack.jobfolder import JobFolder, Origin, differences

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


def encode_file(file: Path, folder: Path, *, settings: Settings, options: JobOptions, watcher: Watcher) -> Outcome:
    """Encode a prompt file into `folder`, with the files that a job has; goes on where an earlier call was stopped.

    The parts that are there stay, and are checked at the end. If all of it is there and everything is named as it was,
    the model is not loaded; else it is, and has to have the fingerprint of the rows that are there.

    Args:
        file: .txt, .jsonl, .csv or .parquet; .gz or .zst may follow.
        folder: is made if need be.
        settings: name the model, and the limits of a chunk if the options do not.
        options: how the rows are stored.
        watcher: hears how far it is.

    Raises:
        PromptFileError: the file is bad, or has no prompt in it.
        OtherResultsError: the folder has something else in it; nothing of it has been touched.
        OfflineError: it cannot be done, or not now; what is done stays.
        JobsError: the folder cannot be used, or has no room for the results.
        OSError: the file cannot be opened.
        KeyboardInterrupt: Ctrl-C; what is done stays.
    """
    origin, job_folder = _origin(file, settings, options), JobFolder(folder)
    store = JobStore(job_folder)
    with job_folder.locked(), _told(file):
        record = job_folder.record()
        if record is None:
            encoder = _loaded(settings, watcher)
            record = _created(store, job_folder, file, origin, settings, options, encoder)
        else:
            is_named_alike = _check_same(job_folder, record, origin, settings, options)
            is_whole = _is_whole(store, record.id)
            if not (is_whole and is_named_alike):
                encoder = _loaded(settings, watcher)
                _check_encoder(job_folder, record, options, encoder)
            if is_whole:
                return Outcome(job_folder.root, store.manifest(record.id), 0)
        job_folder.remove_all_unfinished()
        parts_written = _encode(store, record, settings, encoder, watcher)
        return Outcome(job_folder.root, store.manifest(record.id), parts_written)


def _loaded(settings: Settings, watcher: Watcher) -> Encoder:
    watcher.loading(settings.model or "")
    return load(settings)


def load(settings: Settings) -> Encoder:
    """Load the model of the settings.

    Raises:
        OfflineError: it cannot be loaded.
    """
    from encoder import EncoderError
    from worker.model import load_encoder

    try:
        return load_encoder(settings)
    except EncoderError as exc:
        raise OfflineError(f"the encoder cannot be loaded: {exc}") from exc


class LocalEncoder:
    """The model of the settings, for a few prompts at a time; numpy in and out.

    Attributes:
        info: what it says of itself.

    Raises:
        OfflineError: it cannot be loaded.
    """

    def __init__(self, settings: Settings) -> None:
        from worker.rows import describe

        self._encoder = load(settings)
        self.info: EncoderInfo = describe(self._encoder)

    def dense(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Return `prompt_embeds [B, L, D]` and `text_ids [B, L, 4]`.

        Raises:
            OfflineError: a prompt cannot be encoded.
        """
        from encoder import PromptError
        from worker.rows import to_numpy

        try:
            prompt_embeds, text_ids = self._encoder.dense(self._encoder.encode(prompts))
        except PromptError as exc:
            raise OfflineError(str(exc)) from exc
        return to_numpy(prompt_embeds), to_numpy(text_ids)

    def token(self, prompt: str, row: int) -> str:
        """Return what row `row` of a dense prompt is of: a token of its own, the prefix, or padding."""
        tokenizer, info = self._encoder.tokenizer, self.info
        own_ids = tokenizer([prompt])[0].own_ids
        first = info.max_length - len(own_ids) if info.padding_side == "left" else info.num_prefix_tokens
        if first <= row < first + len(own_ids):
            return repr(tokenizer.text(own_ids[row - first]))
        return "prefix" if first - info.num_prefix_tokens <= row < first else "padding"


def read_prompts(file: Path, settings: Settings) -> Iterator[Prompt]:
    """Yield the prompts of a file, as the API reads them.

    Raises:
        PromptFileError: a line, a row or the file is bad; it names which, what is there and what is allowed.
        OSError: it cannot be read.
    """
    from api.compressed import file_coding
    from api.jobrequest import PromptUpload
    from api.problems import Problem
    from api.uploads import PromptFile

    kind, (coding, _) = PromptFile(_kind(file)), file_coding(file.name, None)
    with file.open("rb") as content:
        try:
            yield from PromptUpload(content, kind, coding, JobOptions(), {}, "file").prompts(settings)
        except Problem as exc:
            setting = " (LAYERSTACK_PROMPT_MAX_CHARS)" if exc.kind == "prompt-too-long" else ""
            raise PromptFileError(f"{file}: {exc.detail}{setting}") from exc


def _kind(file: Path) -> str:
    from api.compressed import file_coding
    from api.uploads import recognise

    _, name = file_coding(file.name, None)
    kind = recognise(name, None)
    if kind is None:
        raise PromptFileError(
            f"{file}: not a prompt file, by its name: .txt, .jsonl, .csv or .parquet; .gz or .zst may follow"
        )
    return kind.value


def _origin(file: Path, settings: Settings, options: JobOptions) -> Origin:
    model = settings.model or ""
    return Origin(
        prompt_file=file.name,
        prompt_kind=_kind(file),
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


def _is_whole(store: JobStore, job_id: str) -> bool:
    """Whether a job has succeeded, and each part is there, as long as it should be; no part is read."""
    if not store.has_manifest(job_id):
        return False
    names = job_names(job_id)
    return all(store.storage.size(names.part(part.index)) == part.bytes for part in store.manifest(job_id).parts)


def _created(
    store: JobStore,
    folder: JobFolder,
    file: Path,
    origin: Origin,
    settings: Settings,
    options: JobOptions,
    encoder: Encoder,
) -> JobRecord:
    from worker.rows import describe

    folder.clear_beginning()
    return store.create(
        read_prompts(file, settings),
        options=options,
        encoder=describe(encoder),
        limits=ChunkLimits(settings.chunk_rows, settings.chunk_tokens),
        metadata=origin.model_dump(),
        reserve_bytes=settings.storage_reserve_bytes,
    )


def _encode(store: JobStore, record: JobRecord, settings: Settings, encoder: Encoder, watcher: Watcher) -> int:
    """Encode what is missing of a job, and check all of it -> how many parts have been written."""
    from encoder import Engine
    from worker.chunks import ChunkEncoder
    from worker.recall import Recall

    store.retry(record.id)  # if it has succeeded before, its parts have to be checked anew
    with Engine(encoder) as engine:
        recall = Recall(engine, settings.deduplicate_rows)
        chunks = ChunkEncoder(store, engine, recall, settings.storage_reserve_bytes)
        for _ in range(_ROUNDS):
            _encode_missing(store, record, chunks, settings.bulk_threads, watcher)
            bad = _finalise(store, record, watcher, read_all=settings.verify_parts == "full")
            if not bad:
                return chunks.written.totals()["written_parts"]
    raise OfflineError(f"the parts {bad} come out damaged each time; is the disk sound? {GO_ON}")


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


def _finalise(store: JobStore, record: JobRecord, watcher: Watcher, *, read_all: bool) -> list[int]:
    """Check all parts, and write the manifest -> the chunks to be done anew."""
    verified, stopping = Verified(), threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="finalise") as pool:
        future: Future[list[int]] = pool.submit(
            finalise, store, record.id, read_all=read_all, should_stop=stopping.is_set, verified=verified
        )
        try:
            while wait([future], timeout=TELL_EVERY_S).not_done:
                watcher.checking(len(verified.parts), record.num_chunks)
        finally:
            stopping.set()
    return future.result()


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
def _told(file: Path) -> Iterator[None]:
    """Turn what the other rooms raise into errors of this one, which say what to do next."""
    from worker.errors import PromptFailedError, WorkerError

    try:
        yield
    except NoPromptsError as exc:
        raise PromptFileError(f"{file}: there is no prompt in it") from exc
    except PromptFailedError as exc:
        raise OfflineError(
            f"{exc}; with --on-error continue, into another -o, it is noted and the rest goes on"
        ) from exc
    except StorageFullError as exc:
        raise OfflineError(f"{exc}; make room, and {GO_ON}") from exc
    except (WorkerError, StorageError) as exc:
        raise OfflineError(f"{exc}; {GO_ON}") from exc
    except (RuntimeError, MemoryError) as exc:  # what torch raises when a device, or its memory, is not up to it
        raise OfflineError(f"the encoder failed: {exc}; {GO_ON}") from exc
