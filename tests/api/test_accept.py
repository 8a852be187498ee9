from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from api.accept import best_coding, best_media_type, header_of
from api.compressed import Coding
from api.problems import Problem

OFFERED = ["application/json", "application/vnd.safetensors", "image/png"]


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "application/json"),
        ("", "application/json"),
        ("  ", "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("image/*", "image/png"),
        ("APPLICATION/VND.SafeTensors", "application/vnd.safetensors"),
        ("application/json; charset=utf-8", "application/json"),
        ("text/html, image/png", "image/png"),
        ("text/html", None),
        ("json", None),
        # The higher weight wins, wherever it stands.
        ("application/json;q=0.1, image/png;q=0.9", "image/png"),
        ("application/json ; q=0.8 , image/png; q=0.801", "image/png"),
        ("application/json;q=0.5, */*", "application/vnd.safetensors"),
        ("text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8", "application/json"),
        # The closest range tells the weight of a type.
        ("*/*, application/json;q=0, application/vnd.safetensors;q=0", "image/png"),
        ("application/*;q=0.2, */*;q=0.1, image/png;q=0", "application/json"),
        ("application/*;q=0, image/*;q=0.001", "image/png"),
        ("application/json;q=0", None),
        ("*/*;q=0", None),
        # With equal weights, what is named more closely wins, then what is named earlier.
        ("*/*, application/vnd.safetensors", "application/vnd.safetensors"),
        ("image/png, application/json", "image/png"),
        # A comma or a weight in quotes is neither.
        (
            'image/png;p="a,application/json;q=1";q=0.1, application/vnd.safetensors;q=0.2',
            "application/vnd.safetensors",
        ),
        # A weight that is none leaves its range out.
        ("image/png;q=high, application/vnd.safetensors;q=0.1", "application/vnd.safetensors"),
        ("image/png;q=2", None),
        ("image/png;q=nan", None),
        ("image/png;q=", None),
    ],
)
def test_the_media_type_that_suits_best_is_chosen(accept, chosen):
    assert best_media_type(accept, OFFERED) == chosen


@pytest.mark.parametrize(
    ("header", "text", "binary"),
    [
        (None, None, None),
        ("", None, None),
        ("gzip", Coding.GZIP, None),
        ("ZSTD", Coding.ZSTD, None),
        ("gzip, deflate, br, zstd", Coding.ZSTD, None),
        ("br, deflate", None, None),
        ("*", Coding.ZSTD, None),
        ("zstd;q=0.5, gzip;q=0.7", Coding.GZIP, None),
        ("*;q=0.1, gzip;q=0.05", Coding.ZSTD, None),
        ("zstd;q=0, *", Coding.GZIP, None),
        ("gzip;q=0", None, None),
        ("identity, gzip", Coding.GZIP, None),
        ("identity;q=0.5, gzip;q=0.4", None, None),
        ("identity;q=0, gzip", Coding.GZIP, Coding.GZIP),
        ("*;q=0, gzip;q=0.1", Coding.GZIP, Coding.GZIP),
        ("identity;q=0.1, *;q=0", None, None),
        ("identity;q=0, *", Coding.ZSTD, Coding.ZSTD),
    ],
)
def test_the_content_coding_is_the_best_of_those_that_are_accepted(header, text, binary):
    assert best_coding(header, worthwhile=True) == text
    assert best_coding(header, worthwhile=False) == binary


@pytest.mark.parametrize(
    "header", ["identity;q=0", "*;q=0", "br, identity;q=0", "identity;q=0, gzip;q=0, zstd;q=0.000"]
)
@pytest.mark.parametrize("worthwhile", [True, False])
def test_a_client_that_refuses_every_coding_and_none_is_told(header, worthwhile):
    with pytest.raises(Problem) as caught:
        best_coding(header, worthwhile=worthwhile)
    assert (caught.value.status_code, caught.value.kind) == (406, "not-acceptable")
    assert caught.value.members["field"] == "Accept-Encoding"
    assert "zstd, gzip" in caught.value.detail


HEADER = st.text(st.sampled_from(list('agzip/*+;,=q01. "\\\té')) | st.characters(max_codepoint=255))


@given(header=HEADER, worthwhile=st.booleans())
def test_any_header_has_an_answer_or_a_problem(header, worthwhile):
    assert best_media_type(header, OFFERED) in [*OFFERED, None]
    with suppress(Problem):
        assert best_coding(header, worthwhile=worthwhile) in [*Coding, None]


def test_a_header_on_two_lines_is_one_list():
    headers = Headers(raw=[(b"accept", b"text/html"), (b"accept", b"image/png")])
    assert header_of(headers, "accept") == "text/html, image/png"
    assert header_of(headers, "accept-encoding") is None
