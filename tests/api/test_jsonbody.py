import gzip

import pytest

from api.jsonbody import MAX_JSON_DEPTH, load_text, parse
from api.problems import Problem
from jobs.records import StrictRecord
from tests.support import kind


class Asked(StrictRecord):
    name: str


def problem(content, encoding=None, max_bytes=100):
    with pytest.raises(Problem) as caught:
        parse(Asked, content, content_encoding=encoding, max_bytes=max_bytes)
    return caught.value


def test_a_body_becomes_a_model_compressed_or_not():
    content = b'{"name": "x"}'
    assert parse(Asked, content, content_encoding=None, max_bytes=100) == Asked(name="x")
    assert parse(Asked, gzip.compress(content), content_encoding="gzip", max_bytes=100) == Asked(name="x")


@pytest.mark.parametrize(
    ("content", "encoding", "status", "field"),
    [
        (b"nonsense", None, 422, "body"),
        (b"", None, 422, "body"),
        (b'{"name": "\xff"}', None, 422, "body"),
        (b'{"name": 1}', None, 422, "name"),
        (b"[]", None, 422, "body"),
        (b"nonsense", "gzip", 422, "body"),
        (b"{}", "br", 415, "Content-Encoding"),
        (gzip.compress(b" " * 101, mtime=0), "gzip", 413, "body"),
    ],
)
def test_what_is_wrong_with_a_body_is_told(content, encoding, status, field):
    found = problem(content, encoding)
    assert found.status_code == status
    assert field in (found.members["field"], found.members.get("errors", [{}])[0].get("field"))


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_is_read_up_to_the_depth_that_is_told(opening, closing):
    load_text(opening * MAX_JSON_DEPTH + "1" + closing * MAX_JSON_DEPTH, "body")
    for deeper in (MAX_JSON_DEPTH + 1, 100_000):
        with pytest.raises(Problem) as caught:
            load_text(opening * deeper + "1" + closing * deeper, "body")
        assert caught.value.detail == f"body: the JSON is nested too deeply, the limit is {MAX_JSON_DEPTH}"
        assert caught.value.members == {"field": "body", "limit": MAX_JSON_DEPTH}


@pytest.mark.parametrize("storage_url", ["folder"], indirect=True)
@pytest.mark.parametrize("path", ["/predict", "/jobs"])
def test_a_body_that_is_nested_too_deeply_is_a_clear_422(api, path):
    content = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    response = api.post(path, content=content, headers={"content-type": "application/json"})
    assert kind(response) == (422, "invalid-request")
    assert (response.json()["field"], response.json()["limit"]) == ("body", MAX_JSON_DEPTH)
