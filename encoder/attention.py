"""Attention over packed sequences with a cached prefix, behind transformers' attention interface.

transformers' own modules stay the model; they call the function registered here with the queries, keys and values of
all M rows, and with the `PackedAttention` of this forward, which knows whose rows are whose.

Two ways to the same numbers: a kernel for sequences of varying length (CUDA in 16 bit), and PyTorch's SDPA over buckets
of sequences of like length (everywhere). Not covered: sliding windows shorter than `max_length`, soft caps, sinks.

Shapes: M rows, B sequences, P prefix tokens, h query heads, g key and value heads, d head size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from encoder.batching import buckets
from encoder.packing import Packing

IMPLEMENTATION = "layerstack_packed"
"""Name of this attention in transformers' interface."""
Kernel = Literal["varlen", "sdpa"]
Cache = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values `[P, g, d]` of the prefix, by layer; empty if there is no prefix."""

_VARLEN_MAX_HEAD_DIM = 256
_VARLEN_OPTIONS = {"scale", "window_size", "enable_gqa", "num_splits"}
# In a bucket the shorter sequences are filled up to the longest. Attention is a few percent of the work, so a quarter
# more of it costs less than more calls.
_GROWTH = 1.25


class PackedAttention(Protocol):
    """The attention of one forward."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend: `query [M, h, d]`, `key` and `value [M, g, d]` -> `[M, h, d]`."""
        ...


def packed_attention(packing: Packing, cache: Cache, kernel: Kernel, *, exact: bool = False) -> PackedAttention:
    """Prepare the attention of one forward.

    Args:
        packing: whose rows are whose.
        cache: the prefix; `packing.prefix_length` tokens for every layer.
        kernel: which implementation.
        exact: give each sequence the same computation whatever else is in the batch.
    """
    return _Varlen(packing, cache, exact=exact) if kernel == "varlen" else _Sdpa(packing, cache, exact=exact)


class RecordingAttention:
    """Plain causal attention of one sequence that keeps keys and values: this is how the prefix gets into a cache.

    Attributes:
        cache: what has been kept so far, in the dtype that was asked for.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.cache: Cache = {}

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend: `query [M, h, d]`, `key` and `value [M, g, d]` -> `[M, h, d]`."""
        self.cache[layer] = key.to(self._dtype, copy=True), value.to(self._dtype, copy=True)
        mask = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril()
        return _sdpa(query[None], key[None], value[None], mask, scale)[0]


def supports_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the installed torch has a variable-length kernel for this."""
    try:
        from torch.nn.attention import varlen  # noqa: PLC0415 - not in every torch that we work with
    except ImportError:
        return False
    known = inspect.signature(varlen.varlen_attn).parameters.keys()
    if torch.version.hip is not None or not known >= _VARLEN_OPTIONS:  # torch 2.10 and 2.11 have fewer
        return False
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return (
        capable and dtype in {torch.bfloat16, torch.float16} and head_dim <= _VARLEN_MAX_HEAD_DIM and head_dim % 8 == 0
    )


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (1, h, M, d)
    key: torch.Tensor,  # (1, g, M, d)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the interface's signature
    scaling: float | None = None,
    packed: PackedAttention | None = None,
    **kwargs: Any,  # noqa: ANN401 - whatever else a model hands to its attention
) -> tuple[torch.Tensor, None]:
    if packed is None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(f"{IMPLEMENTATION} attention supports packed sequences without soft cap and sinks only")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packed(layer, query, key, value, scale)[None], None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)


@dataclass(frozen=True, eq=False)
class _Bucket:
    """B sequences of at most N own rows each.

    Attributes:
        own: `[B, N]`, the rows; behind the end of a sequence any rows, whose results are dropped.
        kept: `[R]`, which of the B * N are real; None for all.
        pads: `[B, m]`, the pad rows; None if there are none.
        mask: `[N, P + N]`, causal, the prefix seen by all. Rows behind the end are keys only to rows behind the end.
    """

    own: torch.Tensor
    kept: torch.Tensor | None
    pads: torch.Tensor | None
    mask: torch.Tensor

    def to(self, device: torch.device) -> _Bucket:
        """Return the same on `device`."""
        kept, pads = (None if tensor is None else tensor.to(device) for tensor in (self.kept, self.pads))
        return _Bucket(self.own.to(device), kept, pads, self.mask.to(device))


class _Sdpa:
    """One SDPA call for each bucket of sequences of like length."""

    def __init__(self, packing: Packing, cache: Cache, *, exact: bool) -> None:
        self._cache = cache
        if exact:
            # Some CPU kernels give other bits for another number of sequences, or another alignment of one.
            runs = [(start, start + 1) for start in range(len(packing.own))]
        else:
            # Pad rows see all own rows, filler included, so with pad rows a bucket's lengths must be equal.
            runs = buckets(packing.own, 1.0 if any(packing.pads) else _GROWTH)
        self._device = torch.device("cpu")
        self._buckets = [_bucket(packing, start, stop) for start, stop in runs]

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self._move_to(query.device)
        out = torch.empty_like(query)  # (M, h, d)
        prefix_key, prefix_value = self._cache.get(layer, (key[:0], value[:0]))
        for bucket in self._buckets:
            keys = _behind_prefix(prefix_key, key, bucket.own)  # (B, P + N, g, d)
            values = _behind_prefix(prefix_value, value, bucket.own)
            rows = bucket.own.flatten()
            if len(rows):
                own = _sdpa(query[bucket.own], keys, values, bucket.mask, scale).flatten(0, 1)  # (B * N, h, d)
                kept = slice(None) if bucket.kept is None else bucket.kept
                out[rows[kept]] = own[kept]
            if bucket.pads is not None:
                out[bucket.pads] = _sdpa(query[bucket.pads], keys, values, None, scale)
        return out

    def _move_to(self, device: torch.device) -> None:
        """Keep the indices where the layers are: once a forward on one device, at every border on several."""
        if device != self._device:
            self._device = device
            self._buckets = [bucket.to(device) for bucket in self._buckets]


def _bucket(packing: Packing, start: int, stop: int) -> _Bucket:
    lengths = torch.tensor(packing.own[start:stop])[:, None]  # (B, 1)
    longest = packing.own[stop - 1]
    within = torch.arange(longest)[None]  # (1, N)
    first = torch.tensor(packing.own_starts[start:stop])[:, None]
    num_pads = packing.pads[start]
    pad_first = torch.tensor(packing.pad_starts[start:stop])[:, None]
    equal = packing.own[start] == longest
    return _Bucket(
        own=first + torch.minimum(within, lengths - 1),
        kept=None if equal else (within < lengths).flatten().nonzero()[:, 0],
        pads=pad_first + torch.arange(num_pads)[None] if num_pads else None,
        mask=torch.ones(longest, packing.prefix_length + longest, dtype=torch.bool).tril(packing.prefix_length),
    )


def _behind_prefix(prefix: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `prefix [P, g, d]` with `rows[index]` behind it: `[B, P + N, g, d]`."""
    return torch.cat([prefix.expand(len(index), -1, -1, -1), rows[index]], dim=1)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """`query [B, N, h, d]`, `key` and `value [B, T, g, d]` -> `[B, N, h, d]`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None and query.device.type == "cuda":
        # With a mask and fewer key heads CUDA has only the slow kernel, which keeps all scores in memory.
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        grouped = False
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


class _Varlen:
    """One call of the variable-length kernel for all own rows, and one for all pad rows."""

    def __init__(self, packing: Packing, cache: Cache, *, exact: bool) -> None:
        self._cache = cache
        self._num_own = sum(packing.own)
        # At least 2: the kernel takes a longest query of 1 to mean exactly one query a sequence.
        self._longest_own, self._longest_pads = max(2, *packing.own), max(2, *packing.pads)
        self._has_pads = any(packing.pads)
        self._longest_keys = packing.prefix_length + self._longest_own
        # With one split the order of summation does not depend on the longest sequence of the batch.
        self._splits = 1 if exact else None
        length = packing.prefix_length
        blocks = [
            block
            for start, own in zip(packing.own_starts, packing.own, strict=True)
            for block in (torch.arange(length), torch.arange(length + start, length + start + own))
        ]
        # Which rows of [prefix ++ own rows] are the keys of the sequences, end to end.
        self._keys = torch.cat(blocks)
        self._own_ends = _ends(packing.own)
        self._pad_ends = _ends(packing.pads)
        self._key_ends = _ends([length + own for own in packing.own])

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        from torch.nn.attention import varlen  # noqa: PLC0415 - not in every torch that we work with

        attend: Any = varlen.varlen_attn  # annotated as if it could return statistics too
        self._move_to(query.device)
        prefix_key, prefix_value = self._cache.get(layer, (key[:0], value[:0]))
        num_own = self._num_own
        keys = torch.cat([prefix_key, key[:num_own]])[self._keys]  # (T, g, d)
        values = torch.cat([prefix_value, value[:num_own]])[self._keys]
        options: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        if self._splits is not None:
            options["num_splits"] = self._splits
        own: torch.Tensor = attend(
            query[:num_own].contiguous(),
            keys,
            values,
            self._own_ends,
            self._key_ends,
            self._longest_own,
            self._longest_keys,
            window_size=(-1, 0),  # causal, the last query at the last key
            **options,
        )
        if not self._has_pads:
            return own
        pads: torch.Tensor = attend(
            query[num_own:].contiguous(),
            keys,
            values,
            self._pad_ends,
            self._key_ends,
            self._longest_pads,
            self._longest_keys,
            **options,
        )
        return torch.cat([own, pads])

    def _move_to(self, device: torch.device) -> None:
        if self._keys.device != device:
            self._keys, self._own_ends, self._pad_ends, self._key_ends = (
                tensor.to(device) for tensor in (self._keys, self._own_ends, self._pad_ends, self._key_ends)
            )


def _ends(lengths: list[int]) -> torch.Tensor:
    """Return where sequences of `lengths` begin and end, end to end: `[B + 1]` int32, beginning with 0."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
