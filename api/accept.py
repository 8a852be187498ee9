"""What a client accepts, and which of the things on offer it likes best: RFC 9110, section 12.5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.request import parse_http_list

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers

from api.compressed import Coding
from api.problems import Problem, shorten


@dataclass(frozen=True)
class _Range:
    """One element of the header: `application/*`, or `gzip`, and its weight."""

    value: str
    weight: float


def header_of(headers: Headers, name: str) -> str | None:
    """Return a header that lists things, which may be sent on several lines; None if it is not there."""
    lines = headers.getlist(name)
    return ", ".join(lines) if lines else None


def best_media_type(accept: str | None, offered: Sequence[str]) -> str | None:
    """Return the media type of `offered` that suits the header `Accept` best.

    Of those with the same weight it is the one that the client names more closely, then earlier, and then the one that
    is offered earlier. Parameters of a media type are not looked at, and neither is a range whose weight is none.

    Args:
        accept: the header; None or empty accepts anything.
        offered: in lower case, without parameters.

    Returns:
        None if the client accepts none of them.
    """
    if not (accept or "").strip():
        return offered[0]
    ranges = _ranges(accept or "")
    rated = [(rating, media_type) for media_type in offered if (rating := _rating(media_type, ranges)) is not None]
    # max() returns the first of equals.
    return max(rated, key=lambda each: each[0])[1] if rated else None


def best_coding(accept_encoding: str | None, *, worthwhile: bool) -> Coding | None:
    """Return the content coding for an answer; None sends it as it is.

    Args:
        accept_encoding: the header; None accepts anything, and gets the answer as it is.
        worthwhile: whether the answer becomes much smaller. If not, it is only coded for a client that refuses it
            as it is.

    Raises:
        Problem: 406, the client refuses it as it is and in each coding that we have.
    """
    if accept_encoding is None:
        return None
    weights = {each.value: each.weight for each in reversed(_ranges(accept_encoding))}
    anything_else = weights.get("*")
    codings = [Coding.ZSTD, Coding.GZIP]
    rated = {coding: weights.get(coding, anything_else or 0.0) for coding in codings}
    best = max(codings, key=lambda coding: rated[coding])
    # Unless it is named, what has no coding is acceptable, and no better than any coding that is.
    plain = weights.get("identity", 0.0 if anything_else == 0.0 else None)
    if plain != 0.0 and (not worthwhile or rated[best] == 0.0 or (plain or 0.0) > rated[best]):
        return None
    if rated[best] == 0.0:
        detail = f"Accept-Encoding: available are {', '.join(codings)} and identity; got {shorten(accept_encoding)}"
        raise Problem("not-acceptable", detail, field="Accept-Encoding", value=shorten(accept_encoding))
    return best


def _ranges(header: str) -> list[_Range]:
    ranges = []
    for element in parse_http_list(header):
        value, parameters = parse_options_header(element)
        weight = _weight(parameters.get(b"q", b"1"))
        if value and weight is not None:
            ranges.append(_Range(value.decode("latin-1").lower(), weight))
    return ranges


def _weight(text: bytes) -> float | None:
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if 0 <= weight <= 1 else None


def _rating(media_type: str, ranges: Sequence[_Range]) -> tuple[float, int, int] | None:
    """Weight, closeness and negative place in the header of the range that is about `media_type`."""
    closeness = {media_type: 2, f"{media_type.partition('/')[0]}/*": 1, "*/*": 0}
    about = [
        (closeness[each.value], each.weight, -place) for place, each in enumerate(ranges) if each.value in closeness
    ]
    closest, weight, place = max(about, default=(0, 0.0, 0))
    return (weight, closest, place) if weight > 0 else None
