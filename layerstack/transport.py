"""Requests to one server: errors of ours, and what may be sent again is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_before_delay, wait_random_exponential

from layerstack.address import LOOPBACK, authorization, server_url
from layerstack.errors import ServerError, ServerUnreachableError

_TRY_AGAIN = {httpx.codes.TOO_MANY_REQUESTS, httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE}
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 20.0
_NOTHING_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)

OnRetry = Callable[[Exception, float], None]
"""Told why a request is sent again, and in how many seconds."""


class Transport:
    """Sends requests to a server.

    A server that is busy or starting (429, 502, 503) is asked again, after what its `Retry-After` says or else after
    twice as long each time, until `retry_s` is over. So is one whose connection broke, if the call may be repeated.

    Args:
        url: of the server; default what the environment names.
        api_key: a key of the server; default what the environment has.
        timeout_s: seconds that an answer may take.
        retry_s: seconds that may be spent on asking again.
        on_retry: told before each wait.

    Raises:
        ApiKeyError: the key has characters that no key has.
    """

    def __init__(
        self,
        url: str | None,
        api_key: str | None,
        *,
        timeout_s: float,
        retry_s: float,
        on_retry: OnRetry = lambda _exc, _wait_s: None,
    ) -> None:
        self.url = server_url(url)
        # A proxy that the environment names cannot reach a server on this machine.
        is_local = httpx.URL(self.url).host in LOOPBACK
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=authorization(api_key), timeout=timeout_s, trust_env=not is_local
        )
        self._retry_s = retry_s
        self._on_retry = on_retry

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, method: str, path: str, *, repeatable: bool = False, **arguments: Any) -> httpx.Response:  # noqa: ANN401 - httpx's arguments
        """Send a request and read its answer.

        Args:
            method: of HTTP.
            path: behind the server's URL.
            repeatable: whether a request whose answer got lost may be sent again.
            arguments: those of `httpx.AsyncClient.request`; `content` may be a function that makes it anew.

        Raises:
            ServerUnreachableError: nobody answers, or the connection broke.
            ServerError: the server says no.
        """
        async for attempt in self.attempts(repeatable=repeatable):
            with attempt:
                given = arguments | ({"content": make()} if callable(make := arguments.get("content")) else {})
                try:
                    response = await self._http.request(method, path, **given)
                except httpx.TransportError as exc:
                    raise unreachable(self.url, exc) from exc
                check(response)
        return response

    async def json(self, method: str, path: str, *, repeatable: bool = False, **arguments: Any) -> Any:  # noqa: ANN401 - JSON, and httpx's arguments
        """Send a request and return the JSON of its answer; as `send`."""
        return (await self.send(method, path, repeatable=repeatable, **arguments)).json()

    @asynccontextmanager
    async def stream(
        self, path: str, headers: dict[str, str] | None = None, *, read_s: float | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Open an answer to be read piece by piece, once: what breaks off inside is for the caller to go on with.

        Args:
            path: behind the server's URL.
            headers: to be sent.
            read_s: seconds that a piece may take; default what an answer may take.

        Raises:
            ServerUnreachableError: nobody answers, or the connection broke, also while it is read.
            ServerError: the server says no.
        """
        timeout = self._http.timeout if read_s is None else httpx.Timeout(self._http.timeout.connect, read=read_s)
        try:
            # A server may send its clients on to the object store; httpx takes our key off at another origin.
            async with self._http.stream(
                "GET", path, headers=headers, timeout=timeout, follow_redirects=True
            ) as response:
                if response.is_error:
                    await response.aread()
                check(response)
                yield response
        except httpx.TransportError as exc:
            raise unreachable(self.url, exc) from exc

    def attempts(self, *, repeatable: bool) -> AsyncRetrying:
        """Return attempts at a call, each to be made inside `with`."""
        return AsyncRetrying(
            retry=retry_if_exception(lambda exc: may_be_sent_again(exc, repeatable=repeatable)),
            wait=_wait_s,
            stop=stop_before_delay(self._retry_s),
            before_sleep=self._tell,
            reraise=True,
        )

    def _tell(self, state: RetryCallState) -> None:
        if state.outcome is not None and isinstance(exc := state.outcome.exception(), Exception):
            self._on_retry(exc, state.upcoming_sleep)


def unreachable(url: str, exc: httpx.TransportError) -> ServerUnreachableError:
    """Return the error of ours for one of httpx's."""
    return ServerUnreachableError(
        f"no answer from {url} ({exc or type(exc).__name__})", was_sent=not isinstance(exc, _NOTHING_SENT)
    )


def check(response: httpx.Response) -> None:
    """Raise `ServerError` for an answer that says no; its body must have been read."""
    if response.is_error:
        is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
        problem = response.json() if is_problem else {}
        raise ServerError(response.status_code, problem, response.text, _retry_after(response))


def may_be_sent_again(exc: BaseException, *, repeatable: bool) -> bool:
    """Whether a request that ended in `exc` is sent again; one whose answer got lost only if it is `repeatable`."""
    if isinstance(exc, ServerError):
        return exc.status in _TRY_AGAIN
    return repeatable and isinstance(exc, ServerUnreachableError) and exc.was_sent


_backoff = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)


def _wait_s(state: RetryCallState) -> float:
    exc = state.outcome.exception() if state.outcome is not None else None
    asked_s = exc.retry_after_s if isinstance(exc, ServerError) else None
    return _backoff(state) if asked_s is None else asked_s


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that the server asks to wait; a date, which only a proxy would send, counts for nothing."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None
