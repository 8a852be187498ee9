import re
import threading
import time

import anyio
import anyio.to_thread
import httpx
import pytest

import layerstack
from layerstack.errors import (
    AddressError,
    ApiKeyError,
    ServerError,
    ServerUnreachableError,
    UnexpectedAnswerError,
)
from layerstack.transport import Transport
from tests.layerstack.servers import Answer, answering, in_turn, problem
from tests.support import free_port

BUSY = problem(429, "queue-full", retry_after=0)
FINE = Answer(200, b"{}", {"Content-Type": "application/json"})


def ask(server, *, repeatable=False, told=None, retry_s=30.0, method="GET"):
    heard = [] if told is None else told

    async def call():
        transport = Transport(
            server.url,
            None,
            timeout_s=10,
            retry_s=retry_s,
            on_retry=lambda *why: heard.append(why),
        )
        try:
            return (await transport.send(method, "/x", repeatable=repeatable)).json()
        finally:
            await transport.aclose()

    return anyio.run(call)


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_server_that_is_busy_is_asked_again_when_it_says_so(status):
    told = []
    with answering(in_turn(problem(status, "busy", retry_after=1), FINE)) as server:
        started = time.monotonic()
        assert ask(server, told=told) == {}
        assert time.monotonic() - started >= 1
        assert len(server.seen) == 2
    (exc, wait_s), *others = told
    assert (exc.status, others) == (status, [])
    assert 1 <= wait_s <= 1.5


def test_without_a_retry_after_it_is_asked_again_all_the_same():
    with answering(in_turn(problem(503, "no-worker"), FINE)) as server:
        assert ask(server) == {}


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500, 504, 507])
def test_any_other_no_is_final(status):
    with answering(in_turn(problem(status, "no"), FINE)) as server:
        with pytest.raises(ServerError) as caught:
            ask(server, repeatable=True)
        assert (caught.value.status, caught.value.kind, len(server.seen)) == (status, "no", 1)


def test_it_gives_up_before_a_wait_that_is_longer_than_it_may_take():
    with answering(in_turn(BUSY, problem(429, "queue-full", retry_after=1000))) as server:
        with pytest.raises(ServerError, match="queue-full") as caught:
            ask(server, retry_s=5)
        assert (len(server.seen), caught.value.retry_after_s) == (2, 1000)


def test_a_call_that_may_be_repeated_survives_a_connection_that_breaks():
    with answering(in_turn(None, FINE)) as server:
        assert ask(server, repeatable=True) == {}
        assert len(server.seen) == 2


def test_one_that_may_not_be_repeated_is_sent_once():
    with answering(in_turn(None, FINE)) as server:
        with pytest.raises(ServerUnreachableError) as caught:
            ask(server, method="DELETE")
        assert (len(server.seen), caught.value.was_sent) == (1, True)


def test_nobody_at_the_url_is_told_at_once_and_with_the_url():
    async def call():
        await Transport("http://127.0.0.1:9", None, timeout_s=10, retry_s=60).send("GET", "/x", repeatable=True)

    with pytest.raises(ServerUnreachableError, match=r"http://127\.0\.0\.1:9") as caught:
        anyio.run(call)
    assert not caught.value.was_sent


def test_an_answer_of_another_kind_of_server_is_an_error_too():
    with (
        answering(in_turn(Answer(404, b"<html>not here"))) as server,
        pytest.raises(ServerError, match="HTTP 404: <html>not"),
    ):
        ask(server)


@pytest.mark.parametrize("key", ["ls_ä", "ls_a\nls_b", "ls_a ls_b"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key):
    with pytest.raises(ApiKeyError) as caught:
        Transport(None, key, timeout_s=1, retry_s=1)
    assert "LAYERSTACK_API_KEY" in str(caught.value)
    assert "ls_" not in str(caught.value)


def test_the_key_is_not_sent_on_to_where_a_server_redirects():
    async def read(url):
        transport = Transport(url, "ls_secret", timeout_s=10, retry_s=1)
        async with transport.stream("/jobs/x/parts/0") as response:
            content = await response.aread()
        await transport.aclose()
        return content

    with (
        answering(in_turn(Answer(body=b"PAR1"))) as store,
        answering(in_turn(Answer(307, headers={"Location": f"{store.url}/bucket/part"}))) as server,
    ):
        assert anyio.run(read, server.url) == b"PAR1"
        assert server.seen[0].headers["Authorization"] == "Bearer ls_secret"
        assert "Authorization" not in store.seen[0].headers
        assert "ls_secret" not in str(store.seen[0].headers)


def test_a_proxy_of_the_environment_is_not_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with answering(in_turn(FINE)) as server:
        assert ask(server) == {}


def test_a_server_that_was_there_and_is_started_again_is_waited_for():
    port = free_port()

    async def call():
        transport = Transport(f"http://127.0.0.1:{port}", None, timeout_s=10, retry_s=30)
        with answering(in_turn(leaving), port):
            await transport.send("GET", "/x")
        again = threading.Thread(target=serve)
        async for attempt in transport.attempts(repeatable=False):
            with attempt:
                if attempt.retry_state.attempt_number == 2:
                    again.start()
                    await anyio.to_thread.run_sync(started.wait)
                await transport.send_once("GET", "/x")
        ended.set()
        again.join()
        await transport.aclose()
        return attempt.retry_state.attempt_number

    started, ended = threading.Event(), threading.Event()
    leaving = Answer(200, b"{}", {"Connection": "close"})

    def serve():
        with answering(in_turn(FINE), port):
            started.set()
            ended.wait(30)

    assert anyio.run(call) == 2


def test_what_a_call_takes_is_no_time_spent_on_asking_again():
    def respond(_request):
        held.wait(0.7)
        return None if len(server.seen) == 1 else FINE

    held = threading.Event()  # never set
    with answering(respond) as server:
        assert ask(server, repeatable=True, retry_s=0.6) == {}


@pytest.mark.parametrize("text", ["localhost:7860", "ftp://host", "http://", "http://localhost:abc", "http://[::1"])
def test_a_url_that_is_none_is_told_with_what_is_wrong(text):
    with pytest.raises(AddressError, match=re.escape(repr(text))):
        Transport(text, None, timeout_s=1, retry_s=1)


def test_a_password_in_the_url_is_not_shown():
    async def call():
        await Transport("http://me:secret@127.0.0.1:9", None, timeout_s=10, retry_s=1).send("GET", "/x")

    with pytest.raises(ServerUnreachableError, match=r"http://127\.0\.0\.1:9 ") as caught:
        anyio.run(call)
    assert "secret" not in str(caught.value)


def test_an_answer_that_does_not_come_names_why():
    async def call():
        await Transport(server.url, None, timeout_s=0.1, retry_s=1).send("GET", "/x")

    held = threading.Event()
    with answering(lambda _: held.wait(5) and None) as server:
        with pytest.raises(ServerUnreachableError, match="ReadTimeout"):
            anyio.run(call)
        held.set()


@pytest.mark.parametrize("status", [301, 308])
def test_a_server_that_has_moved_is_no_yes_and_tells_where_to(status):
    moved = Answer(status, headers={"Location": "https://elsewhere.example/x"})
    with (
        answering(in_turn(moved)) as server,
        pytest.raises(ServerError, match=r"moved to https://elsewhere\.example/x"),
    ):
        ask(server, method="DELETE")


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, b"<html>hello"),
        Answer(200, b"{}"),
        Answer(200, b"[]"),
        Answer(200, b"no gzip", {"Content-Encoding": "gzip"}),
    ],
    ids=["html", "object", "list", "coding"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.encoder(),
        lambda client: client.predict("a"),
        lambda client: client.jobs.list(),
        lambda client: client.jobs.submit(["a"]),
        lambda client: client.jobs.download("01M89S02QC8BKBM49Y5DE15Q8S", "/nowhere"),
        lambda client: list(client.jobs.events("01M89S02QC8BKBM49Y5DE15Q8S")),
    ],
    ids=["encoder", "predict", "list", "submit", "download", "events"],
)
def test_what_is_no_server_of_ours_is_an_error_of_ours(answer, call):
    with (
        answering(in_turn(answer)) as server,
        layerstack.Client(server.url) as client,
        pytest.raises(UnexpectedAnswerError, match=r"no layerstack server|not the tensors"),
    ):
        call(client)


@pytest.mark.parametrize("body", [b"no json", b"[1]"])
def test_a_problem_document_that_is_none_is_an_error_all_the_same(body):
    answer = Answer(500, body, {"Content-Type": "application/problem+json"})
    with answering(in_turn(answer)) as server, pytest.raises(ServerError, match="HTTP 500"):
        ask(server)


def test_it_is_for_others(monkeypatch):
    async def call(proxied):
        transport = Transport(f"http://layerstack.invalid{proxied}", None, timeout_s=10, retry_s=1)
        found = (await transport.send("GET", "/x")).json()
        await transport.aclose()
        return found

    with answering(in_turn(FINE)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert anyio.run(call, "") == {}
        assert proxy.seen[0].headers["Host"] == httpx.URL("http://layerstack.invalid").host
