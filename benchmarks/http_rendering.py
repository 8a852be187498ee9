"""How long `api.formats` takes to make an answer, in this process and alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from api.formats import Format, Renderer
from api.prediction import ConstantRows, Prediction
from api.rows import Padding
from benchmarks.bare_engine import Facts
from jobs.tensors import DTYPES, Array

_REPEATS = 21


def render_ms(formats: Sequence[str], padding: str, facts: Facts, own_tokens: int) -> dict[str, float]:
    """Return the milliseconds for an answer with one prompt, at the median, by format.

    What the server keeps from one answer to the next, such as the text of the constant rows, is there before the first.

    Args:
        formats: what to measure.
        padding: which rows.
        facts: shapes and dtype.
        own_tokens: of the prompt. Its rows are random, since digits are what makes JSON slow.
    """
    prediction = _prediction(facts, own_tokens)
    renderer = Renderer()
    return {each: _median_ms(renderer, prediction, Format(each), Padding(padding)) for each in formats}


def _median_ms(renderer: Renderer, prediction: Prediction, answer_format: Format, padding: Padding) -> float:
    spent = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        renderer.render(prediction, answer_format, dtype=None, padding=padding, time_ms=1.0)
        spent.append(1e3 * (time.perf_counter() - started))
    return float(f"{statistics.median(spent[1:]):.3g}")


def _prediction(facts: Facts, own_tokens: int) -> Prediction:
    generator = np.random.default_rng(0)

    def rows(*shape: int) -> Array:
        return generator.standard_normal(shape, dtype=np.float32).astype(DTYPES[facts.dtype])

    return Prediction(
        own_rows=[rows(own_tokens, facts.embed_dim)],
        constants=ConstantRows(prefix_rows=rows(facts.prefix_length, facts.embed_dim), pad_row=rows(facts.embed_dim)),
        max_length=facts.max_length,
        num_tokens=np.array([facts.prefix_length + own_tokens], dtype=np.int32),
        truncated=np.array([False]),
        fingerprint="benchmark",
        encode_ms=1.0,
        queue_ms=1.0,
    )
