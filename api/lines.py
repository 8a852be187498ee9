"""The lines of a UTF-8 file, read one at a time, so memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from api.problems import Problem, invalid


def read_lines(file: IO[bytes], *, max_bytes: int, max_chars: int) -> Iterator[str]:
    """Yield the lines with their ends; a line feed ends a line. None is held that is longer than `max_bytes`.

    Raises:
        Problem: a line is too long for a prompt of `max_chars`, or not UTF-8; it names the line.
    """
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise Problem(
                "prompt-too-long",
                f"line {number}: longer than {max_bytes} bytes, and a prompt has at most {max_chars} characters",
                field=f"line {number}",
                limit=max_chars,
            )
        try:
            # "utf-8-sig" drops the byte order mark that some editors write at the very beginning.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as exc:
            raise invalid(f"line {number}", line[:100], f"must be UTF-8 ({exc.reason} at byte {exc.start})") from exc
        if text:  # a file of nothing but that mark has no line
            yield text
