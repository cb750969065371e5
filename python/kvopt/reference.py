# SPDX-License-Identifier: Apache-2.0
"""Every operator once more, in plain torch: readable and slow.

The oracle of the tests, and what runs where no compiled kernel exists (``_library.py`` says so once). The layouts are
those of ``csrc/common/quant_format.h``, written down a second time from their description.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_HALF = 2.0**-24


def group_count(k: int, group_size: int) -> int:
    """Groups in a row of ``k`` columns; the last one may be short."""
    return -(-k // group_size)


def expand_groups(per_group: Tensor, k: int, group_size: int) -> Tensor:
    """(N, groups) to (N, K): each group's value at each of its columns."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :k]


def wquant_rtn(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest, by the rule in ``csrc/common/params.h``.

    Args:
        weight: (N, K) float32, float16 or bfloat16.
        bits: 4 or 8.
        group_size: columns per group; K for one group per row.
        symmetric: one zero point, 2^(bits-1), for all.

    Returns:
        codes (N, K) uint8, scale (N, groups) float16, zero (N, groups) float16.
    """
    n, k = weight.shape
    top = 2**bits - 1
    groups = group_count(k, group_size)
    padded = torch.zeros(n, groups * group_size, device=weight.device)
    padded[:, :k] = weight.float()
    grouped = padded.view(n, groups, group_size)  # padding zeros change no range: every range includes 0
    if symmetric:
        absmax = grouped.abs().amax(dim=2)
        scale = absmax / 127 if bits == 8 else (2 * absmax) / top
    else:
        low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
        scale = (high - low) / top
    scale = scale.half().float().clamp(min=SMALLEST_HALF)
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
    codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    return codes.view(n, -1)[:, :k].to(torch.uint8).contiguous(), scale.half(), zero.half()


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """``scale * (codes - zero)`` in float32, rounded once to ``dtype``; (N, K)."""
    k = codes.shape[1]
    value = codes.float() - expand_groups(zero.float(), k, group_size)
    return (expand_groups(scale.float(), k, group_size) * value).to(dtype)


def layout_of(device: torch.device) -> str:
    """The packed layout that a device's kernels read: ``"tile32"`` (CPU) or ``"mma16"`` (CUDA)."""
    return "tile32" if device.type == "cpu" else "mma16"


def packed_bytes(n: int, k: int, bits: int, layout: str) -> int:
    """Size of the packed codes of an (N, K) weight."""
    if layout == "tile32":
        return -(-n // 32) * -(-k // (8 if bits == 4 else 4)) * 128
    return -(-n // 16) * -(-k // 64) * 512 * (1 if bits == 4 else 2)


def meta_count(n: int, groups: int, symmetric: bool, layout: str) -> int:
    """Number of fp16 values in ``meta``."""
    rows = 32 if layout == "tile32" else 16
    return -(-n // rows) * groups * rows * (1 if symmetric else 2)


def _code_addresses(rows: Tensor, k: int, bits: int, layout: str) -> tuple[Tensor, Tensor]:
    """Byte and shift of every code of the given rows, each (rows, K)."""
    row = rows[:, None]
    column = torch.arange(k, device=rows.device)[None, :]
    if layout == "tile32":
        width = 8 if bits == 4 else 4
        tile_bytes = -(-k // width) * 128
        byte = row // 32 * tile_bytes + column // width * 128
        byte = byte + row % 32 // 16 * 64 + row % 16 * 4 + column % 4
        return byte, (column % width // 4 * 4).expand_as(byte)
    width = 64 if bits == 4 else 32
    tile_bytes = -(-k // 64) * (64 // width) * 512
    step = column % width // 16
    lane = row % 8 * 4 + column % 16 // 4
    fragment = column % 2 + row % 16 // 8 * 2 + column % 4 // 2 * 4
    byte = row // 16 * tile_bytes + column // width * 512 + lane * 16
    if bits == 8:
        byte = byte + step * 8 + fragment
        return byte, torch.zeros_like(byte)
    nibble = fragment // 2 + fragment % 2 * 4
    return byte + step * 4 + nibble // 2, nibble % 2 * 4


def _meta_addresses(rows: Tensor, groups: int, symmetric: bool, layout: str) -> tuple[Tensor, int]:
    """Index of every scale of the given rows, (rows, groups), and the distance from it to its zero point."""
    row = rows[:, None]
    group = torch.arange(groups, device=rows.device)[None, :]
    if layout == "tile32":
        stride = 32 if symmetric else 64
        return (row // 32 * groups + group) * stride + row % 32, 32
    stride = 16 if symmetric else 32
    base = (row // 16 * groups + group) * stride
    r = row % 16
    inside = r % 8 * 2 + r // 8 if symmetric else r % 8 * 4 + r // 8 * 2
    return base + inside, 1


def wquant_pack(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    layout: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain codes (N, K) uint8, scale and zero (N, groups) float16 to ``packed`` (uint8) and ``meta`` (int16)."""
    n, k = codes.shape
    layout = layout or layout_of(codes.device)
    rows = torch.arange(n, device=codes.device)
    byte, shift = _code_addresses(rows, k, bits, layout)
    packed = torch.zeros(packed_bytes(n, k, bits, layout), dtype=torch.int32, device=codes.device)
    packed.index_add_(0, byte.flatten(), (codes.int() << shift.int()).flatten())
    groups = group_count(k, group_size)
    index, to_zero = _meta_addresses(rows, groups, symmetric, layout)
    meta = torch.zeros(meta_count(n, groups, symmetric, layout), dtype=torch.float16, device=codes.device)
    meta[index] = scale
    if not symmetric:
        meta[index + to_zero] = zero
    return packed.to(torch.uint8), meta.view(torch.int16)


def wquant_unpack(
    packed: Tensor,
    meta: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    layout: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`wquant_pack`: codes, scale, zero."""
    rows = torch.arange(n, device=packed.device)
    return _unpack_rows(
        packed, meta, rows, k, bits, group_size, symmetric, layout or layout_of(packed.device)
    )


def _unpack_rows(
    packed: Tensor,
    meta: Tensor,
    rows: Tensor,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    byte, shift = _code_addresses(rows, k, bits, layout)
    codes = (packed[byte].int() >> shift.int()) & (2**bits - 1)
    index, to_zero = _meta_addresses(rows, group_count(k, group_size), symmetric, layout)
    values = meta.view(torch.float16)
    scale = values[index]
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else values[index + to_zero]
    return codes.to(torch.uint8), scale, zero


def wquant_rows(
    packed: Tensor,
    meta: Tensor,
    rows: Tensor,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The dense rows (rows, K) with the given numbers, in ``dtype``: an embedding's lookup in a packed table."""
    layout = layout_of(packed.device)
    codes, scale, zero = _unpack_rows(packed, meta, rows, k, bits, group_size, symmetric, layout)
    return dequantize_codes(codes, scale, zero, group_size, dtype)


def wquant_dequantize(
    packed: Tensor,
    meta: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The dense (N, K) weight that the packed one stands for, in ``dtype``."""
    codes, scale, zero = wquant_unpack(packed, meta, n, k, bits, group_size, symmetric)
    return dequantize_codes(codes, scale, zero, group_size, dtype)


def qlinear(
    x: Tensor,
    packed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> Tensor:
    """``x @ w^T + bias`` with the dequantised weight in float32; x (..., K) to (..., N), in the dtype of ``x``."""
    weight = wquant_dequantize(packed, meta, n, x.shape[-1], bits, group_size, symmetric, torch.float32)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
