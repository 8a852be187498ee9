"""Prompt files in CSV: a header with the column `prompt`, and perhaps `id`. A row in quotes may span lines."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from threading import Lock

from api.problems import Problem, invalid

MAX_BLANK_LINES = 100_000
"""Of CSV at its end, and of JSON lines; a small file that is compressed could expand to billions."""
_SHOWN_CELLS = 20
_FIELD_LIMIT_LOCK = Lock()


def read_csv(lines: Iterator[str], *, row_max_chars: int, max_chars: int) -> Iterator[tuple[int, str | None, str]]:
    """Yield the line where each row begins, its id if it has one, and its prompt; one row is held at a time.

    Raises:
        Problem: the header or a row is bad, or a row is longer than `row_max_chars`; it names the line.
    """
    rows = _rows(lines, row_max_chars, max_chars)
    _, header = next(rows, (1, []))
    if header.count("prompt") != 1 or header.count("id") > 1:
        reason = "the header needs one column 'prompt' and has at most one 'id', with commas between columns"
        raise invalid("line 1", header[:_SHOWN_CELLS], reason)
    prompt_at, id_at = header.index("prompt"), header.index("id") if "id" in header else None
    blank: int | None = None
    for number, cells in rows:
        if not cells:
            blank = blank or number
            if number - blank >= MAX_BLANK_LINES:
                raise invalid(f"line {number}", "", f"at most {MAX_BLANK_LINES} lines are blank", limit=MAX_BLANK_LINES)
            continue
        if blank:
            # One cell that is empty, or a line too many? A guess could move every prompt after it.
            raise invalid(f"line {blank}", "", 'blank lines stand at the end only, an empty prompt alone is written ""')
        if len(cells) != len(header):
            reason = f"{len(cells)} cells, but the header has {len(header)}; a cell with a comma in it needs quotes"
            raise invalid(f"line {number}", cells[:_SHOWN_CELLS], reason)
        yield number, (cells[id_at] or None) if id_at is not None else None, cells[prompt_at]


def _rows(lines: Iterator[str], row_max_chars: int, max_chars: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the line where each row begins, and its cells; a quote that is not closed ends at `row_max_chars`."""
    _lift_field_limit(row_max_chars)
    start, held, first = 1, 0, ""  # of the row that is being read: its line, its length so far, its first line

    def counted() -> Iterator[str]:
        nonlocal held, first
        for line in lines:
            first = first if held else line
            held += len(line)
            if held > row_max_chars:
                raise _row_too_long(start, row_max_chars, max_chars)
            yield line

    reader = csv.reader(counted(), strict=True)
    try:
        for cells in reader:
            yield start, cells
            start, held = reader.line_num + 1, 0
    except csv.Error as exc:
        reason = f"not CSV ({exc}); what is opened with a quote ends with one, and a quote within is written twice"
        raise invalid(f"line {start}", first, reason) from exc


def _lift_field_limit(chars: int) -> None:
    """Let a cell be as long as a row.

    The limit of the csv module is one for all threads, and below what a prompt may have. So it is only ever raised, and
    what bounds the memory is the length of the row, which we count.
    """
    with _FIELD_LIMIT_LOCK:
        csv.field_size_limit(max(chars, csv.field_size_limit()))


def _row_too_long(start: int, row_max_chars: int, max_chars: int) -> Problem:
    detail = (
        f"line {start}: the row is longer than {row_max_chars} characters, and a prompt has at most {max_chars}; "
        "is a quote not closed?"
    )
    return Problem("prompt-too-long", detail, field=f"line {start}", limit=max_chars)
