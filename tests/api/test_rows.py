import numpy as np
import orjson
import pytest

from api.rows import ConstantsCache, Padding, json_rows, prompt_rows, row_tensors
from tests.api.predictions import MAX_LENGTH, PREFIX_ROWS, sample


def test_constants_are_made_once_for_each_dtype():
    prediction, cache = sample([6]).prediction, ConstantsCache()
    first = cache.get(prediction.constants, "one", "float32")
    assert cache.get(prediction.constants, "one", "float32") is first
    assert cache.get(prediction.constants, "one", "bfloat16") is not first
    assert cache.get(prediction.constants, "two", "float32") is not first


def test_constants_that_were_not_used_for_long_are_forgotten():
    prediction, cache = sample([6]).prediction, ConstantsCache()
    used, unused = (cache.get(prediction.constants, name, "float32") for name in ("used", "unused"))
    for number in range(5):
        cache.get(prediction.constants, str(number), "float32")
        assert cache.get(prediction.constants, "used", "float32") is used
    assert cache.get(prediction.constants, "unused", "float32") is not unused


@pytest.mark.parametrize("right_padded", [False, True])
def test_rows_of_a_prompt_are_counted_and_placed(right_padded):
    given = sample([9, MAX_LENGTH], right_padded=right_padded)
    constants = ConstantsCache().get(given.prediction.constants, "one", "float32")
    padded, real = (prompt_rows(given.prediction, constants, "float32", each) for each in Padding)
    assert [prompt.shape for prompt in padded] == [(MAX_LENGTH, 9)] * 2
    assert [prompt.start for prompt in padded] == [0, 0]
    assert [prompt.shape for prompt in real] == [(9, 9), (MAX_LENGTH, 9)]
    assert [prompt.start for prompt in real] == given.starts
    assert [tensor.shape for tensor in row_tensors(padded, Padding.MAX_LENGTH)] == [[2, MAX_LENGTH, 9]]
    assert [tensor.shape for tensor in row_tensors(real, Padding.NONE)] == [[9, 9], [MAX_LENGTH, 9]]


def test_own_rows_are_not_copied():
    given = sample([9])
    constants = ConstantsCache().get(given.prediction.constants, "one", "float32")
    (prompt,) = prompt_rows(given.prediction, constants, "float32", Padding.MAX_LENGTH)
    assert np.shares_memory(prompt.own_rows, given.prediction.own_rows[0])


def test_a_tensor_says_how_long_its_bytes_are():
    given = sample([9, 20], dtype="bfloat16")
    constants = ConstantsCache().get(given.prediction.constants, "one", "bfloat16")
    for padding in Padding:
        for tensor in row_tensors(prompt_rows(given.prediction, constants, "bfloat16", padding), padding):
            assert sum(map(len, tensor.runs())) == tensor.nbytes


@pytest.mark.parametrize("count", [0, 1, PREFIX_ROWS, 9])
def test_the_json_of_wide_rows_comes_in_blocks(count):
    rows = np.random.default_rng(0).standard_normal((count, 30_000)).astype(np.float32)
    blocks = list(json_rows(rows))
    assert len(blocks) == -(-count // 2)
    np.testing.assert_array_equal(
        np.array(orjson.loads(b"[" + b"".join(blocks)[:-1] + b"]"), dtype=np.float32).reshape(rows.shape), rows
    )


def test_the_longest_numbers_still_make_no_text_longer_than_a_piece():
    rows = np.full((8, 2**15), np.float32(-1.1754944e-38))
    assert max(map(len, json_rows(rows))) <= 2**20
