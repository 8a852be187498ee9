"""Bytes and numbers of things, as people read them."""

from __future__ import annotations

_STEP = 1000
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def size_text(size: int) -> str:
    """Return a number of bytes with a decimal unit, as disks are sold: 15.7 MB."""
    if size < _STEP:
        return count_text(size, "byte")
    value, unit = float(size), 0
    # What would be shown as 1000.0 of a unit is 1.0 of the next.
    while round(value, 1) >= _STEP and unit < len(_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    return f"{value:.1f} {_UNITS[unit]}"


def count_text(count: int, one: str) -> str:
    """Return how many there are of something whose plural ends in s: 1 part, 2,000 parts."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"
