"""The first layers of a decoder, and the two ways to run them: packed, and padded as transformers would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from encoder.attention import IMPLEMENTATION, Cache, Kernel, RecordingAttention, packed_attention
from encoder.packing import Packing


class Trunk:
    """A transformers decoder without its final norm, and the layers whose outputs are stacked.

    Shapes: M rows, H hidden size, D = K * H for K layers. Not thread-safe.

    Attributes:
        layers: the layers asked for, counted from 1.
        embed_dim: D.
        dtype: of the weights and of every row.
        device: of the embedding, and of every row that is returned.
    """

    def __init__(self, module: nn.Module, layers: tuple[int, ...], kernel: Kernel, *, exact: bool) -> None:
        decoder: Any = module  # any decoder of transformers; what we call of it has no common type
        self._module = decoder
        self._kernel = kernel
        self._exact = exact
        embedding: torch.Tensor = self._module.get_input_embeddings().weight
        self.layers = layers
        self._hidden_size: int = self._module.config.hidden_size
        self.embed_dim = len(layers) * self._hidden_size
        self.dtype: torch.dtype = embedding.dtype
        self.device: torch.device = embedding.device

    @torch.no_grad()
    def record_prefix(self, ids: list[int]) -> tuple[torch.Tensor, Cache]:
        """Run the prefix by itself -> its rows `[P, D]`, and its keys and values.

        It is done once and every prompt's rows depend on it, so it is done in float32 whatever the weights are.
        """
        attention = RecordingAttention(self.dtype)
        if not ids:
            return torch.empty(0, self.embed_dim, dtype=self.dtype, device=self.device), {}
        with self._in_float32():
            rows = self._run(torch.tensor(ids), torch.arange(len(ids)), attention)
        return rows, attention.cache

    @torch.no_grad()
    def packed(self, packing: Packing, cache: Cache) -> torch.Tensor:
        """Run packed sequences behind the prefix in `cache` -> rows `[M, D]`."""
        if not len(packing.ids):
            return torch.empty(0, self.embed_dim, dtype=self.dtype, device=self.device)
        attention = packed_attention(packing, cache, self._kernel, exact=self._exact)
        return self._run(packing.ids, packing.positions, attention)

    @torch.no_grad()
    def padded(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Run padded sequences with transformers' own attention, as diffusers does: `[B, L]` twice -> `[B, L, D]`."""
        rows = torch.empty(*input_ids.shape, self.embed_dim, dtype=self.dtype, device=self.device)
        self._module.set_attn_implementation("sdpa")
        try:
            with self._writing_to(rows):
                self._module(
                    input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device), use_cache=False
                )
        finally:
            self._module.set_attn_implementation(IMPLEMENTATION)
        return rows

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, attention: object) -> torch.Tensor:
        rows = torch.empty(1, len(ids), self.embed_dim, dtype=self.dtype, device=self.device)  # (1, M, D)
        with self._writing_to(rows):
            self._module(
                input_ids=ids[None].to(self.device, non_blocking=True),
                position_ids=positions[None].to(self.device, non_blocking=True),
                use_cache=False,
                packed=attention,
            )
        return rows[0]

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Let hidden states be float32, and each layer's weights while it runs; 16-bit weights come back unchanged."""
        offloaded = any(parameter.is_meta for parameter in self._module.parameters())
        if self.dtype is torch.float32 or offloaded:  # accelerate brings offloaded weights as they are
            yield
            return

        stored: list[tuple[nn.Parameter, torch.Tensor]] = []

        def widen(layer: nn.Module, _args: Any) -> None:  # noqa: ANN401 - torch's hook signature
            for parameter in layer.parameters():
                stored.append((parameter, parameter.data))
                parameter.data = parameter.data.float()

        def narrow(*_hooked: Any) -> None:  # noqa: ANN401 - the same
            while stored:
                parameter, weights = stored.pop()
                parameter.data = weights

        hooks = [self._module.get_input_embeddings().register_forward_hook(lambda *hooked: hooked[-1].float())]
        for layer in self._module.layers:
            hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(narrow)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            narrow()

    @contextmanager
    def _writing_to(self, rows: torch.Tensor) -> Iterator[None]:
        """Let each layer asked for write its output to its columns of `rows`, so that no other output stays alive."""
        hooks = []
        for position, layer in enumerate(self.layers):
            columns = rows[..., position * self._hidden_size : (position + 1) * self._hidden_size]

            def write(_layer: nn.Module, _args: Any, output: Any, columns: torch.Tensor = columns) -> None:  # noqa: ANN401 - torch's hook signature
                columns.copy_(output[0] if isinstance(output, tuple) else output, non_blocking=True)

            hooks.append(self._module.layers[layer - 1].register_forward_hook(write))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
