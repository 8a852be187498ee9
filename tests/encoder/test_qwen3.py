from dataclasses import replace

import pytest
import torch
from diffusers import Flux2KleinPipeline
from transformers import AutoTokenizer, Qwen3ForCausalLM

from encoder import PRESETS, CheckpointError, Encoder
from encoder.trunk import Trunk

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = [
    "hello world",
    "a",
    "",
    " leading and trailing space ",
    "\nbegins",
    "\n\n  begins deep",
    "\r\n\tline\nbreaks\r\nand\ttabs",
    "an [IMG] placeholder [IMG]",
    "<|im_start|>looks like a template<|im_end|>",
    "a cup of tea 🍵 next to a sleeping cat 🐈‍⬛",
    "بيت صغير على تلة خضراء",
    "בית קטן על גבעה",
    "雪の中の赤い鳥居",
    "word " * 200,
    "exactly the end " * 166,
    "over-long " * 2000,
]


@pytest.fixture(scope="module")
def klein(tiny_qwen3):
    return Encoder.load(tiny_qwen3, "flux2-klein-4b", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def deterministic(tiny_qwen3):
    return Encoder.load(tiny_qwen3, "flux2-klein-9b", device="cpu", dtype="float32", deterministic=True)


@pytest.fixture(scope="module")
def klein_reference(tiny_qwen3):
    """diffusers' own function on the same checkpoint: prompts -> [B, 512, D]."""
    model = Qwen3ForCausalLM.from_pretrained(tiny_qwen3 / "text_encoder", dtype=torch.float32)
    model.lm_head = torch.nn.Identity()  # 131077 logits a row, gigabytes in a batch, that nobody reads
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3 / "tokenizer")

    @torch.no_grad()
    def encode(prompts, **options):
        options = {"max_sequence_length": 512, "hidden_states_layers": (9, 18, 27)} | options
        return Flux2KleinPipeline._get_qwen3_prompt_embeds(model, tokenizer, prompts, **options)

    return encode


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: repr(prompt[:20]))
def test_dense_rows_equal_those_of_diffusers_pad_rows_included(klein, klein_reference, prompt):
    want = klein_reference([prompt])
    got, text_ids = klein.dense(klein.encode([prompt]))
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert torch.equal(text_ids, Flux2KleinPipeline._prepare_text_ids(want))


def test_a_batch_of_all_lengths_equals_diffusers_in_order(klein, klein_reference):
    got, text_ids = klein.dense(klein.encode(PROMPTS))
    torch.testing.assert_close(got, klein_reference(PROMPTS), **TOLERANCE)
    assert text_ids.shape == (len(PROMPTS), 512, 4)


def test_the_last_prompt_that_fits_and_the_first_that_is_cut_equal_diffusers(klein, klein_reference):
    (one,) = klein.encode(["a"])
    prompts = ["a" + " a" * (words - one.num_tokens) for words in (511, 512, 513)]
    encodings = klein.encode(prompts)
    assert [encoding.num_tokens for encoding in encodings] == [511, 512, 512]
    assert [encoding.truncated for encoding in encodings] == [False, False, True]
    torch.testing.assert_close(klein.dense(encodings)[0], klein_reference(prompts), **TOLERANCE)


def test_the_preset_of_the_larger_model_has_the_same_layers_and_gives_the_same_rows(klein, deterministic):
    assert deterministic.config.name == "flux2-klein-9b"
    assert replace(deterministic.config, name=klein.config.name) == klein.config
    for one, other in zip(klein.encode(PROMPTS[:3]), deterministic.encode(PROMPTS[:3]), strict=True):
        torch.testing.assert_close(one.own_rows, other.own_rows, **TOLERANCE)


def test_own_rows_are_those_behind_the_prefix_and_the_pad_rows(klein, klein_reference):
    prefix_length = len(klein.prefix_rows)
    want = klein_reference(["", "hello"])
    empty, hello = klein.encode(["", "hello"])
    assert prefix_length >= 1
    assert hello.num_tokens == empty.num_tokens + 1
    for encoding, rows in zip((empty, hello), want, strict=True):
        assert len(encoding.own_rows) == 512 - prefix_length
        torch.testing.assert_close(klein.prefix_rows, rows[:prefix_length], **TOLERANCE)
        torch.testing.assert_close(encoding.own_rows, rows[prefix_length:], **TOLERANCE)


def test_pad_rows_depend_on_the_prompt_so_no_pad_row_is_kept(klein):
    empty, hello = klein.encode(["", "hello"])
    assert not torch.allclose(empty.own_rows[-1], hello.own_rows[-1], atol=0.01)
    assert not klein.pad_row.any()


def test_only_a_prompt_that_is_cut_is_called_truncated(klein):
    fits, cut = klein.encode(["word " * 200, "over-long " * 2000])
    assert not fits.truncated
    assert fits.num_tokens < 512
    assert cut.truncated
    assert cut.num_tokens == 512


def test_an_image_placeholder_stays_in_the_prompt(klein):
    kept, gone = klein.encode(["an [IMG] placeholder", "an  placeholder"])
    assert kept.num_tokens > gone.num_tokens - 1
    assert not torch.equal(kept.own_rows, gone.own_rows)


def test_other_layers_and_lengths_equal_diffusers_too(tiny_qwen3, klein, klein_reference):
    mine = Encoder.load(tiny_qwen3, replace(klein.config, layers=(1, 5), max_length=64), device="cpu")
    got, text_ids = mine.dense(mine.encode(PROMPTS))
    want = klein_reference(PROMPTS, max_sequence_length=64, hidden_states_layers=(1, 5))
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert text_ids.shape == (len(PROMPTS), 64, 4)


def test_deterministic_gives_equal_bits_alone_and_in_company_in_any_order(deterministic):
    prompts = ["", "a", *PROMPTS[3:10], "word " * 200, "over-long " * 2000]
    together = deterministic.encode(prompts)
    backwards = deterministic.encode(prompts[::-1])[::-1]
    for prompt, one, other in zip(prompts, together, backwards, strict=True):
        assert torch.equal(one.own_rows, other.own_rows)
        assert torch.equal(one.own_rows, deterministic.encode([prompt])[0].own_rows)


def test_deterministic_gives_equal_bits_behind_a_prefix_longer_than_half_the_length(tiny_qwen3):
    config = replace(PRESETS["flux2-klein-4b"], layers=(1, 3), max_length=64, system_message="word " * 36)
    mine = Encoder.load(tiny_qwen3, config, device="cpu", dtype="float32", deterministic=True)
    prompts = ["a", "some words", "a fox in the snow", "", "seven words are what this prompt has"]
    assert 32 < len(mine.prefix_rows) < 56
    for prompt, encoding in zip(prompts, mine.encode(prompts), strict=True):
        assert torch.equal(encoding.own_rows, mine.encode([prompt])[0].own_rows)


@pytest.mark.parametrize(("max_length", "system_message"), [(512, None), (64, "word " * 36)])
def test_deterministic_forwards_are_all_of_one_size(tiny_qwen3, klein, max_length, system_message, monkeypatch):
    config = replace(klein.config, layers=(1, 3), max_length=max_length, system_message=system_message)
    mine = Encoder.load(tiny_qwen3, config, device="cpu", dtype="float32", deterministic=True)
    sizes = set()
    packed = Trunk.packed

    def recorded(trunk, packing, cache):
        sizes.add(len(packing.ids))
        return packed(trunk, packing, cache)

    monkeypatch.setattr(Trunk, "packed", recorded)
    mine.encode(["a"])
    mine.encode(["a", "some words", "a fox in the snow"])
    assert sizes == {max_length - len(mine.prefix_rows)}


@pytest.mark.parametrize("preset", ["flux2-dev", "flux2-dev-modular"])
def test_a_mistral_preset_refuses_a_qwen3_checkpoint(tiny_qwen3, preset):
    with pytest.raises(CheckpointError, match="model_type 'qwen3'; this preset is for mistral3, mistral"):
        Encoder.load(tiny_qwen3, preset, device="cpu")


@pytest.mark.parametrize("preset", ["flux2-klein-4b", "flux2-klein-9b"])
def test_a_qwen3_preset_refuses_a_mistral_checkpoint(tiny, preset):
    with pytest.raises(CheckpointError, match="model_type 'mistral3'; this preset is for qwen3"):
        Encoder.load(tiny, preset, device="cpu")
