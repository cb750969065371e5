# SPDX-License-Identifier: Apache-2.0
"""The weight that every checkpoint format is turned into, and made from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from kvopt.reference import Scheme, group_count
from kvopt.weights.checkpoint.ordered import OrderedLinear
from kvopt.weights.formats import CompactAbsmax, QuantizedWeight, WeightFormat
from kvopt.weights.linear import QuantLinear


class ScaleRoundingWarning(UserWarning):
    """A foreign checkpoint's scales are finer than fp16, in which we keep them."""


@dataclass(frozen=True)
class PlainWeight:
    """A quantised (N, K) weight as codes and numbers, the same on every device.

    Attributes:
        format: of the weight.
        codes: (N, K) uint8.
        scale: (N, groups) float16; ignored where ``absmax`` is given.
        zero: (N, groups) float16; ignored by all but asymmetric formats.
        absmax: double-quantised scales.
        order: (K,) int32: column j of ``codes`` belongs to input ``order[j]``; ``None``: to input j.
        input_scale: (K,) float32, multiplies the inputs, in the order of ``codes``.
    """

    format: WeightFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor
    absmax: CompactAbsmax | None = None
    order: Tensor | None = None
    input_scale: Tensor | None = None

    @classmethod
    def of(cls, module: QuantLinear) -> PlainWeight:
        """That of a linear."""
        weight = module.quantized_weight
        codes, scale, zero = weight.codes()
        absmax = weight.scales if isinstance(weight.scales, CompactAbsmax) else None
        order = module.order if isinstance(module, OrderedLinear) else None
        return cls(weight.format, codes, scale, zero, absmax, order, weight.input_scale)

    def linear(self, bias: Tensor | None, source: str, device: torch.device) -> QuantLinear:
        """The module that runs it."""
        absmax = None if self.absmax is None else self.absmax.to(device)
        codes, scale, zero = (tensor.to(device) for tensor in (self.codes, self.scale, self.zero))
        inputs = None if self.input_scale is None else self.input_scale.to(device)
        weight = QuantizedWeight.from_codes(codes, scale, zero, self.format, absmax, inputs)
        bias = None if bias is None else bias.to(device)
        if self.order is None:
            return QuantLinear(weight, bias, source)
        return OrderedLinear(weight, self.order.to(device), bias, source)


def integer_format(
    name: str, bits: int, group: int | None, zero: Tensor, activation_bits: int = 16
) -> WeightFormat:
    """The format of integer codes: symmetric where every zero point (N, groups) is the middle.

    Raises:
        ValueError: names ``name`` where no format of ours has these bits or this group.
    """
    scheme = Scheme.SYMMETRIC if bool((zero == 2 ** (bits - 1)).all()) else Scheme.ASYMMETRIC
    try:
        return WeightFormat(bits, group, scheme, activation_bits=activation_bits)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def half_scales(scale: Tensor, name: str) -> Tensor:
    """Scales or zero points as float16.

    Raises:
        ValueError: names ``name`` where one is not finite in float16.
    """
    half = scale.half()
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{name}: a value is not finite or beyond fp16's range")
    if not torch.equal(half.to(scale.dtype), scale):
        warnings.warn(
            "the checkpoint's scales are finer than fp16, in which kvopt keeps them: they are rounded, by at most "
            "one part in 2048 where they are normal fp16 numbers",
            ScaleRoundingWarning,
            stacklevel=2,
        )
    return half


def group_order(g_idx: Tensor, group: int, name: str) -> Tensor | None:
    """The order in which columns stand group by group, from each column's group number.

    Args:
        g_idx: (K,) integer.
        group: columns per group; the last may be shorter.
        name: of the tensor, for the error.

    Returns:
        (K,) int32, or ``None`` where the columns stand in order already.

    Raises:
        ValueError: the groups are not of ``group`` columns each, so that no order makes them consecutive.
    """
    k = g_idx.numel()
    expected = torch.arange(k, device=g_idx.device) // group
    if torch.equal(g_idx.long(), expected):
        return None
    ordered, order = torch.sort(g_idx.long(), stable=True)
    if not torch.equal(ordered, expected):
        raise ValueError(
            f"{name}: expected {group_count(k, group)} groups of {group} columns each in any order; other groupings "
            "can't be read"
        )
    return order.to(torch.int32)


def in_input_order(columns: Tensor, order: Tensor | None) -> Tensor:
    """Columns (…, K) that stand group by group, back in the order of the inputs."""
    if order is None:
        return columns
    restored = torch.empty_like(columns)
    restored[..., order.long()] = columns
    return restored
