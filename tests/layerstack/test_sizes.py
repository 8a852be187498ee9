import pytest

from layerstack.sizes import count_text, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345, "12.3 kB"), (999_949, "999.9 kB"),
        (999_950, "1.0 MB"), (15_728_640, "15.7 MB"), (10**12, "1.0 TB"), (10**18, "1000.0 PB"),
    ],
)  # fmt: skip
def test_bytes_have_the_unit_that_people_read_them_in(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 parts"), (1, "1 part"), (2, "2 parts"), (1234, "1,234 parts")])
def test_one_of_something_is_no_plural(count, text):
    assert count_text(count, "part") == text
