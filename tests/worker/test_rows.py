import numpy as np
import pytest
import torch

from encoder import PromptError
from worker.rows import describe, encode_each, to_numpy


def test_a_prompt_that_cannot_be_encoded_does_not_touch_the_others(encoder):
    results = encode_each(encoder, ["a", "\ud800", "b", "\udfff", "c"])
    assert [isinstance(result, PromptError) for result in results] == [False, True, False, True, False]
    torch.testing.assert_close(results[4].own_rows, encoder.encode(["c"])[0].own_rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_reach_numpy_unchanged(dtype):
    tensor = torch.randn(3, 4).to(dtype)
    array = to_numpy(tensor)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_the_encoder_is_described_with_what_decides_its_numbers(encoder):
    info = describe(encoder)
    assert (info.layers, info.max_length, info.embed_dim, info.num_prefix_tokens) == ((10, 20, 30), 512, 96, 32)
    assert (info.dtype, info.fingerprint, info.random_weights) == ("float32", encoder.fingerprint, True)
