import pytest
from diffusers.modular_pipelines.flux2.encoders import Flux2TextEncoderStep
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from encoder import PRESETS, EncoderConfig, EncoderConfigError


def test_flux2_dev_has_the_layers_length_and_system_message_of_flux2_pipeline():
    config = EncoderConfig.preset("flux2-dev")
    assert config.layers == (10, 20, 30)
    assert config.max_length == 512
    assert config.system_message == SYSTEM_MESSAGE
    assert "object\nattribution" in config.system_message
    assert config.padding_side == "left"


def test_flux2_dev_modular_has_the_system_message_of_the_modular_step():
    assert EncoderConfig.preset("flux2-dev-modular").system_message == Flux2TextEncoderStep().DEFAULT_SYSTEM_MESSAGE


def test_an_unknown_preset_is_an_error_that_lists_those_there_are():
    with pytest.raises(EncoderConfigError, match=r"'flux3'.*flux2-dev"):
        EncoderConfig.preset("flux3")


def test_every_preset_is_listed_under_its_own_name():
    assert all(name == config.name for name, config in PRESETS.items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", ()),
        ("layers", (0, 10)),
        ("layers", (20, 10)),
        ("layers", (10, 10)),
        ("max_length", 0),
        ("padding_side", "both"),
        ("content", "image"),
    ],
)
def test_a_field_that_makes_no_sense_is_an_error_that_names_it(field, value):
    fields = {"name": "mine", "layers": (10,), "max_length": 512, "system_message": ""} | {field: value}
    with pytest.raises(EncoderConfigError, match=field):
        EncoderConfig(**fields)
