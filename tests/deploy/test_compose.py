"""The compose files, without Docker: `tests/containers` has what needs it."""

import re
from pathlib import Path

import pytest
import yaml

from jobs.loopback import check_exposure
from jobs.settings import Settings, load_settings
from tests.support import setting_of

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("docker-compose*.yml"))
TEXT = {path.name: path.read_text(encoding="utf-8") for path in FILES}
COMPOSE = yaml.safe_load(TEXT["docker-compose.yml"])
SERVICES = COMPOSE["services"]
LONG_RUNNING = {name: service for name, service in SERVICES.items() if service["restart"] != "no"}
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
# Compose's own, of which containers know nothing.
COMPOSE_ONLY = {
    "LAYERSTACK_API_CPUS",
    "LAYERSTACK_API_IMAGE",
    "LAYERSTACK_API_MEMORY",
    "LAYERSTACK_BASE_IMAGE",
    "LAYERSTACK_METRICS_KEY",
    "LAYERSTACK_WORKER_CPUS",
    "LAYERSTACK_WORKER_IMAGE",
    "LAYERSTACK_WORKER_MEMORY",
}


def interpolated(text):
    """Variables that compose puts in, with their defaults."""
    return dict(re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", text))


# Variables of the compose files with their defaults; those of `.env.example` with what it shows.
ASKED = {name: default for text in TEXT.values() for name, default in interpolated(text).items()}
OFFERED = dict(re.findall(r"^#(\w+)=(.*)$", EXAMPLE, re.MULTILINE))


def resolved(environment, **given):
    """An environment as compose makes it."""

    def value(match):
        return given.get(match[1]) or match[2]

    return {name: re.sub(r"\$\{(\w+):-([^}]*)\}", value, str(text)) for name, text in environment.items()}


def settings_of(service, monkeypatch, tmp_path, **given):
    environment = resolved(SERVICES[service]["environment"], **given)
    (tmp_path / "layerstack_broker_url").write_text("redis://:a-password@broker:6379/0\n")
    (tmp_path / "layerstack_reply_url").write_text("redis://:a-password@replies:6379/0\n")
    for name, content in (environment | {"LAYERSTACK_SECRETS_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, content)
    return load_settings()


def test_every_variable_has_a_default_and_is_in_the_example():
    named = set(re.findall(r"(?<!\$)\$\{?([A-Z_]+)", "".join(TEXT.values())))
    assert named == set(ASKED)
    assert named <= set(OFFERED)


def test_the_example_offers_only_what_there_is():
    ours = {name for name in OFFERED if name.startswith("LAYERSTACK_")}
    assert {setting_of(name) for name in ours - COMPOSE_ONLY} <= set(Settings.model_fields)
    assert set(ASKED) >= COMPOSE_ONLY


def test_the_example_shows_the_defaults():
    others = {"LAYERSTACK_MODEL", "LAYERSTACK_STORAGE", "LAYERSTACK_TASK_EVENTS"}  # what one would change them to
    for name in ASKED.keys() - others:
        field = Settings.model_fields.get(setting_of(name))
        default = ASKED[name] or (field.default if field else "")
        assert OFFERED[name] == str(default or "").removeprefix("none"), name


def test_nothing_is_a_secret_by_default():
    for name, default in ASKED.items():
        if re.search("KEY|TOKEN|PASSWORD|SECRET", name):
            assert default in {"", "none"}, name
    for name, shown in OFFERED.items():
        if re.search("KEY|TOKEN|PASSWORD|SECRET", name):
            assert shown == "", name


def test_every_environment_of_ours_holds_settings_only():
    for name in ("api", "worker"):
        for variable in SERVICES[name]["environment"].keys() - COMPOSE_ONLY:
            if variable.startswith("LAYERSTACK_"):
                assert setting_of(variable) in Settings.model_fields


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_no_more_than_it_needs(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "pid", "ipc"} & set(service)
    assert service.get("user", "").partition(":")[0] not in {"0", "root"}
    assert not [volume for volume in service.get("volumes", []) if volume.startswith("/")]


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_a_service_starts_again_has_limits_and_time_to_stop(name):
    service = LONG_RUNNING[name]
    assert service["restart"] == "unless-stopped"
    assert {"memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    if "profiles" not in service:
        assert service["stop_grace_period"]


def test_only_the_api_can_be_reached_and_only_by_this_machine():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    for ports in published.values():
        for port in ports:
            address = port if isinstance(port, str) else resolved(port)["host_ip"]
            assert address.startswith("127.0.0.1")
    assert [name for name in published if "profiles" not in SERVICES[name]] == ["api"]


def test_the_broker_keeps_what_it_accepts_and_replies_are_not_kept():
    for name in ("broker", "replies"):
        assert SERVICES[name]["entrypoint"] == ["valkey-server", "/run/layerstack/valkey.conf", "--dir", "/tmp"]  # noqa: S108 - a volume
    broker, replies = SERVICES["broker"], SERVICES["replies"]
    assert "--appendonly yes" in broker["command"]
    assert "--maxmemory-policy noeviction" in broker["command"]
    assert "broker:/tmp" in broker["volumes"]
    assert "--appendonly no --save ''" in replies["command"]
    assert "/tmp" in replies["tmpfs"]  # noqa: S108 - the container's own


def test_secrets_reach_those_who_need_them_only():
    assert SERVICES["api"]["environment"]["HF_TOKEN"] == ""
    for name in ("api", "worker"):
        assert SERVICES[name]["environment"]["LAYERSTACK_METRICS_KEY"] == ""
    users = {name for name, service in SERVICES.items() if "passwords:" in str(service.get("volumes"))}
    assert users == {"passwords", "broker", "replies", "api", "worker", "flower"}


def test_the_api_starts_without_keys_as_long_as_only_this_machine_reaches_it(monkeypatch, tmp_path):
    settings = settings_of("api", monkeypatch, tmp_path)
    check_exposure(settings)
    assert (settings.host, settings.published_on, settings.allowed_hosts) == ("0.0.0.0", "127.0.0.1", ("api",))  # noqa: S104 - nothing listens
    assert settings.broker_url.get_secret_value() == "redis://:a-password@broker:6379/0"
    assert settings.effective_reply_url == "redis://:a-password@replies:6379/0"


def test_the_worker_runs_the_demo_encoder_unless_told_otherwise(monkeypatch, tmp_path):
    assert settings_of("worker", monkeypatch, tmp_path).model == "demo"
    settings = settings_of("worker", monkeypatch, tmp_path, LAYERSTACK_MODEL="you/model")
    assert (settings.model, settings.worker_metrics_port) == ("you/model", 9464)


def test_volumes_are_declared_and_used():
    used = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert {name for name in used if not name.startswith(".")} == set(COMPOSE["volumes"])
