"""The HTTP client: `AsyncClient`, run on an event loop of its own for code that is not async."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from jobs.records import EncoderInfo, JobStatus, JobView, Manifest
from jobs.tensors import DtypeName
from layerstack.asyncclient import RETRY_S, TIMEOUT_S, AsyncClient, AsyncJobs
from layerstack.download import OnProgress, ignore_progress
from layerstack.embeddings import Embeddings
from layerstack.events import JobEvent
from layerstack.parallel import EventLoopThread
from layerstack.submission import Prompts
from layerstack.transport import OnRetry
from layerstack.waiting import ShowWait


class Client:
    """Talks to a layerstack server; a context manager that closes its connections.

    Arguments and errors are those of `AsyncClient`. Threads may share one; the fork of a process needs its own.
    Functions that are told of something, as `on_retry`, are called from another thread.

    Attributes:
        jobs: long prompt lists.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S,
        on_retry: OnRetry = lambda _exc, _wait_s: None,
    ) -> None:
        self._async = AsyncClient(url, api_key=api_key, timeout_s=timeout_s, retry_s=retry_s, on_retry=on_retry)
        self._loop = EventLoopThread()
        self.jobs = Jobs(self._async.jobs, self._loop)

    @property
    def url(self) -> str:
        """Of the server."""
        return self._async.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._loop.close(self._async.aclose)

    def encoder(self) -> EncoderInfo:
        """Return what the server says of its encoder."""
        return self._loop.run(self._async.encoder)

    def predict(self, prompts: str | Sequence[str], *, dtype: DtypeName | None = None) -> Embeddings:
        """Return the embeddings of one prompt or many, in order; as `AsyncClient.predict`."""
        return self._loop.run(partial(self._async.predict, prompts, dtype=dtype))


class Jobs:
    """The jobs of a server, by their ids; `submit` and `get` give a `Job`, which knows its own.

    Each method is that of `AsyncJobs`, which tells more.
    """

    def __init__(self, jobs: AsyncJobs, loop: EventLoopThread) -> None:
        self._async = jobs
        self._loop = loop

    def submit(
        self,
        prompts: Prompts,
        options: Mapping[str, Any] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        prompt_column: str = "prompt",
        id_column: str = "id",
    ) -> Job:
        """Make a job of a prompt file, a list, an iterator or a `datasets.Dataset`; returns before it is done."""
        call = partial(
            self._async.submit,
            prompts,
            options,
            metadata=metadata,
            prompt_column=prompt_column,
            id_column=id_column,
        )
        return Job(self, self._loop.run(call).view)

    def get(self, job_id: str) -> Job:
        """Return a job."""
        return Job(self, self.view(job_id))

    def view(self, job_id: str) -> JobView:
        """Return how far a job got."""
        return self._loop.run(partial(self._async.view, job_id))

    def list(
        self, *, limit: int = 20, after: str | None = None, status: JobStatus | str | Sequence[JobStatus | str] = ()
    ) -> list[JobView]:
        """Return jobs, newest first: those older than `after`, and in one of `status`, if these are given."""
        return self._loop.run(partial(self._async.list, limit=limit, after=after, status=status))

    def cancel(self, job_id: str) -> JobView:
        """Stop a job between two batches; what is done stays."""
        return self._loop.run(partial(self._async.cancel, job_id))

    def retry(self, job_id: str) -> JobView:
        """Do what is missing of a job that failed or was cancelled; check and repair one that succeeded."""
        return self._loop.run(partial(self._async.retry, job_id))

    def delete(self, job_id: str) -> None:
        """Delete a job and its results, at once and for good."""
        self._loop.run(partial(self._async.delete, job_id))

    def events(self, job_id: str, *, patience_s: float = 300.0) -> Iterator[JobEvent]:
        """Yield what happens to a job until its end; lost connections and restarts of the server do not show."""
        return self._loop.iterate(self._async.events(job_id, patience_s=patience_s))

    def wait(self, job_id: str, *, progress: bool | ShowWait | None = None, timeout_s: float | None = None) -> JobView:
        """Return a job once it has succeeded, showing a bar meanwhile.

        Raises:
            JobEndedError: it failed, was cancelled or deleted, or its results have expired.
            TimeoutError: it takes longer; it goes on all the same.
        """
        return self._loop.run(partial(self._async.wait, job_id, progress=progress, timeout_s=timeout_s))

    def download(self, job_id: str, folder: Path | str, *, on_progress: OnProgress = ignore_progress) -> Manifest:
        """Download a finished job to `folder`, which `layerstack.read` opens, going on where it stopped.

        Raises:
            DownloadError: a part is not what the manifest says, or breaks off again and again.
        """
        return self._loop.run(partial(self._async.download, job_id, folder, on_progress=on_progress))


class Job:
    """A job of a server.

    Attributes:
        view: how far it was when the server was last asked.
    """

    def __init__(self, jobs: Jobs, view: JobView) -> None:
        self._jobs = jobs
        self.view = view

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.view.status}>"

    @property
    def id(self) -> str:
        """The job's id."""
        return self.view.id

    @property
    def status(self) -> JobStatus:
        """Its status when the server was last asked."""
        return self.view.status

    def refresh(self) -> JobView:
        """Ask how far it is."""
        self.view = self._jobs.view(self.id)
        return self.view

    def wait(self, *, progress: bool | ShowWait | None = None, timeout_s: float | None = None) -> JobView:
        """Return once it has succeeded; as `Jobs.wait`."""
        self.view = self._jobs.wait(self.id, progress=progress, timeout_s=timeout_s)
        return self.view

    def events(self) -> Iterator[JobEvent]:
        """Yield what happens to it; as `Jobs.events`."""
        return self._jobs.events(self.id)

    def download(self, folder: Path | str, *, on_progress: OnProgress = ignore_progress) -> Manifest:
        """Download its results; as `Jobs.download`."""
        return self._jobs.download(self.id, folder, on_progress=on_progress)

    def cancel(self) -> JobView:
        """Stop it; as `Jobs.cancel`."""
        self.view = self._jobs.cancel(self.id)
        return self.view

    def retry(self) -> JobView:
        """Let it go on; as `Jobs.retry`."""
        self.view = self._jobs.retry(self.id)
        return self.view

    def delete(self) -> None:
        """Delete it and its results."""
        self._jobs.delete(self.id)
