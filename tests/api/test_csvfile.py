import csv
import io
from itertools import chain, repeat

import pytest

from api.csvfile import read_csv
from api.problems import Problem
from api.uploads import PromptFile, read_prompts

ROW_MAX_CHARS = 1000


def read(content):
    lines = io.StringIO(content, newline="\n")
    return list(read_csv(lines, row_max_chars=ROW_MAX_CHARS, max_chars=100))


def test_rows_come_with_the_line_where_they_begin():
    assert read('id,prompt\nx,a\n,"b, ""c""\r\nd"\ny,\n"z",e') == [
        (2, "x", "a"), (3, None, 'b, "c"\r\nd'), (5, "y", ""), (6, "z", "e"),
    ]  # fmt: skip


def test_columns_stand_in_any_order_and_others_are_ignored():
    assert read("score,prompt,id\n1,a,x\n2,b,\n") == [(2, "x", "a"), (3, None, "b")]


def test_prompt_alone_is_enough():
    assert read('prompt\n a \n""\na "fox"\n') == [(2, None, " a "), (3, None, ""), (4, None, 'a "fox"')]


def test_a_byte_order_mark_and_windows_line_ends_are_tolerated():
    content = '\ufeff"id",prompt\r\nx,a\r\ny,b\r\n'.encode()
    assert [(row.id, row.prompt) for row in read_prompts(io.BytesIO(content), PromptFile.CSV, 100)] == [
        ("x", "a"), ("y", "b"),
    ]  # fmt: skip


def test_a_row_without_an_id_gets_its_index():
    content = b"id,prompt\n,a\n7,b\n,c\n"
    assert [row.id for row in read_prompts(io.BytesIO(content), PromptFile.CSV, 100)] == ["0", "7", "2"]


def test_what_the_csv_module_writes_is_read():
    prompts = ["", "a,b", 'say "hi"', "two\nlines", "\r\n", " ", "雪", "a\x00b", "'", '"']
    content = io.StringIO(newline="")
    csv.writer(content).writerows([["prompt"], *([prompt] for prompt in prompts)])
    assert [prompt for _, _, prompt in read(content.getvalue())] == prompts


def test_blank_lines_at_the_end_are_no_rows():
    assert read("prompt\na\n\n\r\n") == [(2, None, "a")]


def test_a_header_alone_has_no_prompts():
    assert read("id,prompt\n") == []


@pytest.mark.parametrize(
    ("content", "field", "said"),
    [
        ("", "line 1", "needs one column 'prompt'"),
        ("\nprompt\n", "line 1", "needs one column 'prompt'"),
        ("id;prompt\n", "line 1", "got ['id;prompt']"),
        ("a fox\na hen\n", "line 1", "got ['a fox']"),
        ("prompt,prompt\n", "line 1", "needs one column 'prompt'"),
        ("id,prompt,id\n", "line 1", "at most one 'id'"),
        ("id,prompt\nx,a\ny\n", "line 3", "1 cells, but the header has 2"),
        ("id,prompt\nx,a, b\n", "line 2", "3 cells, but the header has 2; a cell with a comma in it needs quotes"),
        ('id,prompt\n"x\n",a\ny\n', "line 4", "got ['y']"),
        ("prompt\na\n\nb\n", "line 3", "blank lines stand at the end only"),
        ('prompt\na\n"b\nc\n', "line 3", "unexpected end of data"),
        ('prompt\n"a" b\n', "line 2", 'got \'"a" b'),
        ("prompt\na\rb\n", "line 2", "not CSV"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(content, field, said):
    with pytest.raises(Problem) as caught:
        read(content)
    assert (caught.value.status_code, caught.value.members["field"]) == (422, field)
    assert said in caught.value.detail
    assert caught.value.detail.startswith(field)


def test_a_quote_that_is_not_closed_does_not_read_the_whole_file():
    taken = 0

    def lines():
        nonlocal taken
        for line in chain(["prompt\n", "a\n", '"b\n'], repeat("c\n")):
            taken += 1
            yield line

    with pytest.raises(Problem, match=r"line 3: the row is longer than 1000 characters.*is a quote not closed"):
        list(read_csv(lines(), row_max_chars=ROW_MAX_CHARS, max_chars=100))
    assert taken < ROW_MAX_CHARS


def test_the_length_of_a_row_is_its_own():
    rows = "".join(f'"{"x" * 90}\n{n}"\n' for n in range(100))
    assert len(read(f"prompt\n{rows}")) == 100


def test_a_prompt_may_be_longer_than_the_csv_module_takes_by_itself():
    prompt = "x" * 200_000
    content = f"prompt\n{prompt}\n".encode()
    assert [row.prompt for row in read_prompts(io.BytesIO(content), PromptFile.CSV, 200_000)] == [prompt]


def test_a_reader_with_a_lower_limit_leaves_one_with_a_higher_limit_alone():
    long = read_prompts(io.BytesIO(b"prompt\na\n" + b"x" * 500_000), PromptFile.CSV, 500_000)
    assert next(long).prompt == "a"
    assert read("prompt\nb\n") == [(2, None, "b")]
    assert len(next(long).prompt) == 500_000
