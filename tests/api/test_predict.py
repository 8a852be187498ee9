import io

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors

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
    assert (response.status_code, response.json()["field"]) == (422, "prompt.1")


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
