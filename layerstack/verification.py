"""Whether two encoders give the same: what a server answers against what this machine computes, layer by layer.

A row of D values holds one slice a layer, `D / K` values each. A slice is right if its values are no further from the
other one's than a tolerance, at the mean and each relative to its size; `encoder.selfcheck` compares rows likewise. A
value that is no number is never right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.tensors import Array, DtypeName

TOLERANCE: dict[DtypeName, float] = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1}
"""How far a slice may be away: the bounds of `encoder.selfcheck`. Rounding, in another batch or on another card, is far
below them, and a slice that is wrong far above."""

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
        relative: the largest mean difference of a slice's values, each relative to it and to the slice's median, here;
            likewise.
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
    slices = zip(layers, *(np.moveaxis(each.reshape(shape), 2, 0) for each in (here, there)), strict=True)
    found = []
    for layer, wanted, got in slices:  # [B, L, D / K] each
        absolute, relative = _errors(wanted.astype(np.float32), got.astype(np.float32))  # (B, L)
        prompt, row = np.unravel_index(int(relative.argmax()), relative.shape)
        found.append(
            LayerError(
                layer,
                float(absolute.max()),
                float(relative.max()),
                first_prompt + int(prompt),
                int(row),
                int((relative > tolerance).sum()),
            )
        )
    return found


def _errors(wanted: Array, got: Array) -> tuple[Array, Array]:
    """Return the largest difference of each slice's values, and the mean one, relative to their size: `[B, L]`.

    A few values of a slice are hundreds of times larger than the rest, and must not excuse errors in those.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        difference, size = np.abs(got - wanted), np.abs(wanted)
        size += np.median(size, axis=-1, keepdims=True)
        # A pad token may be embedded as zeros, and then its rows are zeros in every layer.
        relative = np.where(difference == 0, 0, difference / size).mean(axis=-1)
    # What is no number is as wrong as can be, also where both have it.
    return (
        np.nan_to_num(difference.max(axis=-1), nan=np.inf, posinf=np.inf),
        np.nan_to_num(relative, nan=np.inf, posinf=np.inf),
    )


def _text_ids_differ(here: Array, there: Array) -> str:
    if here.shape != there.shape:
        return f"text_ids differ: {there.shape} there, {here.shape} here"
    prompt, row = (int(place) for place in np.argwhere((here != there).any(axis=-1))[0])
    return f"text_ids differ: row {row} is {there[prompt, row].tolist()} there, {here[prompt, row].tolist()} here"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
