"""The HTTP client for async code. `layerstack.Client` is the same for code that is not async, and runs this one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import anyio

from jobs.records import EncoderInfo, JobStatus, JobView, Manifest, View
from jobs.tensors import DtypeName
from layerstack.address import job_path
from layerstack.download import OnProgress, download, ignore_progress
from layerstack.embeddings import Embeddings
from layerstack.events import JobEvent, ended_well, job_events
from layerstack.predicting import Predictor
from layerstack.submission import Prompts, check_source, submit
from layerstack.transport import OnRetry, Transport
from layerstack.waiting import ShowWait, show_wait

TIMEOUT_S = 130.0
RETRY_S = 60.0


class _Page(View):
    """A page of jobs."""

    jobs: list[JobView]
    next: str | None


class AsyncClient:
    """Talks to a layerstack server; an async context manager that closes its connections. For one event loop.

    Every call raises `ServerUnreachableError` if nobody answers, `ServerError` if the server says no, and
    `UnexpectedAnswerError` if what answers is no server of ours. A server that is busy or has no worker yet (429, 502,
    503) is asked again, when its `Retry-After` says so; so is one that has been there and is started again.

    Args:
        url: of the server; default the environment variable `LAYERSTACK_URL`, or this machine.
        api_key: a key of the server, if it has any; default the environment variable `LAYERSTACK_API_KEY`.
        timeout_s: seconds that an answer may take.
        retry_s: seconds that a call may wait, all together, to ask again.
        on_retry: told why before each time, and how many seconds it waits.

    Attributes:
        jobs: long prompt lists.

    Raises:
        AddressError: the URL is none.
        ApiKeyError: the key has characters that no key has.
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
        self._transport = Transport(url, api_key, timeout_s=timeout_s, retry_s=retry_s, on_retry=on_retry)
        self._predictor = Predictor(self._transport)
        self.jobs = AsyncJobs(self._transport, timeout_s)

    @property
    def url(self) -> str:
        """Of the server."""
        return self._transport.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def encoder(self) -> EncoderInfo:
        """Return what the server says of its encoder."""
        return await self._transport.ask(EncoderInfo, "GET", "/encoder")

    async def predict(self, prompts: str | Sequence[str], *, dtype: DtypeName | None = None) -> Embeddings:
        """Return the embeddings of one prompt or many, in order.

        More than the server takes at once go in several requests, four at a time. Only rows of tokens travel, and the
        dense tensors are put together here; with encoders that pad at the right, all rows travel.

        Args:
            prompts: a prompt or a list of them; thousands are a case for `jobs.submit`.
            dtype: of the rows; default the encoder's. What float16 cannot hold becomes infinite.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        check_source("predict", prompts)
        return await self._predictor.predict(list(prompts), dtype)


class AsyncJobs:
    """The jobs of a server, by their ids; `submit` and `get` give an `AsyncJob`, which knows its own."""

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s

    async def submit(
        self,
        prompts: Prompts,
        options: Mapping[str, Any] | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
        prompt_column: str = "prompt",
        id_column: str = "id",
    ) -> AsyncJob:
        """Make a job; returns before it is done.

        Prompts are read in another thread: an iterator may wait, but not be one that belongs to this thread, as rows of
        sqlite3 do.

        Args:
            prompts: the `Path` of a `.txt`, `.jsonl`, `.csv` or `.parquet` file, `.gz` and `.zst` included; or
                prompts, from a list, an iterator that is read once and never held, or a `datasets.Dataset`.
            options: of the job, `{"dtype": "float16"}` say; docs/api.md lists them.
            metadata: kept with the job.
            prompt_column: of a row with named columns: where the prompt is.
            id_column: likewise: where an id is, if there is one.

        Raises:
            AnswerLostError: the connection broke before the answer came, again and again: the job may exist.
            OSError: the file cannot be read.
            PromptsError: a row is no prompt; nothing of the job stays.
            TypeError: `prompts` is a string, which could be a path or a prompt, or a whole table.
        """
        view = await submit(
            self._transport,
            prompts,
            options or {},
            metadata=metadata or {},
            prompt_column=prompt_column,
            id_column=id_column,
            timeout_s=self._timeout_s,
        )
        return AsyncJob(self, view)

    async def get(self, job_id: str) -> AsyncJob:
        """Return a job."""
        return AsyncJob(self, await self.view(job_id))

    async def view(self, job_id: str) -> JobView:
        """Return how far a job got."""
        return await self._transport.ask(JobView, "GET", job_path(job_id))

    async def list(
        self, *, limit: int = 20, after: str | None = None, status: JobStatus | str | Sequence[JobStatus | str] = ()
    ) -> list[JobView]:
        """Return jobs, newest first: those older than `after`, and in one of `status`, if these are given."""
        found: list[JobView] = []
        statuses = [status] if isinstance(status, str) else [str(each) for each in status]
        while len(found) < limit:
            # With a status, a page may have fewer jobs than there are, or none, and a next one all the same.
            params = {"limit": min(100, limit - len(found)), "after": after, "status": statuses}
            given = {name: value for name, value in params.items() if value}
            page = await self._transport.ask(_Page, "GET", "/jobs", params=given)
            found += page.jobs
            after = page.next
            if after is None:
                break
        return found

    async def cancel(self, job_id: str) -> JobView:
        """Stop a job between two batches; what is done stays."""
        return await self._transport.ask(JobView, "POST", f"{job_path(job_id)}/cancel")

    async def retry(self, job_id: str) -> JobView:
        """Do what is missing of a job that failed or was cancelled; check and repair one that succeeded."""
        return await self._transport.ask(JobView, "POST", f"{job_path(job_id)}/retry")

    async def delete(self, job_id: str) -> None:
        """Delete a job and its results, at once and for good."""
        await self._transport.send("DELETE", job_path(job_id))

    def events(self, job_id: str, *, patience_s: float = 300.0) -> AsyncGenerator[JobEvent]:
        """Yield what happens to a job until its end; lost connections and restarts of the server do not show.

        Args:
            job_id: which job.
            patience_s: seconds that the server may be away.
        """
        return job_events(self._transport, job_id, patience_s=patience_s)

    async def wait(
        self, job_id: str, *, progress: bool | ShowWait | None = None, timeout_s: float | None = None
    ) -> JobView:
        """Return a job once it has succeeded.

        Args:
            job_id: which job.
            progress: whether a bar is drawn; default where standard error is a terminal. Or a function that is told of
                each change.
            timeout_s: seconds to wait at most; default for ever.

        Raises:
            JobEndedError: it failed, was cancelled or deleted, or its results have expired.
            TimeoutError: it takes longer; it goes on all the same.
        """
        job: JobView | None = None
        with show_wait(progress) as show, anyio.fail_after(timeout_s):
            async with aclosing(self.events(job_id)) as events:
                async for event in events:
                    job = None if event.kind == "deleted" else event.job or job
                    if job is not None:
                        show(job)
        return ended_well(job_id, job)

    async def download(self, job_id: str, folder: Path | str, *, on_progress: OnProgress = ignore_progress) -> Manifest:
        """Download a finished job to `folder`, which `layerstack.read` opens; four parts at a time.

        Parts that are there already, and are what the manifest says, stay; one that broke off goes on where it stopped,
        in this call or the next. The manifest comes last, and that of another job is removed first: without one, the
        folder is not read as whole.

        Args:
            job_id: which job.
            folder: gets `manifest.json` and `parts/`.
            on_progress: told how far it got.

        Raises:
            DownloadError: a part is not what the manifest says, breaks off again and again, or somebody else downloads
                to the same folder.
        """
        return await download(self._transport, job_id, Path(folder), on_progress)


class AsyncJob:
    """A job of a server.

    Attributes:
        view: how far it was when the server was last asked.
    """

    def __init__(self, jobs: AsyncJobs, view: JobView) -> None:
        self._jobs = jobs
        self.view = view

    def __repr__(self) -> str:
        return f"<AsyncJob {self.id} {self.view.status}>"

    @property
    def id(self) -> str:
        """The job's id."""
        return self.view.id

    @property
    def status(self) -> JobStatus:
        """Its status when the server was last asked."""
        return self.view.status

    async def refresh(self) -> JobView:
        """Ask how far it is."""
        self.view = await self._jobs.view(self.id)
        return self.view

    async def wait(self, *, progress: bool | ShowWait | None = None, timeout_s: float | None = None) -> JobView:
        """Return once it has succeeded; as `AsyncJobs.wait`."""
        self.view = await self._jobs.wait(self.id, progress=progress, timeout_s=timeout_s)
        return self.view

    def events(self) -> AsyncGenerator[JobEvent]:
        """Yield what happens to it; as `AsyncJobs.events`."""
        return self._jobs.events(self.id)

    async def download(self, folder: Path | str, *, on_progress: OnProgress = ignore_progress) -> Manifest:
        """Download its results; as `AsyncJobs.download`."""
        return await self._jobs.download(self.id, folder, on_progress=on_progress)

    async def cancel(self) -> JobView:
        """Stop it; as `AsyncJobs.cancel`."""
        self.view = await self._jobs.cancel(self.id)
        return self.view

    async def retry(self) -> JobView:
        """Let it go on; as `AsyncJobs.retry`."""
        self.view = await self._jobs.retry(self.id)
        return self.view

    async def delete(self) -> None:
        """Delete it and its results."""
        await self._jobs.delete(self.id)
