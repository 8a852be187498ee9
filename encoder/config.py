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

    Any decoder of transformers can be used by a config of one's own:

        EncoderConfig("mine", layers=(6, 12), max_length=256)

    Attributes:
        name: the preset's name, or one of your own.
        layers: the layers whose outputs are stacked, counted from 1, ascending: `hidden_states[k]` in
            transformers. The last layer of a model cannot be taken.
        max_length: tokens a prompt is truncated and padded to, template and system message included.
        system_message: the system message of the chat template; None for none.
        chat_template: a Jinja template; None for the tokenizer's own.
        template_options: names and values that the chat template is given.
        content: "parts" hands the template a message as a list of parts, "text" as a string.
        removed_text: taken out of every prompt; "" for nothing.
        padding_side: where pad tokens go. With "left" a pad token attends to nothing, so all pad rows are one
            constant. With "right" they attend to the prompt, and are computed for each.
        model_types: `model_type` of the checkpoints that this is meant for; empty for any.
    """

    name: str
    layers: tuple[int, ...]
    max_length: int
    system_message: str | None = None
    chat_template: str | None = None
    template_options: tuple[tuple[str, bool | str], ...] = ()
    content: Literal["parts", "text"] = "text"
    removed_text: str = ""
    padding_side: Literal["left", "right"] = "left"
    model_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            EncoderConfigError: a field has a value that makes no sense; the message names both.
        """
        if not self.layers or self.layers[0] < 1 or list(self.layers) != sorted(set(self.layers)):
            raise EncoderConfigError(f"layers must be ascending and start at 1 or later, not {self.layers}")
        if self.max_length < 1:
            raise EncoderConfigError(f"max_length must be at least 1, not {self.max_length}")
        if self.padding_side not in {"left", "right"}:
            raise EncoderConfigError(f"padding_side must be 'left' or 'right', not {self.padding_side!r}")
        if self.content not in {"parts", "text"}:
            raise EncoderConfigError(f"content must be 'parts' or 'text', not {self.content!r}")

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


_FLUX2_DEV = EncoderConfig(
    name="flux2-dev",
    layers=(10, 20, 30),
    max_length=512,
    system_message=_FLUX2_SYSTEM_MESSAGE,
    template_options=(("add_generation_prompt", False),),
    content="parts",
    # An image placeholder to Mistral-3; diffusers' `format_input` takes it out of the text as well.
    removed_text="[IMG]",
    model_types=("mistral3", "mistral"),
)
# diffusers' `Flux2KleinPipeline._get_qwen3_prompt_embeds`.
_FLUX2_KLEIN = EncoderConfig(
    name="flux2-klein-4b",
    layers=(9, 18, 27),
    max_length=512,
    # Without thinking, Qwen3's template ends in an empty thinking block.
    template_options=(("add_generation_prompt", True), ("enable_thinking", False)),
    padding_side="right",
    model_types=("qwen3",),
)

PRESETS: dict[str, EncoderConfig] = {
    config.name: config
    for config in (
        _FLUX2_DEV,
        replace(
            _FLUX2_DEV,
            name="flux2-dev-modular",
            system_message=_FLUX2_SYSTEM_MESSAGE.replace("object\nattribution", "object attribution"),
        ),
        _FLUX2_KLEIN,
        replace(_FLUX2_KLEIN, name="flux2-klein-9b"),
    )
}
