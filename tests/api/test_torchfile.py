import io

import numpy as np
import pytest
import torch

from api.torchfile import save_tensor
from jobs.tensors import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 512, 96), (0, 4), (1,)])
def test_torch_loads_it_with_weights_only(dtype, shape):
    tensor = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[dtype])
    loaded = torch.load(io.BytesIO(save_tensor(tensor)), weights_only=True)
    assert loaded.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(loaded.float().numpy(), tensor.astype(np.float32))


def test_an_array_that_is_not_contiguous_is_saved_in_its_order():
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(torch.load(io.BytesIO(save_tensor(transposed)), weights_only=True), transposed)
