# SPDX-License-Identifier: Apache-2.0
"""What a quantised weight is: a format, and packed tensors that know how to come back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvopt import ops

MIN_GROUP, MAX_GROUP, GROUP_STEP = 16, 1024, 16


@dataclass(frozen=True)
class WeightFormat:
    """Integer codes with one fp16 scale, and one fp16 zero point if asymmetric, per row and group.

    Attributes:
        bits: 4 or 8 bits per code.
        group_size: columns per group, a multiple of 16 in 16…1024, or ``None`` for one group per row.
        symmetric: the zero point is 2^(bits-1) everywhere and is not stored.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        g = self.group_size
        if g is not None and not (MIN_GROUP <= g <= MAX_GROUP and g % GROUP_STEP == 0):
            raise ValueError(
                f"group size must be a multiple of {GROUP_STEP} in {MIN_GROUP}…{MAX_GROUP}, or gc (one per row); "
                f"got {g}"
            )

    def __str__(self) -> str:
        if self == INT8:
            return "int8"
        group = "gc" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits}_{group}" + ("_sym" if self.symmetric else "")

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


INT8 = WeightFormat(bits=8, group_size=None, symmetric=True)


class QuantizedWeight:
    """A quantised (N, K) weight in the packed layout of the device it is on.

    Attributes:
        format: the :class:`WeightFormat`.
        shape: (N, K).
        packed: uint8, the codes.
        meta: int16, fp16 bit patterns of scales and zero points.
    """

    def __init__(self, packed: Tensor, meta: Tensor, shape: tuple[int, int], format: WeightFormat) -> None:
        self.packed, self.meta, self.shape, self.format = packed, meta, shape, format

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero: Tensor, format: WeightFormat) -> QuantizedWeight:
        """Packs plain codes (N, K) uint8, scale and zero (N, groups) float16."""
        n, k = codes.shape
        packed, meta = ops.wquant_pack(
            codes.contiguous(),
            scale.contiguous(),
            zero.contiguous(),
            format.bits,
            format.group_columns(k),
            format.symmetric,
        )
        return cls(packed, meta, (n, k), format)

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Plain codes (N, K) uint8, scale and zero (N, groups) float16."""
        n, k = self.shape
        f = self.format
        return ops.wquant_unpack(self.packed, self.meta, n, k, f.bits, f.group_columns(k), f.symmetric)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense (N, K) weight, each value ``scale * (code - zero)`` in float32 rounded once to ``dtype``."""
        n, k = self.shape
        f = self.format
        return ops.wquant_dequantize(
            self.packed, self.meta, n, k, f.bits, f.group_columns(k), f.symmetric, dtype
        )

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ w^T + bias``: (..., K) to (..., N); see :func:`kvopt.qlinear`."""
        n, k = self.shape
        f = self.format
        group = k if f.group_size is None else f.group_size
        return ops.qlinear(x, self.packed, self.meta, bias, n, f.bits, group, f.symmetric)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device, repacked where that device's layout differs. Codes stay bit for bit."""
        device = torch.device(device)
        if device.type == self.packed.device.type:
            return QuantizedWeight(self.packed.to(device), self.meta.to(device), self.shape, self.format)
        codes, scale, zero = (t.to(device) for t in self.codes())
        return QuantizedWeight.from_codes(codes, scale, zero, self.format)

    @property
    def device(self) -> torch.device:
        """Where the packed tensors are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, zero points and padding."""
        return self.packed.nbytes + self.meta.nbytes

    @property
    def bits(self) -> float:
        """Bits per weight, all included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def __repr__(self) -> str:
        return (
            f"QuantizedWeight({self.format}, shape={self.shape}, device={self.device}, nbytes={self.nbytes})"
        )


def quantize_to(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """Rounds a weight (N, K) to nearest in ``format``, on the weight's own device.

    Raises:
        ValueError: not 2-dimensional or floating, empty, not finite, too large for fp16 scales, or a group larger
            than K.
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected a non-empty floating (N, K) tensor, got {tuple(weight.shape)} {weight.dtype}"
        )
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()
    low, high = (value.item() for value in torch.aminmax(weight))
    largest = max(-low, high)
    if not largest < float("inf"):
        raise ValueError("weight: contains NaN or infinity")
    if (high - min(low, 0.0)) / (2**format.bits - 1) > torch.finfo(
        torch.float16
    ).max or largest / 127 > 65504:
        raise ValueError(f"weight: the largest magnitude {largest:.3g} needs a scale beyond fp16's range")
    group = format.group_columns(weight.shape[1])
    return QuantizedWeight.from_codes(*ops.wquant_rtn(weight, format.bits, group, format.symmetric), format)
