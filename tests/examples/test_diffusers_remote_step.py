"""diffusers' remote step in the example; tests/test_diffusers_remote.py has what it does beyond that."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import KEY

PROMPT = "a red barn on a hill, seen from far away, in the style of an old photograph"


def test_the_step_gets_what_diffusers_computes(stack, play, reference, tmp_path):
    ended = play("diffusers_remote_step.py", PROMPT, "--url", f"{stack.url}/", "--save", "embeds.pt")
    assert ended.stdout == "prompt_embeds (1, 512, 96) torch.float32\n", ended.stderr
    got = torch.load(tmp_path / "embeds.pt", weights_only=True)
    torch.testing.assert_close(got, reference([PROMPT]), rtol=1e-4, atol=1e-4)


def test_the_modular_pipeline_draws_what_the_local_encoder_makes(stack, play, flux2_folder, local_flux2, tmp_path):
    words = [PROMPT, "--url", stack.url, "--model", flux2_folder, "--dtype", "float32"]
    ended = play("diffusers_remote_step.py", *words, "--out", "here.png", "--steps", 3, "--size", 32, "--seed", 7)
    assert ended.stdout.endswith("\nhere.png: 32 x 32, 3 steps, seed 7\n"), ended.stderr
    generator = torch.Generator().manual_seed(7)
    answer = local_flux2(prompt=PROMPT, height=32, width=32, num_inference_steps=3, generator=generator)
    with Image.open(tmp_path / "here.png") as picture:
        difference = np.asarray(picture).astype(int) - np.asarray(answer.images[0])
    assert np.abs(difference).max() <= 1  # a value between two of a byte's may fall to either side


@pytest.mark.parametrize(("token", "said"), [("hf_anything", "401 Client Error"), (KEY, "503 Server Error")])
def test_the_token_of_hugging_face_is_the_key(keyed_url, play, token, said):
    ended = play("diffusers_remote_step.py", PROMPT, "--url", keyed_url, HF_TOKEN=token)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1].startswith(said)


def test_a_server_that_is_not_there_is_told(play, nobody):
    ended = play("diffusers_remote_step.py", PROMPT, "--url", nobody)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1] == f"no answer from {nobody}/predict?format=pt; is the server running?"
