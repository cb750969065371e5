# SPDX-License-Identifier: Apache-2.0
"""Sink keys at positions inside the cache, as in StreamingLLM, without touching the other keys.

Attention with RoPE sees differences of positions only. Of the tokens that stay, the recent ones are as far from the
query as ever; only the sinks have come nearer, by as many positions as tokens were evicted between them and the
window. So the keys in the window stay as they are, and the s sink keys are turned by that gap, each step afresh from
the original ones: no error accumulates. That moves L·B·H·s vectors per token, for all layers in one go.
"""

from __future__ import annotations

import torch

from kvopt.cache.rotary import Rotary
from kvopt.cache.slots import Rows, Slots


class Sinks:
    """The original keys of the first ``first`` tokens of each row, all layers.

    Attributes:
        original: (L, B, H, s, D) keys at their original positions; 0 for tokens that have not come yet.
        slots: (B, s) int64, where they lie, valid until ``stale``.
    """

    def __init__(self, rotary: Rotary, first: int, layers: int) -> None:
        self.first = first
        self.rotary = rotary
        self._layers = layers
        self.clear()

    def clear(self) -> None:
        """Forgets everything and frees the memory."""
        self.original: torch.Tensor | None = None
        self.slots: torch.Tensor | None = None
        self.stale = True

    def keep(self, layer: int, keys: torch.Tensor, columns: torch.Tensor, arrived: torch.Tensor) -> None:
        """Takes the sinks among new ``keys`` (B, H, q, D): sink j is ``columns[:, j]`` where ``arrived[:, j]``."""
        batch, heads, _, dim = keys.shape
        if self.original is None:
            with torch.inference_mode(False):
                self.original = keys.new_zeros((self._layers, batch, heads, self.first, dim))
                self.slots = torch.zeros((batch, self.first), dtype=torch.int64, device=keys.device)
        new = keys.gather(2, columns[:, None, :, None].expand(batch, heads, self.first, dim))
        self.original[layer].copy_(torch.where(arrived[:, None, :, None], new, self.original[layer]))

    def move(self, gap: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The sinks of each layer, (B, H, s, D), turned by ``gap`` (B,) positions."""
        assert self.original is not None
        return self.rotary.move(self.original, gap).unbind(0)

    def locate(self, slots: Slots, rows: Rows) -> torch.Tensor:
        """(B, s) int64 slots to write the sinks to. A row that still has holes has evicted nothing: slot 0, a hole."""
        if self.stale or self.slots is None:
            self.slots = torch.where((rows.holes <= rows.reserve)[:, None], slots.find(self.first), 0)
            self.stale = rows.most_holes > rows.most_reserve
        return self.slots

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps ``rows`` (int64) of the batch, in that order."""
        if self.original is not None and self.slots is not None:
            with torch.inference_mode(False):
                self.original = self.original.index_select(1, rows)
                self.slots = self.slots.index_select(0, rows)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held, for counting bytes."""
        return [t for t in (self.original, self.slots) if t is not None]
