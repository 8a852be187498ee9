import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from encoder import PRESETS, CheckpointError, Encoder, EncoderConfig, EncoderConfigError
from encoder import tiny as tiny_module
from encoder.checkpoint import locate
from encoder.loading import load_layers

COMMIT = "c" * 40
PROMPTS = ["a fox in the snow", ""]
MB = 10**6


def load(folder, *layers, dtype=torch.float32, **options):
    config = EncoderConfig("mine", layers or (10, 20, 30), 512)
    return load_layers(locate(folder), config, device=torch.device("cpu"), dtype=dtype, **options)


def test_only_the_layers_asked_for_are_loaded_without_norm_and_head(tiny):
    module, _ = load(tiny, dtype=torch.bfloat16)
    names = [name for name, _ in module.named_parameters()]
    assert len(module.layers) == 30
    assert not [name for name in names if name.startswith("norm") or "lm_head" in name]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_last_layer_cannot_be_taken(tiny):
    with pytest.raises(CheckpointError, match="layer 40 is asked for; the model has 40"):
        load(tiny, 40)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A checkpoint of 40 layers and half a gigabyte."""
    folder = tmp_path_factory.mktemp("larger") / "larger"
    tiny_module.write(folder, hidden=256)
    yield folder
    shutil.rmtree(folder)


# Loads a small checkpoint first, so that what is measured is neither imports nor pools. `VmHWM` is the peak of this
# process alone: `ru_maxrss` begins with that of the process that started it.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from encoder import PRESETS
from encoder.checkpoint import locate
from encoder.loading import load_layers

warm_up, folder, dtype = sys.argv[1:]

def proc(file, name):
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

def load(folder):
    return load_layers(
        locate(folder), PRESETS["flux2-dev"], device=torch.device("cpu"), dtype=getattr(torch, dtype)
    )[0]

load(warm_up)
resident, read = proc("status", "VmRSS"), proc("io", "rchar")
module = load(folder)
peak, read = proc("status", "VmHWM"), proc("io", "rchar") - read
kept = list(module.parameters())
print(json.dumps({
    "read": read,
    "values": sum(parameter.numel() for parameter in kept),
    "kept": sum(parameter.numel() * parameter.element_size() for parameter in kept),
    "grown": (peak - resident) * 1024,
}))
"""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def measured(request, tiny, larger):
    """What loading costs a process of its own, in bytes."""
    command = [sys.executable, "-c", MEASURE, str(tiny), str(larger), request.param]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def needed(folder):
    """The stored tensors of the embedding and the first 30 layers."""
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    names = ["embed_tokens", *(f"layers.{n}" for n in range(30))]
    return [tensor for key, tensor in tensors.items() for name in names if f"language_model.{name}." in key]


def test_exactly_the_bytes_of_the_embedding_and_the_layers_asked_for_are_read(measured, larger):
    tensors = needed(larger)
    stored = sum(tensor.nbytes for tensor in tensors)
    assert measured["values"] == sum(tensor.numel() for tensor in tensors)
    assert stored <= measured["read"] <= stored + 5 * MB
    assert stored < 0.7 * (larger / "text_encoder" / "model.safetensors").stat().st_size


def test_memory_never_holds_much_more_than_what_is_kept(measured):
    in_place = measured["kept"] == 4 * measured["values"]
    pieces = 0 if in_place else 64 * MB  # four threads with a piece each of another dtype, however large the model
    assert 0.8 * measured["kept"] < measured["grown"] < 1.15 * measured["kept"] + pieces


MODULES = ["embed_tokens", "layers", "norm", "rotary_emb"]
DEVICE_MAPS = {
    "whole": {"": "cpu"},
    "modules": dict.fromkeys(MODULES, "cpu"),
    "layers": dict.fromkeys(["embed_tokens", *(f"layers.{n}" for n in range(10)), "rotary_emb"], torch.device("cpu")),
    "auto": "auto",
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS.keys())
def test_a_device_map_gives_the_same_rows(tiny, encoder, device_map):
    mine = Encoder.load(tiny, replace(encoder.config, layers=(10,)), dtype="float32", device_map=device_map)
    assert mine.device == torch.device("cpu")
    for one, other in zip(mine.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        torch.testing.assert_close(one.own_rows, other.own_rows[:, :32])  # of layers 10, 20 and 30


def test_a_device_map_that_is_neither_auto_nor_a_mapping_is_an_error_that_says_so(tiny):
    with pytest.raises(EncoderConfigError, match=r"device_map must be 'auto' or a mapping .*, not 'nonsense'"):
        Encoder.load(tiny, device_map="nonsense")


@pytest.mark.parametrize(
    ("modules", "missing"),
    [
        (["layers", "norm", "rotary_emb"], r"embed_tokens\.weight"),
        (["embed_tokens", "norm", "rotary_emb"], r"layers\.0\."),
        (["embed_tokens", "layers.0", "layers.1", "layers.10"], r"layers\.2\."),
    ],
)
def test_a_device_map_that_misses_a_module_is_an_error_that_names_it(tiny, modules, missing):
    with pytest.raises(EncoderConfigError, match=f"device_map names no device for '{missing}"):
        load(tiny, device_map=dict.fromkeys(modules, "cpu"))


@pytest.mark.parametrize("device", ["gpu9", "disk", "cuda:0"])
def test_a_device_map_with_a_device_that_cannot_be_used_is_an_error_that_names_it(tiny, device):
    if device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("this machine has that device")
    with pytest.raises(EncoderConfigError, match=device):
        load(tiny, device_map={"": device})


def with_config(folder, checkpoint, **fields):
    """A checkpoint with other fields in its language model's configuration."""
    folder.mkdir()
    shutil.copytree(checkpoint / "tokenizer", folder / "tokenizer")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "model.safetensors").symlink_to(checkpoint / "text_encoder" / "model.safetensors")
    config = json.loads((checkpoint / "text_encoder" / "config.json").read_text())
    config.get("text_config", config).update(fields)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    return folder


def test_a_sliding_window_shorter_than_the_length_is_refused(tiny, tmp_path):
    folder = with_config(tmp_path / "windowed", tiny, sliding_window=511)
    with pytest.raises(CheckpointError, match="sliding window of 511 tokens, shorter than max_length 512"):
        load(folder)


def test_a_sliding_window_that_no_prompt_is_longer_than_changes_nothing(tiny, tmp_path, encoder):
    folder = with_config(tmp_path / "windowed", tiny, sliding_window=512)
    mine = Encoder.load(folder, device="cpu", dtype="float32")
    prompts = [*PROMPTS, "word " * 600]
    for one, other in zip(mine.encode(prompts), encoder.encode(prompts), strict=True):
        torch.testing.assert_close(one.own_rows, other.own_rows)


@pytest.mark.parametrize(("used", "refused"), [(True, True), (False, False)])
def test_a_sliding_window_counts_only_if_the_model_uses_it(tiny_qwen3, tmp_path, used, refused):
    fields = {"use_sliding_window": used, "sliding_window": 128, "max_window_layers": 0, "layer_types": None}
    folder = with_config(tmp_path / "windowed", tiny_qwen3, **fields)
    if refused:
        with pytest.raises(CheckpointError, match="sliding window of 128 tokens"):
            load(folder)
    else:
        assert len(load(folder)[0].layers) == 30


@pytest.mark.parametrize("subfolder", ["text_encoder", ""])
def test_a_model_is_found_in_a_subfolder_of_a_local_folder(tiny, encoder, subfolder):
    mine = Encoder.load(tiny.parent, subfolder=f"{tiny.name}/{subfolder}".rstrip("/"), device="cpu", dtype="float32")
    assert mine.fingerprint == encoder.fingerprint
    for one, other in zip(mine.encode(PROMPTS), encoder.encode(PROMPTS), strict=True):
        assert torch.equal(one.own_rows, other.own_rows)


def test_a_subfolder_that_does_not_exist_is_an_error_that_names_it(tiny):
    with pytest.raises(CheckpointError, match="/tiny/nowhere is no checkpoint"):
        Encoder.load(tiny, subfolder="nowhere")


class Hub:
    """A repository with weights in three shards, and a cache that gets from it only what is asked for."""

    def __init__(self, source, cache):
        self.source, self.snapshot = source, cache / "models--someone--tiny" / "snapshots" / COMMIT
        self.calls = []
        self.fault = None

    def snapshot_download(self, repository, *, revision, allow_patterns):
        self.calls.append((repository, revision, allow_patterns))
        if self.fault is not None and any("safetensors" in pattern for pattern in allow_patterns):
            raise self.fault
        names = [path.relative_to(self.source).as_posix() for path in self.source.rglob("*") if path.is_file()]
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / name, self.snapshot / name)
        return str(self.snapshot)

    def shards(self):
        return sorted(path.name for path in self.snapshot.rglob("*.safetensors"))


SHARDS = {
    "1.safetensors": ["embed_tokens", *(f"layers.{n}" for n in range(15))],
    "2.safetensors": [f"layers.{n}" for n in range(15, 30)],
    "3.safetensors": [],  # the rest: layers 30 to 39, norm, head and vision
}


@pytest.fixture(params=["text_encoder", "."], ids=["FLUX.2", "plain"])
def hub(request, tiny, tmp_path, monkeypatch):
    model = tmp_path / "source" / request.param
    shutil.copytree(tiny / "tokenizer", tmp_path / "source" / request.param.replace("text_encoder", "tokenizer"))
    model.mkdir(exist_ok=True)
    shutil.copyfile(tiny / "text_encoder" / "config.json", model / "config.json")
    tensors = load_file(tiny / "text_encoder" / "model.safetensors")
    weight_map = {}
    for key in tensors:
        holds = (shard for shard, names in SHARDS.items() if any(f"language_model.{name}." in key for name in names))
        weight_map[key] = next(holds, "3.safetensors")
    for shard in SHARDS:
        save_file({key: tensors[key] for key, name in weight_map.items() if name == shard}, model / shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "source" / "flux2-dev.safetensors").write_bytes(b"the image model")
    found = Hub(tmp_path / "source", tmp_path / "cache")
    monkeypatch.setattr("encoder.checkpoint.snapshot_download", found.snapshot_download)
    return found


def test_of_a_hub_id_only_the_shards_that_are_needed_are_downloaded(hub, encoder):
    mine = Encoder.load("someone/tiny", device="cpu", dtype="float32", revision="a-branch")
    assert (mine.model, mine.revision) == ("someone/tiny", COMMIT)
    assert mine.fingerprint == encoder.fingerprint
    assert torch.equal(mine.encode(PROMPTS)[0].own_rows, encoder.encode(PROMPTS)[0].own_rows)
    assert hub.shards() == ["1.safetensors", "2.safetensors"]
    of_files, of_shards = hub.calls[:-1], hub.calls[-1]
    assert {(repository, revision) for repository, revision, _ in of_files} == {("someone/tiny", "a-branch")}
    assert not any("safetensors" in pattern and "index" not in pattern for *_, ps in of_files for pattern in ps)
    assert of_shards[:2] == ("someone/tiny", COMMIT)
    assert len(of_shards[2]) == 2


def test_fewer_layers_need_fewer_shards(hub):
    load("someone/tiny", 3, 14)
    assert hub.shards() == ["1.safetensors"]
    load("someone/tiny", 3, 31)
    assert hub.shards() == list(SHARDS)


def test_shards_in_the_cache_are_not_asked_for_again(hub):
    load("someone/tiny")
    calls = len(hub.calls)
    load("someone/tiny")
    again = [pattern for *_, patterns in hub.calls[calls:] for pattern in patterns]
    assert again
    assert not any(pattern.endswith(".safetensors") for pattern in again)


def test_weights_in_one_file_are_downloaded_too(hub, tiny):
    (model,) = (path.parent for path in hub.source.rglob("*.index.json"))
    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        path.unlink()
    shutil.copyfile(tiny / "text_encoder" / "model.safetensors", model / "model.safetensors")
    _, digest = load("someone/tiny")
    assert digest == load(tiny)[1]
    assert hub.shards() == ["model.safetensors"]


def test_a_shard_that_the_hub_does_not_give_is_an_error_that_names_the_id(hub):
    hub.fault = LocalEntryNotFoundError("no network")
    with pytest.raises(CheckpointError, match=r"someone/tiny: .*no network"):
        load("someone/tiny")


@pytest.mark.parametrize("hub", ["text_encoder"], indirect=True)
def test_the_shards_of_a_subfolder_of_a_hub_id_are_downloaded(hub, tiny):
    checkpoint = locate("someone/tiny", subfolder="text_encoder")
    assert checkpoint.tokenizer_dir == hub.snapshot / "tokenizer"
    _, digest = load_layers(checkpoint, PRESETS["flux2-dev"], device=torch.device("cpu"), dtype=torch.float32)
    assert digest == load(tiny)[1]
    assert hub.shards() == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize("hub", ["text_encoder"], indirect=True)
@pytest.mark.parametrize("subfolder", ["deep", "deep/text_encoder"])
def test_a_subfolder_of_a_hub_id_is_found_as_that_of_a_local_folder(hub, tmp_path, subfolder):
    outer = tmp_path / "outer"
    outer.mkdir()
    hub.source.rename(outer / "deep")
    hub.source = outer
    local, ours = (locate(model, subfolder=subfolder) for model in (outer, "someone/tiny"))
    assert local.tokenizer_dir == outer / "deep" / "tokenizer"
    assert ours.tokenizer_dir == hub.snapshot / "deep" / "tokenizer"
    assert ours.model_dir == hub.snapshot / "deep" / "text_encoder"


def test_a_device_and_a_device_map_exclude_each_other(tiny):
    with pytest.raises(EncoderConfigError, match="device 'cpu' and device_map 'auto' are both given"):
        Encoder.load(tiny, device="cpu", device_map="auto")
