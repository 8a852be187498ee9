"""Finds values of `prompt_embeds` where they lie in a mapped file, so that no copy of their row group is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

_COLUMN = 3  # of the leaves of `jobs.parts.PART_SCHEMA`
_MOST_STEPS = 64
_PREFIX_BYTES = 4  # a plain value is its length, little-endian, and then its bytes


def plain_value(
    mapped: pa.MemoryMappedFile, group: pq.RowGroupMetaData, sizes: Sequence[Iterable[int]]
) -> pa.Buffer | None:
    """Return the first of the last values of a row group, without reading any, or None if they lie otherwise.

    Plain values end where their column ends, each has its length in front, and what length it can have is known. So
    they are found from the end: that each length on the way is just one of those shows that they lie as expected. They
    do not if they are compressed, or a page begins among them; nor are they looked for behind very many others.

    Args:
        mapped: the file.
        group: the row group's metadata.
        sizes: of each value from the wanted one to the group's last, the bytes that it can have; values that are null
            are left out, for nothing is stored of them.
    """
    column = group.column(_COLUMN)
    if len(sizes) > _MOST_STEPS or column.path_in_schema != "prompt_embeds" or column.compression != "UNCOMPRESSED":
        return None
    start = column.data_page_offset
    end, size = start + column.total_compressed_size, 0
    for possible in reversed(sizes):
        end -= size
        fitting = [
            each
            for each in possible
            if (place := end - each - _PREFIX_BYTES) >= start
            and int.from_bytes(mapped.read_at(_PREFIX_BYTES, place), "little") == each
        ]
        if len(fitting) != 1:
            return None
        size = fitting[0] + _PREFIX_BYTES
    mapped.seek(end - size + _PREFIX_BYTES)
    return mapped.read_buffer(size - _PREFIX_BYTES)
