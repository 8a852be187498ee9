import pytest
import torch

from encoder import CheckpointError, EncoderConfig
from encoder.checkpoint import locate
from encoder.loading import load_layers


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
