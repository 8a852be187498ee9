from typing import get_args

from encoder import PRESETS
from encoder.encoder import Attention
from layerstack.cli.encoderoptions import AttentionName, PresetName


def test_the_choices_are_those_of_the_encoder():
    assert set(get_args(PresetName)) == set(PRESETS)
    assert get_args(AttentionName) == get_args(Attention)
