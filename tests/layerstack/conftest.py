import pytest

from layerstack import cli


@pytest.fixture
def run(capsys, monkeypatch, stack):
    """Run a command against the stack; returns exit code, standard output and standard error."""

    def call(*words, url=stack.url):
        monkeypatch.setenv("LAYERSTACK_URL", url)
        monkeypatch.setattr("sys.argv", ["layerstack", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call
