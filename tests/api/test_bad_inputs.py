"""What people get wrong: each is told by its status, its type, and the field to blame."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import kind

NO_JOB = "/jobs/01M827J2N7FR429X5AQYRY517N"
INVALID = (422, "invalid-request")
JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}
DEEP = "[" * 1000 + "]" * 1000


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def predict(prompt, **others):
    return {"json": {"prompt": prompt} | others}


def job(*prompts, **others):
    return {"json": {"prompts": list(prompts)} | others}


def text(content, **headers):
    return {"content": content, "headers": {**TEXT, **headers}}


def upload(name, content, **data):
    return {"files": {"file": (name, content)}, "data": data}


CASES = {
    # POST /predict
    "no body": ("POST", "/predict", {"headers": JSON}, INVALID, "body"),
    "no JSON": ("POST", "/predict", {"content": b"{prompt: a}", "headers": JSON}, INVALID, "body"),
    "half of a JSON": ("POST", "/predict", {"content": b'{"prompt": [1,', "headers": JSON}, INVALID, "body"),
    "no UTF-8": ("POST", "/predict", {"content": b'{"prompt": "\xff"}', "headers": JSON}, INVALID, "body"),
    "JSON that is too deep": ("POST", "/predict", {"content": DEEP, "headers": JSON}, INVALID, "body"),
    "a deep field": ("POST", "/predict", {"content": f'{{"prompt": {DEEP}}}', "headers": JSON}, INVALID, "body"),
    "a list": ("POST", "/predict", {"json": []}, INVALID, "body"),
    "a form": ("POST", "/predict", {"data": {"prompt": "a"}}, (415, "unsupported-media-type"), "Content-Type"),
    "a body of an unknown coding": (
        "POST", "/predict", {"content": b"{}", "headers": JSON | {"content-encoding": "br"}},
        (415, "unsupported-media-type"), "Content-Encoding",
    ),
    "a body that is not the gzip it says": (
        "POST", "/predict", {"content": b"{}", "headers": JSON | {"content-encoding": "gzip"}}, INVALID, "body",
    ),
    "a gzip bomb": (
        "POST", "/predict",
        {"content": gzip.compress(b" " * (17 << 20)), "headers": JSON | {"content-encoding": "gzip"}},
        (413, "body-too-large"), "body",
    ),
    "a body above the limit": (
        "POST", "/predict", {"content": b" " * ((16 << 20) + 1), "headers": JSON}, (413, "body-too-large"), "body",
    ),
    "no prompt": ("POST", "/predict", {"json": {}}, INVALID, "prompt"),
    "prompts instead of prompt": ("POST", "/predict", {"json": {"prompts": ["a"]}}, INVALID, "prompt"),
    "an empty list": ("POST", "/predict", predict([]), INVALID, "prompt"),
    "null": ("POST", "/predict", predict(None), INVALID, "prompt"),
    "a number": ("POST", "/predict", predict(5), INVALID, "prompt"),
    "an object": ("POST", "/predict", predict({"text": "a"}), INVALID, "prompt"),
    "a list in a list": ("POST", "/predict", predict(["a", ["b"]]), INVALID, "prompt.1"),
    "an unknown field": ("POST", "/predict", predict("a", format="pt"), INVALID, "format"),
    "half a surrogate pair": (
        "POST", "/predict", {"content": b'{"prompt": ["a", "\\ud800"]}', "headers": JSON}, INVALID, "body",
    ),
    "17 prompts": ("POST", "/predict", predict(["a"] * 17), (413, "too-many-prompts"), "prompt"),
    "a prompt that is too long": ("POST", "/predict", predict("x" * 200_001), (422, "prompt-too-long"), "prompt.0"),
    "a dtype we do not have": ("POST", "/predict", predict("a", dtype="int8"), INVALID, "dtype"),
    "a padding we do not have": ("POST", "/predict", predict("a", padding="longest"), INVALID, "padding"),
    "a padding we do not have, in the query": ("POST", "/predict?padding=left", predict("a"), INVALID, "query.padding"),
    "a dtype we do not have, in the query": ("POST", "/predict?dtype=fp16", predict("a"), INVALID, "query.dtype"),
    "a format we do not have": ("POST", "/predict?format=png", predict("a"), INVALID, "query.format"),
    "a media type we do not have": (
        "POST", "/predict", predict("a") | {"headers": {"accept": "image/png"}}, (406, "not-acceptable"), "Accept",
    ),
    # POST /jobs
    "a job of nothing": ("POST", "/jobs", job(), INVALID, "prompts"),
    "a job without prompts": ("POST", "/jobs", {"json": {"prompt": "a"}}, INVALID, "prompts"),
    "a job of a string": ("POST", "/jobs", {"json": {"prompts": "a"}}, INVALID, "prompts"),
    "a job with a number": ("POST", "/jobs", job("a", 5), INVALID, "prompts.1"),
    "an entry without a prompt": ("POST", "/jobs", job({"id": "7"}), INVALID, "prompts.0.prompt"),
    "an entry with an unknown field": ("POST", "/jobs", job({"prompt": "a", "x": 1}), INVALID, "prompts.0.x"),
    "an id that is too long": ("POST", "/jobs", job({"prompt": "a", "id": "i" * 513}), INVALID, "prompts.0.id"),
    "a long prompt in a job": ("POST", "/jobs", job("x" * 200_001), (422, "prompt-too-long"), "prompts.0"),
    "an unknown option": ("POST", "/jobs", job("a", options={"batch": 1}), INVALID, "options.batch"),
    "a layout we do not have": ("POST", "/jobs", job("a", options={"layout": "sparse"}), INVALID, "options.layout"),
    "chunks of nothing": ("POST", "/jobs", job("a", options={"chunk_rows": 0}), INVALID, "options.chunk_rows"),
    "an on_error we do not have": ("POST", "/jobs", job("a", options={"on_error": "x"}), INVALID, "options.on_error"),
    "17 metadata": ("POST", "/jobs", job("a", metadata={str(n): "" for n in range(17)}), INVALID, "metadata"),
    "metadata that is no text": ("POST", "/jobs", job("a", metadata={"n": 1}), INVALID, "metadata.n"),
    "options beside a JSON body": ("POST", "/jobs?options={}", job("a"), INVALID, "options"),
    "an empty Idempotency-Key": (
        "POST", "/jobs", job("a") | {"headers": {"idempotency-key": ""}}, INVALID, "Idempotency-Key",
    ),
    "a file of an unknown kind": (
        "POST", "/jobs", upload("prompts.xlsx", b"a"), (415, "unsupported-media-type"), "file",
    ),
    "a form without a file": ("POST", "/jobs", {"files": {"prompts": ("a.txt", b"a")}}, INVALID, "body"),
    "options that are no JSON": ("POST", "/jobs", upload("a.txt", b"a", options="{"), INVALID, "options"),
    "metadata that are no JSON": ("POST", "/jobs", upload("a.txt", b"a", metadata="["), INVALID, "metadata"),
    "an empty file": ("POST", "/jobs", text(b""), INVALID, "prompts"),
    "a file that is no UTF-8": ("POST", "/jobs", text(b"a\n\xff\n"), INVALID, "line 2"),
    "a line that is no JSON": ("POST", "/jobs", upload("a.jsonl", b'"a"\n{\n'), INVALID, "line 2"),
    "a CSV without the column": ("POST", "/jobs", upload("a.csv", b"text\na\n"), INVALID, "line 1"),
    "a Parquet without the column": ("POST", "/jobs", upload("a.parquet", parquet(text=["a"])), INVALID, "file"),
    "a Parquet with a null": ("POST", "/jobs", upload("a.parquet", parquet(prompt=["a", None])), INVALID, "row 1"),
    "no Parquet": ("POST", "/jobs", upload("a.parquet", b"PAR1"), INVALID, "file"),
    "half of a gzip": ("POST", "/jobs", upload("a.txt.gz", gzip.compress(b"a" * 999)[:20]), INVALID, "file"),
    # The rest
    "a limit above the limit": ("GET", "/jobs?limit=101", {}, INVALID, "query.limit"),
    "a status we do not have": ("GET", "/jobs?status=done", {}, INVALID, "query.status.0"),
    "parts below nothing": ("GET", f"{NO_JOB}?parts_limit=-1", {}, INVALID, "query.parts_limit"),
    "a part that is no number": ("GET", f"{NO_JOB}/parts/first", {}, INVALID, "path.index"),
    "a job that is not there": ("GET", NO_JOB, {}, (404, "job-not-found"), None),
    "an id that is a path": ("GET", "/jobs/..%2F..%2Fetc", {}, (404, "not-found"), None),
    "a job to be cancelled that is not there": ("POST", f"{NO_JOB}/cancel", {}, (404, "job-not-found"), None),
    "a path that is not there": ("GET", "/v1/predict", {}, (404, "not-found"), None),
    "a method that is not there": ("PUT", "/predict", predict("a"), (405, "method-not-allowed"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_a_problem_that_names_the_field(http, case):
    method, path, request, expected, field = CASES[case]
    response = http.request(method, path, **request)
    assert kind(response) == expected, response.text
    problem = response.json()
    assert problem.get("field") == field
    assert field is None or field.rpartition(".")[2] in problem["detail"]
    assert set(problem) >= {"type", "title", "status", "detail"}
    assert "Traceback" not in response.text
    assert len(json.dumps(problem)) < 5000
