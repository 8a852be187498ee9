import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder import CheckpointError, Encoder

PROMPT = ["a fox in the snow"]


@pytest.fixture
def plain(tiny, tmp_path):
    """A copy of the checkpoint as a plain Mistral-3 one: everything in one folder."""
    folder = tmp_path / "plain"
    shutil.copytree(tiny / "text_encoder", folder)
    shutil.copytree(tiny / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def rows(folder):
    return Encoder.load(folder, device="cpu").encode(PROMPT)[0].own_rows


def test_a_plain_checkpoint_gives_the_same_rows(plain, encoder):
    assert torch.equal(rows(plain), encoder.encode(PROMPT)[0].own_rows)


def test_the_text_encoder_folder_alone_finds_the_tokenizer_beside_it(tiny, encoder):
    assert torch.equal(rows(tiny / "text_encoder"), encoder.encode(PROMPT)[0].own_rows)


def test_a_plain_checkpoint_has_the_same_fingerprint(plain, encoder):
    assert Encoder.load(plain, device="cpu").fingerprint == encoder.fingerprint


@pytest.mark.parametrize(
    ("old", "new"), [("model.language_model.", "language_model.model."), ("model.language_model.", "model.")]
)
def test_shards_with_other_published_key_names_give_the_same_rows(plain, encoder, old, new):
    tensors = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    renamed = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    weight_map = {}
    for position, (key, tensor) in enumerate(renamed.items()):
        name = list(shards)[position % 2]
        shards[name][key] = tensor
        weight_map[key] = name
    for name, content in shards.items():
        save_file(content, plain / name)
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(rows(plain), encoder.encode(PROMPT)[0].own_rows)


def test_a_folder_that_is_no_checkpoint_is_an_error_that_names_it_and_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} is no checkpoint: .*config.json"):
        Encoder.load(tmp_path)


def test_a_folder_that_does_not_exist_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"/nowhere: no such folder"):
        Encoder.load(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_had_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"nobody/nothing.*hub"):
        Encoder.load("nobody/nothing")


def test_a_hub_snapshot_in_the_cache_is_loaded_with_its_revision_and_the_same_fingerprint(
    tiny, encoder, tmp_path, monkeypatch
):
    commit = "c" * 40
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = Encoder.load("someone/tiny", device="cpu")
    assert loaded.revision == commit
    assert loaded.fingerprint == encoder.fingerprint


def test_a_preset_refuses_another_family_of_models(plain):
    (plain / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match=r"model_type 'gpt2'; this preset is for mistral3, mistral"):
        Encoder.load(plain)


def test_weights_that_are_missing_are_named(plain):
    tensors = load_file(plain / "model.safetensors")
    del tensors["model.language_model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, plain / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*layers\.3\.mlp\.up_proj"):
        Encoder.load(plain)


def test_a_damaged_weight_file_is_named(plain):
    (plain / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Encoder.load(plain)


@pytest.mark.parametrize(
    ("name", "missing"), [("model.safetensors", "no model.safetensors"), ("tokenizer.json", "tokenizer")]
)
def test_a_missing_file_is_named(plain, name, missing):
    (plain / name).unlink()
    if name.startswith("tokenizer"):
        (plain / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=missing):
        Encoder.load(plain)


def test_a_tokenizer_without_a_chat_template_is_refused(plain):
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat template"):
        Encoder.load(plain)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{nope", "config.json cannot be used"),
        ("tokenizer.json", "{}", "no tokenizer can be loaded"),
        ("chat_template.jinja", "{% for %}", "chat template cannot be used"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "chat template cannot be used"),
        ("model.safetensors.index.json", "{nope", r"index\.json is damaged"),
        ("model.safetensors.index.json", "{}", r"index\.json is damaged"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(plain, name, content, message):
    (plain / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Encoder.load(plain, device="cpu")


def test_a_shard_without_a_tensor_that_is_needed_may_be_missing(plain, encoder):
    tensors = load_file(plain / "model.safetensors")
    needed = {key: t for key, t in tensors.items() if "vision" not in key and "lm_head" not in key}
    save_file(needed, plain / "model.safetensors")
    weight_map = {key: "model.safetensors" if key in needed else "absent.safetensors" for key in tensors}
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(rows(plain), encoder.encode(PROMPT)[0].own_rows)


def test_a_shard_that_is_needed_and_missing_is_named(plain):
    tensors = load_file(plain / "model.safetensors")
    weight_map = {key: "model.safetensors" if "layers.29." not in key else "absent.safetensors" for key in tensors}
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"names files that are missing: \['absent\.safetensors'\]"):
        Encoder.load(plain, device="cpu")


def test_quantized_weights_are_refused_rather_than_misread(plain):
    tensors = load_file(plain / "model.safetensors")
    key = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, plain / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantized, not supported"):
        Encoder.load(plain, device="cpu")
