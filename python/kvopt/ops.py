# SPDX-License-Identifier: Apache-2.0
"""The operators, typed. Each calls its compiled kernel, or ``reference`` where none exists (said once, loudly).

A weight is (N, K). A format is ``bits`` (4 or 8), ``group_size`` (columns per group, K for one group per row) and
``symmetric``. ``packed`` and ``meta`` are in the layout of the device they are on (``csrc/common/quant_format.h``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvopt import _library, reference


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
    """``x @ w^T + bias`` straight from the packed weight, activations in 16-bit precision or better.

    Args:
        x: (..., K) float32, float16 or bfloat16; any strides (made contiguous where it is not).
        packed: uint8, the codes.
        meta: int16, the scales and zero points as fp16 bit patterns.
        bias: (N,) in the dtype of ``x``, or None.
        n: rows of the weight, N.
        bits: 4 or 8.
        group_size: columns per group.
        symmetric: no stored zero points.

    Returns:
        (..., N) in the dtype of ``x``. Differentiable in ``x`` and ``bias``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
    """
    if x.device.type in _library.compiled:
        result: Tensor = torch.ops.kvopt.qlinear(x, packed, meta, bias, n, bits, group_size, symmetric)
        return result
    _library.announce_fallback(x.device.type)
    return reference.qlinear(x, packed, meta, bias, n, bits, group_size, symmetric)


def wquant_rtn(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: codes (N, K) uint8, scale (N, groups) float16, zero (N, groups) float16.

    The rule stands in ``csrc/common/params.h``; CPU, CUDA and reference agree bit for bit. ``weight`` must be finite.
    """
    if weight.device.type in _library.compiled:
        codes, scale, zero = torch.ops.kvopt.wquant_rtn(weight, bits, group_size, symmetric)
        return codes, scale, zero
    _library.announce_fallback(weight.device.type)
    return reference.wquant_rtn(weight, bits, group_size, symmetric)


def wquant_pack(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Plain codes, scale and zero (as :func:`wquant_rtn` gives them) to ``packed`` and ``meta`` of their device."""
    if codes.device.type in _library.compiled:
        packed, meta = torch.ops.kvopt.wquant_pack(codes, scale, zero, bits, group_size, symmetric)
        return packed, meta
    _library.announce_fallback(codes.device.type)
    return reference.wquant_pack(codes, scale, zero, bits, group_size, symmetric)


def wquant_unpack(
    packed: Tensor, meta: Tensor, n: int, k: int, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`wquant_pack`, bit for bit."""
    if packed.device.type in _library.compiled:
        codes, scale, zero = torch.ops.kvopt.wquant_unpack(packed, meta, n, k, bits, group_size, symmetric)
        return codes, scale, zero
    _library.announce_fallback(packed.device.type)
    return reference.wquant_unpack(packed, meta, n, k, bits, group_size, symmetric)


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
    """The dense (N, K) weight in ``dtype``: ``scale * (code - zero)`` in float32, rounded once."""
    if packed.device.type in _library.compiled:
        weight: Tensor = torch.ops.kvopt.wquant_dequantize(
            packed, meta, n, k, bits, group_size, symmetric, dtype
        )
        return weight
    _library.announce_fallback(packed.device.type)
    return reference.wquant_dequantize(packed, meta, n, k, bits, group_size, symmetric, dtype)


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
    """The dense rows (rows, K) of a packed weight: the lookup of a packed embedding.

    A gather of a few rows, for which torch's indexing is the kernel on every device.
    """
    return reference.wquant_rows(packed, meta, rows, k, bits, group_size, symmetric, dtype)
