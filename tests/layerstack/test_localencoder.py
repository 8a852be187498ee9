import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from encoder import PRESETS, EncoderConfigError
from jobs.settings import Settings
from layerstack.errors import OfflineError, PromptFileError
from layerstack.localencoder import LocalEncoder, check_prompts, check_settings, device_faults_told, load, read_prompts

TEXTS = ["a fox", "a red hen"]


def test_prompt_files_of_all_kinds_are_read_as_the_api_reads_them(tmp_path):
    contents = {
        "a.txt": b"a fox\na hen\n",
        "a.jsonl": b'"a fox"\n{"prompt": "a hen"}\n',
        "a.csv": b"prompt\na fox\na hen\n",
        "a.txt.gz": gzip.compress(b"a fox\na hen\n"),
        "a.csv.zst": pa.compress(b"prompt\na fox\na hen\n", "zstd", asbytes=True),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"prompt": ["a fox", "a hen"]}), tmp_path / "a.parquet")
    for name in [*contents, "a.parquet"]:
        assert [each.prompt for each in read_prompts(tmp_path / name, Settings())] == ["a fox", "a hen"], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "fine\n" + 30 * "x",
            r"line 2: a prompt has at most 20 characters; got 30 \(LAYERSTACK_PROMPT_MAX_CHARS",
        ),
        ("a.csv", "text\na fox\n", "line 1: the header needs one column 'prompt'"),
        ("a.pdf", "", "not a prompt file, by its name: .txt"),
        ("a.parquet", "nonsense", "not a Parquet file"),
        ("a.txt.gz", "nonsense", "damaged or cut off gzip"),
    ],
)
def test_a_bad_prompt_file_is_told_with_line_value_and_limit(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptFileError, match=message) as told:
        list(read_prompts(tmp_path / name, Settings(prompt_max_chars=20)))
    assert str(told.value).startswith(f"{tmp_path / name}: ")


def test_a_file_without_a_prompt_is_told(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(PromptFileError, match=r"empty\.txt: there is no prompt in it"):
        check_prompts(tmp_path / "empty.txt", Settings())
    (tmp_path / "empty.txt").write_text("\n")  # the empty prompt
    check_prompts(tmp_path / "empty.txt", Settings())


def test_settings_that_no_encoder_has_are_told_before_anything_is_loaded():
    for preset in PRESETS:
        check_settings(Settings(preset=preset, dtype="float16", attention="sdpa"))
    for bad in ({"preset": "flux9"}, {"dtype": "int8"}, {"attention": "x"}):
        with pytest.raises(OfflineError, match=f"cannot be loaded: .*'{next(iter(bad.values()))}'"):
            check_settings(Settings(**bad))


@pytest.mark.parametrize("fault", [RuntimeError, MemoryError, torch.OutOfMemoryError, EncoderConfigError])
def test_a_model_that_cannot_be_loaded_is_told(monkeypatch, fault):
    def fail(_settings):
        raise fault("no room")

    monkeypatch.setattr("worker.model.load_encoder", fail)
    with pytest.raises(OfflineError, match="the encoder cannot be loaded: no room"):
        load(Settings())


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, torch.AcceleratorError, MemoryError])
def test_a_device_that_is_not_up_to_it_is_told_with_what_to_do(fault):
    with pytest.raises(OfflineError, match="the encoder failed: no room; try again"), device_faults_told("try again"):
        raise fault("no room")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), device_faults_told("try again"):
        raise RuntimeError("a bug")


def test_a_few_prompts_are_encoded_as_dense_tensors(encoder, monkeypatch):
    monkeypatch.setattr("worker.model.load_encoder", lambda _settings: encoder)
    local = LocalEncoder(Settings())
    prompt_embeds, ids = local.dense(TEXTS[:2])
    want, want_ids = encoder.dense(encoder.encode(TEXTS[:2]))
    np.testing.assert_array_equal(prompt_embeds, want.numpy())
    np.testing.assert_array_equal(ids, want_ids.numpy())
    assert local.info.fingerprint == encoder.fingerprint
    prompt, length = "a fox", 512
    own = length - len(encoder.tokenizer([prompt])[0].own_ids)
    assert [local.token(prompt, row) for row in (0, own - 1, own, own + 1)] == [
        "padding",
        "prefix",
        "'a'",
        "' fox'",
    ]
    with pytest.raises(OfflineError, match="prompt 1: not valid Unicode"):
        local.dense(["a fox", "\ud800"])
