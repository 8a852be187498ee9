"""POST /predict: the embeddings of a few prompts, at once."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BeforeValidator, Field
from starlette.concurrency import run_in_threadpool

from api.formats import MEDIA_TYPES, Format, headers, negotiate, render
from api.problems import Problem, invalid
from api.services import ServicesDep
from api.uploads import too_long
from jobs.records import StrictRecord
from jobs.settings import Settings

router = APIRouter(tags=["predict"])


def _as_list(prompt: object) -> object:
    """Let one string stand for a list of it, so that errors name a position and not a branch of a union."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise ValueError("must be a string or a list of strings")  # noqa: TRY004 - pydantic turns only this into a 422
    return prompt


_Prompts = Annotated[
    list[str],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    Field(examples=[["a fox in the snow"], "a fox in the snow"]),
]


class PredictRequest(StrictRecord):
    """The body of POST /predict."""

    prompt: _Prompts


@router.post(
    "/predict",
    response_class=Response,
    responses={
        200: {
            "description": "`prompt_embeds [B, L, D]` and `text_ids [B, L, 4]`",
            "content": {media_type: {} for media_type in MEDIA_TYPES.values()},
        }
    },
)
async def predict(
    body: PredictRequest,
    request: Request,
    services: ServicesDep,
    asked: Annotated[Format | None, Query(alias="format", description="wins over the Accept header")] = None,
) -> Response:
    """Return the text conditioning of one prompt or a few; long lists go to POST /jobs."""
    started = time.perf_counter()
    answer_format = negotiate(asked, request.headers.get("accept"))
    if answer_format is None:
        raise Problem(406, "not-acceptable", f"available are {', '.join(MEDIA_TYPES.values())}", field="Accept")
    _check(body.prompt, services.settings)
    prediction = await services.predictor.predict(body.prompt)
    time_ms = (time.perf_counter() - started) * 1e3
    content = await run_in_threadpool(render, prediction, answer_format, time_ms)
    return Response(content, headers=headers(prediction), media_type=MEDIA_TYPES[answer_format])


def _check(prompts: list[str], settings: Settings) -> None:
    if not prompts:
        raise invalid("prompt", prompts, "needs at least one prompt")
    if len(prompts) > (limit := settings.predict_max_prompts):
        detail = f"prompt: {len(prompts)} prompts, POST /predict takes at most {limit}; POST /jobs takes any number"
        raise Problem(413, "too-many-prompts", detail, field="prompt", value=len(prompts), limit=limit, see="/jobs")
    for position, prompt in enumerate(prompts):
        if len(prompt) > settings.prompt_max_chars:
            raise too_long(f"prompt.{position}", len(prompt), settings.prompt_max_chars)
