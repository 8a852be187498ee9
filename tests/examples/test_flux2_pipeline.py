"""A picture whose text encoder is on a server."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

PROMPT = "a red barn on a hill, seen from far away, in the style of an old photograph"
SIZE = {"height": 32, "width": 48}
STEPS, GUIDANCE, SEED = 3, 3.5, 7
# Embeddings of two ways to compute them differ by some 1e-5, and a value that lies between two of a byte's then falls
# to the one side or the other.
ALLOWED = 1


@pytest.fixture
def drawn(stack, play, flux2_folder, tmp_path):
    """Run the example; returns the pixels."""

    def draw(prompt, *more):
        size = [f"--{name}={pixels}" for name, pixels in SIZE.items()]
        how = [f"--steps={STEPS}", f"--guidance={GUIDANCE}", f"--seed={SEED}", "--dtype=float32", "--device=cpu"]
        words = [prompt, "--url", stack.url, "--model", flux2_folder, "--out", "here.png", *size, *how, *more]
        ended = play("flux2_pipeline.py", *words)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == "here.png: 48 x 32, 3 steps, seed 7\n"
        assert "Warning" not in ended.stderr
        with Image.open(tmp_path / "here.png") as picture:
            return np.asarray(picture).astype(int)

    return draw


@pytest.fixture
def locally_drawn(local_flux2):
    def draw(**prompt):
        generator = torch.Generator().manual_seed(SEED)
        answer = local_flux2(**prompt, **SIZE, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator)
        return np.asarray(answer.images[0]).astype(int)

    return draw


def largest_difference(one, other):
    assert one.shape == other.shape == (32, 48, 3)
    return np.abs(one - other).max()


def test_the_picture_is_the_one_of_the_local_encoder(drawn, locally_drawn, encoder):
    there = drawn(PROMPT)
    of_diffusers = locally_drawn(prompt=PROMPT)
    of_ours = locally_drawn(prompt_embeds=encoder.dense(encoder.encode([PROMPT]))[0])
    assert largest_difference(there, of_diffusers) <= ALLOWED
    assert largest_difference(there, of_ours) <= ALLOWED


@pytest.mark.parametrize("offload", ["model", "group"])
def test_weights_that_come_to_the_device_piece_by_piece_make_the_same_picture(drawn, locally_drawn, offload):
    there = drawn(PROMPT, "--offload", offload)
    assert largest_difference(there, locally_drawn(prompt=PROMPT)) <= ALLOWED


def test_another_prompt_makes_another_picture(locally_drawn):
    fox = locally_drawn(prompt="a fox in the snow")
    assert largest_difference(fox, locally_drawn(prompt=PROMPT)) > 20 * ALLOWED


def test_an_encoder_that_does_not_fit_is_told_before_weights_are_loaded(stack, play, tmp_path):
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    config = {"_class_name": "Flux2Transformer2DModel", "joint_attention_dim": 15360}
    (folder / "config.json").write_text(json.dumps(config))
    ended = play("flux2_pipeline.py", PROMPT, "--url", stack.url, "--model", folder.parent)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("the server's encoder gives 96 values a token, ")
    assert "takes 15360" in ended.stderr


def test_a_server_that_is_not_there_is_told(play, nobody):
    ended = play("flux2_pipeline.py", PROMPT, "--url", nobody)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1].startswith(f"no answer from {nobody}")
