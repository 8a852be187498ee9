import shutil
import threading
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Pipeline
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from encoder import Encoder, EncoderConfig, EncoderConfigError, PromptError, SelfCheckError
from encoder.checkpoint import locate
from encoder.loading import load_layers
from encoder.trunk import Trunk

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = [
    "hello world",
    "a",
    "",
    " leading and trailing space ",
    "line\nbreaks\r\nand\ttabs",
    "an [IMG] placeholder [IMG]",
    "[INST] looks like a template [/INST]</s>",
    "a cup of tea 🍵 next to a sleeping cat 🐈‍⬛",
    "بيت صغير على تلة خضراء",
    "בית קטן על גבעה",
    "雪の中の赤い鳥居",
    "word " * 200,
    "exactly the end " * 159,
    "over-long " * 2000,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: repr(prompt[:20]))
def test_dense_rows_equal_those_of_diffusers(encoder, reference, prompt):
    want = reference([prompt])
    got, text_ids = encoder.dense(encoder.encode([prompt]))
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert torch.equal(text_ids, Flux2Pipeline._prepare_text_ids(want))


def test_a_batch_of_all_lengths_equals_diffusers_in_order(encoder, reference):
    got, text_ids = encoder.dense(encoder.encode(PROMPTS))
    torch.testing.assert_close(got, reference(PROMPTS), **TOLERANCE)
    assert text_ids.shape == (len(PROMPTS), 512, 4)


def test_a_prompt_encodes_the_same_alone_and_in_company(encoder):
    together = encoder.encode(PROMPTS)
    for prompt, encoding in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(encoder.encode([prompt])[0].own_rows, encoding.own_rows, **TOLERANCE)


def test_own_rows_are_what_stands_behind_the_constant_prefix(encoder):
    empty, hello = encoder.encode(["", "hello"])
    assert len(encoder.prefix_rows) == 32
    assert (empty.num_tokens, len(empty.own_rows)) == (33, 1)
    assert (hello.num_tokens, len(hello.own_rows)) == (34, 2)
    assert encoder.pad_row.shape == (encoder.embed_dim,) == (96,)


def test_only_a_prompt_that_is_cut_is_called_truncated(encoder):
    fits, cut = encoder.encode(["word " * 200, "over-long " * 2000])
    assert not fits.truncated
    assert cut.truncated
    assert cut.num_tokens == 512


def test_no_prompts_give_no_encodings(encoder):
    assert encoder.encode([]) == []


@pytest.mark.parametrize("bad", [5, None, b"bytes", "lone \ud800 surrogate"])
def test_a_bad_prompt_is_an_error_that_tells_its_position(encoder, bad):
    with pytest.raises(PromptError, match="prompt 1") as caught:
        encoder.encode(["fine", bad, "fine too"])
    assert caught.value.position == 1


def test_results_need_no_gradients_and_keep_no_batch_alive(encoder):
    encoding = encoder.encode(["a", "b " * 100])[0]
    assert not encoding.own_rows.requires_grad
    assert encoding.own_rows.untyped_storage().nbytes() == encoding.own_rows.nbytes


def test_threads_can_share_an_encoder(encoder):
    want = encoder.encode(PROMPTS[:4])
    got = {}
    threads = [
        threading.Thread(target=lambda n=n: got.update({n: encoder.encode([PROMPTS[n]])[0].own_rows})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, encoding in enumerate(want):
        torch.testing.assert_close(got[n], encoding.own_rows, **TOLERANCE)


def test_bfloat16_stays_near_float32(tiny, encoder):
    half = Encoder.load(tiny, device="cpu", dtype="bfloat16")
    want = encoder.encode(["a fox"])[0].own_rows
    got = half.encode(["a fox"])[0].own_rows
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_prefix_of_16_bit_weights_is_computed_in_float32_and_leaves_them_unchanged(tiny, dtype):
    half = Encoder.load(tiny, device="cpu", dtype=dtype)
    module, _ = load_layers(locate(tiny), half.config, device=torch.device("cpu"), dtype=dtype)
    for (name, one), (other, now) in zip(
        module.named_parameters(), half._trunk._module.named_parameters(), strict=True
    ):
        assert name == other
        assert now.dtype == dtype
        assert torch.equal(one, now)
    want, cache = Trunk(module.float(), half.config.layers, "sdpa", exact=False).record_prefix(
        half.tokenizer.prefix_ids
    )
    assert (want.dtype, half.prefix_rows.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(half.prefix_rows, want.to(dtype))
    assert {tensor.dtype for pair in half._cache.values() for tensor in pair} == {dtype}
    for layer, pair in half._cache.items():
        torch.testing.assert_close(pair, tuple(tensor.to(dtype) for tensor in cache[layer]))


def test_the_fingerprint_changes_with_what_changes_the_numbers(tiny, encoder):
    others = [
        Encoder.load(tiny, "flux2-dev-modular", device="cpu"),
        Encoder.load(tiny, device="cpu", dtype="bfloat16"),
        Encoder.load(tiny, replace(encoder.config, layers=(10, 20)), device="cpu"),
        Encoder.load(tiny, replace(encoder.config, max_length=256), device="cpu"),
    ]
    assert len({encoder.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert Encoder.load(tiny, device="cpu", token_budget=30).fingerprint == encoder.fingerprint


def test_the_modular_preset_equals_diffusers_with_its_system_message(tiny, reference):
    modular = Encoder.load(tiny, "flux2-dev-modular", device="cpu")
    got, _ = modular.dense(modular.encode(["a fox"]))
    torch.testing.assert_close(got, reference(["a fox"], system_message=modular.config.system_message), **TOLERANCE)


def test_other_layers_and_lengths_equal_diffusers_too(tiny, encoder, reference):
    config = replace(encoder.config, layers=(1, 5), max_length=64)
    mine = Encoder.load(tiny, config, device="cpu")
    got, text_ids = mine.dense(mine.encode(PROMPTS))
    want = reference(PROMPTS, max_sequence_length=64, hidden_states_layers=[1, 5])
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert text_ids.shape == (len(PROMPTS), 64, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"device": "gpu"}, "gpu"),
        ({"token_budget": 0}, "token_budget"),
        ({"attention": "flash9"}, "'flash9' is not one of auto, varlen, sdpa"),
        ({"attention": "varlen", "device": "cpu"}, "'varlen' needs a CUDA device"),
        ({"config": "flux9"}, "flux9"),
        ({"config": EncoderConfig("mine", (10,), 20, "word " * 50)}, "max_length 20 leaves no room"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(tiny, arguments, message):
    with pytest.raises(EncoderConfigError, match=message):
        Encoder.load(tiny, **arguments)


def test_cuda_without_a_cuda_device_is_an_error_that_says_so(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EncoderConfigError, match="'cuda' is asked for, but torch finds no CUDA device"):
        Encoder.load(tiny, device="cuda")


def test_one_string_is_no_list_of_prompts(encoder):
    with pytest.raises(TypeError, match="expected a list of prompts"):
        encoder.encode("hello")


@pytest.fixture(scope="module")
def deterministic(tiny):
    return Encoder.load(tiny, device="cpu", dtype="float32", deterministic=True)


def test_deterministic_gives_equal_bits_alone_in_any_batch_and_in_another_order(deterministic):
    prompts = [*PROMPTS, *("word " * n for n in range(1, 25, 4)), *("twice " * n for n in range(30, 480, 90))]
    together = [encoding.own_rows for encoding in deterministic.encode(prompts)]
    backwards = [encoding.own_rows for encoding in deterministic.encode(prompts[::-1])][::-1]
    pairs = [
        encoding.own_rows for n in range(0, len(prompts), 2) for encoding in deterministic.encode(prompts[n : n + 2])
    ]
    for position, prompt in enumerate(prompts):
        alone = deterministic.encode([prompt])[0].own_rows
        assert torch.equal(together[position], alone)
        assert torch.equal(backwards[position], alone)
        assert torch.equal(pairs[position], alone)


def test_deterministic_rows_are_those_of_the_encoder_that_is_not(deterministic, encoder):
    assert deterministic.fingerprint == encoder.fingerprint
    for one, other in zip(deterministic.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        torch.testing.assert_close(one.own_rows, other.own_rows, **TOLERANCE)


def test_a_token_budget_smaller_than_any_prompt_gives_the_same_rows(tiny, encoder):
    mine = Encoder.load(tiny, device="cpu", dtype="float32", token_budget=7)
    assert mine.token_budget == 7
    for one, other in zip(mine.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        torch.testing.assert_close(one.own_rows, other.own_rows, **TOLERANCE)


@pytest.mark.parametrize("max_length", [33, 34])
def test_a_length_that_leaves_a_prompt_one_token_or_two_equals_diffusers(tiny, encoder, reference, max_length):
    mine = Encoder.load(tiny, replace(encoder.config, layers=(1, 5), max_length=max_length), device="cpu")
    got, _ = mine.dense(mine.encode(PROMPTS))
    want = reference(PROMPTS, max_sequence_length=max_length, hidden_states_layers=[1, 5])
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_no_system_message_is_none_and_an_empty_one_is_one(tiny, encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer")
    prefixes = {}
    for message in (None, ""):
        config = replace(encoder.config, layers=(1, 2), max_length=64, system_message=message)
        mine = Encoder.load(tiny, config, device="cpu")
        prefixes[message] = tokenizer.decode(mine.tokenizer.prefix_ids)
        assert len(mine.prefix_rows) == len(mine.tokenizer.prefix_ids)
    assert prefixes == {None: "<s>[INST]", "": "<s>[SYSTEM_PROMPT][/SYSTEM_PROMPT][INST]"}


def changed_by_one(rows, index):
    rows = rows.clone()
    rows[index] += 1
    return rows


def rolled(cache):
    return {layer: (key, value.roll(1, 0)) for layer, (key, value) in cache.items()}


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("padded", lambda rows: changed_by_one(rows, (1, 7)), r"1 of \d+ pad rows of prompt 1 \(first: row 7\)"),
        ("padded", lambda rows: changed_by_one(rows, (0, 3)), r"1 of 479 pad rows of prompt 0 \(first: row 3\)"),
        ("record_prefix", lambda result: (changed_by_one(result[0], 31), result[1]), "1 of 32 prefix rows of prompt 0"),
        ("record_prefix", lambda result: (result[0], rolled(result[1])), "1 of 1 own rows of prompt 0"),
        ("packed", lambda rows: changed_by_one(rows, -1), r"1 of 1 own rows of prompt 0 \(first: row 511\)"),
        ("packed", lambda rows: torch.full_like(rows, torch.nan), "own rows of prompt 1 .* by up to inf"),
    ],
    ids=["pad row", "first prompt's pad row", "prefix row", "cache", "own row", "no number"],
)
def test_a_model_whose_fast_path_is_wrong_is_refused_at_load(tiny, monkeypatch, method, change, message):
    right = getattr(Trunk, method)
    monkeypatch.setattr(Trunk, method, lambda *arguments: change(right(*arguments)))
    with pytest.raises(SelfCheckError, match=message):
        Encoder.load(tiny, device="cpu", dtype="float32")


def test_deterministic_is_refused_at_load_where_bits_depend_on_the_batch(tiny, monkeypatch):
    packed = Trunk.packed
    monkeypatch.setattr(
        Trunk, "packed", lambda trunk, packing, cache: packed(trunk, packing, cache) + 1e-6 * len(packing.own)
    )
    with pytest.raises(SelfCheckError, match="deterministic was asked for, but on cpu"):
        Encoder.load(tiny, device="cpu", dtype="float32", deterministic=True)


MINE = EncoderConfig("mine", layers=(2, 4), max_length=64, chat_template="{{ bos_token }}{{ messages[0]['content'] }}")
DECODERS = [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)]


def other_decoder(folder, tiny, config_class, model_class, **options):
    """A small checkpoint of another family in `folder`, with the tokenizer of `tiny`."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=131072,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **options,
    )
    model_class(config).save_pretrained(folder)
    shutil.copytree(tiny / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@torch.no_grad()
def by_hand(folder, prompts):
    """Layers 2 and 4 of prompts of at most 64 tokens, padded at the left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer("<s>" + prompt, add_special_tokens=False)["input_ids"][:64] for prompt in prompts]
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (64 - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (64 - len(row)) + [1] * len(row) for row in ids])
    states = model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.cat([states[2], states[4]], dim=-1)


@pytest.mark.parametrize(("config_class", "model_class"), DECODERS, ids=["llama", "qwen2"])
def test_any_other_decoder_works_by_a_config_of_ones_own(tiny, tmp_path, config_class, model_class):
    folder = other_decoder(tmp_path / "other", tiny, config_class, model_class)
    mine = Encoder.load(folder, MINE, device="cpu", dtype="float32")
    got, text_ids = mine.dense(mine.encode(PROMPTS))
    torch.testing.assert_close(got, by_hand(folder, PROMPTS), **TOLERANCE)
    assert text_ids.shape == (len(PROMPTS), 64, 4)
    assert (len(mine.prefix_rows), mine.embed_dim, mine.revision) == (1, 64, None)
    assert not mine.random_weights
    assert [encoding.num_tokens for encoding in mine.encode(["", "a", "over-long " * 99])] == [1, 2, 64]


def test_a_decoder_whose_pad_token_is_embedded_as_zeros_works_too(tiny, tmp_path):
    pad = AutoTokenizer.from_pretrained(tiny / "tokenizer").pad_token_id
    folder = other_decoder(tmp_path / "other", tiny, LlamaConfig, LlamaForCausalLM, pad_token_id=pad)
    want = by_hand(folder, ["", "a fox in the snow"])
    assert not want[0, 0].any()
    mine = Encoder.load(folder, MINE, device="cpu", dtype="float32")
    torch.testing.assert_close(mine.dense(mine.encode(["", "a fox in the snow"]))[0], want, **TOLERANCE)
