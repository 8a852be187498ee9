import asyncio

import pytest
from starlette.requests import ClientDisconnect

from api.readstream import ReadStream


class Read:
    """Pieces without end; knows how many were read, and whether they are still being read."""

    def __init__(self):
        self.count = 0
        self.is_closed = False

    def pieces(self):
        try:
            while True:
                self.count += 1
                yield b"piece"
        finally:
            self.is_closed = True


def stream(read, spec_version, send, receive):
    scope = {"type": "http", "asgi": {"spec_version": spec_version}}
    response = ReadStream(b"first", read.pieces(), 200, {}, "text/plain")
    return asyncio.run(response(scope, receive, send))


def test_a_client_that_goes_while_it_is_sent_to_leaves_nothing_open():
    read, sent = Read(), []

    async def send(message):
        sent.append(message.get("body"))
        if len(sent) > 3:
            raise OSError("gone")

    with pytest.raises(ClientDisconnect) as caught:  # its traceback holds the generator
        stream(read, "2.4", send, None)
    assert sent[1:] == [b"first", b"piece", b"piece"]
    assert (read.is_closed, read.count, caught.value is None) == (True, 2, False)


def test_a_client_that_is_known_to_have_gone_leaves_nothing_open():
    read = Read()
    asked = asyncio.Event()

    async def send(message):
        if message.get("body") == b"piece":
            asked.set()
            await asyncio.Event().wait()  # it reads no more

    async def receive():
        await asked.wait()
        return {"type": "http.disconnect"}

    stream(read, "2.3", send, receive)
    assert (read.is_closed, read.count) == (True, 1)
