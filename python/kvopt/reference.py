# SPDX-License-Identifier: Apache-2.0
"""Every operator once more, in plain torch: readable and slow.

The oracle of the tests, and what runs where no compiled kernel exists (``_library.py`` says so once). Layouts and rules
are those of ``csrc/common/{quant_format,params}.h``, written down a second time from their description.
"""

from __future__ import annotations

import enum
import functools

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_HALF = 2.0**-24


class Scheme(enum.IntEnum):
    """What a code means. The numbers are part of the operators' schemas."""

    ASYMMETRIC = 0  # scale * (code - zero), a stored zero point per group
    SYMMETRIC = 1  # the zero point is 2^(bits-1)
    NF4 = 2  # scale * book[code], bitsandbytes' code books
    FP4 = 3
    INT8_DYNAMIC = 4  # symmetric, 8 bits, one group per row; the product takes activations as int8 per token

    @property
    def has_book(self) -> bool:
        """Whether codes index a table."""
        return self in (Scheme.NF4, Scheme.FP4)


# bitsandbytes' tables. NF4: quantiles of the normal distribution (QLoRA, appendix E). FP4: sign, two bits of exponent,
# one of mantissa, in units of its largest value, 12; not OCP's E2M1.
BOOKS = {
    Scheme.NF4: torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ]
    ),
    Scheme.FP4: torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12,
}


def group_count(k: int, group_size: int) -> int:
    """Groups in a row of ``k`` columns; the last one may be short."""
    return -(-k // group_size)


def expand_groups(per_group: Tensor, k: int, group_size: int) -> Tensor:
    """(N, groups) to (N, K): each group's value at each of its columns."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :k]


def in_groups(rows: Tensor, group_size: int) -> Tensor:
    """(N, K) to (N, groups, group_size), the last group filled up with zeros."""
    n, k = rows.shape
    groups = group_count(k, group_size)
    return functional.pad(rows, (0, groups * group_size - k)).view(n, groups, group_size)


# --- rounding weights -------------------------------------------------------------------------------------------------


def wquant_rtn(weight: Tensor, bits: int, group_size: int, scheme: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest, by the rule in ``csrc/common/params.h``.

    Args:
        weight: (N, K) float32, float16 or bfloat16.
        bits: 2, 3, 4 or 8.
        group_size: columns per group; K for one group per row.
        scheme: a :class:`Scheme`.

    Returns:
        codes (N, K) uint8, scale (N, groups) float16, zero (N, groups) float16.
    """
    n, k = weight.shape
    top = 2**bits - 1
    grouped = in_groups(weight.float(), group_size)  # padding zeros change no range: every range includes 0
    absmax = grouped.abs().amax(dim=2)
    if Scheme(scheme).has_book:
        scaled = (
            grouped * absmax.clamp(min=1e-38).reciprocal()[..., None]
        )  # rounded twice, as bitsandbytes does
        codes = book_codes(scaled, scheme)
        scale = _stored_scale(absmax)
        zero = torch.zeros_like(scale)
    elif scheme == Scheme.ASYMMETRIC:
        low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
        scale = _stored_scale((high - low) / top)
        zero = (-low / scale).round().clamp(0, top)
        codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    else:
        scale = _stored_scale(absmax / 127 if bits == 8 else (2 * absmax) / top)
        zero = torch.full_like(scale, 2.0 ** (bits - 1))
        codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    return codes.reshape(n, -1)[:, :k].to(torch.uint8).contiguous(), scale.half(), zero.half()


def _stored_scale(scale: Tensor) -> Tensor:
    return scale.half().float().clamp(min=SMALLEST_HALF)


def book_codes(scaled: Tensor, scheme: int) -> Tensor:
    """The codes that bitsandbytes 0.50 chooses on the CPU for values in [-1, 1]; same shape, integer.

    Values in rising order, a threshold midway between neighbours in fp32; what lies on one goes down.
    """
    book = BOOKS[Scheme(scheme)].to(scaled.device)
    order = torch.argsort(book, stable=True)
    sorted_book = book[order]
    thresholds = (sorted_book[:-1] + sorted_book[1:]) / 2
    return order[torch.bucketize(scaled, thresholds)]


def dequantize_codes(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    dtype: torch.dtype,
    scheme: int = Scheme.ASYMMETRIC,
) -> Tensor:
    """``scale * (code - zero)``, or ``scale * book[code]``, in float32 and rounded once to ``dtype``; (N, K)."""
    k = codes.shape[1]
    if Scheme(scheme).has_book:
        value = BOOKS[Scheme(scheme)].to(codes.device)[codes.int()]
    else:
        value = codes.float() - expand_groups(zero.float(), k, group_size)
    return (expand_groups(scale.float(), k, group_size) * value).to(dtype)


# --- double quantisation ----------------------------------------------------------------------------------------------

DOUBLE_BLOCK = 256  # absmax values that share a scale


@functools.cache
def dynamic_map() -> Tensor:
    """The signed "dynamic" 8-bit values of bitsandbytes in rising order, (256,) float32.

    Seven decades; decade 10^(i-6) has 2^i values, the middles of 2^i equal parts of [0.1, 1]. Then 0 and 1.
    Source: Dettmers, 8-bit approximations for parallelism in deep learning (2015). The edges are counted from the
    nearer end with one rounding, as a linspace with fused multiply-add does it, so every machine has the same bits.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        steps = torch.arange(2**i + 1)
        low, high = torch.tensor(0.1), torch.tensor(1.0)
        step = ((high - low) / 2**i).double()
        from_high = high.double() - step * (2**i - steps)
        edges = torch.where(2 * steps < 2**i, low.double() + step * steps, from_high).float()
        middles = torch.tensor(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Absmax (N, groups) float32 to 8 bits: less their mean, in blocks of 256 along the flattened rows.

    Returns:
        codes (N * groups,) uint8, scale (blocks,) float32, offset () float32.
    """
    flat = absmax.float().flatten()
    offset = flat.mean()
    blocks = in_groups((flat - offset)[None], DOUBLE_BLOCK)[0]
    scale = blocks.abs().amax(dim=1)
    scaled = (blocks * scale.clamp(min=1e-38).reciprocal()[:, None]).clamp(-1, 1)
    book = dynamic_map().to(absmax.device)
    codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2)
    return codes.flatten()[: flat.numel()].to(torch.uint8), scale, offset


def expand_absmax(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The inverse of :func:`double_quantize` as fp16, at least 2^-24: (N * groups,) float16."""
    value = dynamic_map().to(codes.device)[codes.int()]
    absmax = value * scale.repeat_interleave(DOUBLE_BLOCK)[: codes.numel()] + offset
    return absmax.half().clamp(min=SMALLEST_HALF)


def wquant_expand_scales(
    absmax_codes: Tensor,
    absmax_scale: Tensor,
    offset: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scheme: int,
    layout: str | None = None,
) -> Tensor:
    """Double-quantised absmax to ``meta`` (int16) of the device's layout."""
    layout = layout or layout_of(absmax_codes.device)
    groups = group_count(k, group_size)
    scale = expand_absmax(absmax_codes, absmax_scale, offset.reshape(())).view(n, groups)
    return _pack_meta(scale, scale, groups, scheme, layout)


# --- layouts ----------------------------------------------------------------------------------------------------------


def layout_of(device: torch.device) -> str:
    """The packed layout that a device's kernels read: ``"tile32"`` (CPU) or ``"mma16"`` (CUDA)."""
    return "tile32" if device.type == "cpu" else "mma16"


def _is_row_major(scheme: int, layout: str) -> bool:
    return layout == "mma16" and scheme == Scheme.INT8_DYNAMIC


def _block(bits: int, layout: str) -> tuple[int, int, int]:
    """Columns and bytes of a block, and the columns that K is padded to."""
    if layout == "tile32":
        return {2: (16, 128, 16), 3: (32, 384, 32), 4: (8, 128, 8), 8: (4, 128, 4)}[bits]
    return {2: (128, 512, 128), 3: (256, 1536, 256), 4: (64, 512, 64), 8: (32, 512, 64)}[bits]


def _tile_bytes(k: int, bits: int, layout: str) -> int:
    columns, size, padded = _block(bits, layout)
    return -(-k // padded) * (padded // columns) * size


def packed_bytes(n: int, k: int, bits: int, scheme: int, layout: str) -> int:
    """Size of the packed codes of an (N, K) weight."""
    if _is_row_major(scheme, layout):
        return n * -(-k // 16) * 16
    return -(-n // (32 if layout == "tile32" else 16)) * _tile_bytes(k, bits, layout)


def meta_count(n: int, groups: int, scheme: int, layout: str) -> int:
    """Number of fp16 values in ``meta``."""
    if _is_row_major(scheme, layout):
        return n
    rows = 32 if layout == "tile32" else 16
    return -(-n // rows) * groups * rows * (2 if scheme == Scheme.ASYMMETRIC else 1)


# Where bits [first, first + width) of every code are: word of the packed buffer and shift in it, each (rows, K).
_Field = tuple[Tensor, Tensor, int, int]


def _fields(rows: Tensor, k: int, bits: int, scheme: int, layout: str) -> list[_Field]:
    row = rows[:, None]
    column = torch.arange(k, device=rows.device)[None, :]
    if _is_row_major(scheme, layout):
        byte = row * (-(-k // 16) * 16) + column
        return [(byte // 4, byte % 4 * 8, 8, 0)]
    columns, size, _ = _block(bits, layout)
    if layout == "tile32":
        of_row = row // 32 * (_tile_bytes(k, bits, layout) // 4) + row % 32 // 16 * 16 + row % 16
        word = of_row + column // columns * (size // 4)
        byte_shift, i = column % 4 * 8, column % columns // 4
        if bits == 3:
            low = (word + i // 4 * 32, byte_shift + i % 4 * 2, 2, 0)
            return [low, (word + 64, byte_shift + i, 1, 2)]
        return [(word, byte_shift + bits * i, bits, 0)]

    block = row // 16 * (_tile_bytes(k, bits, layout) // 4) + column // columns * (size // 4)
    lane = row % 8 * 4 + column % 8 // 2
    i = row % 16 // 8 + column % 16 // 8 * 2  # which of a0..a3
    half = column % 2 * 16  # which of the pair
    step = column % columns // 16
    if bits == 8:
        return [(block + lane * 4 + step * 2 + i // 2, i % 2 * 8 + half, 8, 0)]
    if bits == 4:
        return [(block + lane * 4 + step, i * 4 + half, 4, 0)]
    if bits == 2:
        return [(block + lane * 4 + step // 2, i % 2 * 2 + step % 2 * 4 + i // 2 * 8 + half, 2, 0)]
    fields: list[_Field] = []
    for b in range(3):  # bit by bit: a2 of every fourth step is spread over the three words
        last = torch.where(i == 2, b, torch.where(i == 3, 2, i))
        word = step // 4 * 3 + torch.where(step % 4 < 3, step % 4, last)
        shift = torch.where(step % 4 < 3, 3 * i + b, torch.where(i == 2, 15, 12 + b)) + half
        fields.append((block + word // 4 * 128 + lane * 4 + word % 4, shift, 1, b))
    return fields


def _meta_addresses(rows: Tensor, groups: int, scheme: int, layout: str) -> tuple[Tensor, int]:
    """Index of every scale of the given rows, (rows, groups), and the distance from it to its zero point."""
    row = rows[:, None]
    if _is_row_major(scheme, layout):
        return row, 0
    group = torch.arange(groups, device=rows.device)[None, :]
    zeros = scheme == Scheme.ASYMMETRIC
    if layout == "tile32":
        return (row // 32 * groups + group) * (64 if zeros else 32) + row % 32, 32
    base = (row // 16 * groups + group) * (32 if zeros else 16)
    r = row % 16
    return base + (r % 8 * 4 + r // 8 * 2 if zeros else r % 8 * 2 + r // 8), 1


def _pack_meta(scale: Tensor, zero: Tensor, groups: int, scheme: int, layout: str) -> Tensor:
    n = scale.shape[0]
    index, to_zero = _meta_addresses(torch.arange(n, device=scale.device), groups, scheme, layout)
    meta = torch.zeros(meta_count(n, groups, scheme, layout), dtype=torch.float16, device=scale.device)
    meta[index] = scale
    if scheme == Scheme.ASYMMETRIC:
        meta[index + to_zero] = zero
    return meta.view(torch.int16)


def wquant_pack(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    scheme: int,
    layout: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain codes (N, K) uint8, scale and zero (N, groups) float16 to ``packed`` (uint8) and ``meta`` (int16)."""
    n, k = codes.shape
    layout = layout or layout_of(codes.device)
    rows = torch.arange(n, device=codes.device)
    size = packed_bytes(n, k, bits, scheme, layout)
    words = torch.zeros(size // 4, dtype=torch.int64, device=codes.device)
    stored = codes.long() ^ (0x80 if _is_row_major(scheme, layout) else 0)
    for word, shift, width, first in _fields(rows, k, bits, scheme, layout):
        value = (stored >> first & (1 << width) - 1) << shift
        words.index_add_(0, word.flatten(), value.flatten())
    packed = words.to(torch.int32).view(torch.uint8)
    return packed, _pack_meta(scale, zero, group_count(k, group_size), scheme, layout)


def wquant_unpack(
    packed: Tensor,
    meta: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scheme: int,
    layout: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`wquant_pack`: codes, scale, zero."""
    rows = torch.arange(n, device=packed.device)
    return _unpack_rows(packed, meta, rows, k, bits, group_size, scheme, layout or layout_of(packed.device))


def _unpack_rows(
    packed: Tensor,
    meta: Tensor,
    rows: Tensor,
    k: int,
    bits: int,
    group_size: int,
    scheme: int,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    words = packed.view(torch.int32)
    parts = [
        (words[word] >> shift.int() & (1 << width) - 1) << first
        for word, shift, width, first in _fields(rows, k, bits, scheme, layout)
    ]
    codes = functools.reduce(torch.bitwise_or, parts)
    if _is_row_major(scheme, layout):
        codes = codes ^ 0x80
    index, to_zero = _meta_addresses(rows, group_count(k, group_size), scheme, layout)
    values = meta.view(torch.float16)
    scale = values[index]
    if scheme == Scheme.ASYMMETRIC:
        zero = values[index + to_zero]
    else:
        zero = torch.full_like(scale, 0.0 if Scheme(scheme).has_book else 2.0 ** (bits - 1))
    return codes.to(torch.uint8), scale, zero


def wquant_rows(
    packed: Tensor,
    meta: Tensor,
    rows: Tensor,
    k: int,
    bits: int,
    group_size: int,
    scheme: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense rows (rows, K) with the given numbers, in ``dtype``: an embedding's lookup in a packed table."""
    layout = layout_of(packed.device)
    codes, scale, zero = _unpack_rows(packed, meta, rows, k, bits, group_size, scheme, layout)
    return dequantize_codes(codes, scale, zero, group_size, dtype, scheme)


def wquant_dequantize(
    packed: Tensor,
    meta: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scheme: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense (N, K) weight that the packed one stands for, in ``dtype``."""
    codes, scale, zero = wquant_unpack(packed, meta, n, k, bits, group_size, scheme)
    return dequantize_codes(codes, scale, zero, group_size, dtype, scheme)


# --- the product ------------------------------------------------------------------------------------------------------


def round_activations(x: Tensor, group_size: int) -> Tensor:
    """Rows (M, K) rounded to int8 with one scale per row and group, max |x| / 127; float32, same shape."""
    grouped = in_groups(x.float(), group_size)
    scale = grouped.abs().amax(dim=2, keepdim=True) / 127
    codes = torch.where(scale == 0, 0.0, (grouped / scale).round())
    return (codes * scale).view(x.shape[0], -1)[:, : x.shape[1]]


def split_swiglu(h: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N) whose columns alternate in eights between gate and up: the two, each (..., N / 2)."""
    pairs = h.reshape(*h.shape[:-1], -1, 2, 8)
    return pairs[..., 0, :].flatten(-2), pairs[..., 1, :].flatten(-2)


def join_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The inverse of :func:`split_swiglu`."""
    eights = [part.reshape(*part.shape[:-1], -1, 8) for part in (gate, up)]
    return torch.stack(eights, dim=-2).flatten(-3)


def linear_unrounded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_size: int,
    scheme: int,
    activation_bits: int = 16,
    input_scale: Tensor | None = None,
    low_rank_x: Tensor | None = None,
    low_rank_w: Tensor | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """What :func:`qlinear` computes, with a dense weight (N, K) and in its type, not yet rounded to that of ``x``.

    ``addend`` (M, N) is added before SwiGLU.
    """
    compute, k = weight.dtype, x.shape[-1]
    rows = x.reshape(-1, k)
    if input_scale is not None:
        rows = rows.float() * input_scale.float()
    if scheme == Scheme.INT8_DYNAMIC:
        rows = round_activations(rows, k)
    elif activation_bits == 8:
        rows = round_activations(rows, group_size)
    h = rows.to(compute) @ weight.T
    if bias is not None:
        h = h + bias.to(compute)
    if low_rank_x is not None and low_rank_w is not None:
        h = h + low_rank_x.reshape(-1, low_rank_x.shape[-1]).to(compute) @ low_rank_w.to(compute).T
    if addend is not None:
        h = h + addend
    if swiglu:
        gate, up = split_swiglu(h)
        h = functional.silu(gate) * up
    y = h.view(*x.shape[:-1], h.shape[-1])
    return y if residual is None else y + residual.to(compute)


def qlinear(
    x: Tensor,
    packed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    scheme: int,
    activation_bits: int = 16,
    input_scale: Tensor | None = None,
    low_rank_x: Tensor | None = None,
    low_rank_w: Tensor | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The product with its epilogue, as :func:`kvopt.ops.qlinear` documents it, in float32 and rounded once."""
    weight = wquant_dequantize(packed, meta, n, x.shape[-1], bits, group_size, scheme, torch.float32)
    return linear_unrounded(
        *(x, weight, bias, group_size, scheme, activation_bits),
        *(input_scale, low_rank_x, low_rank_w, swiglu, residual),
    ).to(x.dtype)
