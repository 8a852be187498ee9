import pytest

from api.formats import Format, negotiate


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, Format.JSON),
        ("*/*", Format.JSON),
        ("application/*", Format.JSON),
        ("application/json", Format.JSON),
        ("Application/JSON; charset=utf-8", Format.JSON),
        ("application/vnd.safetensors", Format.SAFETENSORS),
        ("image/png, application/vnd.safetensors, */*", Format.SAFETENSORS),
        ("image/png", None),
    ],
)
def test_the_first_media_type_that_we_have_is_chosen(accept, chosen):
    assert negotiate(None, accept) == chosen


def test_the_query_wins_over_the_header():
    assert negotiate(Format.PT, "application/json") == Format.PT
