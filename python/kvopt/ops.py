# SPDX-License-Identifier: Apache-2.0
"""The operators, typed. Each calls its compiled kernel, or ``reference`` where none exists (said once, loudly).

A weight is (N, K). A format is ``bits`` (2, 3, 4 or 8), ``group_size`` (columns per group, K for one group per row) and
``scheme``, a :class:`kvopt.reference.Scheme`; the code books NF4 and FP4 have 4 bits, INT8_DYNAMIC has 8 and one group
per row. ``packed`` and ``meta`` are in the layout of the device they are on (``csrc/common/quant_format.h``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvopt import _library, reference, reference_outliers, reference_solvers

if TYPE_CHECKING:
    from kvopt.weights.formats import WeightFormat


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
    """``act((x * input_scale) @ w^T + bias + low_rank_x @ low_rank_w^T) + residual`` straight from the packed weight.

    Args:
        x: (..., K) float32, float16 or bfloat16; any strides (made contiguous where it is not).
        packed: uint8, the codes.
        meta: int16, the scales and zero points as fp16 bit patterns.
        bias: (N,), like every further tensor in the dtype of ``x``; or None.
        n: rows of the weight, N.
        bits: 2, 3, 4 or 8.
        group_size: columns per group.
        scheme: the :class:`~kvopt.reference.Scheme`.
        activation_bits: 16 keeps the activations in 16-bit precision or better; 8 rounds them to int8 with one scale
            per token and weight group, max ǀxǀ / 127. INT8_DYNAMIC always rounds them, per token.
        input_scale: (K,), multiplies ``x``.
        low_rank_x: (..., rank), and
        low_rank_w: (N, rank): a correction of low rank.
        swiglu: the weight's rows alternate in eights between gate and up (N a multiple of 16); the result is
            ``silu(gate) * up``, (..., N / 2). Otherwise ``act`` is the identity.
        residual: of the shape of the result.

    Returns:
        (..., N), or (..., N / 2), in the dtype of ``x``. Differentiable in every tensor but the weight; rounding to
        int8 counts as the identity.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
    """
    arguments: tuple[object, ...] = (x, packed, meta, bias, n, bits, group_size, int(scheme), activation_bits)
    epilogue = low_rank_x is not None or low_rank_w is not None or swiglu or residual is not None
    if (
        epilogue or input_scale is not None
    ):  # what is not passed need not be converted: a small product feels it
        arguments = (*arguments, input_scale, low_rank_x, low_rank_w, swiglu, residual)
    if x.device.type in _library.compiled:
        op: Any = torch.ops.kvopt.qlinear.default
        result: Tensor
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            result = op(*arguments)
        else:  # past the autograd layer, which is written in Python and takes longer than a small product
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*arguments)
        return result
    _library.announce_fallback(x.device.type)
    result = reference.qlinear(*arguments)  # type: ignore[arg-type]
    return result


def qlinear_outliers(
    x: Tensor,
    packed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    n: int,
    threshold: float,
    input_scale: Tensor | None = None,
    low_rank_x: Tensor | None = None,
    low_rank_w: Tensor | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`qlinear` of an INT8_DYNAMIC weight without the outlier columns of ``x``, which it multiplies unrounded.

    A column of ``x * input_scale`` is an outlier where any row of this call has a magnitude of ``threshold`` or more.
    The other columns are rounded to int8 per token by their own largest magnitude; the outliers' product with the
    dequantised weight is summed in float32, rounded to the dtype of ``x`` and added. Any number of columns may be
    outliers; on a GPU the host never learns how many. Source: LLM.int8() (Dettmers et al. 2022, section 3.2).

    Args:
        x: (..., K) float32, float16 or bfloat16.
        packed: uint8, the codes.
        meta: int16, the scales.
        bias: as :func:`qlinear` takes it, like everything that is not named here.
        n: rows of the weight, N.
        threshold: positive.
        input_scale: see :func:`qlinear`.
        low_rank_x: see :func:`qlinear`.
        low_rank_w: see :func:`qlinear`.
        swiglu: see :func:`qlinear`.
        residual: see :func:`qlinear`.

    Returns:
        As :func:`qlinear`. A row that holds NaN or infinity comes out as NaN.

    Raises:
        RuntimeError: a shape, dtype, device or the threshold does not fit; the message names the argument.
    """
    arguments = (
        *(x, packed, meta, bias, n, threshold),
        *(input_scale, low_rank_x, low_rank_w, swiglu, residual),
    )
    if x.device.type in _library.compiled:
        result: Tensor = torch.ops.kvopt.qlinear_outliers(*arguments)
        return result
    _library.announce_fallback(x.device.type)
    return reference_outliers.qlinear_outliers(*arguments)


def wquant_rtn(weight: Tensor, bits: int, group_size: int, scheme: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: codes (N, K) uint8, scale (N, groups) float16, zero (N, groups) float16.

    The rule stands in ``csrc/common/params.h``; CPU, CUDA and reference agree bit for bit. ``weight`` must be finite.
    """
    if weight.device.type in _library.compiled:
        codes, scale, zero = torch.ops.kvopt.wquant_rtn(weight, bits, group_size, int(scheme))
        return codes, scale, zero
    _library.announce_fallback(weight.device.type)
    return reference.wquant_rtn(weight, bits, group_size, scheme)


def wquant_pack(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, scheme: int
) -> tuple[Tensor, Tensor]:
    """Plain codes, scale and zero (as :func:`wquant_rtn` gives them) to ``packed`` and ``meta`` of their device."""
    if codes.device.type in _library.compiled:
        packed, meta = torch.ops.kvopt.wquant_pack(codes, scale, zero, bits, group_size, int(scheme))
        return packed, meta
    _library.announce_fallback(codes.device.type)
    return reference.wquant_pack(codes, scale, zero, bits, group_size, scheme)


def wquant_unpack(
    packed: Tensor, meta: Tensor, n: int, k: int, bits: int, group_size: int, scheme: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`wquant_pack`, bit for bit; zero points not stored are 2^(bits-1), with a book 0."""
    if packed.device.type in _library.compiled:
        codes, scale, zero = torch.ops.kvopt.wquant_unpack(packed, meta, n, k, bits, group_size, int(scheme))
        return codes, scale, zero
    _library.announce_fallback(packed.device.type)
    return reference.wquant_unpack(packed, meta, n, k, bits, group_size, scheme)


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
    """The dense (N, K) weight in ``dtype``: ``scale * (code - zero)``, or ``scale * book[code]``, rounded once."""
    if packed.device.type in _library.compiled:
        weight: Tensor = torch.ops.kvopt.wquant_dequantize(
            packed, meta, n, k, bits, group_size, int(scheme), dtype
        )
        return weight
    _library.announce_fallback(packed.device.type)
    return reference.wquant_dequantize(packed, meta, n, k, bits, group_size, scheme, dtype)


def wquant_expand_scales(
    absmax_codes: Tensor,
    absmax_scale: Tensor,
    offset: Tensor,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    scheme: int,
) -> Tensor:
    """Double-quantised absmax to the ``meta`` that a product reads.

    Args:
        absmax_codes: (N * groups,) uint8, the groups of a row side by side.
        absmax_scale: (⌈N * groups / 256⌉,) float32.
        offset: () float32.
        n: rows of the weight.
        k: columns of the weight.
        bits: 4.
        group_size: columns per group.
        scheme: NF4 or FP4.
    """
    arguments = (absmax_codes, absmax_scale, offset, n, k, bits, group_size, int(scheme))
    if absmax_codes.device.type in _library.compiled:
        meta: Tensor = torch.ops.kvopt.wquant_expand_scales(*arguments)
        return meta
    _library.announce_fallback(absmax_codes.device.type)
    return reference.wquant_expand_scales(*arguments)


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
    """The dense rows (rows, K) of a packed weight: the lookup of a packed embedding.

    A gather of a few rows, for which torch's indexing is the kernel on every device.
    """
    return reference.wquant_rows(packed, meta, rows, k, bits, group_size, scheme, dtype)


def wsearch(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    scheme: int,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero as :func:`wquant_rtn` gives them, each group's range chosen by its squared error.

    The candidates and the choice stand in ``csrc/common/wsearch.h``; CPU and CUDA agree bit for bit.

    Args:
        weight: (N, K) float32 or float64, finite.
        importance: (K,) of the same type: what a column's squared error counts; or None.
        bits: 2, 3, 4 or 8.
        group_size: columns per group.
        scheme: an integer one.
        steps: how many smaller ranges are tried, 0 to 100.
        smallest: the smallest range, as a share of the full one.
    """
    if weight.device.type in _library.compiled:
        codes, scale, zero = torch.ops.kvopt.wsearch(
            weight, importance, bits, group_size, int(scheme), steps, smallest
        )
        return codes, scale, zero
    _library.announce_fallback(weight.device.type)
    return reference_solvers.wsearch(weight, importance, bits, group_size, scheme, steps, smallest)


def wsearch_hqq(
    weight: Tensor,
    bits: int,
    group_size: int,
    scheme: int,
    iterations: int,
    beta: float,
    kappa: float,
    norm: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Half-quadratic quantisation: codes, scale and a fractional zero point per group; ``csrc/common/wsearch.h``.

    Args:
        weight: (N, K) float32, finite.
        bits: 2, 3, 4 or 8.
        group_size: columns per group.
        scheme: asymmetric.
        iterations: at most so many.
        beta: of the shrinkage, times ``kappa`` after each iteration.
        kappa: see ``beta``.
        norm: the exponent of the error's norm, in (0, 1].
    """
    arguments = (weight, bits, group_size, int(scheme), iterations, beta, kappa, norm)
    if weight.device.type in _library.compiled:
        codes, scale, zero = torch.ops.kvopt.wsearch_hqq(*arguments)
        return codes, scale, zero
    _library.announce_fallback(weight.device.type)
    return reference_solvers.wsearch_hqq(*arguments)


def gptq_block(
    weight: Tensor,
    factor: Tensor,
    importance: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    begin: int,
    end: int,
    bits: int,
    group_size: int,
    scheme: int,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantises the columns ``begin`` to ``end`` of GPTQ's working copy; ``csrc/common/gptq.h``.

    Args:
        weight: (N, K) float32 or float64, the working copy in the order of processing; it is not changed.
        factor: (K, K) of the same type, U with H^-1 = U^T U.
        importance: (K,) of the same type, as :func:`wsearch` takes it, for groups that begin here; or None.
        scale: (N, end - begin) float16, each column's; or None: groups begin here and choose theirs.
        zero: likewise.
        begin: the first column.
        end: behind the last one; at most 128 columns, whole groups or (part of) one.
        bits: 2, 3, 4 or 8.
        group_size: columns per group.
        scheme: an integer one.
        steps: of the search; 0 rounds to nearest.
        smallest: of the search.

    Returns:
        codes (N, end - begin) uint8; errors, likewise and in the type of ``weight``, for
        ``weight[:, end:] -= errors @ factor[begin:end, end:]``; scale and zero (N, groups) float16 of the groups that
        begin here, none where they were given.
    """
    arguments = (
        *(weight, factor, importance, scale, zero, begin, end),
        *(bits, group_size, int(scheme), steps, smallest),
    )
    if weight.device.type in _library.compiled:
        codes, errors, scale_out, zero_out = torch.ops.kvopt.gptq_block(*arguments)
        return codes, errors, scale_out, zero_out
    _library.announce_fallback(weight.device.type)
    return reference_solvers.gptq_block(*arguments)


_DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def explain_qlinear(
    m: int,
    n: int,
    k: int,
    format: WeightFormat,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    activation_bits: int | None = None,
    capability: tuple[int, int] | None = None,
    multiprocessors: int | None = None,
) -> str:
    """Which kernel the product x (M, K) by w (N, K) takes and why, as text.

    Args:
        m: rows of x.
        n: rows of the weight.
        k: columns of the weight.
        format: of the weight.
        device: ``"cpu"``: with the instruction set in use here; or ``"cuda"``.
        dtype: of x.
        activation_bits: 16 or 8; default: the format's.
        capability: of the GPU, (9, 0) for instance; default: the current one's.
        multiprocessors: of the GPU; default: the current one's.

    Raises:
        RuntimeError: the compiled operators, or those for CUDA, are missing, or there is no GPU and none was described.
    """
    module = _library.require_ops()
    sm = count = 0
    if device == "cuda":
        if capability is None or multiprocessors is None:
            if not torch.cuda.is_available():
                raise RuntimeError("explain_qlinear: no GPU here; give capability and multiprocessors")
            properties = torch.cuda.get_device_properties()
            capability = capability or (properties.major, properties.minor)
            multiprocessors = multiprocessors or properties.multi_processor_count
        sm, count = 10 * capability[0] + capability[1], multiprocessors
    bits = format.activation_bits if activation_bits is None else activation_bits
    text: str = module.explain_qlinear(
        *(m, n, k, format.bits, format.group_columns(k), int(format.scheme)),
        *(_DTYPE_NUMBERS[dtype], bits, device, sm, count),
    )
    if format.outlier_threshold is not None:
        text += f"; columns with ǀxǀ >= {format.outlier_threshold} are found first, and multiplied unrounded"
    return text
