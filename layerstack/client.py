"""The HTTP client."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import httpx
from pydantic import ValidationError

from jobs.files import remove_unfinished, sha256_of, sync_folder, written_whole
from jobs.layout import JobNames
from jobs.records import EncoderInfo, JobView, Manifest, PartSummary
from jobs.tensors import Array, load_tensors
from layerstack.address import LOOPBACK, authorization, server_url
from layerstack.errors import AnswerLostError, DownloadError, ServerError, ServerUnreachableError

_NOTHING_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The answer to `Client.predict`.

    Attributes:
        prompt_embeds: `[B, max_length, D]`, a numpy array in the encoder's dtype.
        text_ids: `[B, max_length, 4]`, int64.
        num_tokens: tokens of each prompt, the system message included.
        truncated: whether each prompt was cut.
        fingerprint: of the encoder.
    """

    prompt_embeds: Array
    text_ids: Array
    num_tokens: list[int]
    truncated: list[bool]
    fingerprint: str


class Client:
    """Talks to a layerstack server; a context manager that closes its connections.

    Every method raises `ServerUnreachableError` if nobody answers, and `ServerError` if the server says no; `submit`
    tells apart whether anything was sent.

    Args:
        url: of the server.
        api_key: a key of the server, if it has any; default the environment variable `LAYERSTACK_API_KEY`.
        timeout_s: seconds that an answer may take.

    Raises:
        ApiKeyError: the key has characters that no key has.
    """

    def __init__(self, url: str | None = None, *, api_key: str | None = None, timeout_s: float = 130.0) -> None:
        self.url = server_url(url)
        # A proxy that the environment names cannot reach a server on this machine.
        is_local = httpx.URL(self.url).host in LOOPBACK
        self._http = httpx.Client(
            base_url=self.url, headers=authorization(api_key), timeout=timeout_s, trust_env=not is_local
        )
        # For an answer that comes only once all that was sent has been stored, however long that takes.
        self._patient = httpx.Timeout(timeout_s, read=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.close()

    def encoder(self) -> EncoderInfo:
        """Return what the server says of its encoder."""
        return EncoderInfo.model_validate(self._json("GET", "/encoder"))

    def predict(self, prompts: str | Sequence[str]) -> Embeddings:
        """Return the embeddings of one prompt or a few."""
        response = self._send(
            "POST",
            "/predict",
            params={"format": "safetensors"},
            json={"prompt": prompts if isinstance(prompts, str) else list(prompts)},
        )
        tensors, metadata = load_tensors(response.content)
        return Embeddings(
            prompt_embeds=tensors["prompt_embeds"],
            text_ids=tensors["text_ids"],
            num_tokens=tensors["num_tokens"].tolist(),
            truncated=tensors["truncated"].tolist(),
            fingerprint=metadata["fingerprint"],
        )

    def submit(self, prompts: Path | Sequence[str], options: Mapping[str, Any] | None = None) -> JobView:
        """Make a job of a `.txt`, `.jsonl`, `.csv` or `.parquet` file, or of a list; returns before it is done.

        Raises:
            AnswerLostError: the connection broke before the answer came: the job may exist.
            OSError: the file cannot be read.
            TypeError: `prompts` is a string, which could be a path or a prompt.
        """
        if isinstance(prompts, str):
            raise TypeError(f"submit takes a list of prompts or a pathlib.Path, not the string {prompts!r}")
        if isinstance(prompts, Path):
            with prompts.open("rb") as file:
                return self._upload(prompts.name, file, options)
        lines = "\n".join(json.dumps(prompt) for prompt in prompts)  # unlike a JSON body, a file has any number
        return self._upload("prompts.jsonl", io.BytesIO(lines.encode()), options)

    def _upload(self, name: str, file: IO[bytes], options: Mapping[str, Any] | None) -> JobView:
        form = {"options": json.dumps(dict(options or {}))}
        try:
            answer = self._json("POST", "/jobs", files={"file": (name, file)}, data=form, timeout=self._patient)
        except ServerUnreachableError as exc:
            if isinstance(exc.__cause__, _NOTHING_SENT):
                raise
            raise AnswerLostError(
                f"{exc}; the job may exist all the same: look with `layerstack jobs list` before you send it again"
            ) from exc
        return JobView.model_validate(answer)

    def job(self, job_id: str) -> JobView:
        """Return how far a job got."""
        return JobView.model_validate(self._json("GET", f"/jobs/{job_id}"))

    def jobs(self, *, limit: int = 20, after: str | None = None) -> list[JobView]:
        """Return jobs, newest first, those older than `after` if that is given."""
        params = {"limit": limit} | ({"after": after} if after else {})
        return [JobView.model_validate(job) for job in self._json("GET", "/jobs", params=params)["jobs"]]

    def cancel(self, job_id: str) -> JobView:
        """Stop a job between two batches; what is done stays."""
        return JobView.model_validate(self._json("POST", f"/jobs/{job_id}/cancel"))

    def retry(self, job_id: str) -> JobView:
        """Do what is missing of a job that failed or was cancelled; check and repair one that succeeded."""
        return JobView.model_validate(self._json("POST", f"/jobs/{job_id}/retry"))

    def delete(self, job_id: str) -> None:
        """Delete a job and its results, at once and for good."""
        self._send("DELETE", f"/jobs/{job_id}")

    def fetch(
        self,
        job_id: str,
        folder: Path,
        on_part: Callable[[PartSummary], None] = lambda _: None,
        *,
        on_begin: Callable[[Manifest], None] = lambda _: None,
    ) -> Manifest:
        """Download a finished job to `folder`, which `layerstack.read` opens. Parts that are there already stay.

        The manifest comes last, and that of another job is removed first: without one, the folder is not read as whole.

        Args:
            job_id: which job.
            folder: gets `manifest.json` and `parts/`.
            on_part: told of each part once it is there.
            on_begin: told what there is to download.

        Raises:
            DownloadError: a part is not what the manifest says.
        """
        content = self._send("GET", f"/jobs/{job_id}/results").content
        manifest = Manifest.model_validate_json(content)
        target = JobNames(str(folder))
        _make_ready(target, manifest)
        on_begin(manifest)
        for part in manifest.parts:
            self._fetch_part(job_id, part, Path(target.part(part.index)))
            on_part(part)
        with written_whole(Path(target.manifest)) as file:
            file.write(content)
        return manifest

    def _fetch_part(self, job_id: str, part: PartSummary, path: Path) -> None:
        if path.is_file() and sha256_of(path) == part.sha256:
            return
        digest = hashlib.sha256()
        with written_whole(path) as file, self._stream(f"/jobs/{job_id}/parts/{part.index}") as response:
            for piece in response.iter_bytes():
                digest.update(piece)
                file.write(piece)
            if digest.hexdigest() != part.sha256:
                raise DownloadError(f"part {part.index} of job {job_id} is damaged: its SHA-256 is not the manifest's")

    def _json(self, method: str, path: str, **arguments: Any) -> Any:  # noqa: ANN401 - JSON, and httpx's arguments
        return self._send(method, path, **arguments).json()

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:  # noqa: ANN401 - httpx's arguments
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc
        _check(response)
        return response

    @contextmanager
    def _stream(self, path: str) -> Iterator[httpx.Response]:
        try:
            # A server may send its clients on to the object store; httpx takes our key off at another origin.
            with self._http.stream("GET", path, follow_redirects=True) as response:
                if response.is_error:
                    response.read()
                _check(response)
                yield response
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc

    def _unreachable(self, exc: httpx.TransportError) -> ServerUnreachableError:
        return ServerUnreachableError(f"no answer from {self.url} ({exc or type(exc).__name__})")


def _make_ready(target: JobNames, manifest: Manifest) -> None:
    """Remove what an earlier download left in a folder: unfinished files, and the manifest of something else."""
    path = Path(target.manifest)
    for folder in (path.parent, Path(target.parts_folder)):
        remove_unfinished(folder)
    if path.is_file() and not _is_manifest(path, manifest):
        path.unlink()
        sync_folder(path.parent)


def _is_manifest(path: Path, manifest: Manifest) -> bool:
    try:
        return Manifest.model_validate_json(path.read_bytes()) == manifest
    except ValidationError:
        return False


def _check(response: httpx.Response) -> None:
    if response.is_error:
        is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
        raise ServerError(response.status_code, response.json() if is_problem else {}, response.text)
