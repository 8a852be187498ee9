"""Which hidden states are taken, and how a prompt is put in front of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from encoder.errors import EncoderConfigError

# diffusers' `Flux2Pipeline` and Black Forest Labs' own code break the line between "object" and "attribution".
# diffusers' modular `Flux2TextEncoderStep` has a space there, which changes every row.
_FLUX2_SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


@dataclass(frozen=True)
class EncoderConfig:
    """What, besides the weights and the dtype, decides the numbers.

    Attributes:
        name: the preset's name, or one of your own.
        layers: the layers whose outputs are stacked, counted from 1, ascending: `hidden_states[k]` in
            transformers. The last layer of a model cannot be taken.
        max_length: tokens a prompt is truncated and padded to, system message included.
        system_message: the system message of the chat template.
        padding_side: where pad tokens go. Only "left" gives pad rows that no prompt can change.
    """

    name: str
    layers: tuple[int, ...]
    max_length: int
    system_message: str
    padding_side: Literal["left"] = "left"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            EncoderConfigError: a field has a value that makes no sense; the message names both.
        """
        if not self.layers or self.layers[0] < 1 or list(self.layers) != sorted(set(self.layers)):
            raise EncoderConfigError(f"layers must be ascending and start at 1 or later, not {self.layers}")
        if self.max_length < 1:
            raise EncoderConfigError(f"max_length must be at least 1, not {self.max_length}")
        if self.padding_side != "left":
            raise EncoderConfigError(f"padding_side must be 'left', not {self.padding_side!r}")

    @classmethod
    def preset(cls, name: str) -> EncoderConfig:
        """Return the preset called `name`.

        Raises:
            EncoderConfigError: there is no such preset; the message lists those there are.
        """
        try:
            return PRESETS[name]
        except KeyError:
            raise EncoderConfigError(f"no preset {name!r}; there are: {', '.join(sorted(PRESETS))}") from None


_FLUX2_DEV = EncoderConfig(name="flux2-dev", layers=(10, 20, 30), max_length=512, system_message=_FLUX2_SYSTEM_MESSAGE)

PRESETS: dict[str, EncoderConfig] = {
    config.name: config
    for config in (
        _FLUX2_DEV,
        replace(
            _FLUX2_DEV,
            name="flux2-dev-modular",
            system_message=_FLUX2_SYSTEM_MESSAGE.replace("object\nattribution", "object attribution"),
        ),
    )
}
