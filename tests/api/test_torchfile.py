import io
import zipfile

import numpy as np
import pytest
import torch

from api.pieces import Pieces
from api.rows import ConstantsCache, Padding, prompt_rows, row_tensors
from api.torchfile import write_tensors
from jobs.tensors import DTYPES
from tests.api.predictions import MAX_LENGTH, sample


def saved(given, dtype, padding):
    constants = ConstantsCache().get(given.prediction.constants, "one", dtype)
    pieces = Pieces()
    write_tensors(row_tensors(prompt_rows(given.prediction, constants, dtype, padding), padding), pieces)
    return b"".join(pieces.finish())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [[6], [6, 17, MAX_LENGTH], [9] * 40])
def test_torch_loads_it_with_weights_only(dtype, num_tokens):
    given = sample(num_tokens, dtype=dtype)
    loaded = torch.load(io.BytesIO(saved(given, dtype, Padding.MAX_LENGTH)), weights_only=True)
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.is_contiguous()
    np.testing.assert_array_equal(loaded.float().numpy(), given.dense.astype(np.float32))
    listed = torch.load(io.BytesIO(saved(given, dtype, Padding.NONE)), weights_only=True)
    assert [len(rows) for rows in listed] == num_tokens
    for rows, expected in zip(listed, given.real, strict=True):
        np.testing.assert_array_equal(rows.float().numpy(), expected.astype(np.float32))


def test_torch_maps_it_into_memory(tmp_path):
    given = sample([6, 17])
    path = tmp_path / "embeddings.pt"
    path.write_bytes(saved(given, "float32", Padding.MAX_LENGTH))
    np.testing.assert_array_equal(torch.load(path, weights_only=True, mmap=True), given.dense)


def test_torch_saves_what_it_loaded():
    loaded = torch.load(io.BytesIO(saved(sample([6]), "bfloat16", Padding.MAX_LENGTH)), weights_only=True)
    again = io.BytesIO()
    torch.save(loaded, again)
    again.seek(0)
    assert torch.equal(torch.load(again, weights_only=True), loaded)


def test_the_zip_is_sound_and_not_compressed():
    content = saved(sample([6, 17]), "float32", Padding.NONE)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None  # reads everything, and compares the checksums
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist() == [
            f"archive/{name}" for name in ("data.pkl", "byteorder", "data/0", "data/1", "version")
        ]


def test_the_same_tensors_are_the_same_bytes():
    assert saved(sample([6]), "float32", Padding.NONE) == saved(sample([6]), "float32", Padding.NONE)
