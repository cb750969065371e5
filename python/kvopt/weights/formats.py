# SPDX-License-Identifier: Apache-2.0
"""What a quantised weight is: a format, and packed tensors that know how to come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvopt import ops, reference
from kvopt.reference import Scheme

BITS = (2, 3, 4, 8)
MIN_GROUP, MAX_GROUP, GROUP_STEP = 16, 1024, 16
OUTLIER_THRESHOLD, MAX_THRESHOLD = 6.0, 1000  # of LLM.int8(), section 3.2; the largest in tenths
BOOK_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored, and how a product with it takes its activations.

    Attributes:
        bits: 2, 3, 4 or 8 bits per code.
        group_size: columns that share a scale: a multiple of 16 in 16…1024 (one of ``BOOK_BLOCKS`` for a code book), or
            ``None`` for one scale per row.
        scheme: what a code means; ``False`` and ``True`` stand for asymmetric and symmetric.
        double_quantized: NF4 and FP4: the scales are themselves stored in 8 bits.
        activation_bits: 16, or 8: int8 per token and group. INT8_DYNAMIC always has 8.
        outlier_threshold: INT8_DYNAMIC: from this magnitude on a column of the inputs stays in 16 bits (LLM.int8());
            a multiple of 0.1, or ``None``: none does.
    """

    bits: int
    group_size: int | None
    scheme: Scheme
    double_quantized: bool = False
    activation_bits: int = 16
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", Scheme(self.scheme))
        if self.scheme == Scheme.INT8_DYNAMIC:
            object.__setattr__(self, "activation_bits", 8)
        if self.bits not in BITS:
            raise ValueError(f"bits must be 2, 3, 4 or 8, got {self.bits}")
        if self.activation_bits not in (8, 16):
            raise ValueError(f"activation bits must be 8 or 16, got {self.activation_bits}")
        if self.outlier_threshold is not None:
            self._check_threshold(self.outlier_threshold)
        g = self.group_size
        if self.scheme.has_book:
            if self.bits != 4:
                raise ValueError(f"{self.scheme.name.lower()} has 4 bits, got {self.bits}")
            if g not in BOOK_BLOCKS:
                raise ValueError(f"block size must be one of {', '.join(map(str, BOOK_BLOCKS))}; got {g}")
        elif self.double_quantized:
            raise ValueError("only nf4 and fp4 have double-quantised scales")
        elif self.scheme == Scheme.INT8_DYNAMIC:
            if self.bits != 8 or g is not None:
                raise ValueError(f"int8 dynamic has 8 bits and one scale per row, got {self.bits} and {g}")
        elif g is not None and not (MIN_GROUP <= g <= MAX_GROUP and g % GROUP_STEP == 0):
            raise ValueError(
                f"group size must be a multiple of {GROUP_STEP} in {MIN_GROUP}…{MAX_GROUP}, or gc (one per row); "
                f"got {g}"
            )

    def _check_threshold(self, threshold: float) -> None:
        if self.scheme != Scheme.INT8_DYNAMIC:
            raise ValueError("only int8 dynamic keeps outlier columns in 16 bits")
        if not 0.1 <= threshold <= MAX_THRESHOLD / 10 or threshold != round(10 * threshold) / 10:
            raise ValueError(
                f"the outlier threshold must be a multiple of 0.1 in 0.1…{MAX_THRESHOLD / 10}, got {threshold}"
            )

    @property
    def symmetric(self) -> bool:
        """No zero points are stored."""
        return self.scheme != Scheme.ASYMMETRIC

    @property
    def storage_name(self) -> str:
        """The format as a recipe names it, without the activations' part."""
        if self.outlier_threshold is not None:
            settled = self.outlier_threshold == OUTLIER_THRESHOLD
            return "llm_int8" + ("" if settled else f"_t{round(10 * self.outlier_threshold)}")
        if self.scheme == Scheme.INT8_DYNAMIC:
            return "int8_dyn"
        if (self.bits, self.group_size, self.scheme) == (8, None, Scheme.SYMMETRIC):
            return "int8"
        if self.scheme.has_book:
            block = "" if self.group_size == 64 else f"_b{self.group_size}"
            return self.scheme.name.lower() + block + ("_dq" if self.double_quantized else "")
        group = "gc" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits}_{group}" + ("_sym" if self.scheme == Scheme.SYMMETRIC else "")

    @property
    def has_a8_part(self) -> bool:
        """Whether a recipe says ``+a8`` for it: int8 activations that do not follow from the scheme."""
        return self.activation_bits == 8 and self.scheme != Scheme.INT8_DYNAMIC

    def __str__(self) -> str:
        return self.storage_name + ("+a8" if self.has_a8_part else "")

    def group_columns(self, k: int) -> int:
        """The group size as the operators take it for rows of ``k`` columns.

        Raises:
            ValueError: a group is larger than a row.
        """
        if self.group_size is None:
            return k
        if self.group_size > k:
            raise ValueError(f"group size {self.group_size} is larger than the row: K = {k}")
        return self.group_size


INT8 = WeightFormat(bits=8, group_size=None, scheme=Scheme.SYMMETRIC)


@dataclass(frozen=True)
class CompactAbsmax:
    """Double-quantised scales, plain on every device.

    Attributes:
        codes: (N * groups,) uint8, the groups of a row side by side.
        scale: (⌈N * groups / 256⌉,) float32.
        offset: () float32, the mean.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(cls, absmax: Tensor) -> CompactAbsmax:
        """From absmax (N, groups), as bitsandbytes does it."""
        return cls(*reference.double_quantize(absmax))

    def to_meta(self, shape: tuple[int, int], format: WeightFormat) -> Tensor:
        """The scales as a product reads them."""
        n, k = shape
        return ops.wquant_expand_scales(
            self.codes, self.scale, self.offset, n, k, format.bits, format.group_columns(k), format.scheme
        )

    def to(self, device: torch.device | str) -> CompactAbsmax:
        """The same on another device."""
        return CompactAbsmax(self.codes.to(device), self.scale.to(device), self.offset.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scale.nbytes + self.offset.nbytes


class QuantizedWeight:
    """A quantised (N, K) weight in the packed layout of the device it is on.

    Args:
        packed: uint8, the codes.
        scales: int16, fp16 bit patterns of scales and zero points; or double-quantised scales.
        shape: (N, K).
        format: the :class:`WeightFormat`.
        input_scale: (K,) float32, multiplies the inputs of a product (AWQ): the weight is what is packed, each column
            times its entry. Or None.
    """

    def __init__(
        self,
        packed: Tensor,
        scales: Tensor | CompactAbsmax,
        shape: tuple[int, int],
        format: WeightFormat,
        input_scale: Tensor | None = None,
    ) -> None:
        self.packed, self.scales, self.shape, self.format = packed, scales, shape, format
        self.input_scale = input_scale
        if input_scale is not None and (
            tuple(input_scale.shape) != (shape[1],) or input_scale.dtype != torch.float32
        ):
            raise ValueError(
                f"input_scale: expected float32 of shape ({shape[1]},), got {input_scale.dtype} of "
                f"{tuple(input_scale.shape)}"
            )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        format: WeightFormat,
        absmax: CompactAbsmax | None = None,
        input_scale: Tensor | None = None,
    ) -> QuantizedWeight:
        """Packs plain codes (N, K) uint8, scale and zero (N, groups) float16.

        Args:
            codes: the codes.
            scale: the scales.
            zero: the zero points; ignored by all but asymmetric formats.
            format: of the result.
            absmax: for a double-quantised format, what is stored in place of ``scale``; default: made from it.
            input_scale: see the class.
        """
        n, k = codes.shape
        group = format.group_columns(k)
        plain = (codes.contiguous(), scale.contiguous(), zero.contiguous())
        packed, meta = ops.wquant_pack(*plain, format.bits, group, format.scheme)
        scales: Tensor | CompactAbsmax = meta
        if format.double_quantized:
            scales = CompactAbsmax.of(scale) if absmax is None else absmax
        return cls(packed, scales, (n, k), format, input_scale)

    @property
    def meta(self) -> Tensor:
        """int16, fp16 bit patterns of scales and zero points; expanded anew where they are double-quantised."""
        if isinstance(self.scales, CompactAbsmax):
            return self.scales.to_meta(self.shape, self.format)
        return self.scales

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Plain codes (N, K) uint8, scale and zero (N, groups) float16."""
        n, k = self.shape
        f = self.format
        return ops.wquant_unpack(self.packed, self.meta, n, k, f.bits, f.group_columns(k), f.scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense (N, K) weight, each value computed in float32 and rounded once to ``dtype``."""
        n, k = self.shape
        f = self.format
        first = dtype if self.input_scale is None else torch.float32
        dense = ops.wquant_dequantize(
            self.packed, self.meta, n, k, f.bits, f.group_columns(k), f.scheme, first
        )
        return dense if self.input_scale is None else (dense * self.input_scale).to(dtype)

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        activation_bits: int | None = None,
        input_scale: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
        swiglu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The fused product (..., K) to (..., N); see :func:`kvopt.qlinear`. Its own input scale comes on top."""
        n, k = self.shape
        f = self.format
        group = k if f.group_size is None else f.group_size
        low_rank_x, low_rank_w = (None, None) if low_rank is None else low_rank
        if activation_bits is None:
            activation_bits = f.activation_bits
        if self.input_scale is not None:
            own = self.input_scale.to(x.dtype)
            input_scale = own if input_scale is None else own * input_scale
        if f.outlier_threshold is not None:
            return ops.qlinear_outliers(
                *(x, self.packed, self.meta, bias, n, f.outlier_threshold),
                *(input_scale, low_rank_x, low_rank_w, swiglu, residual),
            )
        return ops.qlinear(
            *(x, self.packed, self.meta, bias, n, f.bits, group, f.scheme, activation_bits),
            input_scale=input_scale,
            low_rank_x=low_rank_x,
            low_rank_w=low_rank_w,
            swiglu=swiglu,
            residual=residual,
        )

    @classmethod
    def cat(cls, weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """The rows of several weights below each other, bit for bit: several outputs of one input in one launch.

        Raises:
            ValueError: nothing given, or different formats, K, devices or input scales; or double-quantised scales,
                which share an offset: quantise the joined weight instead.
        """
        codes, scale, zero = _joinable(weights, "cat")
        first = weights[0]
        return cls.from_codes(
            torch.cat(codes), torch.cat(scale), torch.cat(zero), first.format, input_scale=first.input_scale
        )

    @classmethod
    def interleave_swiglu(cls, gate: QuantizedWeight, up: QuantizedWeight) -> QuantizedWeight:
        """Gate's and up's rows alternating in eights, as ``qlinear(…, swiglu=True)`` takes them.

        A bias or ``low_rank_w`` of such a product alternates in the same way.

        Raises:
            ValueError: shapes, formats, devices or input scales differ, N is no multiple of 8, or the scales are
                double-quantised.
        """
        if gate.shape != up.shape or gate.shape[0] % 8:
            raise ValueError(
                "interleave_swiglu: gate and up need one shape and a multiple of 8 rows, got "
                f"{gate.shape} and {up.shape}"
            )
        parts = _joinable([gate, up], "interleave_swiglu")
        codes, scale, zero = (reference.join_swiglu(a.T, b.T).T for a, b in parts)
        return cls.from_codes(codes, scale, zero, gate.format, input_scale=gate.input_scale)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device, repacked where that device's layout differs. Codes stay bit for bit."""
        device = torch.device(device)
        inputs = None if self.input_scale is None else self.input_scale.to(device)
        if device.type == self.packed.device.type:
            return QuantizedWeight(
                self.packed.to(device), self.scales.to(device), self.shape, self.format, inputs
            )
        codes, scale, zero = (t.to(device) for t in self.codes())
        absmax = self.scales.to(device) if isinstance(self.scales, CompactAbsmax) else None
        return QuantizedWeight.from_codes(codes, scale, zero, self.format, absmax, inputs)

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, zero points, padding and the input scale."""
        inputs = 0 if self.input_scale is None else self.input_scale.nbytes
        return self.packed.nbytes + self.scales.nbytes + inputs

    @property
    def bits(self) -> float:
        """Bits per weight, all included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def __repr__(self) -> str:
        return (
            f"QuantizedWeight({self.format}, shape={self.shape}, device={self.device}, nbytes={self.nbytes})"
        )


def _joinable(weights: Sequence[QuantizedWeight], what: str) -> list[tuple[Tensor, ...]]:
    """Codes, scales and zero points of weights that may be joined: three tuples."""
    if not weights:
        raise ValueError(f"{what}: no weights given")
    first = weights[0]
    for other in weights[1:]:
        if (other.format, other.shape[1], other.device) != (first.format, first.shape[1], first.device):
            raise ValueError(f"{what}: one format, K and device is needed, got {first} and {other}")
        if not _same(first.input_scale, other.input_scale):
            raise ValueError(f"{what}: the weights have different input scales")
    if first.format.double_quantized:
        raise ValueError(
            f"{what}: double-quantised scales can't be joined exactly; quantise the joined weight"
        )
    return list(zip(*(weight.codes() for weight in weights), strict=True))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def check_weight(weight: Tensor, format: WeightFormat) -> None:
    """Whether ``weight`` can be quantised in ``format``.

    Raises:
        ValueError: not 2-dimensional or floating, empty, not finite, or too large for fp16 scales.
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected a non-empty floating (N, K) tensor, got {tuple(weight.shape)} {weight.dtype}"
        )
    low, high = (value.item() for value in torch.aminmax(weight.detach()))
    largest = max(-low, high)
    if not largest < float("inf"):
        raise ValueError("weight: contains NaN or infinity")
    if _largest_scale(low, high, format) > torch.finfo(torch.float16).max:
        raise ValueError(f"weight: the largest magnitude {largest:.3g} needs a scale beyond fp16's range")


def quantize_to(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """Rounds a weight (N, K) to nearest in ``format``, on the weight's own device.

    Raises:
        ValueError: not 2-dimensional or floating, empty, not finite, too large for fp16 scales, or a group larger
            than K.
    """
    check_weight(weight, format)
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()
    group = format.group_columns(weight.shape[1])
    plain = ops.wquant_rtn(weight, format.bits, group, format.scheme)
    absmax = None
    if format.double_quantized:
        absmax = CompactAbsmax.of(reference.in_groups(weight.float(), group).abs().amax(dim=2))
    return QuantizedWeight.from_codes(*plain, format, absmax)


def _largest_scale(low: float, high: float, format: WeightFormat) -> float:
    """An upper bound of the scales of a weight whose values are in low…high."""
    largest = max(-low, high)
    if format.scheme.has_book:
        return largest
    top = (1 << format.bits) - 1
    if format.scheme == Scheme.ASYMMETRIC:
        return (max(high, 0.0) - min(low, 0.0)) / top
    return largest / 127 if format.bits == 8 else 2 * largest / top
