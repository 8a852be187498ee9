"""The figure of `layerstack inspect --plot`: how long the prompts are, and one prompt's rows, layer by layer."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.files import written_whole
from jobs.tensors import Array
from layerstack.errors import PlotError
from layerstack.inspection import StoredPrompt, Summary, p95_of
from layerstack.tokens import escaped, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

SUFFIXES = (".png", ".svg", ".pdf")
MAX_TOKENS = 48
_LAST_TOKENS = 8
_MAX_LABEL = 18
_MAX_BINS = 128
_HISTOGRAM_BARS = 80
# Comes with matplotlib, so the same letters have shapes everywhere.
_FONT = "DejaVu Sans"
DPI = 150
_TITLE_SIZE, _NOTE_SIZE = 11, 8
_POINTS_AN_INCH = 72
_LINE_INCHES = 0.2
_MARGIN = 0.01  # of the width
_BAR, _MEDIAN, _P95, _LIMIT = "#7fa7c9", "#1b1b1b", "#d55e00", "#440154"  # apart from each other for every eye


def draw(
    path: Path, summary: Summary, num_tokens: Array, prompt: StoredPrompt, labels: Sequence[str], note: str = ""
) -> None:
    """Write the figure, as PNG, SVG or PDF by the path's suffix.

    Args:
        path: of the file, which appears whole.
        summary: as in `make_figure`.
        num_tokens: likewise.
        prompt: likewise.
        labels: likewise.
        note: likewise.

    Raises:
        PlotError: the suffix is another, or matplotlib is not installed.
        OSError: the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise PlotError(f"{path}: a figure is written as {', '.join(SUFFIXES)}, by the name's ending")
    figure = make_figure(summary, num_tokens, prompt, labels, note)
    with written_whole(path) as file:
        figure.savefig(file, format=kind[1:], dpi=DPI)


def make_figure(
    summary: Summary, num_tokens: Array, prompt: StoredPrompt, labels: Sequence[str], note: str = ""
) -> Figure:
    """Draw the figure.

    Args:
        summary: of all prompts.
        num_tokens: of each prompt that succeeded, one at least.
        prompt: whose rows are drawn.
        labels: of its own rows, or of the first of them; those behind it are no tokens, and are left out.
        note: goes under the figure.

    Raises:
        PlotError: matplotlib is not installed, or there are no labels.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - it comes with an extra
    except ImportError as exc:
        raise PlotError(f"{exc}; figures need: pip install 'layerstack[plot]'") from exc
    if not labels:
        raise PlotError(f"prompt {prompt.index} has no own rows that could be drawn")
    shown = _shown_rows(len(labels))
    width = max(10.5, 2.0 + 2.6 * len(summary.layers))
    title = _wrapped(_title(prompt, labels, shown), width, _TITLE_SIZE)
    under = _wrapped([_legible(note, 300, spaces=True)], width, _NOTE_SIZE) if note else []
    heat_inches = max(1.4, 0.172 * len(shown)) + _LINE_INCHES * (len(title) + len(under))
    # Not of pyplot, which keeps figures and settings for the whole process.
    figure = Figure(figsize=(width, 3.7 + heat_inches), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[2.5, 1.2 + heat_inches], hspace=0.03)
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _draw_lengths(top, summary, num_tokens)
    _draw_rows(bottom, summary, prompt, labels, shown)
    of_font = {"x": _MARGIN, "ha": "left", "fontfamily": _FONT, "parse_math": False}
    bottom.suptitle("\n".join(title), fontsize=_TITLE_SIZE, **of_font)
    if under:
        figure.supxlabel("\n".join(under), fontsize=_NOTE_SIZE, color="0.35", **of_font)
    return figure


def _draw_lengths(figure: SubFigure, summary: Summary, num_tokens: Array) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - the same

    axes: Axes = figure.subplots()
    limit, longest = summary.max_length, int(num_tokens.max())
    # All the way to the limit where prompts come near it, as otherwise they would be squeezed into a corner.
    stop = limit if longest > limit / 2 else min(limit, round(longest * 1.08) + 2)
    width = max(1, -(-(stop - summary.num_prefix_rows) // _HISTOGRAM_BARS))
    edges = np.arange(summary.num_prefix_rows, stop + width + 1, width) - 0.5
    axes.hist(num_tokens, bins=list(edges), color=_BAR, edgecolor="white", linewidth=0.5)
    median, p95 = float(np.median(num_tokens)), p95_of(num_tokens)
    axes.axvline(median, color=_MEDIAN, linewidth=1.5, label=f"median {median:g}")
    axes.axvline(p95, color=_P95, linewidth=1.5, linestyle="--", label=f"95 % have at most {p95}")
    if stop == limit:
        axes.axvline(limit, color=_LIMIT, linewidth=1.5, linestyle=":", label=f"L = {limit}, where prompts are cut")
    else:
        axes.plot([], [], color=_LIMIT, marker=r"$\rightarrow$", linestyle="", label=f"L = {limit}, further right")
    axes.set_xlim(edges[0] - 0.5, edges[-1] + 0.5)
    of_prefix = f", the {summary.num_prefix_rows} of the prefix included" if summary.num_prefix_rows else ""
    axes.set_xlabel(f"tokens of a prompt{of_prefix}", fontsize=9)
    axes.set_ylabel("prompts", fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8)
    # Left of the line at the limit.
    axes.legend(fontsize=9, loc="upper right", bbox_to_anchor=(0.975, 1.0), edgecolor="none", framealpha=0.8)
    cut = f", {summary.truncated:,} cut" if summary.truncated else ""
    failed = f", {summary.failed:,} failed" if summary.failed else ""
    figure.suptitle(
        f"Lengths of {summary.succeeded:,} prompts{cut}{failed}", fontsize=_TITLE_SIZE, x=_MARGIN, ha="left"
    )
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rows(
    figure: SubFigure, summary: Summary, prompt: StoredPrompt, labels: Sequence[str], shown: Sequence[int | None]
) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter  # noqa: PLC0415 - the same

    layers, hidden = summary.layers, summary.embed_dim // len(summary.layers)
    rms = _binned_rms(prompt.own_rows[: len(labels)], len(layers))  # (K, n, bins)
    values = _picked(rms, shown)
    norm = _norm(values)
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    extent = (0, hidden, len(shown) - 0.5, -0.5)
    images: list[AxesImage] = []
    for axes, layer, value in zip(panels, layers, values, strict=True):
        images.append(
            axes.imshow(value, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest", extent=extent)
        )
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.tick_params(labelsize=8, length=2)
        axes.locator_params(axis="x", nbins=4)
    first = panels[0]
    first.set_yticks(range(len(shown)), [_label(labels, each) for each in shown], fontfamily=_FONT, parse_math=False)
    figure.supxlabel("hidden dimension", fontsize=9)
    bar = figure.colorbar(images[0], ax=list(panels), pad=0.01, fraction=0.03, extend="min")
    bar.locator, bar.formatter = LogLocator(subs=(1, 2, 5)), StrMethodFormatter("{x:g}")
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    per_bin = hidden / rms.shape[2]
    bar.set_label("size of a value" if per_bin == 1 else f"root mean square of {per_bin:.3g} dimensions", fontsize=9)


def _title(prompt: StoredPrompt, labels: Sequence[str], shown: Sequence[int | None]) -> list[str]:
    left_out = len(labels) - sum(each is not None for each in shown)
    tokens = f"{len(labels)} own tokens" + (f", {left_out} of them left out here" if left_out else "")
    id_ = "" if prompt.id == str(prompt.index) else f" (id {_legible(prompt.id, 40)})"
    text = _legible(" ".join(prompt.prompt.split()), 230, spaces=True)
    return [f"Rows of prompt {prompt.index}{id_}: {tokens}", *([text] if text else [])]


def _wrapped(lines: Sequence[str], inches: float, size: float) -> list[str]:
    """Break lines so that each fits into a figure's width in letters of `size` points, within a word if need be."""
    room, pixels = inches * DPI * (1 - 2 * _MARGIN), size * DPI / _POINTS_AN_INCH
    wrapped = []
    for line in lines:
        left = line
        while (fits := bisect_right(_ends(left, pixels), room)) < len(left):
            space = left.rfind(" ", 1, fits + 1)
            stop = space if space > 0 else max(1, fits)
            wrapped.append(left[:stop])
            left = left[stop:].lstrip(" ")
        wrapped.append(left)
    return wrapped


def _ends(line: str, pixels: float) -> list[int]:
    """Return where each letter ends, at most: in a PNG, letters are as wide as whole pixels."""
    return list(accumulate(math.ceil(_widths()[ord(letter)] * pixels) for letter in line))


def _shown_rows(count: int) -> list[int | None]:
    """Return which rows are drawn: all, or the first and the last of them with a gap (None) between."""
    if count <= MAX_TOKENS:
        return list(range(count))
    return [*range(MAX_TOKENS - _LAST_TOKENS), None, *range(count - _LAST_TOKENS, count)]


def _label(labels: Sequence[str], position: int | None) -> str:
    if position is None:
        return f"⋮  {len(labels) - MAX_TOKENS} left out  ⋮"
    return _legible(labels[position], _MAX_LABEL, spaces=True)


def _picked(rms: Array, shown: Sequence[int | None]) -> Array:
    """Return the shown rows of `rms [K, n, bins]`, and not-a-number in gaps: `[K, len(shown), bins]`."""
    picked = np.full((rms.shape[0], len(shown), rms.shape[2]), np.nan, np.float32)
    for place, position in enumerate(shown):
        if position is not None:
            picked[:, place] = rms[:, position]
    return picked


def _binned_rms(own_rows: Array, num_layers: int) -> Array:
    """Return the root mean square of neighbouring hidden dimensions, `[n, K*H]` to `[K, n, bins]`."""
    rows = own_rows.astype(np.float32).reshape(len(own_rows), num_layers, -1)  # (n, K, H)
    hidden = rows.shape[2]
    starts = np.unique(np.linspace(0, hidden, min(hidden, _MAX_BINS), endpoint=False).astype(int))
    sizes = np.diff([*starts, hidden])
    # A value of bfloat16 may be so large that its square is not finite in float32.
    mean = np.add.reduceat(np.square(rows, dtype=np.float64), starts, axis=2) / sizes
    binned: Array = np.sqrt(mean).transpose(1, 0, 2)
    return binned


def _norm(values: Array) -> LogNorm:
    """Return one scale of colours for all layers. What hardly any bin goes below is its lower end."""
    from matplotlib.colors import LogNorm  # noqa: PLC0415 - the same

    positive = values[values > 0]
    if not positive.size:
        return LogNorm(0.1, 1.0, clip=True)
    low, high = float(np.percentile(positive, 0.5)), float(positive.max())
    return LogNorm(low if low < high else high / 10, high, clip=True)


def _legible(text: str, limit: int, *, spaces: bool = False) -> str:
    """Return at most `limit` characters of `text`, with escapes for those that the font has no shape for."""
    shown = visible(text.replace(" ", "\0")).replace("\\u0000", " ") if spaces else visible(text)
    shown = "".join(letter if ord(letter) in _widths() else escaped(letter) for letter in shown)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


@cache
def _widths() -> dict[int, float]:
    """Return the characters that the font has a shape for, and how wide each is in units of the font's size."""
    from matplotlib import font_manager  # noqa: PLC0415 - the same
    from matplotlib.ft2font import FT2Font, LoadFlags  # noqa: PLC0415 - the same

    font = FT2Font(font_manager.findfont(_FONT))
    return {
        letter: font.load_char(letter, LoadFlags.NO_SCALE).horiAdvance / font.units_per_EM
        for letter in font.get_charmap()
    }
