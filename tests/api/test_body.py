import gzip
import random
import socket
import threading

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


class Endless:
    """A body that never ends; tells when nobody asks for more of it."""

    def __init__(self):
        self.dropped = threading.Event()
        self.taken = 0

    def pieces(self):
        try:
            while True:
                self.taken += 1
                yield memoryview(CONTENT)[: 2**20]
        finally:
            self.dropped.set()


@pytest.fixture(scope="module")
def endless():
    return {coding: Endless() for coding in DECODERS}


@pytest.fixture(scope="module", params=["httptools", "h11"])
def base_url(request, endless):
    """A server with each of uvicorn's parsers. `/whole/CODING` and `/endless/CODING` answer with a body."""

    async def whole(request):
        body = Body.of(CONTENT, "application/json")
        return respond(body, {"Vary": "Accept", "X-Other": "told"}, coding_of(request))

    async def never_ending(request):
        coding = coding_of(request)
        endless[coding] = Endless()
        return respond(Body(endless[coding].pieces(), 2**40, "application/json"), {}, coding)

    routes = [Route("/whole/{coding}", whole), Route("/endless/{coding}", never_ending)]
    config = uvicorn.Config(
        Starlette(routes=routes), http=request.param, ws="none", lifespan="off", log_level="warning"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def coding_of(request):
    name = request.path_params["coding"]
    return None if name == "none" else Coding(name)


def test_a_body_without_a_coding_arrives_whole_and_tells_its_length(base_url):
    response = httpx.get(f"{base_url}/whole/none")
    assert response.content == CONTENT
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.headers["content-type"] == "application/json"
    assert response.headers["vary"] == "Accept, Accept-Encoding"
    assert response.headers["x-other"] == "told"
    assert "content-encoding" not in response.headers


@pytest.mark.parametrize("coding", Coding)
def test_a_coded_body_decodes_to_the_same_and_has_no_length(base_url, coding):
    with httpx.stream("GET", f"{base_url}/whole/{coding}") as response:
        assert DECODERS[coding](b"".join(response.iter_raw())) == CONTENT
    assert response.headers["content-encoding"] == coding
    assert response.headers["vary"] == "Accept, Accept-Encoding"
    assert "content-length" not in response.headers
    assert httpx.get(f"{base_url}/whole/{coding}").content == CONTENT  # the client decodes by itself


@pytest.mark.parametrize("coding", DECODERS)
def test_nothing_more_is_made_for_a_client_that_has_gone_or_does_not_read(base_url, endless, coding):
    with httpx.stream("GET", f"{base_url}/endless/{coding or 'none'}") as response:
        read = 0
        for chunk in response.iter_raw():
            read += len(chunk)
            if read > 5 * 2**20:
                break
    assert endless[coding].dropped.wait(30)
    # What the sockets' buffers hold comes on top of what was read.
    assert endless[coding].taken < 40


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_small_body_is_sent_as_it_is(size):
    body = Body.of(CONTENT[:size], "application/json")
    assert (b"".join(body.pieces), body.size) == (CONTENT[:size], size)
