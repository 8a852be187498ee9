"""A prompt's tokens as text, for the labels of a figure. This file reaches the encoder, and only when it is called."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.settings import DEMO_MODEL
from layerstack.errors import TokensError

if TYPE_CHECKING:
    from encoder import EncoderConfig

_SHOWN = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def prompt_tokens(prompt: str, layers: tuple[int, ...], model: str | None = None) -> list[str]:
    """Return what each own row of a prompt stands for, in order, with white space made visible.

    A token that is part of a character, as the bytes of an emoji are, is shown as `<F0 9F>`.

    Args:
        prompt: as it was given.
        layers: of the encoder that made the rows; they tell which family of models it is.
        model: folder or hub id whose tokenizer it is; None or "demo" for the vocabulary of the demo encoder.

    Raises:
        TokensError: the tokenizer cannot be loaded; the message says why.
    """
    try:
        from encoder import EncoderError  # noqa: PLC0415 - torch takes seconds to import, and comes with an extra
        from encoder.prompts import PromptTokenizer  # noqa: PLC0415 - the same
    except ImportError as exc:
        raise TokensError(f"{exc}; tokens as labels need: pip install 'layerstack[worker]'") from exc
    config = _config(layers)
    try:
        tokenizer = _tokenizer(model, config)
        ids = PromptTokenizer(tokenizer, config)([prompt])[0].own_ids
    except EncoderError as exc:
        raise TokensError(str(exc)) from exc
    return [_shown(tokenizer, number) for number in ids]


def _config(layers: tuple[int, ...]) -> EncoderConfig:
    from encoder import PRESETS  # noqa: PLC0415

    # A system message of its own makes another preset, but no other own tokens.
    fitting = [preset for preset in PRESETS.values() if preset.layers == layers]
    return fitting[0] if fitting else PRESETS["flux2-dev"]


def _tokenizer(model: str | None, config: EncoderConfig) -> Any:  # noqa: ANN401 - transformers annotates little of it
    from encoder.checkpoint import locate  # noqa: PLC0415

    if model not in {None, DEMO_MODEL}:
        return locate(str(model)).tokenizer()
    from encoder import tiny  # noqa: PLC0415 - needs the real vocabulary's package

    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        tiny.write(demo, hidden=16, family="qwen3" if "qwen3" in config.model_types else "mistral3")
        return locate(demo).tokenizer()


def _shown(tokenizer: Any, number: int) -> str:  # noqa: ANN401 - the same
    token: str = tokenizer.convert_ids_to_tokens(number)
    if number in tokenizer.all_special_ids or token in tokenizer.added_tokens_encoder:
        return token
    content = _bytes_of(token)
    if content is None:
        return visible(tokenizer.decode([number]))
    try:
        return visible(content.decode())
    except UnicodeDecodeError:
        return f"<{content.hex(' ').upper()}>"


def _bytes_of(token: str) -> bytes | None:
    """Return the bytes that a token of a byte-level vocabulary stands for; None if it is of another kind."""
    byte_of = _byte_of()
    return bytes(byte_of[letter] for letter in token) if all(letter in byte_of for letter in token) else None


@cache
def _byte_of() -> dict[str, int]:
    """Return which byte each letter of a byte-level vocabulary stands for: itself, or the next without a shape."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = sorted(set(range(256)) - plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def visible(text: str) -> str:
    """Return `text` with signs for white space, and escapes for whatever else has no shape."""
    shown = (_SHOWN.get(letter, letter) for letter in text)
    return "".join(letter if letter.isprintable() else escaped(letter) for letter in shown)


def escaped(letter: str) -> str:
    """Return the escape of a character, as in a Python string."""
    number = ord(letter)
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"  # noqa: PLR2004 - what four digits hold
