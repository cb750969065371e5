# SPDX-License-Identifier: Apache-2.0
"""Codes as a checkpoint stores them: plain, dense, the same on every device.

A row is a little-endian stream of bits: column c has the bits from ``c * bits`` on, and the row ends with its last byte
filled up with zeros. So 8 bits are a byte each, of 4 bits the even column is the low nibble, and eight codes of 3 bits
fill three bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a row of ``k`` codes."""
    return -(-k * bits // 8)


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) uint8 to (N, ⌈K * bits / 8⌉) uint8."""
    if bits == 8:
        return codes
    n, k = codes.shape
    eights = functional.pad(codes, (0, -k % 8)).view(n, -1, 8)  # eight codes are `bits` whole bytes
    stream = torch.zeros(*eights.shape[:2], bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= eights[..., i] >> (8 - shift)
    return stream.view(n, -1)[:, : row_bytes(k, bits)].contiguous()


def from_stream(stream: Tensor, k: int, bits: int) -> Tensor:
    """The inverse of :func:`to_stream`.

    Raises:
        ValueError: not uint8 rows of the size that ``k`` codes have.
    """
    if stream.dtype != torch.uint8 or stream.dim() != 2 or stream.shape[1] != row_bytes(k, bits):
        raise ValueError(
            f"codes: expected uint8 rows of {row_bytes(k, bits)} bytes for {k} columns of {bits} bits, got "
            f"{tuple(stream.shape)} {stream.dtype}"
        )
    if bits == 8:
        return stream
    n = stream.shape[0]
    eights = functional.pad(stream, (0, -stream.shape[1] % bits)).view(n, -1, bits)
    codes = torch.empty(*eights.shape[:2], 8, dtype=torch.uint8, device=stream.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = eights[..., byte] >> shift
        if shift + bits > 8:
            code = code | eights[..., byte + 1] << (8 - shift)
        codes[..., i] = code & (1 << bits) - 1
    return codes.view(n, -1)[:, :k].contiguous()
