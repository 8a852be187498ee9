"""Media types as headers write them."""

from __future__ import annotations


def essence(header: str | None) -> str:
    """Return `type/subtype` of a media type, without parameters and in lower case; empty if there is none."""
    return (header or "").partition(";")[0].strip().lower()


def is_json(header: str | None) -> bool:
    """Tell whether a media type is JSON, or a kind of it such as `application/ld+json`."""
    name = essence(header)
    return name.startswith("application/") and name.endswith(("/json", "+json"))
