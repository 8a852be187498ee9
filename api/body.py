"""A large body on its way to the client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from anyio.lowlevel import checkpoint
from starlette.responses import StreamingResponse

from api.compressed import Coding
from api.contentcoding import coded
from api.pieces import Pieces


@dataclass(frozen=True, eq=False)
class Body:
    """What is to be sent.

    Attributes:
        pieces: in their order; the same piece may come several times.
        size: bytes of all of them.
        media_type: for `Content-Type`.
    """

    pieces: Sequence[memoryview]
    size: int
    media_type: str

    @classmethod
    def of(cls, content: bytes, media_type: str) -> Self:
        """Return the body of bytes that are at hand."""
        pieces = Pieces()
        pieces.write(content)
        return cls(pieces.finish(), pieces.size, media_type)


def respond(body: Body, headers: Mapping[str, str], coding: Coding | None, status: int = 200) -> StreamingResponse:
    """Return the response that sends `body`, piece by piece, as fast as the client reads; it ends if the client goes.

    Args:
        body: what is sent.
        headers: others than those of the body; `Vary` gets `Accept-Encoding` added to it.
        coding: what `best_coding` chose. Pieces are compressed in a thread, one at a time.
        status: HTTP status.
    """
    if coding is None:
        content, told = _as_it_is(body.pieces), {"Content-Length": str(body.size)}
        response = StreamingResponse(content, status, {**headers, **told}, body.media_type)
    else:
        told = {"Content-Encoding": coding.value}
        response = StreamingResponse(coded(body.pieces, coding), status, {**headers, **told}, body.media_type)
    response.headers.add_vary_header("Accept-Encoding")
    return response


async def _as_it_is(pieces: Sequence[memoryview]) -> AsyncIterator[memoryview]:
    # Asynchronous, so that Starlette fetches no piece through a thread.
    for piece in pieces:
        yield piece
        # Sending need not wait, for a fast client or one that has gone: others have their turn, and so has the end.
        await checkpoint()
