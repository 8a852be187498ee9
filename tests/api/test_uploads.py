import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from api.csvfile import MAX_BLANK_LINES
from api.problems import Problem
from api.uploads import Entry, PromptFile, read_prompts, recognise
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


@pytest.mark.parametrize("kind", [PromptFile.TXT, PromptFile.JSONL])
def test_an_empty_file_of_lines_has_no_prompts(kind):
    assert read(b"", kind) == []


@pytest.mark.parametrize("kind", [PromptFile.CSV, PromptFile.PARQUET])
def test_an_empty_file_of_columns_lacks_them(kind):
    with pytest.raises(Problem) as caught:
        read(b"", kind)
    assert caught.value.status_code == 422


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


def test_a_line_with_very_many_unknown_fields_is_one_error_that_names_the_first():
    line = json.dumps({f"more{n}": n for n in range(100)} | {"prompt": "a"}).encode()
    with pytest.raises(Problem) as caught:
        read(line, PromptFile.JSONL)
    assert [error["field"] for error in caught.value.members["errors"]] == ["line 1.more0"]


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


_MODEL = TypeAdapter(Entry)
_IDS = st.one_of(st.none(), st.text(max_size=4), st.integers())
_OBJECTS = st.fixed_dictionaries({}, optional={"id": _IDS, "prompt": st.one_of(_IDS, st.text()), "more": st.none()})
_VALUES = st.one_of(_OBJECTS, st.text(), st.integers(), st.floats(), st.none(), st.lists(st.text(), max_size=2))


@settings(deadline=None)  # a busy machine is no failure
@given(st.one_of(st.builds(json.dumps, _VALUES, ensure_ascii=st.booleans()), st.text('{}[]":,\\u8d aidprompt\t0')))
def test_a_json_line_is_taken_if_and_only_if_the_model_of_an_entry_takes_it(line):
    assume(line.strip() and "\n" not in line)
    try:
        content = line.encode()
        entry = _MODEL.validate_json(content)
    except (UnicodeEncodeError, ValidationError):
        entry = None
    try:
        found = read(line.encode("utf-8", "surrogatepass"), PromptFile.JSONL)
    except Problem:
        found = None
    if entry is None or len(entry.prompt) > MAX_CHARS:
        assert found is None
    else:
        assert found == [("0" if entry.id is None else entry.id, entry.prompt)]


def test_a_key_given_twice_counts_as_its_last():
    assert read(b'{"prompt": 1, "prompt": "a", "id": 5, "id": null}', PromptFile.JSONL) == [("0", "a")]


def as_csv(id_, prompt):
    return f"id,prompt\n,b\n{id_},{prompt}\n".encode()


def as_parquet(id_, prompt):
    content = io.BytesIO()
    pq.write_table(pa.table({"id": [None, id_], "prompt": ["b", prompt]}), content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("kind", "write", "place"),
    [(PromptFile.CSV, as_csv, "line 3"), (PromptFile.PARQUET, as_parquet, "row 1")],
)
def test_rows_of_tables_have_the_limits_of_all_prompts(kind, write, place):
    assert read(write("x" * 512, "y" * MAX_CHARS), kind) == [("0", "b"), ("x" * 512, "y" * MAX_CHARS)]
    with pytest.raises(Problem) as caught:
        read(write("x", "y" * 101), kind)
    assert (caught.value.kind, caught.value.members) == (
        "prompt-too-long", {"field": place, "value": 101, "limit": MAX_CHARS},
    )  # fmt: skip
    with pytest.raises(Problem, match=f"{place}.id: an id has at most 512 characters; got 'x"):
        read(write("x" * 513, "y"), kind)


@pytest.mark.parametrize(
    ("filename", "media_type", "kind"),
    [
        ("a.txt", None, PromptFile.TXT),
        ("A.JSONL", "text/plain", PromptFile.JSONL),
        ("captions", "text/plain; charset=utf-8", PromptFile.TXT),
        (None, "application/x-ndjson", PromptFile.JSONL),
        ("a.csv", "application/vnd.ms-excel", PromptFile.CSV),
        (None, "text/csv; header=present", PromptFile.CSV),
        ("a.parquet", "application/octet-stream", PromptFile.PARQUET),
        (None, "application/vnd.apache.parquet", PromptFile.PARQUET),
        (None, "application/x-parquet", PromptFile.PARQUET),
        ("a.png", "image/png", None),
        (None, None, None),
    ],
)
def test_the_name_tells_the_kind_or_else_the_media_type(filename, media_type, kind):
    assert recognise(filename, media_type) == kind


def test_reading_yields_records():
    assert list(read_prompts(io.BytesIO(b"a"), PromptFile.TXT, MAX_CHARS)) == [Prompt(id="0", prompt="a")]


@pytest.mark.parametrize(("kind", "content"), [(PromptFile.JSONL, b'"a"\n'), (PromptFile.CSV, b"prompt\na\n")])
def test_a_file_of_blank_lines_without_end_is_given_up(kind, content):
    assert read(content + b"\n" * MAX_BLANK_LINES, kind) == [("0", "a")]
    with pytest.raises(Problem) as caught:
        read(content + b"\n" * (MAX_BLANK_LINES + 1), kind)
    assert caught.value.members["limit"] == MAX_BLANK_LINES
