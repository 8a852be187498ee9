import pytest
import torch
from safetensors.torch import save_file

from encoder import CheckpointError
from encoder.weights import read_tensors, stored_tensors


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (64,), "c": (3, 4, 2), "one": (1,), "none": (0, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder, tensors):
    """One file with all tensors -> where each is."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "all.safetensors")
    return stored_tensors(folder / "all.safetensors", set(tensors))


def empty(tensors, dtype=None):
    return {name: torch.full_like(tensor, torch.nan, dtype=dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("piece", [64, 16 * 2**20])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_each_target_becomes_the_stored_tensor_in_its_own_dtype(tensors, tmp_path, monkeypatch, stored, target, piece):
    monkeypatch.setattr("encoder.weights._PIECE_BYTES", piece)
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    targets = empty(tensors, target)
    read_tensors(write(tmp_path, tensors), targets)
    for name, tensor in tensors.items():
        assert targets[name].dtype == target
        assert torch.equal(targets[name], tensor.to(target))


def test_tensors_of_several_dtypes_and_files_are_read_together(tensors, tmp_path):
    tensors |= {"a": tensors["a"].bfloat16(), "b": tensors["b"].half()}
    stored = {}
    for name, tensor in tensors.items():
        stored |= write(tmp_path / name, {name: tensor})
    targets = empty(tensors)
    read_tensors(stored, targets)
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors.items())


def test_only_the_tensors_asked_for_are_found(tensors, tmp_path):
    write(tmp_path, tensors)
    found = stored_tensors(tmp_path / "all.safetensors", {"b", "c"})
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        "b": ((64,), torch.float32),
        "c": ((3, 4, 2), torch.float32),
    }


def test_a_tensor_that_is_missing_is_named(tensors, tmp_path):
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"all\.safetensors: 2 tensors are missing, among them \['x', 'y'\]"):
        stored_tensors(tmp_path / "all.safetensors", {"a", "x", "y"})


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_a_tensor_in_a_dtype_of_quantized_weights_is_named_if_it_is_asked_for(tensors, tmp_path, dtype, name):
    tensors["b"] = tensors["b"].to(dtype)
    save_file(tensors, tmp_path / "all.safetensors")
    with pytest.raises(CheckpointError, match=f"all.safetensors: tensor 'b' is {name}: quantized, not supported"):
        stored_tensors(tmp_path / "all.safetensors", {"a", "b"})
    assert stored_tensors(tmp_path / "all.safetensors", {"a"})


def test_a_wrong_shape_is_an_error_that_names_the_tensor_and_both_shapes(tensors, tmp_path):
    stored = write(tmp_path, tensors)
    targets = empty(tensors) | {"a": torch.zeros(5, 7)}
    with pytest.raises(
        CheckpointError, match=r"all\.safetensors: tensor 'a' has the shape \[7, 5\], the model needs \[5, 7\]"
    ):
        read_tensors(stored, targets)
    assert targets["b"].isnan().all()  # nothing has been read


def test_a_file_cut_short_is_an_error_that_names_it(tensors, tmp_path):
    write(tmp_path, tensors)
    path = tmp_path / "all.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"all\.safetensors is damaged"):
        stored_tensors(path, {"a"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_cut_short_while_it_is_read_is_an_error_that_names_file_and_tensor(tensors, tmp_path, dtype):
    stored = write(tmp_path, tensors)
    last = max(stored, key=lambda name: (0 not in stored[name].shape, stored[name].offset))
    path = tmp_path / "all.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"all\.safetensors: tensor '{last}' cannot be read: the file ends too early"
    ):
        read_tensors(stored, empty(tensors, dtype))


def test_a_file_that_is_gone_is_an_error_that_names_it(tensors, tmp_path):
    stored = write(tmp_path, tensors)
    (tmp_path / "all.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"all\.safetensors: tensor '\w+' cannot be read"):
        read_tensors(stored, empty(tensors))
    with pytest.raises(CheckpointError, match=r"all\.safetensors is damaged: .*No such file"):
        stored_tensors(tmp_path / "all.safetensors", {"a"})


def test_the_digest_is_the_same_however_the_checkpoint_is_divided_and_whatever_it_is_read_into(
    tensors, tmp_path, monkeypatch
):
    whole = read_tensors(write(tmp_path, tensors), empty(tensors))
    shards = {}
    for name, tensor in reversed(tensors.items()):
        shards |= write(tmp_path / f"shard-{name}", {name: tensor})
    assert read_tensors(shards, empty(tensors)) == whole
    assert read_tensors(shards, empty(tensors, torch.bfloat16)) == whole
    monkeypatch.setattr("encoder.weights._PIECE_BYTES", 64)
    assert read_tensors(shards, empty(tensors)) == whole


def test_the_digest_changes_with_any_value_name_or_dtype(tensors, tmp_path):
    others = {
        "same": tensors,
        "value": tensors | {"c": tensors["c"].index_fill(0, torch.tensor(2), 0.5)},
        "bit": tensors | {"one": torch.nextafter(tensors["one"], torch.tensor(9.0))},
        "swapped": tensors | {"b": tensors["b"].flip(0)},
        "names": {name.replace("one", "uno"): tensor for name, tensor in tensors.items()},
        "dtype": tensors | {"a": tensors["a"].bfloat16()},
        "fewer": {name: tensor for name, tensor in tensors.items() if name != "none"},
    }
    digests = [read_tensors(write(tmp_path / name, some), empty(some)) for name, some in others.items()]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)
