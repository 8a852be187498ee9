"""From prompts to token ids: the chat template, truncation, and the prefix that all prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from encoder.config import EncoderConfig
from encoder.errors import CheckpointError, EncoderConfigError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts that begin with different tokens: what their templated forms share is what every prompt shares.
_PROBES = ("", "a", "Zebra", "7", " ", "\n", "é", "猫")


@dataclass(frozen=True)
class TokenizedPrompt:
    """What is left of a prompt for the model to do.

    Attributes:
        own_ids: token ids behind the prefix that all prompts share; the prefix and these are at most `max_length`.
        num_tokens: tokens of the templated prompt within `max_length`, prefix included.
        truncated: whether the prompt was cut to `max_length`.
    """

    own_ids: list[int]
    num_tokens: int
    truncated: bool


class PromptTokenizer:
    """Puts prompts through the chat template and the tokenizer exactly as diffusers does.

    Thread-safe: tokenizing changes no state, and runs outside the interpreter's lock for most of its time.

    Attributes:
        prefix_ids: token ids that come first in every prompt: the system message and what surrounds it.
        pad_token_id: token id of the padding.
        chat_template: the Jinja template in use.

    Raises:
        CheckpointError: the chat template fails, or the tokenizer cuts at the left, where the system message is.
        EncoderConfigError: `max_length` leaves no room behind the prefix.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EncoderConfig) -> None:
        if tokenizer.truncation_side != "right":
            raise CheckpointError(f"the tokenizer truncates at the {tokenizer.truncation_side}, not at the right")
        template = config.chat_template or tokenizer.chat_template
        if template is None:
            raise CheckpointError("the tokenizer has no chat template (chat_template.jinja)")
        self._tokenizer: Any = tokenizer  # annotated neither for lists of parts nor for what `return_dict` returns
        self._config = config
        self.pad_token_id: int = tokenizer.pad_token_id
        self.chat_template: str = template
        try:
            self.prefix_ids: list[int] = _shared_start(self._templated_ids(_PROBES))
        except Exception as exc:  # a template is a program, and fails as it likes
            raise CheckpointError(f"the chat template cannot be used: {type(exc).__name__}: {exc}") from exc
        if len(self.prefix_ids) >= config.max_length:
            raise EncoderConfigError(
                f"max_length {config.max_length} leaves no room for a prompt: "
                f"the system message alone takes {len(self.prefix_ids)} tokens"
            )

    def __call__(self, prompts: Sequence[str]) -> list[TokenizedPrompt]:
        """Tokenize `prompts`.

        Raises:
            TypeError: `prompts` is one string.
            PromptError: one of them cannot be encoded; it names the first such.
        """
        results = self.each(prompts)
        for result in results:
            if isinstance(result, PromptError):
                raise result
        return [result for result in results if isinstance(result, TokenizedPrompt)]

    def each(self, prompts: Sequence[str]) -> list[TokenizedPrompt | PromptError]:
        """Tokenize `prompts`; one that cannot be gives its error, and does not touch the others.

        Raises:
            TypeError: `prompts` is one string.
        """
        if isinstance(prompts, str):
            raise TypeError("expected a list of prompts, got one string")
        faults = {position: fault for position, prompt in enumerate(prompts) if (fault := _fault(position, prompt))}
        sound = [prompt for position, prompt in enumerate(prompts) if position not in faults]
        templated = iter(self._templated_ids(sound) if sound else [])
        return [
            faults.get(position) or self._without_prefix(position, next(templated)) for position in range(len(prompts))
        ]

    def text(self, token_id: int) -> str:
        """Return what a token stands for; of one that is part of a character, a sign for that."""
        text: str = self._tokenizer.decode([token_id])
        return text

    def _without_prefix(self, position: int, ids: list[int]) -> TokenizedPrompt | PromptError:
        limit, prefix_length = self._config.max_length, len(self.prefix_ids)
        if ids[:prefix_length] != self.prefix_ids:
            # Only with a template that does not end its prefix in a special token, which no preset's does.
            return PromptError(position, "its beginning merges with the chat template's text in front of it")
        if not ids:
            return PromptError(position, "it has no tokens")
        own_ids = ids[prefix_length:limit]
        return TokenizedPrompt(own_ids, prefix_length + len(own_ids), truncated=len(ids) > limit)

    def _templated_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Render and tokenize all of `prompts` in one call, without truncation or padding."""
        ids: list[list[int]] = self._tokenizer.apply_chat_template(
            [self._messages(prompt) for prompt in prompts],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            **dict(self._config.template_options),
        )["input_ids"]
        return ids

    def _messages(self, prompt: str) -> list[dict[str, Any]]:
        config = self._config
        user = prompt.replace(config.removed_text, "") if config.removed_text else prompt
        texts = {"system": config.system_message, "user": user}
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if config.content == "parts" else text}
            for role, text in texts.items()
            if text is not None
        ]


def _fault(position: int, prompt: object) -> PromptError | None:
    if not isinstance(prompt, str):
        return PromptError(position, f"expected a string, got {type(prompt).__name__}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as exc:
        return PromptError(position, f"not valid Unicode: {exc}")
    return None


def _shared_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest start that all `sequences` have in common."""
    columns = zip(*sequences, strict=False)  # the shortest ends the comparison
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
