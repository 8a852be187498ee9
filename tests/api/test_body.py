import gc
import gzip
import random
import socket
import threading
import weakref
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
import zstandard
from starlette.applications import Starlette
from starlette.routing import Route

from api.body import Body, respond
from api.compressed import Coding
from tests.support import wait_for

CONTENT = random.Random(0).randbytes(5 * 2**20 + 3)
DECODERS = {
    None: bytes,
    Coding.GZIP: gzip.decompress,
    Coding.ZSTD: lambda content: zstandard.ZstdDecompressor().decompressobj().decompress(content),
}


@dataclass
class Watched:
    """A server, how many pieces it has sent since the last request, and whether the last one is in memory."""

    url: str = ""
    sent: int = 0
    last: weakref.ref | None = None


@pytest.fixture(scope="module")
def server():
    """A server with the parser that ours has. `/whole/CODING` and `/huge/CODING` answer with a body."""
    watched = Watched()

    async def whole(request):
        body = Body.of(CONTENT, "application/json")
        return respond(body, {"Vary": "Accept", "X-Other": "told"}, coding_of(request))

    async def huge(request):
        # Two that differ, because gzip compresses a piece that comes again only once.
        piece, other, last = (memoryview(random.Random(seed).randbytes(2**20)) for seed in range(3))
        watched.last = weakref.ref(last)
        pieces = [*[piece, other] * 2000, last]
        return respond(Body(pieces, len(pieces) * 2**20, "application/json"), {}, coding_of(request))

    routes = [Route("/whole/{coding}", whole), Route("/huge/{coding}", huge)]
    application = Starlette(routes=routes)

    async def counted(scope, receive, send):
        watched.sent = 0

        async def counting(message):
            watched.sent += 1
            await send(message)

        await application(scope, receive, counting)

    config = uvicorn.Config(counted, http="h11", ws="none", lifespan="off", log_level="warning")
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        wait_for(lambda: running.started)
        watched.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield watched
        running.should_exit = True
        thread.join()


@pytest.fixture
def uncollected():
    """Without the garbage collector."""
    gc.disable()
    yield
    gc.enable()


def coding_of(request):
    name = request.path_params["coding"]
    return None if name == "none" else Coding(name)


def test_a_body_without_a_coding_arrives_whole_and_tells_its_length(server):
    response = httpx.get(f"{server.url}/whole/none")
    assert response.content == CONTENT
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.headers["content-type"] == "application/json"
    assert response.headers["vary"] == "Accept, Accept-Encoding"
    assert response.headers["x-other"] == "told"
    assert "content-encoding" not in response.headers


@pytest.mark.parametrize("coding", Coding)
def test_a_coded_body_decodes_to_the_same_and_has_no_length(server, coding):
    with httpx.stream("GET", f"{server.url}/whole/{coding}") as response:
        assert DECODERS[coding](b"".join(response.iter_raw())) == CONTENT
    assert response.headers["content-encoding"] == coding
    assert response.headers["vary"] == "Accept, Accept-Encoding"
    assert "content-length" not in response.headers
    assert httpx.get(f"{server.url}/whole/{coding}").content == CONTENT  # the client decodes by itself


@pytest.mark.parametrize("coding", DECODERS)
@pytest.mark.usefixtures("uncollected")
def test_pieces_are_sent_as_they_are_read_and_dropped_once_the_client_goes(server, coding):
    with httpx.stream("GET", f"{server.url}/huge/{coding or 'none'}") as response:
        read = 0
        for chunk in response.iter_raw():
            read += len(chunk)
            if read > 5 * 2**20:
                assert server.last() is not None
                break
        assert server.sent < 40  # what the buffers of the sockets hold comes on top of what was read
    wait_for(lambda: server.last() is None)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_small_body_is_sent_as_it_is(size):
    body = Body.of(CONTENT[:size], "application/json")
    assert (b"".join(body.pieces), body.size) == (CONTENT[:size], size)
