"""Where a server is and which key it gets, from arguments or the environment."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

import httpx

from layerstack.errors import AddressError, ApiKeyError

DEFAULT_URL = "http://127.0.0.1:7860"
URL_VARIABLE = "LAYERSTACK_URL"
KEY_VARIABLE = "LAYERSTACK_API_KEY"
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def server_url(url: str | None) -> httpx.URL:
    """Return `url` without a slash at its end, or else what the environment names, or this machine.

    Raises:
        AddressError: it is no URL of a server.
    """
    text = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    try:
        found = httpx.URL(text.rstrip("/"))
    except httpx.InvalidURL as exc:
        raise AddressError(f"{text!r} is no URL of a server: {exc}") from exc
    if found.scheme not in {"http", "https"} or not found.host:
        raise AddressError(f"{text!r} is no URL of a server: it has to begin with http:// or https://")
    return found


def goes_by_proxy(url: httpx.URL) -> bool:
    """Whether a proxy that the environment names is for `url`: it cannot reach a server on this machine."""
    return url.host not in LOOPBACK


def job_path(job_id: str) -> str:
    """Return the path of a job at its server.

    Raises:
        AddressError: no job can be called that.
    """
    if job_id in {"", ".", ".."}:
        raise AddressError(f"{job_id!r} is no id of a job")
    return f"/jobs/{quote(job_id, safe='')}"


def authorization(api_key: str | None) -> dict[str, str]:
    """Return the headers with `api_key`, or else the key of the environment; none if there is no key.

    Raises:
        ApiKeyError: the key has characters that no key has.
    """
    key = (os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):  # httpx would show it in its error
        raise ApiKeyError(f"the key ({KEY_VARIABLE}) has characters other than ASCII letters, digits and signs")
    return {"Authorization": f"Bearer {key}"} if key else {}
