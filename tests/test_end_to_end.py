"""Prompts in, checked Parquet out, through everything there is."""

import random
from pathlib import Path

import torch
from diffusers import Flux2Pipeline

import layerstack

PROMPTS = Path(__file__).parent.parent / "examples" / "prompts.txt"


def test_a_prompt_file_comes_back_as_the_rows_of_diffusers(stack, reference, tmp_path):
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    with layerstack.Client(stack.url) as client:
        job = client.jobs.submit(PROMPTS, {"chunk_rows": 10})
        assert (job.view.num_prompts, job.view.num_parts) == (len(prompts), 4)
        job.wait(timeout_s=120)
        job.download(tmp_path)
    rows = layerstack.read(tmp_path)
    assert [row["index"] for row in rows] == list(range(len(prompts)))
    assert [row["prompt"] for row in rows] == prompts
    chosen = random.Random(0).sample(range(len(rows)), 8)
    want = reference([prompts[position] for position in chosen])
    torch.testing.assert_close(torch.stack([rows[n]["prompt_embeds"] for n in chosen]), want, rtol=1e-4, atol=1e-4)
    text_ids = torch.stack([rows[n]["text_ids"] for n in chosen])
    assert torch.equal(text_ids, Flux2Pipeline._prepare_text_ids(want))
