# SPDX-License-Identifier: Apache-2.0
"""Small numbers in 32-bit words: one little-endian stream of bits per row, filled up to whole words.

GPTQ, compressed-tensors and AWQ all pack so, along one dimension or another. Three bits cross the words' edges: 32
values fill three words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kvopt.weights.storage import from_stream, row_bytes, to_stream


def words_of(count: int, bits: int) -> int:
    """Words of ``count`` values."""
    return -(-count * bits // 32)


def to_words(values: Tensor, bits: int) -> Tensor:
    """Values (R, C) uint8 below 2^bits to (R, words) int32."""
    stream = to_stream(values, bits)
    padded = functional.pad(stream, (0, -stream.shape[1] % 4))
    # flat, for a view of a single row may have any stride
    return padded.flatten().view(torch.int32).view(values.shape[0], -1)


def from_words(words: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of :func:`to_words`: (R, words) int32 to (R, count) uint8."""
    stream = words.flatten().view(torch.uint8).view(words.shape[0], -1)
    return from_stream(stream[:, : row_bytes(count, bits)].contiguous(), count, bits)
