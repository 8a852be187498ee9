import pytest

from jobs.errors import SettingsError
from jobs.loopback import check_exposure, is_loopback
from jobs.settings import Settings


@pytest.mark.parametrize("host", ["localhost", "Localhost", "127.0.0.1", "127.255.0.9", "::1"])
def test_names_of_this_machine(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "gpu", "", "[::1]"])  # noqa: S104 - nothing listens
def test_names_that_others_reach(host):
    assert not is_loopback(host)


def test_without_keys_only_loopback_is_listened_on():
    with pytest.raises(SettingsError) as caught:
        check_exposure(Settings(host="0.0.0.0"))  # noqa: S104 - nothing listens
    for name in ("LAYERSTACK_HOST='0.0.0.0'", "LAYERSTACK_API_KEYS", "LAYERSTACK_ALLOW_WITHOUT_KEYS"):
        assert name in str(caught.value)


def test_a_container_listens_on_all_its_addresses_if_only_this_machine_is_led_there():
    check_exposure(Settings(host="0.0.0.0", published_on="127.0.0.1"))  # noqa: S104 - nothing listens
    with pytest.raises(SettingsError, match=r"LAYERSTACK_PUBLISHED_ON='10\.0\.0\.1'.*LAYERSTACK_API_KEYS"):
        check_exposure(Settings(host="127.0.0.1", published_on="10.0.0.1"))


@pytest.mark.parametrize("settings", [{"api_keys": "a:" + "0" * 64}, {"allow_without_keys": True}])
def test_with_keys_or_on_purpose_it_may_be_any(settings):
    check_exposure(Settings(host="0.0.0.0", **settings))  # noqa: S104 - nothing listens
