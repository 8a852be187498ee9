"""The model and the prompt files of this machine, read as a worker and the API read them.

Imports `encoder`, `worker` and `api` only when it is called: torch takes seconds to import, and a client does without
all three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.records import EncoderInfo, JobOptions, Prompt
from jobs.settings import Settings
from jobs.tensors import Array
from layerstack.errors import OfflineError, PromptFileError

if TYPE_CHECKING:
    from encoder import Encoder


def check_settings(settings: Settings) -> None:
    """Find out whether preset, dtype and attention of the settings are some that there are; loads nothing.

    Raises:
        OfflineError: one of them is not.
    """
    from encoder import EncoderConfigError
    from worker.model import check_settings as check

    try:
        check(settings)
    except EncoderConfigError as exc:
        raise OfflineError(f"the encoder cannot be loaded: {exc}") from exc


def load(settings: Settings) -> Encoder:
    """Load the model of the settings.

    Raises:
        OfflineError: it cannot be loaded.
    """
    from encoder import EncoderError
    from worker.model import load_encoder

    try:
        return load_encoder(settings)
    except (EncoderError, RuntimeError, MemoryError) as exc:  # torch's own errors are RuntimeErrors
        raise OfflineError(f"the encoder cannot be loaded: {exc}") from exc


@contextmanager
def device_faults_told(advice: str) -> Iterator[None]:
    """Turn what torch raises when a device, or its memory, is not up to it into an `OfflineError` that ends in advice.

    Other errors keep their traceback.
    """
    import torch

    try:
        yield
    except (torch.AcceleratorError, torch.OutOfMemoryError, MemoryError) as exc:
        raise OfflineError(f"the encoder failed: {exc}; {advice}") from exc


class LocalEncoder:
    """The model of the settings, for a few prompts at a time; numpy in and out.

    Attributes:
        info: what it says of itself.

    Raises:
        OfflineError: it cannot be loaded.
    """

    def __init__(self, settings: Settings) -> None:
        from worker.rows import describe

        self._encoder = load(settings)
        self.info: EncoderInfo = describe(self._encoder)

    def dense(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Return `prompt_embeds [B, L, D]` and `text_ids [B, L, 4]`.

        Raises:
            OfflineError: a prompt cannot be encoded, or the device fails.
        """
        from encoder import PromptError
        from worker.rows import to_numpy

        try:
            with device_faults_told("another --device may be up to it"):
                prompt_embeds, text_ids = self._encoder.dense(self._encoder.encode(prompts))
                return to_numpy(prompt_embeds), to_numpy(text_ids)
        except PromptError as exc:
            raise OfflineError(str(exc)) from exc

    def token(self, prompt: str, row: int) -> str:
        """Return what row `row` of a dense prompt is of: a token of its own, the prefix, or padding."""
        tokenizer, info = self._encoder.tokenizer, self.info
        own_ids = tokenizer([prompt])[0].own_ids
        first = info.max_length - len(own_ids) if info.padding_side == "left" else info.num_prefix_tokens
        if first <= row < first + len(own_ids):
            return repr(tokenizer.text(own_ids[row - first]))
        return "prefix" if first - info.num_prefix_tokens <= row < first else "padding"


def read_prompts(file: Path, settings: Settings) -> Iterator[Prompt]:
    """Yield the prompts of a file, as the API reads them.

    Raises:
        PromptFileError: a line, a row or the file is bad; it names which, what is there and what is allowed.
        OSError: it cannot be read.
    """
    from api.compressed import file_coding
    from api.jobrequest import PromptUpload
    from api.problems import Problem
    from api.uploads import PromptFile

    kind, (coding, _) = PromptFile(kind_of(file)), file_coding(file.name, None)
    with file.open("rb") as content:
        try:
            yield from PromptUpload(content, kind, coding, JobOptions(), {}, "file").prompts(settings)
        except Problem as exc:
            setting = " (LAYERSTACK_PROMPT_MAX_CHARS)" if exc.kind == "prompt-too-long" else ""
            raise PromptFileError(f"{file}: {exc.detail}{setting}") from exc


def check_prompts(file: Path, settings: Settings) -> None:
    """Go through the prompts of a file once, and keep none.

    Raises:
        PromptFileError: as `read_prompts`, or there is no prompt in it.
        OSError: it cannot be read.
    """
    if not sum(1 for _ in read_prompts(file, settings)):
        raise PromptFileError(f"{file}: there is no prompt in it")


def kind_of(file: Path) -> str:
    """Return how the name of a prompt file says that it is to be read.

    Raises:
        PromptFileError: it does not.
    """
    from api.compressed import file_coding
    from api.uploads import recognise

    _, name = file_coding(file.name, None)
    kind = recognise(name, None)
    if kind is None:
        raise PromptFileError(
            f"{file}: not a prompt file, by its name: .txt, .jsonl, .csv or .parquet; .gz or .zst may follow"
        )
    return kind.value
