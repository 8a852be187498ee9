"""One prompt at a time on the idle stack, in each format in turn, with the cheapest client there is: `http.client`."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import cycle, islice
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from benchmarks.measure import spread

_WARM_UP = 2
_TIMEOUT_S = 600.0


class _Answer(NamedTuple):
    latency_ms: float  # from sending the request to the last byte
    encode_ms: float
    size: int


def ask_in_turn(
    url: str, prompts: Sequence[str], formats: Sequence[str], rounds: int, padding: str = "max_length"
) -> list[dict[str, Any]]:
    """Ask for a prompt in each format, and for the next one, so many times after a warm-up -> a report of each format.

    With fewer prompts than rounds they come again.
    """
    asked_for = islice(cycle(prompts), _WARM_UP + rounds)
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)) as connection:
        asked = [[_ask(connection, prompt, each, padding) for each in formats] for prompt in asked_for]
    return [_report(each, answers[_WARM_UP:]) for each, answers in zip(formats, zip(*asked, strict=True), strict=True)]


def _ask(connection: http.client.HTTPConnection, prompt: str, answer_format: str, padding: str) -> _Answer:
    body = json.dumps({"prompt": prompt})
    path = f"/predict?format={answer_format}&padding={padding}"
    started = time.perf_counter()
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    latency_ms = 1e3 * (time.perf_counter() - started)
    if response.status != http.HTTPStatus.OK:
        raise SystemExit(f"POST {path} answered {response.status}: {content[:500]!r}")
    return _Answer(latency_ms, float(response.headers["Layerstack-Encode-Ms"]), len(content))


def _report(answer_format: str, answers: Sequence[_Answer]) -> dict[str, Any]:
    return {
        "format": answer_format,
        "clients": 1,
        "answers": len(answers),
        "answer_mb": round(answers[-1].size / 1e6, 3),
        "encode_ms": spread([answer.encode_ms for answer in answers]),
        "over_encode_ms": spread([answer.latency_ms - answer.encode_ms for answer in answers]),
    }
