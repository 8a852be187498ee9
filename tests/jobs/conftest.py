import pytest

from jobs.records import EncoderInfo
from jobs.store import JobStore


@pytest.fixture
def info():
    """A small encoder that nobody loads: these tests are about files."""
    return EncoderInfo(
        model="m",
        revision=None,
        preset="flux2-dev",
        layers=(1, 2),
        max_length=16,
        embed_dim=4,
        num_prefix_tokens=2,
        dtype="float32",
        device="cpu",
        fingerprint="0123456789abcdef",
        random_weights=True,
    )


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path)
