import filecmp
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

from encoder import tiny as tiny_module


def test_the_published_loaders_of_transformers_read_it(tiny):
    model = Mistral3ForConditionalGeneration.from_pretrained(tiny / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer")
    assert model.config.text_config.num_hidden_layers == 40
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.text_config.vocab_size == 131072
    assert tokenizer.padding_side == "left"


def test_loading_it_finds_every_weight(tiny):
    _, report = Mistral3ForConditionalGeneration.from_pretrained(tiny / "text_encoder", output_loading_info=True)
    assert not any(report.values()), report


def test_the_command_writes_the_same_bytes_every_time(tiny, tmp_path):
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-m", "encoder.tiny", str(again), "--hidden", "32"], check=True)
    for part in ("text_encoder", "tokenizer"):
        names = [path.name for path in (tiny / part).iterdir()]
        assert filecmp.cmpfiles(tiny / part, again / part, names, shallow=False) == (names, [], [])


def test_a_folder_that_exists_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        tiny_module.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hidden_size_that_heads_cannot_share_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="multiple of 16, not 30"):
        tiny_module.write(tmp_path / "x", hidden=30)
