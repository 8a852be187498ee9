import numpy as np
import pytest

from encoder import Encoder, selfcheck
from jobs.tensors import DTYPES
from layerstack.verification import PROMPTS, TOLERANCE, Comparison, layer_errors
from worker.rows import to_numpy

LAYERS = (10, 20, 30)


@pytest.fixture
def here():
    return np.random.default_rng(0).standard_normal((3, 16, 24), dtype=np.float32)


def ids(prompt_embeds):
    found = np.zeros((*prompt_embeds.shape[:2], 4), np.int64)
    found[..., 3] = np.arange(prompt_embeds.shape[1])
    return found


def compared(here, there, here_ids=None, there_ids=None, prompts=("a fox", "a hen", "an owl")):
    comparison = Comparison(LAYERS, "float32")
    comparison.add(
        prompts,
        (here, ids(here) if here_ids is None else here_ids),
        (there, ids(there) if there_ids is None else there_ids),
    )
    return comparison


def test_the_same_tensors_are_the_same(here):
    comparison = compared(here, here.copy())
    assert comparison.differences == []
    assert comparison.rows == 48
    assert [(each.layer, each.absolute, each.relative) for each in comparison.layers] == [(n, 0, 0) for n in LAYERS]


def test_what_the_row_is_of_is_told_if_somebody_knows(here):
    comparison, there = Comparison(LAYERS, "float32", lambda prompt, row: f"{prompt}/{row}"), here.copy()
    there[2, 3, 0] += 1
    comparison.add(["a", "b", "c"], (here, ids(here)), (there, ids(here)))
    assert "of prompt 2 'c', row 3 (c/3); largest" in comparison.differences[0]
    assert "c/3" in comparison.summary()["layers"][0].values()


def test_rounding_is_no_difference(here):
    comparison = compared(here, here * np.float32(1 + 5e-6))
    assert comparison.differences == []
    assert all(0 < each.relative < 1e-5 for each in comparison.layers)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_few_huge_values_excuse_no_error_in_the_others(dtype):
    rng = np.random.default_rng(1)
    here = rng.standard_normal((1, 4, 15360), dtype=np.float32)
    here[..., 7::5120], here[..., 99::5120] = 300, -200
    noise = 0.4 * rng.standard_normal(here.shape, dtype=np.float32)
    noise[..., 7::5120], noise[..., 99::5120] = 0, 0
    assert np.linalg.norm(noise) < 0.1 * np.linalg.norm(here)  # which a norm would take for little
    comparison = Comparison(LAYERS, dtype)
    comparison.add(["a fox"], (here, ids(here)), (here + noise, ids(here)))
    assert [each.wrong_rows for each in comparison.layers] == [4, 4, 4]
    rounded = here.astype(DTYPES["bfloat16"]).astype(np.float32)
    assert all(each.relative < 0.01 for each in layer_errors(here, rounded, LAYERS, 0.1))


def test_the_tolerances_are_those_of_the_encoders_own_check():
    assert {str(dtype).removeprefix("torch."): bound for dtype, bound in selfcheck._TOLERANCE.items()} == TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_same_model_in_another_dtype_and_another_batch_is_far_below_the_tolerance(tiny, encoder, dtype):
    in_16_bits = Encoder.load(tiny, device="cpu", dtype=dtype)
    here, _ = encoder.dense([encoder.encode([prompt])[0] for prompt in PROMPTS])
    there, _ = in_16_bits.dense(in_16_bits.encode(PROMPTS))
    found = layer_errors(to_numpy(here), to_numpy(there), encoder.config.layers, TOLERANCE[dtype])
    assert all(0 < each.relative < TOLERANCE[dtype] / 3 for each in found)


def test_the_first_layer_that_differs_is_named_with_error_prompt_and_row(here):
    there = here.copy()
    there[1, 7, 8:] += 0.5  # layers 20 and 30
    comparison = compared(here, there)
    (told,) = comparison.differences
    assert told.startswith("layer 20 differs: relative error ")
    assert "of prompt 1 'a hen', row 7; largest absolute error 0.5; 1 of 48 rows" in told
    assert [each.wrong_rows for each in comparison.layers] == [0, 1, 1]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("both", [True, False])
def test_what_is_no_number_differs_even_from_itself(here, wrong, both):
    there = here.copy()
    there[2, 3, 20] = wrong
    comparison = compared(there if both else here, there)
    assert comparison.differences[0].startswith("layer 30 differs")
    assert (comparison.layers[2].prompt, comparison.layers[2].row) == (2, 3)
    assert comparison.summary()["layers"][2]["max_relative_error"] is None


def test_a_slice_of_zeros_is_like_itself_and_like_nothing_else(here):
    here[0, 0, :8] = 0
    assert compared(here, here.copy()).differences == []
    there = here.copy()
    there[0, 0, 0] = 1e-9
    assert compared(here, there).differences[0].startswith("layer 10 differs")


def test_another_shape_is_told_and_not_compared(here):
    comparison = compared(here, here[:, :, :12], there_ids=ids(here))
    assert comparison.differences == ["prompt_embeds differ: (3, 16, 12) there, (3, 16, 24) here"]
    assert comparison.layers == []


def test_other_text_ids_are_told(here):
    wrong = ids(here)
    wrong[1, 4, 3] = 99
    assert compared(here, here, there_ids=wrong).differences == [
        "text_ids differ: row 4 is [0, 0, 0, 99] there, [0, 0, 0, 4] here"
    ]
    assert compared(here, here, there_ids=wrong[:, :2]).differences == [
        "text_ids differ: (3, 2, 4) there, (3, 16, 4) here"
    ]


def test_what_comes_later_is_added_up_and_prompts_are_counted_on(here):
    comparison, there = compared(here, here * np.float32(1 + 1e-6)), here.copy()
    there[2, 5, 0] += 1
    comparison.add(["x", "y", "z"], (here, ids(here)), (there, ids(here)))
    assert comparison.rows == 96
    assert "of prompt 5 'z', row 5" in comparison.differences[0]
    assert comparison.layers[1].relative > 0


def test_anything_else_that_differs_is_told_once(here):
    comparison = compared(here, here)
    for _ in range(2):
        comparison.expect("fingerprint", "aaaa", "bbbb")
    comparison.expect("layers", LAYERS, LAYERS)
    assert comparison.differences == ["fingerprint differs: bbbb there, aaaa here"]
    assert comparison.summary()["same"] is False


def test_sixteen_bits_are_allowed_more(here):
    there = here * np.float32(1.01)
    assert layer_errors(here, there, LAYERS, 1e-4)[0].wrong_rows == 48
    comparison = Comparison(LAYERS, "bfloat16")
    comparison.add(["a", "b", "c"], (here, ids(here)), (there, ids(here)))
    assert comparison.differences == []


def test_the_prompts_of_its_own_are_empty_long_and_of_many_scripts(encoder):
    encodings = dict(zip(PROMPTS, encoder.encode(PROMPTS), strict=True))
    assert "" in encodings
    assert [encoding.truncated for encoding in encodings.values()] == [False] * 5 + [True]
    assert any(not prompt.isascii() for prompt in PROMPTS)
