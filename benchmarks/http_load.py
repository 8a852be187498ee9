"""The load of `benchmarks/http.py`: clients that each send POST /predict, wait for the answer and send the next.

    python -m benchmarks.http_load --url URL --prompts FILE --clients 8 --warm-up 8 --seconds 15 < /dev/null

locust runs the clients, in this process of its own, since it replaces sockets and threads everywhere. Lines of JSON on
the standard output tell the benchmark when the measured time begins, which is with the answer that ends the warm-up,
when it ends, and then what has been seen.

An answer of 429 is sent again after the time that its `Retry-After` asks for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from http import HTTPStatus
from itertools import cycle
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from geventhttpclient.client import HTTPClientPool
from locust import FastHttpUser, constant, task
from locust.env import Environment

_ANSWER_S = 600.0
_WARM_UP_S = 240.0
# After any other refusal, or the clients would do nothing but ask.
_PAUSE_S = 0.2
# What is read at once: with geventhttpclient's own 4 KB, reading large answers is most of what this machine does.
_BLOCK_BYTES = 2**20
_ENCODE_MS = "Layerstack-Encode-Ms"
_TIME_MS = re.compile(rb'"time_ms":\s*([\d.]+)\}$')  # of benchmarks/plain_service.py, which has no such header


class Client(FastHttpUser):
    """Sends one prompt after the other."""

    wait_time = constant(0)

    @task
    def predict(self) -> None:
        """Ask for one prompt until it is answered or refused for good."""
        options = self.environment.parsed_options
        body, query = {"prompt": next(options.prompts_left)}, options.query
        # A proxy that compresses for a slow line is not what is measured here.
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        response = self.client.post(f"/predict{query}", name="/predict", json=body, headers=headers)
        while response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            asked = response.headers.get("Retry-After") if response.headers else None
            gevent.sleep(float(asked) if isinstance(asked, str) else 1.0)
            response = self.client.post(f"/predict{query}", name="/predict", json=body, headers=headers)
        if response.status_code != HTTPStatus.OK:
            gevent.sleep(_PAUSE_S)


class Recorder:
    """Notes each request, and when the warm-up and the measured time are over.

    Attributes:
        requests: of each: seconds when it was sent and when its last byte was here, status (0 without one), bytes,
            milliseconds that the encoder took (None if the answer does not tell).
        warm: set with the answer that ends the warm-up.
        begun_s: when that came.
        enough: set with the last answer that is wanted.
        ended_s: when that came.
    """

    def __init__(self, warm_up: int, wanted: int | None) -> None:
        self._warm_up, self._wanted = warm_up, wanted
        self._answers = 0
        self.requests: list[tuple[float, float, int, int, float | None]] = []
        self.warm = Event()
        self.begun_s = 0.0
        self.enough = Event()
        self.ended_s = 0.0

    def note(self, response: Any, response_time: float, response_length: int, **_other: object) -> None:  # noqa: ANN401 - locust's own
        """Listen to locust's event of a request that is over."""
        now, status = time.monotonic(), response.status_code
        encode_ms = _encode_ms(response) if status == HTTPStatus.OK else None
        self.requests.append((now - response_time / 1e3, now, status, response_length, encode_ms))
        if status == HTTPStatus.OK:
            self._answers += 1
            if self._answers == self._warm_up:
                self.begun_s = now
                self.warm.set()
            if self._wanted is not None and self._answers == self._warm_up + self._wanted:
                self.ended_s = now
                self.enough.set()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_load")
    parser.add_argument("--url", required=True, help="of the server")
    parser.add_argument("--query", default="", help="of the requests, with its question mark")
    parser.add_argument("--prompts", type=Path, required=True, help="a JSON list; taken in turn")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--warm-up", type=int, required=True, help="answers that come first")
    parser.add_argument("--seconds", type=float, required=True, help="measured time, at most")
    parser.add_argument("--requests", type=int, help="answers in the measured time, at most")
    parser.add_argument("--drain", type=float, default=0.0, help="seconds to wait for the last answers (default 0)")
    args = parser.parse_args()
    args.prompts_left = cycle(json.loads(args.prompts.read_text(encoding="utf-8")))
    Client.client_pool = HTTPClientPool(
        concurrency=args.clients, block_size=_BLOCK_BYTES, connection_timeout=10.0, network_timeout=_ANSWER_S
    )
    environment = Environment(
        user_classes=[Client], host=args.url, parsed_options=args, stop_timeout=args.drain, catch_exceptions=False
    )
    recorder = Recorder(args.warm_up, args.requests)
    environment.events.request.add_listener(recorder.note)
    runner = environment.create_local_runner()
    runner.start(args.clients, spawn_rate=args.clients)
    if not recorder.warm.wait(_WARM_UP_S):
        seen = dict(Counter(status for _, _, status, _, _ in recorder.requests))
        sys.exit(f"{args.url}: fewer than {args.warm_up} answers in {_WARM_UP_S:g} s; requests by status: {seen}")
    _say({"event": "begun"})
    ended_s = recorder.ended_s if recorder.enough.wait(args.seconds) else time.monotonic()
    _say({"event": "ended"})
    runner.quit()
    _say({"event": "results", "begun": recorder.begun_s, "ended": ended_s, "requests": recorder.requests})


def _encode_ms(response: Any) -> float | None:  # noqa: ANN401 - the same
    if (told := response.headers.get(_ENCODE_MS)) is not None:
        return float(told)
    found = _TIME_MS.search(response.content[-64:])
    return float(found[1]) if found else None


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
