import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load as torch_load

from encoder.encoding import Encoding
from encoder.encoding import dense_rows as torch_dense_rows
from jobs.errors import TensorFormatError
from jobs.tensors import DTYPES, dense_rows, dtype_name, load_tensors, safetensors_header, save_tensors, text_ids


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_safetensors_come_back_and_torch_reads_them(dtype):
    tensor = np.arange(12).reshape(3, 4).astype(dtype)
    content = save_tensors({"a": tensor, "b": np.array([True, False])}, {"k": "v"})
    tensors, metadata = load_tensors(content)
    assert metadata == {"k": "v"}
    assert tensors["a"].dtype == dtype
    np.testing.assert_array_equal(tensors["a"], tensor)
    np.testing.assert_array_equal(torch_load(content)["a"].float().numpy(), tensor.astype(np.float32))


def test_an_array_that_is_not_contiguous_is_saved_in_its_order():
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(load_tensors(save_tensors({"a": transposed}))[0]["a"], transposed)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\xff" * 64, save_tensors({"a": np.zeros(2, np.uint8)})])
def test_bytes_that_we_did_not_write_are_an_error(content):
    with pytest.raises(TensorFormatError):
        load_tensors(content)


@pytest.mark.parametrize("metadata", [None, {"a name": "ä value"}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "int64", "bool"])
def test_a_header_and_the_bytes_behind_it_are_a_safetensors_file(dtype, metadata):
    tensors = {"a": np.arange(6).reshape(2, 3).astype(dtype), "ß": np.ones((0, 4), dtype), "c": np.ones((), dtype)}
    header = safetensors_header([(name, t.dtype.name, t.shape) for name, t in tensors.items()], metadata)
    content = header + b"".join(t.tobytes() for t in tensors.values())
    assert len(header) % 8 == 0
    loaded, told = load_tensors(content)
    assert told == (metadata or {})
    for name, tensor in torch_load(content).items():
        assert tensor.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(tensor.float().numpy(), tensors[name].astype(np.float32))
        np.testing.assert_array_equal(loaded[name], tensors[name])
    assert len(loaded) == 3


def test_the_dtype_of_rows_has_a_name_and_no_other_has():
    assert dtype_name(np.zeros(1, ml_dtypes.bfloat16)) == "bfloat16"
    with pytest.raises(TensorFormatError, match="float64"):
        dtype_name(np.zeros(1))


@pytest.mark.parametrize("own", [1, 5, 14])
def test_dense_rows_are_pad_prefix_and_own_rows_as_the_encoder_puts_them(own):
    rng = np.random.default_rng(0)
    own_rows, prefix_rows, pad_row = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((own, 4), (2, 4), (4,))
    )
    got = dense_rows(own_rows, prefix_rows=prefix_rows, pad_row=pad_row, max_length=16)
    want = torch_dense_rows(
        [Encoding(torch.from_numpy(own_rows), own + 2, truncated=False)],
        pad_row=torch.from_numpy(pad_row),
        prefix_rows=torch.from_numpy(prefix_rows),
        max_length=16,
    )
    np.testing.assert_array_equal(got, want[0].numpy())


def test_dense_rows_keep_bfloat16():
    zeros = np.zeros((1, 4), ml_dtypes.bfloat16)
    assert dense_rows(zeros, prefix_rows=zeros, pad_row=zeros[0], max_length=3).dtype == ml_dtypes.bfloat16


def test_text_ids_count_in_the_last_column():
    assert text_ids(3, 5).tolist() == [[0, 0, 0, 3], [0, 0, 0, 4]]
