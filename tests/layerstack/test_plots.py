import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from layerstack.errors import PlotError
from layerstack.inspection import StoredPrompt, inspect_parts
from layerstack.plots import DPI, MAX_TOKENS, draw, make_figure
from layerstack.scan import Parts
from layerstack.sources import open_source
from tests.layerstack.jobs_on_disk import LAYERS, D, write_job


@pytest.fixture
def found(tmp_path):
    return inspect_parts(Parts(open_source(write_job(tmp_path / "job", bad=(0,), cut=(2,)))))


def a_prompt(count, prompt="a fox", rows=None, id_="0"):
    if rows is None:
        rows = np.random.default_rng(0).standard_normal((count, D)).astype(np.float32)
    return StoredPrompt(0, 0, id_, prompt, count + 2, truncated=False, own_rows=rows)


def drawn(found, prompt, labels, note=""):
    figure = make_figure(found.summary, found.num_tokens, prompt, labels, note)
    FigureCanvasAgg(figure).draw()
    return figure


def panels(figure):
    return [axes for axes in figure.subfigs[1].axes if axes.get_title().startswith("layer")]


def tick_texts(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize(
    ("suffix", "beginning"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_the_names_ending_says_what_is_written(found, tmp_path, suffix, beginning):
    path = tmp_path / f"figure{suffix}"
    draw(path, found.summary, found.num_tokens, a_prompt(3), ["a", "·fox", "[/INST]"])
    assert path.read_bytes().startswith(beginning)


def test_another_ending_is_refused_before_anything_is_drawn(found, tmp_path):
    with pytest.raises(PlotError, match=r"\.png, \.svg, \.pdf"):
        draw(tmp_path / "figure.jpg", found.summary, found.num_tokens, a_prompt(1), ["a"])
    assert not (tmp_path / "figure.jpg").exists()


def test_without_matplotlib_it_says_how_to_install_it(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match=r"pip install 'layerstack\[plot\]'"):
        make_figure(found.summary, found.num_tokens, a_prompt(1), ["a"])


def test_there_is_a_panel_a_layer_with_the_tokens_from_top_to_bottom(found):
    figure = drawn(found, a_prompt(3), ["a", "·fox", "[/INST]"])
    assert [axes.get_title() for axes in panels(figure)] == [f"layer {layer}" for layer in LAYERS]
    first = panels(figure)[0]
    assert tick_texts(first) == ["a", "·fox", "[/INST]"]
    assert first.get_ylim() == (2.5, -0.5)


def test_a_panel_shows_the_root_mean_square_of_neighbouring_dimensions_on_one_scale(found):
    rows = np.ones((2, 3 * 256), np.float32)  # K = 3, H = 256
    rows[1, 256] = 5  # the first dimension of the second layer
    summary = found.summary.model_copy(update={"embed_dim": rows.shape[1]})
    figure = make_figure(summary, found.num_tokens, a_prompt(2, rows=rows), ["a", "b"])
    images = [axes.images[0] for axes in panels(figure)]
    assert [image.get_array().shape for image in images] == [(2, 128)] * 3
    assert images[1].get_array()[1, 0] == pytest.approx(np.sqrt((25 + 1) / 2))
    assert images[1].get_array()[1, 1] == images[0].get_array()[0, 0] == 1
    assert len({id(image.norm) for image in images}) == 1


def test_of_a_long_prompt_the_middle_is_left_out_and_it_says_how_much(found):
    figure = drawn(found, a_prompt(100), [f"t{n}" for n in range(100)])
    labels = tick_texts(panels(figure)[0])
    assert len(labels) == MAX_TOKENS + 1
    assert (labels[0], labels[-1]) == ("t0", "t99")
    assert any("52 left out" in label for label in labels)
    assert "100 own tokens, 52 of them left out here" in figure.subfigs[1].get_suptitle()


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def titles(figure):
    return [text for part in (figure, *figure.subfigs) for text in part.texts if text.get_text()]


@pytest.mark.parametrize("text", ["word " * 200, "WORD " * 200, "W" * 1000, "\N{FOX FACE} " * 200, "il" * 500, "a fox"])
@pytest.mark.parametrize("count", [1, 2, 12, 48, 300])
def test_every_text_can_be_read_and_no_label_covers_another(found, count, text):
    labels = [f"·token{n}" if n else text for n in range(count)]
    figure = make_figure(found.summary, found.num_tokens, a_prompt(count, text, id_=text), labels, text)
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).draw()
    assert min(text.get_fontsize() for text in texts(figure)) >= 8
    # An axis has labels too for ticks beyond its ends, which are not drawn; its box is of those that are.
    of_axes = [axes.get_tightbbox() for axes in figure.findobj(Axes)]
    of_texts = [text.get_window_extent() for text in titles(figure)]
    assert len(of_texts) == 4
    for box in [*of_axes, *of_texts]:
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    boxes = [label.get_window_extent() for label in panels(figure)[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def test_the_words_of_a_long_prompt_stay_whole_and_in_order(found):
    prompt = " ".join(f"WORD{n}" for n in range(30))
    figure = drawn(found, a_prompt(1, prompt), ["a"])
    first, *lines = figure.subfigs[1].get_suptitle().splitlines()
    assert first == "Rows of prompt 0: 1 own tokens"
    assert len(lines) > 1
    assert " ".join(lines) == prompt


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("猫", "\\u732b"),
        ("\N{FOX FACE}", "\\U0001f98a"),
        ("$a^b$", "$a^b$"),
        ("\x07", "\\u0007"),
        ("·don't", "·don't"),
        ("é", "é"),
        ("<E7 8C>", "<E7 8C>"),
        ("x" * 40, "x" * 17 + "…"),
    ],
)
def test_a_token_is_shown_by_signs_that_the_font_has(found, token, shown):
    figure = drawn(found, a_prompt(1, token, id_=token), [token], token)
    assert tick_texts(panels(figure)[0]) == [shown]


def test_rows_of_zeros_or_of_one_value_or_of_huge_ones_can_be_drawn(found):
    for value in (0, 1, 3e38):
        drawn(found, a_prompt(2, rows=np.full((2, D), value, np.float32)), ["a", "b"])


def test_a_prompt_without_own_rows_cannot_be_drawn(found):
    with pytest.raises(PlotError, match="prompt 0 has no own rows"):
        make_figure(found.summary, found.num_tokens, a_prompt(0), [])


def test_lengths_are_marked_with_median_p95_and_limit(found):
    (axes,) = drawn(found, a_prompt(1), ["a"]).subfigs[0].axes
    said = " ".join(text.get_text() for text in axes.get_legend().get_texts())
    assert "median" in said
    assert f"95 % have at most {found.summary.num_tokens.p95}" in said
    assert f"L = {found.summary.max_length}" in said
    assert sum(patch.get_height() for patch in axes.patches) == 9


def test_lengths_far_below_the_limit_are_not_squeezed_into_a_corner(found):
    summary = found.summary.model_copy(update={"max_length": 512})
    figure = make_figure(summary, found.num_tokens, a_prompt(1), ["a"])
    assert figure.subfigs[0].axes[0].get_xlim()[1] < 20


def test_the_tokens_that_all_prompts_share_are_called_the_prefix(found):
    (axes,) = drawn(found, a_prompt(1), ["a"]).subfigs[0].axes
    assert axes.get_xlabel() == "tokens of a prompt, the 2 of the prefix included"


DRAW = """
import sys
from pathlib import Path
from layerstack.inspection import inspect_parts, read_prompt
from layerstack.plots import draw
from layerstack.scan import Parts
from layerstack.sources import open_source

parts = Parts(open_source(sys.argv[1]))
found, prompt = inspect_parts(parts), read_prompt(parts)
draw(Path(sys.argv[2]), found.summary, found.num_tokens, prompt, ["a"] * len(prompt.own_rows), "a note")
sys.exit("matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pyplot_is_left_alone(tmp_path, suffix):
    job, path = write_job(tmp_path / "job"), tmp_path / f"figure{suffix}"
    ended = subprocess.run([sys.executable, "-c", DRAW, job, path], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert path.is_file()
