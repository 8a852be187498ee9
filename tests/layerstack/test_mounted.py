import pytest

from jobs.settings import Settings
from layerstack.mounted import mounted_model


@pytest.mark.parametrize("place", ["config.json", "text_encoder/config.json"])
def test_a_mounted_folder_with_a_model_is_the_model(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    assert mounted_model(Settings(model_mount=str(tmp_path), model="other/one")) == str(tmp_path)


def test_one_with_something_else_in_it_is_not(tmp_path):
    (tmp_path / "README.md").touch()
    assert mounted_model(Settings(model_mount=str(tmp_path))) is None


def test_where_nothing_is_mounted_there_is_none(tmp_path):
    assert mounted_model(Settings(model_mount=str(tmp_path / "nowhere"))) is None
    assert mounted_model(Settings()) is None


def test_it_is_looked_for_where_the_model_is_said_to_be(tmp_path):
    (tmp_path / "config.json").touch()
    assert mounted_model(Settings(model_mount=str(tmp_path), model_subfolder="encoder")) is None
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").touch()
    assert mounted_model(Settings(model_mount=str(tmp_path), model_subfolder="encoder")) == str(tmp_path)
