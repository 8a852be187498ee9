import numpy as np
import pytest
import torch

from worker.rows import describe, to_numpy


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
