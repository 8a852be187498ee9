import threading
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2Pipeline

from encoder import Encoder, EncoderConfig, EncoderConfigError, PromptError

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
