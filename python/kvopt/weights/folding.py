# SPDX-License-Identifier: Apache-2.0
"""Moving a factor per channel of a linear's input into the module before it (AWQ, Lin et al. 2024, section 3.2).

``w x = (w s) (x / s)``: the columns of the weight are multiplied by s, and the norm or the linear that makes x gives
x / s. The function stays; the weight is easier to quantise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvopt.models.adapters import Source
from kvopt.weights.formats import QuantizedWeight
from kvopt.weights.linear import QuantLinear

_SMALLEST_SCALE = torch.finfo(torch.float16).tiny  # below it fp16 loses digits


@dataclass(frozen=True)
class Fold:
    """A move that is legal and not yet made.

    Attributes:
        factor: (K,) float32, what the source's channels will be divided by, after rounding to the source's own type.
        commit: makes the move.
    """

    factor: Tensor
    commit: Callable[[], None]


def prepare(layer: nn.Module, source: Source, config: Any, factor: Tensor) -> Fold | None:
    """The move of a positive factor (K,) into ``source``, or ``None`` where it is not legal or would lose precision.

    Args:
        layer: the decoder layer.
        source: the module whose channels are divided.
        config: the model's.
        factor: what to divide by.
    """
    if not source.when(config):
        return None
    try:
        module: Any = layer.get_submodule(source.name)
    except AttributeError:
        return None
    if isinstance(module, QuantLinear | nn.Linear | Conv1D):
        rows = source.rows(config) if source.rows is not None else torch.arange(_outputs(module))
        if rows.numel() != factor.numel() or int(rows.max()) >= _outputs(module):
            return None
        if isinstance(module, QuantLinear):
            return _quantized(module, rows, factor)
        return _linear(module, rows, factor)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != factor.shape:
        return None
    return _norm(module, source.offset, factor)


def _norm(module: Any, offset: float, factor: Tensor) -> Fold:
    weight = module.weight.detach()
    whole = offset + weight.double()
    divided = (whole / factor.double().to(weight.device) - offset).to(weight.dtype)
    rounded = offset + divided.double()
    applied = torch.where(rounded == 0, factor.double().to(weight.device), whole / rounded)
    bias = getattr(module, "bias", None)

    def commit() -> None:
        module.weight.data = divided
        if bias is not None:
            bias.data = (bias.detach().double() / applied).to(bias.dtype)

    return Fold(applied.float() if weight.dtype != torch.float64 else applied, commit)


def _linear(module: Any, rows: Tensor, factor: Tensor) -> Fold | None:
    if module.weight.dtype not in (torch.float32, torch.float64):
        return None  # every element would be rounded
    by = factor.to(module.weight)
    dimension = 1 if isinstance(module, Conv1D) else 0

    def commit() -> None:
        index = rows.to(by.device)
        weight = module.weight.data
        if dimension:
            weight[:, index] /= by
        else:
            weight[index] /= by[:, None]
        if module.bias is not None:
            module.bias.data[index] /= by

    return Fold(factor, commit)


def _quantized(module: QuantLinear, rows: Tensor, factor: Tensor) -> Fold | None:
    """Rows of a quantised weight are divided by dividing their scales."""
    if module.format.double_quantized:
        return None
    weight = module.quantized_weight
    codes, scale, zero = weight.codes()
    rows = rows.to(scale.device)
    by = torch.ones(scale.shape[0], device=scale.device)
    by[rows] = factor.to(by)
    divided = scale.float() / by[:, None]
    used = divided[scale != 0]
    if not ((used >= _SMALLEST_SCALE) & (used <= torch.finfo(torch.float16).max)).all():
        return None

    def commit() -> None:
        module._hold(
            QuantizedWeight.from_codes(
                codes, divided.half(), zero, module.format, input_scale=weight.input_scale
            )
        )
        if module.bias is not None:
            module.bias.data = (module.bias.detach().float() / by).to(module.bias.dtype)

    return Fold(factor, commit)


def _outputs(module: Any) -> int:
    if isinstance(module, QuantLinear):
        return module.out_features
    size: int = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
    return size
