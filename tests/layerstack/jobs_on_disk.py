"""Job folders as `layerstack jobs fetch` leaves them, without an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from jobs.files import sha256_of
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import Manifest, as_json
from jobs.tensors import Array, dense_rows

D, P, L = 6, 2, 8
LAYERS = (10, 20, 30)
PREFIX = np.arange(P * D, dtype=np.float32).reshape(P, D)
PAD = np.full(D, -1, np.float32)


def own_rows(index: int) -> Array:
    """1 to 5 rows, `[n, D]`, whose values tell the row."""
    return np.random.default_rng(index).integers(1, 100, (1 + index % 5, D)).astype(np.float32)


def dense(index: int) -> Array:
    return dense_rows(own_rows(index), prefix_rows=PREFIX, pad_row=PAD, max_length=L)


def write_job(
    folder: Path,
    count: int = 10,
    rows_per_part: int = 4,
    *,
    bad: tuple[int, ...] = (),
    cut: tuple[int, ...] = (),
    ids: Mapping[int, str] | None = None,
    rows: Callable[[int], Array] = own_rows,
    num_tokens: Callable[[int], int] | None = None,
    **header: object,
) -> Path:
    """Write a job of `count` prompts, some of which failed or were cut; return its folder."""
    options = {"layout": "own_rows", "dtype": "float32", "fingerprint": "f", "prefix_rows": PREFIX, "pad_row": PAD}
    head = PartHeader.build(**options | header, max_length=L, layers=LAYERS)
    (folder / "parts").mkdir(parents=True)
    reports = []
    for number, start in enumerate(range(0, count, rows_per_part)):
        path = folder / "parts" / f"{number:05d}.parquet"
        with path.open("wb") as file, PartWriter(file, head, "none") as part:
            for index in range(start, min(start + rows_per_part, count)):
                name = (ids or {}).get(index, f"id{index}")
                if index in bad:
                    part.write(EncodedRow(index, name, f"p{index}", error="why"))
                else:
                    own = rows(index)
                    tokens = len(own) + P if num_tokens is None else num_tokens(index)
                    part.write(EncodedRow(index, name, f"p{index}", own, tokens, index in cut))
        reports.append(part.counts.report(number, path.stat().st_size, sha256_of(path)))
    parts = [report.part for report in reports]
    names = ("rows", "bytes", "succeeded", "failed", "truncated", "tokens")
    manifest = Manifest(
        job_id="01ARZ3NDEKTSV4RRFFQ69G5FAV",
        fingerprint=head.fingerprint,
        finished_at=datetime.now(UTC),
        parts=parts,
        errors=[error for report in reports for error in report.errors],
        **{name: sum(getattr(part, name) for part in parts) for name in names},
    )
    (folder / "manifest.json").write_bytes(as_json(manifest))
    return folder


def flip_byte(path: Path) -> None:
    """Damage a file in its middle, leaving its size as it is."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
