"""Prompts in any number, cut to what a server takes at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import httpx

from jobs.tensors import DtypeName
from layerstack.embeddings import Embeddings, joined, parse
from layerstack.errors import ServerError
from layerstack.parallel import in_parallel
from layerstack.transport import Transport

# The default of LAYERSTACK_PREDICT_MAX_PROMPTS; a server with a lower limit says so.
_FIRST_GUESS = 16
# While one answer travels, the next is computed.
_AT_A_TIME = 4


class Predictor:
    """Asks a server's `/predict`, and remembers what it has learned of it: how many prompts it takes, how it pads."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._limit = _FIRST_GUESS
        self._padding = "none"  # pad rows that are all the same need not travel

    async def predict(self, prompts: Sequence[str], dtype: DtypeName | None) -> Embeddings:
        """Return the embeddings of `prompts`, in order.

        Raises:
            ServerError, ServerUnreachableError: as `Transport.send`.
            UnexpectedAnswerError: the server's encoder changed meanwhile, or it is none of ours.
            ValueError: there are no prompts.
        """
        if not prompts:
            raise ValueError("predict takes at least one prompt, got an empty list")
        pieces = [prompts[start : start + self._limit] for start in range(0, len(prompts), self._limit)]
        return joined(await in_parallel([partial(self._piece, piece, dtype) for piece in pieces], _AT_A_TIME))

    async def _piece(self, prompts: Sequence[str], dtype: DtypeName | None) -> Embeddings:
        try:
            return await self._ask(prompts, dtype)
        except ServerError as exc:
            if exc.status != httpx.codes.REQUEST_ENTITY_TOO_LARGE or len(prompts) == 1:
                raise
            size = self._smaller(exc, len(prompts))
        starts = range(0, len(prompts), size)
        return joined([await self._piece(prompts[start : start + size], dtype) for start in starts])

    async def _ask(self, prompts: Sequence[str], dtype: DtypeName | None) -> Embeddings:
        padding = self._padding
        params = {"format": "safetensors", "padding": padding} | ({"dtype": dtype} if dtype else {})
        response = await self._transport.send(
            "POST",
            "/predict",
            params=params,
            # As ASCII, since a string of Python may have characters that UTF-8 has not: the server says which is bad.
            content=json.dumps({"prompt": list(prompts)}).encode(),
            headers={"Content-Type": "application/json"},
            repeatable=True,
        )
        answer = parse(response.content)
        if answer is None:
            self._padding = "max_length"
            return await self._ask(prompts, dtype)
        return answer

    def _smaller(self, refusal: ServerError, count: int) -> int:
        """Return how many prompts to send instead of `count`: the limit of the server, or half if it is of bytes."""
        limit = refusal.problem.get("limit")
        if refusal.kind == "too-many-prompts" and isinstance(limit, int) and 0 < limit < count:
            self._limit = limit
            return limit
        return count // 2
