# SPDX-License-Identifier: Apache-2.0
"""A linear whose groups of columns are not consecutive inputs: GPTQ's act-order with dynamic groups."""

from __future__ import annotations

import torch
from torch import Tensor

from kvopt.weights.formats import QuantizedWeight
from kvopt.weights.linear import QuantLinear


class OrderedWeight(QuantizedWeight):
    """A weight whose packed columns stand in another order than its inputs."""

    order: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense (N, K) weight, columns in the order of the inputs."""
        dense = torch.empty(self.shape, dtype=dtype, device=self.device)
        dense[:, self.order.long()] = super().dequantize(dtype)
        return dense


class OrderedLinear(QuantLinear):
    """A :class:`QuantLinear` that gathers its inputs first; its state dict holds ``order`` as well.

    Args:
        weight: (out_features, in_features), its columns group by group.
        order: (in_features,) int32: column j of the weight belongs to input ``order[j]``.
        bias: (out_features,) or None.
        source: as in :class:`QuantLinear`.
    """

    order: Tensor

    def __init__(
        self, weight: QuantizedWeight, order: Tensor, bias: Tensor | None = None, source: str = "linear"
    ) -> None:
        super().__init__(weight, bias, source)
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``."""
        return super().forward(x.index_select(-1, self.order))

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The packed weight; its ``dequantize`` gives the columns in the order of the inputs."""
        plain = super().quantized_weight
        weight = OrderedWeight(plain.packed, plain.scales, plain.shape, plain.format, plain.input_scale)
        weight.order = self.order
        return weight
