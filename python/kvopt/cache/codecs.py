# SPDX-License-Identifier: Apache-2.0
"""How a key or value is stored. A codec makes stores; a store holds the keys, or the values, of one layer.

The cache speaks to stores only, by slot: append at the end, put into chosen slots, take a selection, read. The
attention never learns how many bits there were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 256  # slots by which a cache without a budget grows


@dataclass(frozen=True)
class ModelType:
    """The default codec: keys and values in the type in which the model computes them. Nothing is lost."""

    name = "model"

    def bytes_per_vector(self, dim: int, dtype: torch.dtype) -> int:
        """Bytes of one key or value vector of ``dim`` numbers."""
        return dim * dtype.itemsize

    def store(self, like: torch.Tensor, slots: int | None) -> PlainStore:
        """A store for vectors like ``like`` (B, H, any, D); ``slots`` are allocated at once, None grows in blocks."""
        return PlainStore(like, slots)


class PlainStore:
    """One tensor (B, H, capacity, D) in the model's type, written in place."""

    def __init__(self, like: torch.Tensor, slots: int | None) -> None:
        self._grows = slots is None
        # Zeros, because empty slots are masked: 0 weight times whatever lay in the memory could be NaN.
        self._data = like.new_zeros((like.shape[0], like.shape[1], slots or 0, like.shape[3]))

    def append(self, vectors: torch.Tensor, at: int) -> None:
        """Writes (B, H, q, D) into slots ``at … at + q - 1``."""
        self._reserve(at, at + vectors.shape[2])
        self._data.narrow(2, at, vectors.shape[2]).copy_(vectors)

    def put(self, vectors: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes (B, H, m, D) into ``slots``, int64 and expanded to the same shape."""
        self._data.scatter_(2, slots, vectors)

    def take(self, vectors: torch.Tensor, columns: torch.Tensor) -> None:
        """Fills the first m slots with ``columns`` (B, 1 or H, m) of ``vectors`` (B, H, n, D), a tensor not our own."""
        self._reserve(0, columns.shape[2])
        index = columns.unsqueeze(3).expand(-1, vectors.shape[1], -1, vectors.shape[3])
        self._data.narrow(2, 0, columns.shape[2]).copy_(vectors.gather(2, index))

    def read(self, n: int) -> torch.Tensor:
        """The first ``n`` slots, (B, H, n, D), without a copy."""
        return self._data if n == self._data.shape[2] else self._data.narrow(2, 0, n)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps ``rows`` (int64) of the batch, in that order."""
        with torch.inference_mode(False):
            self._data = self._data.index_select(0, rows)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this store holds, for counting bytes."""
        return [self._data]

    def _reserve(self, used: int, needed: int) -> None:
        have = self._data.shape[2]
        if needed <= have:
            return
        assert self._grows, f"{needed} slots asked of a store of {have}"
        batch, heads, _, dim = self._data.shape
        with torch.inference_mode(
            False
        ):  # written in place later, perhaps outside the caller's inference mode
            grown = self._data.new_zeros((batch, heads, -(-needed // BLOCK) * BLOCK, dim))
        grown.narrow(2, 0, used).copy_(self._data.narrow(2, 0, used))
        self._data = grown


Codec = ModelType
