# SPDX-License-Identifier: Apache-2.0
"""LLM.int8()'s product in plain torch (Dettmers et al. 2022, section 3.2): the oracle of ``qlinear_outliers``."""

from __future__ import annotations

import torch
from torch import Tensor

from kvopt.reference import Scheme, linear_unrounded, wquant_dequantize


def outlier_columns(v: Tensor, threshold: float) -> Tensor:
    """Which columns of (M, K) hold a magnitude of ``threshold`` or more, or NaN: (K,) bool."""
    return ~(v.abs() < threshold).all(dim=0)


def outliers_unrounded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: float,
    input_scale: Tensor | None = None,
    low_rank_x: Tensor | None = None,
    low_rank_w: Tensor | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """What :func:`qlinear_outliers` computes, with a dense weight (N, K), in its type and not rounded to that of ``x``.

    But the outliers' part is: it is made first and added as a whole.
    """
    compute, k = weight.dtype, x.shape[-1]
    scale = x.new_ones(k) if input_scale is None else input_scale
    v = x.reshape(-1, k).float() * scale.float()
    outside = outlier_columns(v, threshold)
    part = (v[:, outside].to(compute) @ weight[:, outside].T).to(x.dtype).to(compute)
    return linear_unrounded(
        *(x, weight, bias, k, Scheme.INT8_DYNAMIC, 8, scale.masked_fill(outside, 0)),
        *(low_rank_x, low_rank_w, swiglu, residual, part),
    )


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
    """The product as :func:`kvopt.ops.qlinear_outliers` documents it, in float32 and rounded once."""
    k = x.shape[-1]
    weight = wquant_dequantize(packed, meta, n, k, 8, k, Scheme.INT8_DYNAMIC, torch.float32)
    return outliers_unrounded(
        *(x, weight, bias, threshold, input_scale, low_rank_x, low_rank_w, swiglu, residual)
    ).to(x.dtype)
