"""Whether two encoders give the same: what a server answers against what this machine computes, layer by layer.

A row of D values holds one slice a layer, `D / K` values each. A slice is right if it is no further from the other one
than a tolerance, relative to its own norm. A value that is no number is never right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.tensors import Array, DtypeName

TOLERANCE: dict[DtypeName, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""How far a slice may be away, relative to its norm: 16 bits round differently in another batch or on another card."""

PROMPTS = (
    "a fox in the snow",
    "an old lighthouse keeper reads a map by candlelight",
    "",
    "九尾の狐 — naïve café, Ωμέγα, 🦊🏔️",
    "line one\nline two\ttabbed",
    "a very long walk through a city of glass and rain, " * 60,
)
"""Prompts that go different ways: short, empty, of many scripts, and one that is truncated."""

_SHOWN_CHARS = 40


@dataclass(frozen=True)
class LayerError:
    """How far one layer's slices are apart, over all rows that were compared.

    Attributes:
        layer: counted from 1.
        absolute: the largest difference of two values; infinite where one is no number.
        relative: the largest norm of a difference of slices, relative to the norm of the slice here; likewise.
        prompt: position of the prompt where `relative` is.
        row: which of its L rows that is.
        wrong_rows: rows that are further apart than the tolerance.
    """

    layer: int
    absolute: float
    relative: float
    prompt: int
    row: int
    wrong_rows: int

    def and_of(self, other: LayerError) -> LayerError:
        """Return what holds for the rows of both."""
        worst = self if self.relative >= other.relative else other
        return LayerError(
            self.layer,
            max(self.absolute, other.absolute),
            worst.relative,
            worst.prompt,
            worst.row,
            self.wrong_rows + other.wrong_rows,
        )


class Comparison:
    """Compares the tensors of prompts here and there, as many at a time as one likes.

    Args:
        layers: of the encoder, in the order in which their slices are stacked.
        dtype: of the rows, which says what tolerance there is.
        token_of: tells what a row of a prompt is of, for whoever reads the differences.

    Attributes:
        tolerance: relative, of a slice.
        prompts: that were compared.
        rows: rows that were compared.
        layers: what was found for each layer; empty as long as no two tensors have the same shape.
    """

    def __init__(
        self, layers: Sequence[int], dtype: DtypeName, token_of: Callable[[str, int], str] = lambda _prompt, _row: ""
    ) -> None:
        self.tolerance = TOLERANCE[dtype]
        self.prompts: list[str] = []
        self.rows = 0
        self.layers: list[LayerError] = []
        self._layers = tuple(layers)
        self._token_of = token_of
        self._others: list[str] = []

    def add(self, prompts: Sequence[str], here: tuple[Array, Array], there: tuple[Array, Array]) -> None:
        """Compare more prompts.

        Args:
            prompts: B of them.
            here: `prompt_embeds [B, L, D]` and `text_ids [B, L, 4]` of this machine.
            there: likewise, of the server.
        """
        first = len(self.prompts)
        self.prompts += prompts
        if not np.array_equal(here[1], there[1]):
            self._note(_text_ids_differ(here[1], there[1]))
        if here[0].shape != there[0].shape:
            self._note(f"prompt_embeds differ: {there[0].shape} there, {here[0].shape} here")
            return
        self.rows += here[0].shape[0] * here[0].shape[1]
        found = layer_errors(here[0], there[0], self._layers, self.tolerance, first)
        self.layers = [old.and_of(new) for old, new in zip(self.layers, found, strict=True)] if self.layers else found

    def expect(self, name: str, here: object, there: object) -> None:
        """Note that something else differs, if it does."""
        if here != there:
            self._note(f"{name} differs: {there} there, {here} here")

    @property
    def differences(self) -> list[str]:
        """What differs, in words: the first layer that does, then everything else; empty if it is all the same."""
        wrong = [layer for layer in self.layers if layer.wrong_rows]
        return [*(self.describe(layer) for layer in wrong[:1]), *self._others]

    def token(self, layer: LayerError) -> str:
        """Tell what the row is of where a layer is furthest apart; "" if nobody knows."""
        return self._token_of(self.prompts[layer.prompt], layer.row)

    def describe(self, layer: LayerError) -> str:
        """Tell how a layer differs, and where most."""
        prompt = " ".join(self.prompts[layer.prompt].split())
        shown = prompt if len(prompt) <= _SHOWN_CHARS else prompt[: _SHOWN_CHARS - 1] + "…"
        token = self.token(layer)
        place = f"row {layer.row} ({token})" if token else f"row {layer.row}"
        return (
            f"layer {layer.layer} differs: relative error {layer.relative:.2g} (tolerance {self.tolerance:g}) of "
            f"prompt {layer.prompt} {shown!r}, {place}; largest absolute error {layer.absolute:.2g}; "
            f"{layer.wrong_rows} of {self.rows} rows"
        )

    def summary(self) -> dict[str, Any]:
        """Return what was found, for programs; an infinite error is null."""
        return {
            "same": not self.differences,
            "differences": self.differences,
            "prompts": len(self.prompts),
            "rows": self.rows,
            "tolerance": self.tolerance,
            "layers": [
                {
                    "layer": each.layer,
                    "max_absolute_error": _finite(each.absolute),
                    "max_relative_error": _finite(each.relative),
                    "prompt": each.prompt,
                    "row": each.row,
                    "token": self.token(each) or None,
                    "wrong_rows": each.wrong_rows,
                }
                for each in self.layers
            ],
        }

    def _note(self, difference: str) -> None:
        if difference not in self._others:
            self._others.append(difference)


def layer_errors(
    here: Array, there: Array, layers: Sequence[int], tolerance: float, first_prompt: int = 0
) -> list[LayerError]:
    """Compare two `prompt_embeds [B, L, D]`, the slice of each layer by itself.

    Args:
        here: what is right.
        there: what is to be like it.
        layers: K of them; D is a multiple of K.
        tolerance: relative, of a slice.
        first_prompt: position of the first of the B prompts.
    """
    shape = (*here.shape[:2], len(layers), -1)
    wanted, got = (each.astype(np.float32).reshape(shape) for each in (here, there))  # (B, L, K, D / K)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        difference = np.abs(got - wanted)
        norms = np.linalg.norm(wanted, axis=-1)  # (B, L, K)
        distances = np.linalg.norm(difference, axis=-1)
        relative = np.where(distances == 0, 0, distances / norms)
    # What is no number is as wrong as can be, also where both have it.
    absolute, relative = (np.nan_to_num(each, nan=np.inf, posinf=np.inf) for each in (difference.max(-1), relative))
    found = []
    for position, layer in enumerate(layers):
        of_layer = relative[..., position]  # (B, L)
        prompt, row = np.unravel_index(int(of_layer.argmax()), of_layer.shape)
        found.append(
            LayerError(
                layer,
                float(absolute[..., position].max()),
                float(of_layer.max()),
                first_prompt + int(prompt),
                int(row),
                int((of_layer > tolerance).sum()),
            )
        )
    return found


def _text_ids_differ(here: Array, there: Array) -> str:
    if here.shape != there.shape:
        return f"text_ids differ: {there.shape} there, {here.shape} here"
    prompt, row = (int(place) for place in np.argwhere((here != there).any(axis=-1))[0])
    return f"text_ids differ: row {row} is {there[prompt, row].tolist()} there, {here[prompt, row].tolist()} here"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
