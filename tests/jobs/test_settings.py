from pathlib import Path

import pytest

from jobs.errors import SettingsError
from jobs.settings import load_settings


def test_the_environment_sets_them_and_arguments_win(monkeypatch):
    monkeypatch.setenv("LAYERSTACK_PORT", "1234")
    monkeypatch.setenv("LAYERSTACK_CHUNK_ROWS", "7")
    settings = load_settings(port=4321)
    assert (settings.port, settings.chunk_rows) == (4321, 7)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LAYERSTACK_PORT", "abc"),
        ("LAYERSTACK_PORT", "70000"),
        ("LAYERSTACK_CHUNK_ROWS", "0"),
        ("LAYERSTACK_LOG_LEVEL", "LOUD"),
        ("LAYERSTACK_STORAGE", "ftp://host/jobs"),
        ("LAYERSTACK_VERIFY_PARTS", "sometimes"),
        ("LAYERSTACK_CHUNK_CRASHES", "0"),
        ("LAYERSTACK_RETENTION_HOURS", "-1"),
        ("LAYERSTACK_LEASE_S", "0.5"),
    ],
)
def test_a_bad_value_is_an_error_that_names_variable_and_value(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"{variable}='{value}'"):
        load_settings()


@pytest.mark.parametrize("url", ["amqp://user:hunter2@host", "redis://:hunter2/x@host", "redis://hunter2:port/0"])
def test_a_bad_url_is_named_without_its_password(monkeypatch, url):
    monkeypatch.setenv("LAYERSTACK_BROKER_URL", url)
    with pytest.raises(SettingsError, match="LAYERSTACK_BROKER_URL") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_passwords_do_not_show_in_what_is_printed(monkeypatch):
    monkeypatch.setenv("LAYERSTACK_BROKER_URL", "redis://:hunter2@host/0")
    assert "hunter2" not in repr(load_settings())


def test_replies_travel_over_the_broker_unless_told_otherwise():
    assert load_settings(broker_url="redis://a").effective_reply_url == "redis://a"
    assert load_settings(broker_url="redis://a", reply_url="redis://b").effective_reply_url == "redis://b"


@pytest.mark.parametrize("url", ["layerstack-data", "/somewhere", "s3://bucket/jobs", "gs://bucket"])
def test_jobs_are_kept_in_a_folder_or_an_object_store(url):
    assert load_settings(storage=url).storage == url


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"storage": "/somewhere"}, "/somewhere"),
        ({"storage": "/somewhere", "local_dir": "/here"}, "/here"),
        ({"storage": "s3://bucket", "local_dir": "/here"}, "/here"),
        ({"storage": "s3://bucket"}, str(Path("~/.cache/layerstack").expanduser())),
    ],
)
def test_what_is_no_result_stays_on_this_machine(settings, folder):
    assert str(load_settings(**settings).local_folder) == folder


def test_a_setting_may_lie_in_a_file_which_the_environment_wins_over(monkeypatch, tmp_path):
    (tmp_path / "layerstack_broker_url").write_text("redis://:hunter2@host/0\n")
    (tmp_path / "layerstack_api_keys").write_text(f"ann:{'0' * 64}\n")
    (tmp_path / "layerstack_port").write_text("1234")
    (tmp_path / "layerstack_reply_url").write_text("\n")  # is not set, either
    monkeypatch.setenv("LAYERSTACK_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("LAYERSTACK_PORT", "4321")
    monkeypatch.setenv("LAYERSTACK_BROKER_URL", "")  # is not set
    settings = load_settings()
    assert settings.broker_url.get_secret_value() == "redis://:hunter2@host/0"
    assert (settings.api_keys, settings.port, settings.reply_url) == ({"ann": "0" * 64}, 4321, None)


def test_a_bad_value_in_a_file_is_told_like_one_of_a_variable(monkeypatch, tmp_path):
    (tmp_path / "layerstack_port").write_text("abc")
    monkeypatch.setenv("LAYERSTACK_SECRETS_DIR", str(tmp_path))
    with pytest.raises(SettingsError, match="LAYERSTACK_PORT='abc'"):
        load_settings()


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_folder_of_secrets_that_is_none_is_told(monkeypatch, tmp_path, name):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAYERSTACK_SECRETS_DIR", str(tmp_path / name))
    with pytest.raises(SettingsError, match=f"LAYERSTACK_SECRETS_DIR='.*{name}': there is no such folder"):
        load_settings()


def broken(kind, path):
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("kind", "reason"), [("folder", "Is a directory"), ("link", "No such file"), ("bytes", "it is no text")]
)
def test_a_file_that_cannot_be_read_is_told_and_never_left_out(monkeypatch, tmp_path, kind, reason):
    broken(kind, tmp_path / "layerstack_api_keys")
    monkeypatch.setenv("LAYERSTACK_SECRETS_DIR", str(tmp_path))
    with pytest.raises(SettingsError, match=f"layerstack_api_keys cannot be read: {reason}"):
        load_settings()


@pytest.mark.parametrize("host", ["api:7860", "http://api", "[::1]", "*"])
def test_hosts_are_named_without_scheme_and_port(monkeypatch, host):
    monkeypatch.setenv("LAYERSTACK_ALLOWED_HOSTS", f"gateway,{host}")
    with pytest.raises(SettingsError, match=r"LAYERSTACK_ALLOWED_HOSTS=.*is no name of a host"):
        load_settings()
