import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from api.pieces import MAX_PIECE_BYTES, Pieces

SIZES = st.lists(st.sampled_from([0, 1, 7, 2**15, 2**16 - 1, 2**16, 2**18, 2**20, 2**20 + 1, 2**21 + 5]), max_size=9)


@given(sizes=SIZES)
def test_pieces_are_what_was_written_and_none_is_large_or_empty(sizes):
    written = [bytes([position]) * size for position, size in enumerate(sizes)]
    pieces = Pieces()
    for content in written:
        assert pieces.write(content) == len(content)
    found = pieces.finish()
    assert b"".join(found) == b"".join(written)
    assert pieces.size == sum(sizes)
    assert all(0 < len(piece) <= MAX_PIECE_BYTES for piece in found)


def test_small_things_are_joined():
    pieces = Pieces()
    for _ in range(1000):
        pieces.write(b"small")
    assert len(pieces.finish()) == 1


def test_large_things_are_not_copied():
    large = np.arange(2**20, dtype=np.uint8)
    pieces = Pieces()
    pieces.write(large.data)
    found = np.frombuffer(pieces.finish()[0], dtype=np.uint8)
    assert found.ctypes.data == large.ctypes.data


def test_a_view_that_needs_no_cutting_stays_the_same_object():
    view = memoryview(bytes(MAX_PIECE_BYTES))
    pieces = Pieces()
    pieces.write(view)
    pieces.write(view)
    first, second = pieces.finish()
    assert first is second is view


def test_the_size_of_an_array_is_counted_in_bytes():
    pieces = Pieces()
    assert pieces.write(np.ones((2, 3), dtype=np.int64)) == 48
    assert b"".join(pieces.finish()) == np.ones(6, dtype=np.int64).tobytes()
