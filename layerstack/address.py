"""Where a server is and which key it gets, from arguments or the environment."""

from __future__ import annotations

import os
import re

from layerstack.errors import ApiKeyError

DEFAULT_URL = "http://127.0.0.1:7860"
URL_VARIABLE = "LAYERSTACK_URL"
KEY_VARIABLE = "LAYERSTACK_API_KEY"
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def server_url(url: str | None) -> str:
    """Return `url` without a slash at its end, or else what the environment names, or this machine."""
    return (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")


def authorization(api_key: str | None) -> dict[str, str]:
    """Return the headers with `api_key`, or else the key of the environment; none if there is no key.

    Raises:
        ApiKeyError: the key has characters that no key has.
    """
    key = (os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):  # httpx would show it in its error
        raise ApiKeyError(f"the key ({KEY_VARIABLE}) has characters other than ASCII letters, digits and signs")
    return {"Authorization": f"Bearer {key}"} if key else {}
