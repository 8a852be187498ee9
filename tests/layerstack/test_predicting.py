import json

import numpy as np
import pandas as pd
import pytest
import torch

import layerstack
from jobs.tensors import save_tensors
from layerstack.errors import ServerError, UnexpectedAnswerError
from tests.layerstack.servers import Answer, answering, problem


@pytest.fixture
def client(stack):
    with layerstack.Client(stack.url) as found:
        yield found


def test_dense_tensors_are_those_of_diffusers(client, reference):
    answer = client.predict(["a fox", "over-long " * 2000, ""])
    want = reference(["a fox", "over-long " * 2000, ""])
    np.testing.assert_allclose(answer.prompt_embeds, want, rtol=1e-4, atol=1e-4)
    assert answer.text_ids.dtype == np.int64
    assert answer.text_ids[1].tolist() == [[0, 0, 0, position] for position in range(512)]
    assert (len(answer), answer.truncated) == (3, [False, True, False])
    assert answer.fingerprint == client.encoder().fingerprint


def test_own_rows_are_what_is_left_without_pads_and_prefix(client):
    answer = client.predict(["a fox", "a hen in the snow"])
    assert [len(rows) + len(answer.prefix_rows) for rows in answer.own_rows] == answer.num_tokens
    for rows, dense in zip(answer.own_rows, answer.prompt_embeds, strict=True):
        np.testing.assert_array_equal(dense[-len(rows) :], rows)


def test_one_prompt_is_a_list_of_one(client):
    np.testing.assert_array_equal(client.predict("a fox").prompt_embeds, client.predict(["a fox"]).prompt_embeds)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_has_the_same_values_in_the_same_dtype(client, dtype):
    answer = client.predict("a fox", dtype=dtype)
    prompt_embeds, text_ids = answer.torch()
    assert (prompt_embeds.dtype, prompt_embeds.shape) == (getattr(torch, dtype), (1, 512, 96))
    np.testing.assert_array_equal(prompt_embeds.float(), answer.prompt_embeds.astype(np.float32))
    assert (text_ids.dtype, text_ids.shape) == (torch.int64, (1, 512, 4))
    prompt_embeds[0, 0, 0] = 1  # may be written to


def test_more_prompts_than_a_server_takes_come_back_in_order(client):
    prompts = [f"prompt {n} {'and so on ' * (n % 5)}" for n in range(50)]
    answer = client.predict(prompts)
    assert len(answer) == 50
    for n in (0, 17, 49):
        alone = client.predict(prompts[n])
        np.testing.assert_allclose(answer.own_rows[n], alone.own_rows[0], rtol=1e-4, atol=1e-4)


def answer_of(prompts, fingerprint="f"):
    """The answer of an encoder with one prefix row, whose prompts have as many rows as characters."""
    tensors = told_of(prompts)
    for n, prompt in enumerate(prompts):
        tensors[f"prompt_embeds.{n}"] = np.full((1 + len(prompt), 2), len(prompt), np.float32)
        tensors[f"text_ids.{n}"] = np.full((1 + len(prompt), 4), 9)
    return as_answer(tensors | {"pad_row": np.zeros(2, np.float32)}, fingerprint)


def told_of(prompts):
    counts = np.array([1 + len(prompt) for prompt in prompts], np.int32)
    return {"num_tokens": counts, "truncated": np.zeros(len(prompts), bool)}


def as_answer(tensors, fingerprint="f"):
    metadata = {"fingerprint": fingerprint, "max_length": "16", "num_prefix_tokens": "1"}
    return Answer(200, save_tensors(tensors, metadata))


def strict(limit, characters=10**9):
    """A server that takes `limit` prompts of so many characters at once."""

    def respond(request):
        prompts = json.loads(request.body)["prompt"]
        if len(prompts) > limit:
            return problem(413, "too-many-prompts", limit=limit, field="prompt")
        if sum(map(len, prompts)) > characters:
            return problem(413, "body-too-large", limit=characters)
        return answer_of(prompts)

    return respond


def test_the_limit_of_a_server_is_learned_from_its_refusal():
    with answering(strict(3)) as server, layerstack.Client(server.url) as client:
        answer = client.predict(["a" * (n % 4) for n in range(10)])
        assert [len(rows) for rows in answer.own_rows] == [n % 4 for n in range(10)]
        refused = len(server.seen)
        client.predict(["a"] * 6)
        assert len(server.seen) - refused == 2


def test_prompts_that_are_too_many_bytes_are_halved_until_they_fit():
    with answering(strict(16, characters=5)) as server, layerstack.Client(server.url) as client:
        assert [len(rows) for rows in client.predict(["aaa"] * 9).own_rows] == [3] * 9
        with pytest.raises(ServerError, match="body-too-large"):
            client.predict("a" * 6)


def test_answers_of_two_encoders_are_not_mixed():
    fingerprints = iter("fg")

    def respond(request):
        return answer_of(json.loads(request.body)["prompt"], next(fingerprints))

    with (
        answering(respond) as server,
        layerstack.Client(server.url) as client,
        pytest.raises(UnexpectedAnswerError, match="encoder changed between two answers: fingerprints f, g"),
    ):
        client.predict(["a"] * 17)


def test_a_character_that_utf8_has_not_is_the_servers_to_refuse(client):
    with pytest.raises(ServerError) as caught:
        client.predict("\ud800")
    assert caught.value.kind == "invalid-request"


@pytest.mark.parametrize("prompts", [{"a": 1}, pd.DataFrame({"prompt": ["a"]})])
def test_what_would_be_read_as_something_else_is_refused(client, prompts):
    with pytest.raises(TypeError, match="predict takes"):
        client.predict(prompts)


def test_no_prompts_are_an_error(client):
    with pytest.raises(ValueError, match="at least one prompt"):
        client.predict([])


def test_what_the_server_says_is_in_the_error(client):
    with pytest.raises(ServerError, match="at most 200000 characters") as caught:
        client.predict("a" * 200_001)
    assert (caught.value.status, caught.value.problem["limit"]) == (422, 200_000)


def test_of_an_encoder_that_pads_at_the_right_all_rows_are_asked_for():
    rows = np.arange(2 * 16 * 2, dtype=np.float32).reshape(2, 16, 2)
    rows[:, 0] = -1  # the prefix

    def respond(request):
        prompts = json.loads(request.body)["prompt"]
        if "padding=max_length" in request.path:
            ids = np.tile(np.arange(16)[:, None], (2, 1, 4))
            return as_answer(told_of(prompts) | {"prompt_embeds": rows, "text_ids": ids})
        tokens = {f"prompt_embeds.{n}": rows[n, : 1 + len(prompt)] for n, prompt in enumerate(prompts)}
        ids = {f"text_ids.{n}": np.tile(np.arange(1 + len(p))[:, None], (1, 4)) for n, p in enumerate(prompts)}
        return as_answer(told_of(prompts) | tokens | ids | {"pad_row": np.zeros(2, np.float32)})

    with answering(respond) as server, layerstack.Client(server.url) as client:
        for _ in range(2):
            answer = client.predict(["a", "abc"])
            np.testing.assert_array_equal(answer.prompt_embeds, rows)
            np.testing.assert_array_equal(answer.own_rows[1], rows[1, 1:])
        assert ["padding=none" in request.path for request in server.seen] == [True, False, False]
