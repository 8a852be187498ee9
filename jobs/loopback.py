"""Who can reach the API: without keys, this machine alone."""

from __future__ import annotations

import ipaddress

from jobs.errors import SettingsError
from jobs.settings import Settings


def is_loopback(host: str) -> bool:
    """Tell whether a name or an address, without brackets, means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_exposure(settings: Settings) -> None:
    """Refuse to listen where others reach a server that asks for no key.

    Raises:
        SettingsError: its address is not loopback, there are no keys, and nobody said that this is meant.
    """
    if settings.api_keys is None and not settings.allow_without_keys and not is_loopback(settings.reachable_on):
        variable = "LAYERSTACK_HOST" if settings.published_on is None else "LAYERSTACK_PUBLISHED_ON"
        raise SettingsError(
            f"{variable}={settings.reachable_on!r}: without keys, the API is for loopback only; set "
            "LAYERSTACK_API_KEYS (`layerstack keys new NAME` makes a key), or LAYERSTACK_ALLOW_WITHOUT_KEYS=true if "
            "whoever reaches this port may use the encoder and read every job"
        )
