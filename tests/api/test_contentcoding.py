import gzip
import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from api.compressed import Coding
from api.contentcoding import coded

DECODERS = {
    Coding.GZIP: gzip.decompress,
    Coding.ZSTD: lambda content: zstandard.ZstdDecompressor().decompressobj().decompress(content),
}


@pytest.mark.parametrize("coding", Coding)
@given(contents=st.lists(st.binary(max_size=50), max_size=6), order=st.lists(st.integers(0, 5), max_size=20))
def test_what_is_coded_decodes_to_the_same(coding, contents, order):
    views = [memoryview(content) for content in contents]
    pieces = [views[position % len(views)] for position in order] if views else []
    assert DECODERS[coding](b"".join(coded(pieces, coding))) == b"".join(pieces)


@pytest.mark.parametrize("coding", Coding)
def test_it_becomes_smaller(coding):
    text = b",".join(b"%.7f" % (position / 7) for position in range(100_000))
    assert len(b"".join(coded([memoryview(text)], coding))) < len(text) / 2


@pytest.mark.parametrize("coding", Coding)
def test_no_piece_is_taken_before_the_last_one_is_sent(coding):
    taken = []

    def pieces():
        for position in range(10):
            taken.append(position)
            yield memoryview(random.Random(position).randbytes(2**20))

    stream = coded(pieces(), coding)
    sent = 0
    while sent < 2**20:
        sent += len(next(stream))
    assert len(taken) <= 3
