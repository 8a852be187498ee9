import io

import pytest

from api.problems import Problem
from api.uploads import PromptFile, read_prompts, recognise
from jobs.records import Prompt

MAX_CHARS = 100


def read(content, kind):
    return [(prompt.id, prompt.prompt) for prompt in read_prompts(io.BytesIO(content), kind, MAX_CHARS)]


def test_each_line_of_text_is_a_prompt_and_an_empty_line_the_empty_prompt():
    content = "\ufeffone\n\n two \r\nd\u2028e\x0bf\nlast".encode()
    assert read(content, PromptFile.TXT) == [
        ("0", "one"), ("1", ""), ("2", " two "), ("3", "d\u2028e\x0bf"), ("4", "last"),
    ]  # fmt: skip


def test_json_lines_are_strings_or_objects_and_blank_lines_are_skipped():
    content = b'"a"\n{"prompt": "b", "id": "x"}\n\n  \n{"prompt": "\\u00e9"}\n'
    assert read(content, PromptFile.JSONL) == [("0", "a"), ("x", "b"), ("2", "é")]


@pytest.mark.parametrize("kind", PromptFile)
def test_an_empty_file_has_no_prompts(kind):
    assert read(b"", kind) == []


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"nonsense", "line 2"),
        (b"5", "line 2"),
        (b"[1]", "line 2"),
        (b"null", "line 2"),
        (b'{"id": "x"}', "line 2.prompt"),
        (b'{"prompt": 5}', "line 2.prompt"),
        (b'{"prompt": "a", "id": 5}', "line 2.id"),
        (b'{"prompt": "a", "more": 1}', "line 2.more"),
        (b'{"prompt": "a", "id": "' + b"x" * 513 + b'"}', "line 2.id"),
        (b'"\\ud800"', "line 2"),
        (b"\xff\xfe", "line 2"),
        (b'"' + b"x" * 101 + b'"', "line 2"),
        (b'"' + b"x" * 20000 + b'"', "line 2"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(line, field):
    with pytest.raises(Problem) as caught:
        read(b'"fine"\n' + line + b"\n", PromptFile.JSONL)
    assert caught.value.status_code == 422
    assert caught.value.members["field"] == field
    assert field in caught.value.detail


def test_a_line_without_end_is_not_held_in_memory():
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.taken += len(buffer)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    endless = Endless()
    with pytest.raises(Problem, match="at most 100 characters"):
        list(read_prompts(io.BufferedReader(endless), PromptFile.TXT, MAX_CHARS))
    assert endless.taken < 100_000


@pytest.mark.parametrize(
    ("filename", "media_type", "kind"),
    [
        ("a.txt", None, PromptFile.TXT),
        ("A.JSONL", "text/plain", PromptFile.JSONL),
        ("captions", "text/plain; charset=utf-8", PromptFile.TXT),
        (None, "application/x-ndjson", PromptFile.JSONL),
        ("a.png", "image/png", None),
        (None, None, None),
    ],
)
def test_the_name_tells_the_kind_or_else_the_media_type(filename, media_type, kind):
    assert recognise(filename, media_type) == kind


def test_reading_yields_records():
    assert list(read_prompts(io.BytesIO(b"a"), PromptFile.TXT, MAX_CHARS)) == [Prompt(id="0", prompt="a")]
