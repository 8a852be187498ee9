"""A large body on its way to the client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from anyio.lowlevel import checkpoint
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

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


def respond(body: Body, headers: Mapping[str, str], coding: Coding | None, status: int = 200) -> Response:
    """Return the response that sends `body`, piece by piece, as fast as the client reads; it ends if the client goes.

    Args:
        body: what is sent.
        headers: others than those of the body; `Vary` gets `Accept-Encoding` added to it.
        coding: what `best_coding` chose. Pieces are compressed in a thread, one at a time.
        status: HTTP status.
    """
    response = _PiecesResponse(body, headers, coding, status)
    response.headers.add_vary_header("Accept-Encoding")
    return response


class _PiecesResponse(StreamingResponse):
    """Sends pieces, and lets go of them when it ends."""

    def __init__(self, body: Body, headers: Mapping[str, str], coding: Coding | None, status: int) -> None:
        self._pieces = list(body.pieces)
        if coding is None:
            told = {"Content-Length": str(body.size)}
            super().__init__(_as_it_is(self._pieces), status, {**headers, **told}, body.media_type)
        else:
            told = {"Content-Encoding": coding.value}
            super().__init__(coded(self._pieces, coding), status, {**headers, **told}, body.media_type)

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            # If the client has gone, a traceback keeps whoever iterates over them until the garbage collector comes.
            self._pieces.clear()


async def _as_it_is(pieces: Sequence[memoryview]) -> AsyncIterator[memoryview | bytes]:
    # Asynchronous, so that Starlette fetches no piece through a thread.
    for piece in pieces:
        # h11 joins what it sends, which copies a view, and leaves a single `bytes` object as it is.
        whole = piece.obj
        yield whole if isinstance(whole, bytes) and len(whole) == len(piece) else piece
        # Sending need not wait, for a fast client or one that has gone: others have their turn, and so has the end.
        await checkpoint()
