import gzip
import json
import os
import threading
import urllib.parse

import datasets
import pandas as pd
import polars as pl
import pytest

import layerstack
from api.jobrequest import MAX_JSON_PROMPTS
from layerstack.errors import AnswerLostError, PromptsError, ServerError, ServerUnreachableError
from layerstack.submission import as_line
from tests.layerstack.servers import Answer, answering, in_turn, problem


@pytest.fixture
def client(stack):
    with layerstack.Client(stack.url) as found:
        yield found


def rows_of(job, tmp_path):
    """What was stored of a job, once it is done: ids and prompts."""
    job.wait(timeout_s=60)
    job.download(tmp_path / job.id)
    return [(row["id"], row["prompt"]) for row in layerstack.read(tmp_path / job.id)]


ROWS = [{"prompt": "a fox", "id": "x", "width": 9}, {"prompt": "ein Fuchs, 狐", "id": None}]


@pytest.mark.parametrize(
    ("prompts", "stored"),
    [
        (["a", "line\nbreak", ""], [("0", "a"), ("1", "line\nbreak"), ("2", "")]),
        (("a", "b"), [("0", "a"), ("1", "b")]),
        (pd.Series(["a", "b"]), [("0", "a"), ("1", "b")]),
        (ROWS, [("x", "a fox"), ("1", "ein Fuchs, 狐")]),
        (datasets.Dataset.from_list([{"prompt": "a", "id": 7}, {"prompt": "b", "id": 8}]), [("7", "a"), ("8", "b")]),
    ],
    ids=["list", "tuple", "series", "rows", "dataset"],
)
def test_prompts_come_from_whatever_they_lie_in(client, tmp_path, prompts, stored):
    assert rows_of(client.jobs.submit(prompts), tmp_path) == stored


def test_an_iterator_is_read_as_it_is_sent(client, tmp_path):
    job = client.jobs.submit((f"prompt {n}" for n in range(2500)), metadata={"set": "many"})
    assert (job.view.num_prompts, job.view.metadata) == (2500, {"set": "many"})
    assert rows_of(job, tmp_path)[2400] == ("2400", "prompt 2400")


def test_columns_may_have_other_names(client, tmp_path):
    captions = datasets.Dataset.from_dict({"caption": ["a", "b"], "key": ["k1", "k2"]})
    job = client.jobs.submit(captions, prompt_column="caption", id_column="key")
    assert rows_of(job, tmp_path) == [("k1", "a"), ("k2", "b")]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz"])
def test_a_file_is_sent_with_its_kind(client, tmp_path, name):
    content = b'"a"\n{"id": "x", "prompt": "b"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    job = client.jobs.submit(tmp_path / name, {"dtype": "float16"}, metadata={"a": "b"})
    assert (job.view.options.dtype, job.view.metadata) == ("float16", {"a": "b"})
    assert rows_of(job, tmp_path) == [("0", "a"), ("x", "b")]


def test_more_prompts_than_a_json_body_may_have_are_submitted_as_a_list(client):
    made = client.jobs.submit([""] * (MAX_JSON_PROMPTS + 1))
    made.delete()
    assert made.view.num_prompts == MAX_JSON_PROMPTS + 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("p.txt", r"pathlib\.Path, not the string 'p\.txt'"),
        ({"train": [], "test": []}, "not a dictionary of 'train', 'test'"),
        (pd.DataFrame({"prompt": ["a"]}), "not a DataFrame: choose a column"),
        (pl.DataFrame({"prompt": ["a"]}), "not a DataFrame: choose a column"),
    ],
    ids=["string", "dictionary", "pandas", "polars"],
)
def test_what_would_be_read_as_something_else_is_refused(client, prompts, message):
    with pytest.raises(TypeError, match=message):
        client.jobs.submit(prompts)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "prompt 3 is of type int: a string is needed"),
        ({"caption": "a", "id": 1}, "prompt 3 has no column 'prompt', but 'caption', 'id': name the right one"),
        ({"prompt": None}, "prompt 3: column 'prompt' has None, which is no string"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(row, message):
    with pytest.raises(PromptsError, match=message):
        as_line(3, row, "prompt", "id")


def test_nothing_stays_of_a_job_whose_prompts_end_in_an_error(client):
    def prompts():
        yield from ["a"] * 2000
        yield 7

    before = client.jobs.list(limit=1)
    with pytest.raises(PromptsError, match="prompt 2000 is of type int"):
        client.jobs.submit(prompts())
    assert [job.id for job in client.jobs.list(limit=1)] == [job.id for job in before]


def made(request, job):
    """The answer to a create: the job once for each key."""
    return Answer(202, json.dumps(job | {"metadata": {"key": request.headers["Idempotency-Key"]}}).encode())


@pytest.fixture
def a_job(client):
    return client.jobs.submit(["a"]).view.model_dump(mode="json")


@pytest.mark.parametrize("kind", ["list", "file"])
def test_a_job_whose_answer_got_lost_is_sent_again_whole_and_with_the_same_key(a_job, tmp_path, kind):
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\na hen\n")
    answers = [None, problem(503, "no-worker", retry_after=0), None]

    def respond(request):
        return answers.pop(0) if answers else made(request, a_job)

    with answering(respond) as server, layerstack.Client(server.url) as client:
        job = client.jobs.submit(["a fox", "a hen"] if kind == "list" else path, {"layout": "dense"})
        assert {request.headers["Idempotency-Key"] for request in server.seen} == {job.view.metadata["key"]}
        assert len(server.seen) == 4
        for request in server.seen:
            assert b"a fox" in request.body
            assert b"a hen" in request.body
            assert "dense" in urllib.parse.unquote(request.path) + request.body.decode()


READY = Answer(200, b"{}")


def test_an_iterator_whose_answer_got_lost_may_be_a_job_and_the_error_says_so():
    with answering(lambda request: READY if request.path == "/encoder" else None) as server:
        with (
            pytest.raises(AnswerLostError, match=r"disconnected.*may exist .*`layerstack jobs list` before you send"),
            layerstack.Client(server.url) as client,
        ):
            client.jobs.submit(iter(["a"]))
        assert [request.method for request in server.seen] == ["GET", "POST"]


def test_an_iterator_is_sent_once_there_is_a_worker(a_job):
    answers = in_turn(problem(503, "no-worker", retry_after=0), READY)
    with (
        answering(lambda request: answers(request) if request.path == "/encoder" else made(request, a_job)) as server,
        layerstack.Client(server.url) as client,
    ):
        assert client.jobs.submit(iter(["a"])).id == a_job["id"]
        assert [request.method for request in server.seen] == ["GET", "GET", "POST"]


@pytest.mark.parametrize("then", [problem(401, "unauthorized"), problem(503, "no-worker", retry_after=999)])
def test_a_job_whose_answer_got_lost_may_exist_whatever_the_server_says_then(then):
    with (
        answering(in_turn(None, then)) as server,
        layerstack.Client(server.url) as client,
        pytest.raises(AnswerLostError, match=f"{then_kind(then)}; the job may exist"),
    ):
        client.jobs.submit(["a"])


def then_kind(answer):
    return json.loads(answer.body)["detail"]


def test_unless_it_says_that_the_prompts_are_none():
    with (
        answering(in_turn(None, problem(422, "invalid-request"))) as server,
        layerstack.Client(server.url) as client,
        pytest.raises(ServerError, match="invalid-request"),
    ):
        client.jobs.submit(["a"])


def test_a_pipe_is_no_file_and_the_error_says_what_reads_one(client, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(PromptsError, match=r"pipe\.txt is no regular file; .* reads a pipe"):
        client.jobs.submit(tmp_path / "pipe.txt")


def test_so_is_a_list_whose_answer_got_lost_for_too_long():
    with (
        answering(in_turn(None)) as server,
        layerstack.Client(server.url, retry_s=0.1) as client,
        pytest.raises(AnswerLostError),
    ):
        client.jobs.submit(["a"])


def test_the_answer_to_a_new_job_is_waited_for_however_long_it_takes(a_job):
    held = threading.Event()  # never set: longer than an answer may take

    def respond(request):
        held.wait(0.7)
        return made(request, a_job)

    with answering(respond) as server, layerstack.Client(server.url, timeout_s=0.2) as client:
        assert client.jobs.submit(["a"]).id == a_job["id"]


def test_a_job_that_could_not_even_be_sent_does_not_exist():
    with pytest.raises(ServerUnreachableError), layerstack.Client("http://127.0.0.1:9") as client:
        client.jobs.submit(["a"])


def test_a_job_that_is_refused_says_which_line_is_wrong(client):
    with pytest.raises(ServerError, match="line 2") as caught:
        client.jobs.submit(["a", "x" * 200_001])
    assert caught.value.kind == "prompt-too-long"
