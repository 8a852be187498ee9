import base64

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from api.jsonformat import Base64Text
from api.pieces import Pieces
from api.rows import Constant

CONSTANT = np.random.default_rng(0).integers(0, 256, (4, 7), dtype=np.uint8)


@given(runs=st.lists(st.binary(max_size=9) | st.integers(1, len(CONSTANT)), max_size=12))
def test_bytes_that_come_in_runs_are_one_text(runs):
    constant, pieces, expected = Constant(CONSTANT), Pieces(), b""
    text = Base64Text(pieces)
    for run in runs:
        if isinstance(run, int):
            text.write_constant(constant, run)
            expected += CONSTANT[:run].tobytes()
        else:
            text.write(memoryview(run))
            expected += run
    text.finish()
    assert b"".join(pieces.finish()) == base64.b64encode(expected)
