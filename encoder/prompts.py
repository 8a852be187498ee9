"""From prompts to token ids: the chat template, truncation, and the prefix that all prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

from encoder.config import EncoderConfig
from encoder.errors import CheckpointError, EncoderConfigError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts that begin with different tokens: what their templated forms share is what every prompt shares.
_PROBES = ("", "a", "Zebra", "7", " ", "\n", "é", "猫")


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a templated prompt, at most `max_length` of them, and whether that cut it."""

    ids: list[int]
    truncated: bool


class PromptTokenizer:
    """Puts prompts through the chat template and the tokenizer exactly as `Flux2Pipeline` does.

    Attributes:
        prefix_ids: token ids that come first in every prompt: the system message and what surrounds it.
        pad_token_id: token id of the padding.

    Raises:
        CheckpointError: the chat template fails, or the tokenizer cuts at the left, where the system message is.
        EncoderConfigError: `max_length` leaves no room behind the prefix.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EncoderConfig) -> None:
        if tokenizer.truncation_side != "right":
            raise CheckpointError(f"the tokenizer truncates at the {tokenizer.truncation_side}, not at the right")
        self._tokenizer = tokenizer
        self._config = config
        self.pad_token_id: int = tokenizer.pad_token_id
        self.chat_template: str = tokenizer.chat_template
        try:
            self.prefix_ids: list[int] = _shared_start([self._templated_ids(probe) for probe in _PROBES])
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
            PromptError: one of them is no string, or no valid Unicode; it names the first such.
        """
        if isinstance(prompts, str):
            raise TypeError("expected a list of prompts, got one string")
        limit = self._config.max_length
        tokenized = []
        for position, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise PromptError(position, f"expected a string, got {type(prompt).__name__}")
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError as exc:
                raise PromptError(position, f"not valid Unicode: {exc}") from exc
            ids = self._templated_ids(prompt)
            tokenized.append(TokenizedPrompt(ids[:limit], truncated=len(ids) > limit))
        return tokenized

    def _templated_ids(self, prompt: str) -> list[int]:
        # `[IMG]` is an image placeholder to Mistral-3; diffusers' `format_input` takes it out of the text as well.
        messages = [
            {"role": "system", "content": [{"type": "text", "text": self._config.system_message}]},
            {"role": "user", "content": [{"type": "text", "text": prompt.replace("[IMG]", "")}]},
        ]
        # transformers annotates neither content lists nor what `return_dict` returns.
        tokenized: Any = self._tokenizer.apply_chat_template(
            cast("Any", messages), add_generation_prompt=False, tokenize=True, return_dict=True
        )
        ids: list[int] = tokenized["input_ids"]
        return ids


def _shared_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the longest start that all `sequences` have in common."""
    columns = zip(*sequences, strict=False)  # the shortest ends the comparison
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
