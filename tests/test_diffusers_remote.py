"""diffusers' own remote step and its training scripts, with nothing changed but the address."""

import io

import pytest
import requests
import torch

from tests.support import local_stack

PROMPTS = ["a fox in the snow", "a red barn on a hill, seen from far away, in the style of an old photograph"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def remote(url, prompt, monkeypatch):
    """What a modular pipeline gets from the remote step."""
    from diffusers.modular_pipelines.flux2.encoders import Flux2RemoteTextEncoderStep

    monkeypatch.setattr(Flux2RemoteTextEncoderStep, "REMOTE_URL", f"{url}/predict?format=pt")
    return Flux2RemoteTextEncoderStep().init_pipeline()(prompt=prompt, output="prompt_embeds")


@pytest.fixture(scope="module")
def modular_stack(tmp_path_factory, tiny):
    """A stack with the system message of the modular pipeline."""
    folder = tmp_path_factory.mktemp("modular")
    with local_stack(folder, "--model", str(tiny), "--preset", "flux2-dev-modular") as found:
        yield found


@pytest.mark.parametrize("prompt", [PROMPTS, PROMPTS[0], None])
def test_the_remote_step_gets_what_the_pipeline_computes(stack, reference, prompt, monkeypatch):
    expected = reference([prompt or ""] if not isinstance(prompt, list) else prompt)
    torch.testing.assert_close(remote(stack.url, prompt, monkeypatch), expected, **TOLERANCE)


def test_the_remote_step_gets_what_the_local_modular_step_computes(modular_stack, tiny, monkeypatch):
    from diffusers.modular_pipelines.flux2.encoders import Flux2TextEncoderStep
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    local = Flux2TextEncoderStep().init_pipeline()
    local.update_components(
        text_encoder=Mistral3ForConditionalGeneration.from_pretrained(tiny / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(tiny / "tokenizer"),
    )
    expected = local(prompt=PROMPTS, output="prompt_embeds")
    torch.testing.assert_close(remote(modular_stack.url, PROMPTS, monkeypatch), expected, **TOLERANCE)


def test_a_training_script_posts_a_string_with_a_bearer_token_and_no_accept_header(stack, reference):
    session = requests.Session()
    session.headers = {}  # not even the Accept that requests adds
    response = session.post(
        f"{stack.url}/predict?format=pt",
        json={"prompt": PROMPTS[1]},
        headers={"Authorization": "Bearer hf_anything", "Content-Type": "application/json"},
    )
    assert "accept" not in {name.lower() for name in response.request.headers}
    tensor = torch.load(io.BytesIO(response.content), weights_only=True)
    torch.testing.assert_close(tensor, reference([PROMPTS[1]]), **TOLERANCE)
