"""Content that is read in threads while it is sent."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from itertools import chain

from anyio import CancelScope
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Send


class ReadStream(StreamingResponse):
    """Sends what a generator yields, and closes it at the end, also if the client has gone.

    Each piece is read in a thread, when the one before has been sent: a slow reader holds none.

    Args:
        first: the first piece, which has been read already.
        pieces: yields those after it.
        status: HTTP status.
        headers: of the answer.
        media_type: of the content.
    """

    def __init__(
        self,
        first: bytes | memoryview,
        pieces: Generator[bytes] | Generator[memoryview],
        status: int,
        headers: Mapping[str, str],
        media_type: str,
    ) -> None:
        self._pieces = pieces
        super().__init__(chain([first], pieces), status, headers, media_type)

    async def stream_response(self, send: Send) -> None:
        """Send the pieces."""
        try:
            await super().stream_response(send)
        finally:
            # If the client has gone, a traceback keeps the generator, and its open file, until the garbage collector
            # comes.
            with CancelScope(shield=True):
                await run_in_threadpool(self._pieces.close)
