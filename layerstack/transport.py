"""Requests to one server: errors of ours, and what may be sent again is."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from layerstack.address import authorization, goes_by_proxy, server_url
from layerstack.errors import ServerError, ServerUnreachableError, UnexpectedAnswerError

M = TypeVar("M", bound=BaseModel)
_TRY_AGAIN = {httpx.codes.TOO_MANY_REQUESTS, httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE}
_CONNECT_S = 10.0
_SHORTEST_WAIT_S = 0.5
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
    twice as long each time, until the waits are `retry_s` together. So is one whose connection broke, if the call may
    be repeated, and one that cannot be reached any more, as while it is started again.

    Args:
        url: of the server; default what the environment names.
        api_key: a key of the server; default what the environment has.
        timeout_s: seconds that an answer may take.
        retry_s: seconds that a call may wait to ask again.
        on_retry: told before each wait.

    Attributes:
        url: of the server, without the password that may be in it.
        on_retry: see above.

    Raises:
        AddressError: the URL is none.
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
        address = server_url(url)
        self.url = str(address.copy_with(userinfo=b"")).rstrip("/")
        self.on_retry = on_retry
        self._http = httpx.AsyncClient(
            base_url=address,
            headers=authorization(api_key),
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S)),
            trust_env=goes_by_proxy(address),
        )
        self._retry_s = retry_s
        self._is_known = False  # that there is a server

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, method: str, path: str, *, repeatable: bool = False, **arguments: Any) -> httpx.Response:  # noqa: ANN401 - httpx's arguments
        """Send a request and read its answer.

        Args:
            method: of HTTP.
            path: behind the server's URL.
            repeatable: whether a request whose answer got lost may be sent again.
            arguments: those of `httpx.AsyncClient.request`.

        Raises:
            ServerUnreachableError: nobody answers, or the connection broke.
            ServerError: the server says no.
            UnexpectedAnswerError: what answers is no server of ours.
        """
        async for attempt in self.attempts(repeatable=repeatable):
            with attempt:
                response = await self.send_once(method, path, **arguments)
        return response

    async def send_once(self, method: str, path: str, **arguments: Any) -> httpx.Response:  # noqa: ANN401 - httpx's arguments
        """Send a request, whatever comes of it; as `send`."""
        try:
            response = await self._http.request(method, path, **arguments)
        except httpx.RequestError as exc:
            raise unreachable(self.url, exc) from exc
        self._is_known = True
        check(response)
        return response

    async def ask(self, kind: type[M], method: str, path: str, *, repeatable: bool = True, **arguments: Any) -> M:  # noqa: ANN401 - httpx's arguments
        """Send a request and return its answer as a record of `kind`; as `send`."""
        response = await self.send(method, path, repeatable=repeatable, **arguments)
        return record(kind, response.content, self.url)

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
            UnexpectedAnswerError: what answers is no server of ours.
        """
        timeout = httpx.Timeout(self._http.timeout.read if read_s is None else read_s, connect=_CONNECT_S)
        try:
            # A server may send its clients on to the object store; httpx takes our key off at another origin.
            async with self._http.stream(
                "GET", path, headers=headers, timeout=timeout, follow_redirects=True
            ) as response:
                self._is_known = True
                if not response.is_success:
                    await response.aread()
                check(response)
                yield response
        except httpx.RequestError as exc:
            raise unreachable(self.url, exc) from exc

    def attempts(self, *, repeatable: bool) -> AsyncRetrying:
        """Return attempts at a call, each to be made inside `with`."""

        def may_be_sent(exc: BaseException) -> bool:
            is_away = isinstance(exc, ServerUnreachableError) and not exc.was_sent and self._is_known
            return is_away or may_be_sent_again(exc, repeatable=repeatable)

        return AsyncRetrying(
            retry=retry_if_exception(may_be_sent),
            wait=_wait_s,
            # What the calls themselves take does not count: an upload may take hours.
            stop=lambda state: state.idle_for + state.upcoming_sleep > self._retry_s,
            before_sleep=self._tell,
            reraise=True,
        )

    def _tell(self, state: RetryCallState) -> None:
        if state.outcome is not None and isinstance(exc := state.outcome.exception(), Exception):
            self.on_retry(exc, state.upcoming_sleep)


def record(kind: type[M], content: bytes | str, url: str) -> M:
    """Return what a server answered as a record.

    Raises:
        UnexpectedAnswerError: it is none.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as exc:
        shown = content[:100] if isinstance(content, str) else content[:100].decode("utf-8", "replace")
        raise UnexpectedAnswerError(
            f"{url} answers what no layerstack server of this version does: {shown!r} is no {kind.__name__}"
        ) from exc


def unreachable(url: str, exc: httpx.RequestError) -> ServerUnreachableError | UnexpectedAnswerError:
    """Return the error of ours for one of httpx's."""
    why = str(exc) or type(exc).__name__
    if not isinstance(exc, httpx.TransportError):  # compressed badly, say, or sent round in circles
        return UnexpectedAnswerError(f"{url} answers what no layerstack server does: {why}")
    return ServerUnreachableError(f"no answer from {url} ({why})", was_sent=not isinstance(exc, _NOTHING_SENT))


def check(response: httpx.Response) -> None:
    """Raise `ServerError` for an answer that says no, or that there is nothing here; its body must have been read."""
    if response.is_success:
        return
    problem = {}
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        problem = _object(response.content)
    elif response.has_redirect_location:
        problem = {"detail": f"the server has moved to {response.headers['location']}: use that as its URL"}
    raise ServerError(response.status_code, problem, response.text, _retry_after(response))


def may_be_sent_again(exc: BaseException, *, repeatable: bool) -> bool:
    """Whether a request that ended in `exc` is sent again; one whose answer got lost only if it is `repeatable`."""
    if isinstance(exc, ServerError):
        return exc.status in _TRY_AGAIN
    return repeatable and isinstance(exc, ServerUnreachableError) and exc.was_sent


def patient_wait_s(exc: Exception, attempt: int) -> float:
    """Return the seconds to wait before attempt `attempt`, counted from 1: what the server asks for, within reason."""
    asked_s = exc.retry_after_s if isinstance(exc, ServerError) else None
    return min(asked_s or _SHORTEST_WAIT_S * 2 ** min(attempt - 1, 10), _LONGEST_WAIT_S)


_backoff = wait_random_exponential(multiplier=_SHORTEST_WAIT_S, max=_LONGEST_WAIT_S)


def _wait_s(state: RetryCallState) -> float:
    exc = state.outcome.exception() if state.outcome is not None else None
    asked_s = exc.retry_after_s if isinstance(exc, ServerError) else None
    if asked_s is None:
        return _backoff(state)
    # Some more, by chance, or all clients that were turned away come back in the same moment.
    return max(asked_s, _SHORTEST_WAIT_S) + random.uniform(0, _SHORTEST_WAIT_S)  # noqa: S311 - needs no secret


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that the server asks to wait; a date, which only a proxy would send, counts for nothing."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None
