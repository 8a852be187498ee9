import io

import pytest

from api.lines import read_lines
from api.problems import Problem


def read(content):
    return list(read_lines(io.BytesIO(content), max_bytes=20, max_chars=10))


def test_lines_keep_their_ends_and_only_a_line_feed_ends_one():
    assert read("a\r\n\nb\rc\u2028d\x0be\nf".encode()) == ["a\r\n", "\n", "b\rc\u2028d\x0be\n", "f"]


def test_a_byte_order_mark_is_dropped_at_the_very_beginning_only():
    assert read("\ufeffa\n\ufeffb\n".encode()) == ["a\n", "\ufeffb\n"]


def test_a_file_of_nothing_but_a_byte_order_mark_has_no_line():
    assert read("\ufeff".encode()) == []
    assert read("\ufeff\n".encode()) == ["\n"]


def test_a_line_may_have_as_many_bytes_as_allowed():
    assert read(b"a\n" + b"x" * 20) == ["a\n", "x" * 20]
    with pytest.raises(Problem, match="line 2: longer than 20 bytes, and a prompt has at most 10 characters"):
        read(b"a\n" + b"x" * 21)


def test_what_is_not_utf8_is_an_error_that_names_the_line():
    with pytest.raises(Problem, match=r"line 2: must be UTF-8 \(invalid start byte at byte 1\); got b'b\\xff'"):
        read(b"a\nb\xff")
