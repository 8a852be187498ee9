"""The parts of a job that a server has, read by HTTP ranges without downloading them."""

from __future__ import annotations

import io
import os
import re
import weakref
from functools import partial
from typing import IO, NoReturn

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from jobs.rangefile import RangeFile
from jobs.records import ULID_PATTERN, Manifest
from layerstack.address import authorization, goes_by_proxy
from layerstack.errors import ReadError
from layerstack.sources import PartFile, parsed
from layerstack.transport import check, may_be_sent_again, unreachable

_ADDRESS = re.compile(rf"(https?://.+)/jobs/({ULID_PATTERN.strip('^$')})(?:/parts/(\d+))?/?")
_TIMEOUT_S = 60.0
_ATTEMPTS = 5
_READ_AHEAD_BYTES = 2**18


def served_parts(url: str, api_key: str | None = None) -> ServedParts:
    """Ask a server what parts a job has.

    Args:
        url: `http(s)://HOST:PORT/jobs/ID`, or that of one part.
        api_key: of the server; default the environment variable `LAYERSTACK_API_KEY`.

    Raises:
        ReadError: the URL is of something else, or the job has no such part.
        ServerError: the server says no, as it does while the job is not finished.
        ServerUnreachableError: nobody answers.
    """
    found = _ADDRESS.fullmatch(url)
    if found is None:
        raise ReadError(f"{url} is not the address of a job: that is http://HOST:PORT/jobs/ID")
    server, job_id, number = found.groups()
    connection = _Connection(server, api_key)
    manifest = parsed(connection.get(f"/jobs/{job_id}/results").content, Manifest, f"the manifest of job {job_id}")
    parts = [
        PartFile(f"{server}{key}", key, part)
        for part in manifest.parts
        if number is None or part.index == int(number)
        for key in [f"/jobs/{job_id}/parts/{part.index}"]
    ]
    if not parts:
        raise ReadError(f"{url}: the job has {len(manifest.parts)} parts, from 0 on")
    return ServedParts(url, parts, manifest.fingerprint, connection)


class ServedParts:
    """Parts of a job of a server; see `layerstack.sources.Source`."""

    def __init__(self, where: str, parts: list[PartFile], fingerprint: str, connection: _Connection) -> None:
        self.where, self.parts = where, parts
        self.fingerprint: str | None = fingerprint
        self._connection = connection

    def open(self, part: PartFile) -> IO[bytes]:
        """Open a part; each read is a request for a range."""
        size = part.summary.bytes if part.summary is not None else 0
        return io.BufferedReader(_Ranges(self._connection, part, size), _READ_AHEAD_BYTES)


class _Connection:
    """Sends GETs to a server. A process that was forked, or got this pickled, makes connections of its own."""

    def __init__(self, server: str, api_key: str | None) -> None:
        self._server = server
        self._headers = authorization(api_key)
        self._clients: dict[int, httpx.Client] = {}

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        """Return an answer that says yes; asked again if the server is busy or the connection broke."""
        attempts = Retrying(
            retry=retry_if_exception(partial(may_be_sent_again, repeatable=True)),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            reraise=True,
        )
        response: httpx.Response = attempts(self._get, path, headers or {})
        return response

    def _get(self, path: str, headers: dict[str, str]) -> httpx.Response:
        try:
            # A server may send its clients on to the object store; httpx takes our key off at another origin.
            response = self._client().get(f"{self._server}{path}", headers=headers, follow_redirects=True)
        except httpx.InvalidURL as exc:
            raise ReadError(f"{self._server}{path}: {exc}") from exc
        except httpx.TransportError as exc:
            raise unreachable(self._server, exc) from exc
        check(response)
        return response

    def _client(self) -> httpx.Client:
        pid = os.getpid()
        if pid not in self._clients:
            client = httpx.Client(
                headers=self._headers, timeout=_TIMEOUT_S, trust_env=goes_by_proxy(httpx.URL(self._server))
            )
            weakref.finalize(self, client.close)
            self._clients[pid] = client
        return self._clients[pid]

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_clients": {}}


class _Ranges(RangeFile):
    """A part as a file."""

    def __init__(self, connection: _Connection, part: PartFile, size: int) -> None:
        super().__init__(size)
        self._connection, self._part = connection, part

    def read_range(self, start: int, stop: int) -> bytes:
        asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        response = self._connection.get(self._part.key, asked)
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            self._refuse(f"the server answers a range with HTTP {response.status_code}")
        if response.headers.get("content-range") != f"bytes {start}-{stop - 1}/{self._size}":
            self._refuse(f"has another size than {self._size} bytes, which the manifest says")
        return response.content

    def _refuse(self, why: str) -> NoReturn:
        raise ReadError(f"{self._part.name}: {why}")
