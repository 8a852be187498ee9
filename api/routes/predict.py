"""POST /predict: the embeddings of a few prompts, at once."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from kombu.exceptions import OperationalError
from pydantic import BaseModel, BeforeValidator, Field
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api import jsonbody, openapi
from api.accept import best_coding, header_of
from api.body import respond
from api.disconnect import while_connected
from api.formats import MEDIA_TYPES, Format, headers, is_quick, negotiate
from api.media_types import is_json
from api.metrics import Refusal
from api.prediction import Prediction
from api.problems import Problem, shorten
from api.rows import Padding
from api.services import Services, ServicesDep
from api.uploads import too_long
from jobs.records import StrictRecord
from jobs.settings import Settings
from jobs.tensors import DtypeName

router = APIRouter(tags=["predict"])
# Read in less time than it takes to ask a thread to do it; but a zstd body of this size may be much larger.
_SMALL_BODY_BYTES = 2**14


def _as_list(prompt: object) -> object:
    """Let one string stand for a list of it, so that errors name a position and not a branch of a union."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise ValueError("must be a string or a list of strings")  # noqa: TRY004 - pydantic turns only this into a 422
    return prompt


_Prompts = Annotated[
    list[str],
    BeforeValidator(_as_list, json_schema_input_type=str | Annotated[list[str], Field(min_length=1)]),
    Field(examples=[["a fox in the snow"], "a fox in the snow"], min_length=1),
]
_DTYPE = "of prompt_embeds; default the encoder's"
_PADDING = "max_length answers all L rows of a prompt, none those of its tokens only; default max_length"


class PredictRequest(StrictRecord):
    """The body of POST /predict."""

    prompt: _Prompts
    dtype: DtypeName | None = Field(None, description=_DTYPE)
    padding: Annotated[Padding, Field(strict=False)] | None = Field(None, description=_PADDING)


class PredictAnswer(BaseModel):
    """The JSON answer of POST /predict, without `padding: none`."""

    prompt_embeds: list[list[list[float | None]]] = Field(description="[B, L, D]; null for a value that is no number")
    text_ids: list[list[list[int]]] = Field(description="[B, L, 4]; row l is (0, 0, 0, l)")
    shapes: dict[str, list[Any]]
    num_tokens: list[int] = Field(description="of each prompt, system message included")
    truncated: list[bool] = Field(description="whether the prompt was longer than L tokens, and lost its end")
    dtype: DtypeName
    fingerprint: str
    encode_ms: float
    queue_ms: float
    time_ms: float


class Base64Tensor(BaseModel):
    """A tensor as text."""

    dtype: str
    shape: list[int]
    base64: str = Field(description="its values, row-major and little-endian")


class PredictBase64Answer(PredictAnswer):
    """The same with the tensors in base64; lists of one tensor a prompt with `padding: none`."""

    prompt_embeds: Base64Tensor | list[Base64Tensor]  # type: ignore[assignment] # the same name, in another form
    text_ids: Base64Tensor | list[Base64Tensor]  # type: ignore[assignment] # as above


MODELS = (PredictRequest, PredictAnswer, PredictBase64Answer)
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ANSWER_HEADERS = {
    "Layerstack-Fingerprint": "fingerprint of the encoder",
    "Layerstack-Num-Tokens": "`num_tokens`, with commas",
    "Layerstack-Truncated": "`truncated`, with commas",
    "Layerstack-Encode-Ms": "`encode_ms`",
    "Layerstack-Queue-Ms": "`queue_ms`",
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "`prompt_embeds [B, L, D]` and `text_ids [B, L, 4]`",
        "headers": {
            name: {"description": meaning, "schema": {"type": "string"}} for name, meaning in _ANSWER_HEADERS.items()
        },
        "content": {
            MEDIA_TYPES[Format.JSON]: {"schema": openapi.reference(PredictAnswer)},
            MEDIA_TYPES[Format.BASE64]: {"schema": openapi.reference(PredictBase64Answer)},
            MEDIA_TYPES[Format.SAFETENSORS]: _BINARY,
            MEDIA_TYPES[Format.PT]: _BINARY,
        },
    },
    **openapi.answers(
        *("not-acceptable", "too-many-prompts", "body-too-large", "unsupported-media-type", "invalid-request"),
        *("prompt-too-long", "queue-full", "encoder-failed", "no-worker", "broker-unavailable", "no-answer"),
    ),
}
_REFUSALS: dict[str, Refusal] = {
    "queue-full": "queue-full",
    "no-worker": "no-worker",
    "no-answer": "no-answer",
    "invalid-request": "bad-prompt",
}


@router.post(
    "/predict",
    response_class=Response,
    responses=_ANSWERS,
    openapi_extra=openapi.body({"application/json": {"schema": openapi.reference(PredictRequest)}}),
)
async def predict(
    request: Request,
    services: ServicesDep,
    asked: Annotated[Format | None, Query(alias="format", description="wins over the Accept header")] = None,
    dtype: Annotated[DtypeName | None, Query(description=f"{_DTYPE}; wins over the body")] = None,
    padding: Annotated[Padding | None, Query(description=f"{_PADDING}; wins over the body")] = None,
) -> Response:
    """Return the text conditioning of one prompt or a few; long lists go to POST /jobs."""
    started = time.perf_counter()
    answer_format = _negotiated(asked, header_of(request.headers, "accept"))
    coding = best_coding(header_of(request.headers, "accept-encoding"), worthwhile=answer_format.is_text)
    body = await _read(request, services.settings)
    _check(body.prompt, services.settings)
    prediction = await _predicted(request, services, body.prompt)
    chosen = dtype or body.dtype
    render = partial(
        services.renderer.render,
        prediction,
        answer_format,
        dtype=chosen,
        padding=padding or body.padding or Padding.MAX_LENGTH,
        time_ms=(time.perf_counter() - started) * 1e3,
    )
    # To ask a thread takes half a millisecond.
    rendered = render() if is_quick(prediction, answer_format, chosen) else await run_in_threadpool(render)
    return respond(rendered, headers(prediction), coding)


def _negotiated(asked: Format | None, accept: str | None) -> Format:
    found = negotiate(asked, accept)
    if found is None:
        detail = f"Accept: available are {', '.join(MEDIA_TYPES.values())}; got {shorten(accept)}"
        raise Problem("not-acceptable", detail, field="Accept", value=shorten(accept))
    return found


async def _read(request: Request, settings: Settings) -> PredictRequest:
    media_type = request.headers.get("content-type", "")
    if not is_json(media_type):
        detail = f"Content-Type: this needs application/json; got {shorten(media_type)}"
        raise Problem("unsupported-media-type", detail, field="Content-Type")
    content = await request.body()
    parse = partial(
        jsonbody.parse,
        PredictRequest,
        content,
        content_encoding=request.headers.get("content-encoding"),
        max_bytes=settings.body_max_bytes,
    )
    return parse() if len(content) < _SMALL_BODY_BYTES else await run_in_threadpool(parse)


def _check(prompts: list[str], settings: Settings) -> None:
    if len(prompts) > (limit := settings.predict_max_prompts):
        detail = f"prompt: {len(prompts)} prompts, POST /predict takes at most {limit}; POST /jobs takes any number"
        raise Problem("too-many-prompts", detail, field="prompt", value=len(prompts), limit=limit, see="/jobs")
    for position, prompt in enumerate(prompts):
        if len(prompt) > settings.prompt_max_chars:
            raise too_long(f"prompt.{position}", len(prompt), settings.prompt_max_chars)


async def _predicted(request: Request, services: Services, prompts: list[str]) -> Prediction:
    """Have the prompts encoded for as long as the client waits, and count what came of it."""
    metrics = services.metrics
    try:
        prediction = await while_connected(request, services.predictor.predict(prompts))
    except ClientDisconnect:
        metrics.refused("disconnected")
        raise
    except Problem as problem:
        metrics.refused(_REFUSALS.get(problem.kind, "failed"))
        raise
    except (RedisError, OperationalError):
        metrics.refused("failed")
        raise
    metrics.predicted(
        prediction.queue_ms / 1e3, prediction.encode_ms / 1e3, len(prompts), int(prediction.num_tokens.sum())
    )
    return prediction
