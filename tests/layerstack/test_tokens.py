import sys

import pytest

from layerstack.errors import TokensError
from layerstack.tokens import prompt_tokens

LAYERS = (10, 20, 30)


def test_tokens_are_those_of_the_encoder_one_a_row(tiny, encoder):
    prompt = "A fox, [IMG] jumping\n\n\tover 猫 and 🦊 café"
    labels = prompt_tokens(prompt, LAYERS, str(tiny))
    assert len(labels) == len(encoder.encode([prompt])[0].own_rows)
    assert labels[:3] == ["A", "·fox", ","]
    assert labels[-1] == "[/INST]"


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [("a\nb", ["a", "⏎", "b"]), ("\ta", ["⇥a"]), ("猫", ["<E7 8C>", "<AB>"]), ("\x07", ["\\u0007"]), ("café", None)],
)
def test_white_space_is_visible_and_parts_of_a_character_are_bytes(tiny, prompt, labels):
    found = prompt_tokens(prompt, LAYERS, str(tiny))[:-1]
    assert found == labels if labels else "".join(found) == prompt


@pytest.mark.parametrize("model", [None, "demo"])
def test_without_a_model_the_vocabulary_is_that_of_the_demo_encoder(model):
    assert prompt_tokens("a fox", LAYERS, model) == ["a", "·fox", "[/INST]"]


def test_the_layers_tell_the_family(tiny_qwen3):
    labels = prompt_tokens("a fox", (9, 18, 27), str(tiny_qwen3))
    start = labels.index("a")
    assert labels[start : start + 3] == ["a", "·fox", "<|im_end|>"]


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TokensError, match="no-model"):
        prompt_tokens("a", LAYERS, str(tmp_path / "no-model"))


def test_without_the_encoder_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "encoder", None)
    with pytest.raises(TokensError, match=r"pip install 'layerstack\[worker\]'"):
        prompt_tokens("a", LAYERS)
