"""The first look at what a server answers."""

import pytest


@pytest.mark.parametrize("words", [(), ("",)])
def test_it_shows_what_comes_back(stack, play, words):
    ended = play("client.py", *words, "--url", stack.url)
    assert ended.returncode == 0, ended.stderr
    assert "prompt_embeds (2, 512, 96) torch.float32, text_ids (2, 512, 4) torch.int64" in ended.stdout
    assert "truncated [False, False]" in ended.stdout


def test_own_rows_are_compared_with_the_dense_prompt(stack, play):
    ended = play("client.py", "a fox in the snow", LAYERSTACK_URL=stack.url)
    assert "num_tokens [38, 38]" in ended.stdout, ended.stderr
    assert "6 own rows of 512: 2,304 bytes, where the dense prompt has 196,608, 85.3 times as many" in ended.stdout


def test_a_server_that_is_not_there_is_told_in_one_line(play, nobody):
    ended = play("client.py", "--url", nobody)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"no answer from {nobody}")
    assert ended.stderr.count("\n") == 1
