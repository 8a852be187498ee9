"""The engine in a process of its own, with nothing around it: no queue, no HTTP."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from encoder import Encoder, Engine

_STOP_S = 30.0


@dataclass(frozen=True)
class Facts:
    """The engine's encoder, and what the prompts are to it."""

    device: str
    dtype: str
    token_budget: int
    embed_dim: int
    max_length: int
    prefix_length: int
    own_tokens: int


@dataclass(frozen=True)
class Turn:
    """Prompts per second while all wait at once, and the seconds of some, one at a time."""

    prompts_per_s: float
    single_s: list[float]


class BareEngine:
    """A process with the engine, which waits until it is asked for a turn; a context manager.

    Args:
        checkpoint: of its encoder.
        prompts: for each turn.
        num_single: how many of them go through it one at a time as well.
        seconds: what a turn takes, about; in a short one the prompts wait several times over.
        device: of its encoder.
        dtype: of its encoder; default as in `Encoder.load`.
        token_budget: rows of a forward; default the encoder's.

    Attributes:
        facts: what it has loaded.
    """

    def __init__(
        self,
        checkpoint: Path,
        prompts: list[str],
        num_single: int,
        *,
        seconds: float,
        device: str | None,
        dtype: str | None,
        token_budget: int | None,
    ) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        options = {"device": device, "dtype": dtype, "token_budget": token_budget}
        # A daemon ends with this process, whatever happens.
        self._process = context.Process(
            target=_serve, args=(theirs, checkpoint, prompts, num_single, seconds, options), daemon=True
        )
        self._theirs = theirs

    def __enter__(self) -> Self:
        self._process.start()
        self._theirs.close()  # or the death of the other process would not be noticed
        self.facts: Facts = self._received()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._pipe.close()
        self._process.join(_STOP_S)
        self._process.kill()

    def turn(self) -> Turn:
        """Encode the prompts, while everything else should be idle."""
        self._pipe.send(None)
        turn: Turn = self._received()
        return turn

    def _received(self) -> Facts | Turn:
        try:
            return self._pipe.recv()
        except EOFError as exc:
            raise SystemExit("the bare engine's process has ended; its messages are above") from exc


def _serve(
    pipe: Connection,
    checkpoint: Path,
    prompts: list[str],
    num_single: int,
    seconds: float,
    options: dict[str, Any],
) -> None:
    """Load the engine, and take turns until the other end of `pipe` is closed."""
    encoder = Encoder.load(checkpoint, **options)
    with Engine(encoder) as engine:
        warm_up_s = _seconds(engine, prompts)
        waiting = prompts * max(1, round(seconds / warm_up_s))
        rows = [encoder.num_rows(prompt) for prompt in encoder.tokenizer(prompts)]
        pipe.send(
            Facts(
                device=str(encoder.device),
                dtype=str(encoder.dtype).removeprefix("torch."),
                token_budget=encoder.token_budget,
                embed_dim=encoder.embed_dim,
                max_length=encoder.config.max_length,
                prefix_length=len(encoder.prefix_rows),
                own_tokens=sum(rows),
            )
        )
        while _is_asked(pipe):
            rate = len(waiting) / _seconds(engine, waiting)
            pipe.send(Turn(rate, [_seconds(engine, [prompt]) for prompt in prompts[:num_single]]))


def _is_asked(pipe: Connection) -> bool:
    try:
        pipe.recv()
    except EOFError:
        return False
    return True


def _seconds(engine: Engine, prompts: list[str]) -> float:
    started = time.perf_counter()
    engine.submit(prompts).result()
    return time.perf_counter() - started
