from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.chunking import ChunkLimits, Sizes, cut
from jobs.parts import PartHeader
from jobs.records import Prompt
from tests.sample_jobs import INFO

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.txt"
SIZES = Sizes(max_own_rows=14, stored_rows=None, row_bytes=48, constant_bytes=64)

texts = st.lists(st.text(max_size=80), max_size=60)
limits = st.builds(ChunkLimits, st.integers(1, 9), st.integers(1, 40))
sizes = st.sampled_from([SIZES, replace(SIZES, stored_rows=16)])


def prompts_of(texts):
    return [Prompt(id=str(n), prompt=text) for n, text in enumerate(texts)]


@given(texts, sizes, limits)
def test_the_chunks_together_are_the_prompts_in_order(texts, sizes, limits):
    prompts = prompts_of(texts)
    chunks = list(cut(iter(prompts), sizes, limits))
    assert [prompt for chunk in chunks for prompt in chunk.prompts] == prompts
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.start for chunk in chunks] == [int(chunk.prompts[0].id) for chunk in chunks]


@given(texts, sizes, limits)
def test_a_chunk_keeps_both_limits_unless_it_is_a_single_prompt(texts, sizes, limits):
    for chunk in cut(prompts_of(texts), sizes, limits):
        assert 1 <= len(chunk.prompts) <= limits.prompts
        assert chunk.rows == sum(sizes.rows(prompt.prompt) for prompt in chunk.prompts)
        assert chunk.rows <= limits.tokens or len(chunk.prompts) == 1


@given(texts, sizes, limits)
def test_no_chunk_ends_before_it_is_full(texts, sizes, limits):
    chunks = list(cut(prompts_of(texts), sizes, limits))
    for chunk, following in pairwise(chunks):
        full = len(chunk.prompts) == limits.prompts
        assert full or chunk.rows + sizes.rows(following.prompts[0].prompt) > limits.tokens


@given(st.text())
def test_a_prompt_is_not_estimated_above_what_it_can_have(text):
    assert 0 <= SIZES.rows(text) <= 14


def test_half_a_surrogate_pair_has_a_size_too():
    assert SIZES.rows("\ud800") > 0


@pytest.mark.parametrize(("dtype", "row_bytes"), [("float32", 16 + 32), ("bfloat16", 8 + 32)])
def test_the_dense_layout_counts_max_length_rows_of_each_prompt(dtype, row_bytes):
    dense = Sizes.of(INFO, "dense", dtype)
    assert (dense.rows(""), dense.rows("word " * 100)) == (16, 16)
    assert dense.row_bytes == Sizes.of(INFO, "own_rows", dtype).row_bytes == row_bytes


@pytest.mark.parametrize("layout", ["own_rows", "dense"])
@pytest.mark.parametrize("num_parts", [1, 50])
def test_the_estimate_has_the_constant_rows_of_each_part(layout, num_parts):
    encoder = INFO.model_copy(update={"embed_dim": 3 * 1024, "num_prefix_tokens": 31})
    rows = np.zeros((32, encoder.embed_dim), np.float32)
    header = PartHeader.build(
        layout=layout, dtype="float32", max_length=16, fingerprint="f", layers=(1,),
        prefix_rows=rows[1:], pad_row=rows[0],
    )  # fmt: skip
    found = Sizes.of(encoder, layout, "float32").stored_bytes(0, num_parts)
    assert found == pytest.approx(num_parts * len(header.model_dump_json()), rel=0.01)


def test_own_rows_are_at_most_what_the_prefix_leaves():
    sizes = Sizes.of(INFO, "own_rows", "float32")
    assert sizes.rows("word " * 100) == INFO.max_length - INFO.num_prefix_tokens


def test_the_estimate_is_near_the_rows_of_the_tokenizer(encoder):
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    sizes = replace(SIZES, max_own_rows=encoder.config.max_length - len(encoder.prefix_rows))
    real = [len(tokenized.own_ids) for tokenized in encoder.tokenizer(prompts)]
    estimates = [sizes.rows(prompt) for prompt in prompts]
    assert 0.8 < sum(estimates) / sum(real) < 1.25
    assert all(0.4 < estimate / rows < 2.5 for estimate, rows in zip(estimates, real, strict=True))
