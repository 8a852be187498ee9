import base64
import gzip
import io

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors

from jobs.tensors import DTYPES

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def test_json_has_embeddings_positions_shapes_and_the_time(http, reference):
    answer = http.post("/predict", json={"prompt": ["hello world", "a fox"]}).json()
    np.testing.assert_allclose(answer["prompt_embeds"], reference(["hello world", "a fox"]), **TOLERANCE)
    assert np.array(answer["text_ids"]).shape == (2, 512, 4)
    assert answer["text_ids"][1][7] == [0, 0, 0, 7]
    assert answer["shapes"] == {"prompt_embeds": [2, 512, 96], "text_ids": [2, 512, 4]}
    assert answer["num_tokens"] == [35, 35]
    assert answer["truncated"] == [False, False]
    assert answer["dtype"] == "float32"
    assert 0 < answer["encode_ms"] <= answer["time_ms"]


def test_a_string_is_a_list_of_one(http):
    one, many = (http.post("/predict", json={"prompt": prompt}).json() for prompt in ("a fox", ["a fox"]))
    assert one["shapes"] == many["shapes"] == {"prompt_embeds": [1, 512, 96], "text_ids": [1, 512, 4]}
    np.testing.assert_allclose(one["prompt_embeds"], many["prompt_embeds"], **TOLERANCE)


def test_the_same_prompt_twice_gives_the_same_rows(http):
    first, second = http.post("/predict", json={"prompt": ["a fox"] * 2}).json()["prompt_embeds"]
    np.testing.assert_allclose(first, second, **TOLERANCE)


def test_safetensors_by_accept_header(http, reference):
    response = http.post("/predict", json={"prompt": "a fox"}, headers={"accept": "application/vnd.safetensors"})
    assert response.headers["content-type"] == "application/vnd.safetensors"
    tensors = load_safetensors(response.content)
    torch.testing.assert_close(tensors["prompt_embeds"], reference(["a fox"]), **TOLERANCE)
    assert tensors["text_ids"].dtype == torch.int64
    assert (tensors["num_tokens"].tolist(), tensors["truncated"].tolist()) == ([35], [False])


def test_pt_is_what_diffusers_remote_step_reads(http, reference):
    response = http.post("/predict?format=pt", json={"prompt": ["a fox"]}, headers={"Authorization": "Bearer x"})
    tensor = torch.load(io.BytesIO(response.content), weights_only=True)
    torch.testing.assert_close(tensor, reference(["a fox"]), **TOLERANCE)


@pytest.mark.parametrize("answer_format", ["json", "safetensors", "pt"])
def test_an_over_long_prompt_is_cut_and_told_in_every_format(http, answer_format):
    response = http.post(f"/predict?format={answer_format}", json={"prompt": ["a", "over-long " * 2000]})
    assert response.status_code == 200
    assert response.headers["layerstack-truncated"] == "false,true"
    assert response.headers["layerstack-num-tokens"] == "34,512"
    assert len(response.headers["layerstack-fingerprint"]) == 16


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": 5}, 422, "prompt"),
        ({"prompt": None}, 422, "prompt"),
        ({"prompt": ["a", 5]}, 422, "prompt.1"),
        ({"prompt": ["a", ["b"]]}, 422, "prompt.1"),
        ({"prompt": "a", "unknown": 1}, 422, "unknown"),
        ({}, 422, "prompt"),
        ([], 422, "body"),
        ({"prompt": ["a"] * 17}, 413, "prompt"),
        ({"prompt": ["fine", "x" * 200_001]}, 422, "prompt.1"),
    ],
)
def test_bad_input_is_a_problem_that_names_the_field(http, body, status, field):
    response = http.post("/predict", json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["field"]) == (status, field)
    assert field in problem["detail"]
    assert problem["type"].startswith("urn:layerstack:problem:")


def test_a_lone_surrogate_is_no_unicode(http):
    content = b'{"prompt": ["a", "\\ud800"]}'
    response = http.post("/predict", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["field"]) == (422, "body")


def test_too_many_prompts_are_sent_to_jobs_with_the_limit(http):
    problem = http.post("/predict", json={"prompt": ["a"] * 17}).json()
    assert (problem["limit"], problem["value"], problem["see"]) == (16, 17, "/jobs")


@pytest.mark.parametrize("content", [b"", b"nonsense", b'{"prompt": [1,', b"\xff\xfe"])
def test_a_body_that_is_no_json_is_a_client_error(http, content):
    response = http.post("/predict", content=content, headers={"content-type": "application/json"})
    assert response.status_code in {400, 422}
    assert response.headers["content-type"] == "application/problem+json"


def test_a_body_of_another_type_is_told_what_is_needed(http):
    response = http.post("/predict", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert (response.status_code, response.json()["field"]) == (415, "Content-Type")


@pytest.mark.parametrize(
    ("url", "headers", "status"),
    [("/predict?format=png", {}, 422), ("/predict", {"accept": "image/png"}, 406)],
)
def test_a_format_that_we_do_not_have_is_told(http, url, headers, status):
    assert http.post(url, json={"prompt": "a"}, headers=headers).status_code == status


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_above_the_limit_is_refused_while_it_arrives(lone_api, broker, declared):
    import httpx

    url = lone_api(broker.url, body_max_bytes=1000)
    content = b'{"prompt": "' + b"x" * 2000 + b'"}'
    response = httpx.post(
        f"{url}/predict",
        content=content if declared else iter([content]),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413
    assert response.json()["limit"] == 1000


def decoded(response, answer_format):
    """The embeddings of an answer, a list of [n, D] arrays in float32."""
    if answer_format == "pt":
        return [rows.float().numpy() for rows in torch.load(io.BytesIO(response.content), weights_only=True)]
    if answer_format == "safetensors":
        tensors = load_safetensors(response.content)
        if "prompt_embeds" in tensors:
            return list(tensors["prompt_embeds"].float().numpy())
        return [tensors[f"prompt_embeds.{n}"].float().numpy() for n in range(len(tensors["num_tokens"]))]
    found = response.json()["prompt_embeds"]
    if answer_format == "json":
        return [np.array(rows, np.float32) for rows in found]
    tensors = found if isinstance(found, list) else [found]
    arrays = [
        np.frombuffer(base64.b64decode(each["base64"]), DTYPES[each["dtype"]]).reshape(each["shape"])
        for each in tensors
    ]
    return [rows.astype(np.float32) for array in arrays for rows in (array if array.ndim == 3 else [array])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_all_formats_of_a_request_have_the_same_numbers(http, reference, dtype, padding):
    prompts = ["a fox", "a red barn on a hill"]
    expected = reference(prompts).to(getattr(torch, dtype)).float().numpy()
    if padding == "none":
        expected = [rows[-n:] for rows, n in zip(expected, (35, 39), strict=True)]
    for answer_format in ("json", "base64", "safetensors", "pt"):
        options = {"format": answer_format, "dtype": dtype, "padding": padding}
        response = http.post("/predict", params=options, json={"prompt": prompts})
        assert response.headers["layerstack-num-tokens"] == "35,39"
        found = decoded(response, answer_format)
        assert [len(rows) for rows in found] == [len(rows) for rows in expected]
        for rows, right in zip(found, expected, strict=True):
            tolerance = {"float32": 1e-4, "bfloat16": 0.04, "float16": 5e-3}[dtype]  # a bit of a value of size 4
            np.testing.assert_allclose(rows, right, rtol=tolerance, atol=tolerance)


def test_options_are_taken_from_the_body_unless_the_query_has_them(http):
    body = {"prompt": "a fox", "dtype": "float16", "padding": "none"}
    answer = http.post("/predict?format=base64", json=body).json()
    assert (answer["dtype"], answer["shapes"]["prompt_embeds"]) == ("float16", [[35, 96]])
    answer = http.post("/predict?format=base64&dtype=bfloat16&padding=max_length", json=body).json()
    assert (answer["dtype"], answer["shapes"]["prompt_embeds"]) == ("bfloat16", [1, 512, 96])


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
@pytest.mark.parametrize("answer_format", ["json", "base64"])
def test_text_is_compressed_for_who_accepts_that(http, coding, answer_format):
    options = {"format": answer_format, "padding": "none"}
    plain, compressed = (
        http.post("/predict", params=options, json={"prompt": "a fox"}, headers={"accept-encoding": accepted})
        for accepted in ("identity", coding)
    )
    assert compressed.headers["content-encoding"] == coding
    assert "Accept-Encoding" in compressed.headers["vary"]
    assert compressed.headers["vary"] == plain.headers["vary"]
    np.testing.assert_allclose(*(decoded(each, answer_format)[0] for each in (plain, compressed)), **TOLERANCE)


def test_tensors_are_sent_as_they_are_with_their_length(http):
    response = http.post("/predict?format=pt", json={"prompt": "a"}, headers={"accept-encoding": "gzip, zstd"})
    assert "content-encoding" not in response.headers
    assert int(response.headers["content-length"]) == len(response.content)


def test_a_compressed_body_is_read(http):
    content = gzip.compress(b'{"prompt": "a fox"}')
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = http.post("/predict?format=base64&padding=none", content=content, headers=headers)
    assert response.json()["num_tokens"] == [35]
