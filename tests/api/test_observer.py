"""What is counted and logged of a request, whatever becomes of it."""

import asyncio
import logging

import pytest

from api.metrics import Metrics
from api.observer import Observer


class Route:
    path = "/things/{n}"


START = {"type": "http.response.start", "status": 200, "headers": []}


def scope(**changes):
    return {
        "type": "http", "method": "GET", "path": "/things/7", "query_string": b"a=1", "client": ("127.0.0.1", 9)
    } | changes  # fmt: skip


def watch(app, received=(), **changes):
    """Let one request through to `app` -> what was counted of it, and what it raised."""
    metrics, messages = Metrics(), list(received)

    async def receive():
        return messages.pop(0)

    async def send(message):
        pass

    try:
        asyncio.run(Observer(app, metrics)(scope(**changes), receive, send))
    except RuntimeError as exc:
        return metrics.registry, exc
    return metrics.registry, None


def requests(registry, route="/things/{n}", method="GET"):
    """Status -> number of requests."""
    (family,) = (family for family in registry.collect() if family.name == "layerstack_http_requests")
    found = [sample for sample in family.samples if sample.name.endswith("_total")]
    assert {(sample.labels["route"], sample.labels["method"]) for sample in found} == {(route, method)}
    return {sample.labels["status"]: sample.value for sample in found}


def body(content, more=False):
    return {"type": "http.response.body", "body": content, "more_body": more}


async def answering(scope, _receive, send):
    scope["route"] = Route
    await send(START | {"status": 206})
    await send(body(b"12345", more=True))
    await send(body(b"678"))


def test_an_answer_is_counted_with_its_route_status_bytes_and_time():
    registry, _ = watch(answering)
    assert requests(registry) == {"206": 1}
    labels = {"method": "GET", "route": "/things/{n}"}
    assert registry.get_sample_value("layerstack_http_sent_bytes_total", labels) == 8
    assert registry.get_sample_value("layerstack_http_request_duration_seconds_count", labels) == 1
    assert registry.get_sample_value("layerstack_http_requests_in_progress") == 0


def test_it_is_timed_to_the_end_of_a_streamed_answer():
    async def slow(scope, _receive, send):
        scope["route"] = Route
        await send(START)
        await asyncio.sleep(0.06)
        await send(body(b"x"))

    registry, _ = watch(slow)
    labels = {"method": "GET", "route": "/things/{n}"}
    assert registry.get_sample_value("layerstack_http_request_duration_seconds_sum", labels) > 0.05


def test_an_exception_is_a_500_and_goes_on():
    async def failing(scope, _receive, _send):
        scope["route"] = Route
        raise RuntimeError("no")

    registry, error = watch(failing)
    assert requests(registry) == {"500": 1}
    assert str(error) == "no"
    assert registry.get_sample_value("layerstack_http_requests_in_progress") == 0


def test_an_answer_that_breaks_off_is_a_500():
    async def breaking(scope, _receive, send):
        scope["route"] = Route
        await send(START)
        await send(body(b"x", more=True))
        raise RuntimeError("no")

    registry, _ = watch(breaking)
    assert requests(registry) == {"500": 1}


def test_a_client_that_leaves_before_the_end_is_a_499():
    async def listening(scope, receive, send):
        scope["route"] = Route
        await receive()
        await send(START | {"status": 400})
        await send(body(b""))

    registry, _ = watch(listening, [{"type": "http.disconnect"}])
    assert requests(registry) == {"499": 1}


def test_what_comes_after_the_end_of_an_answer_is_no_client_that_left():
    async def listening(scope, receive, send):
        await answering(scope, receive, send)
        await receive()

    registry, _ = watch(listening, [{"type": "http.disconnect"}])
    assert requests(registry) == {"206": 1}


def test_words_that_are_no_methods_are_counted_together():
    registry, _ = watch(answering, method="BREW")
    assert requests(registry, method="other") == {"206": 1}


def test_a_request_without_a_route_is_counted_without_its_path():
    async def refusing(_scope, _receive, send):
        await send(START | {"status": 401})
        await send(body(b""))

    registry, _ = watch(refusing)
    assert requests(registry, route="none") == {"401": 1}


def test_what_is_no_http_passes():
    seen = []

    async def app(scope, _receive, _send):
        seen.append(scope["type"])

    watch(app, type="lifespan")
    assert seen == ["lifespan"]


@pytest.mark.parametrize(("path", "lines"), [("/things/7", 1), ("/health", 0), ("/ready", 0), ("/metrics", 0)])
def test_each_request_has_a_line_but_for_probes(caplog, path, lines):
    with caplog.at_level(logging.INFO, "api.access"):
        watch(answering, path=path)
    assert len(caplog.records) == lines


def test_a_line_cannot_be_broken_by_a_path_and_is_not_endless(caplog):
    with caplog.at_level(logging.INFO, "api.access"):
        watch(answering, path="/a\nb", query_string=b"x" * 10_000)
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert record.path.startswith("/a%0Ab?xxx")
    assert len(record.path) == 500
