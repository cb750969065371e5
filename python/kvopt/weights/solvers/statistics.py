# SPDX-License-Identifier: Apache-2.0
"""What the inputs of a linear look like: second moments, mean and largest magnitudes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS_AT_ONCE = 4096


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Products of float32 matrices in float32 inside, whatever torch was told (TF32, bf16)."""
    settings: list[Any] = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@dataclass
class Statistics:
    """Sums over the tokens that a linear sees.

    Attributes:
        tokens: how many.
        hessian: (K, K) float32, the sum of x xᵀ; GPTQ's H up to a factor, which no method here depends on.
        absmean: (K,) float32, the mean of |x|.
        absmax: (K,) float32, the largest |x|.
    """

    tokens: int
    hessian: Tensor
    absmean: Tensor
    absmax: Tensor

    @classmethod
    def empty(cls, k: int, device: torch.device | str = "cpu") -> Statistics:
        """Of no tokens."""
        return cls(0, torch.zeros(k, k, device=device), *torch.zeros(2, k, device=device).unbind())

    @classmethod
    def of(cls, x: Tensor) -> Statistics:
        """Of inputs (..., K), on their device."""
        statistics = cls.empty(x.shape[-1], x.device)
        statistics.add(x)
        return statistics

    def add(self, x: Tensor) -> None:
        """Adds inputs (..., K), in place.

        Sums are float32. Half-precision inputs on CUDA are multiplied as they are, on the tensor cores, whose sums are
        a little coarser: some 1e-5 of ‖H‖.

        Raises:
            ValueError: another K, or no floating tensor.
        """
        if x.shape[-1] != self.absmax.shape[0] or not x.is_floating_point():
            raise ValueError(
                f"inputs: expected a floating (..., {self.absmax.shape[0]}), got {tuple(x.shape)} {x.dtype}"
            )
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return
        rows = rows.to(self.hessian.device)
        if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16):
            for part in torch.split(rows, _ROWS_AT_ONCE):  # their sums lose bits with every term
                self.hessian += torch.mm(part.T, part, out_dtype=torch.float32)
        else:
            rows = rows.float()
            with full_precision_products():
                self.hessian.addmm_(rows.T, rows)
        magnitudes = rows.abs()
        self.absmax = torch.maximum(self.absmax, magnitudes.amax(dim=0).float())
        total = self.tokens + rows.shape[0]
        mean = magnitudes.mean(dim=0, dtype=torch.float64)
        self.absmean = (self.absmean + (mean - self.absmean) * (rows.shape[0] / total)).float()
        self.tokens = total

    def to(self, device: torch.device | str) -> Statistics:
        """The same on another device."""
        return Statistics(
            self.tokens, self.hessian.to(device), self.absmean.to(device), self.absmax.to(device)
        )

    def scaled(self, factor: Tensor) -> Statistics:
        """Of the inputs x * factor, (K,) and positive."""
        factor = factor.to(self.hessian)
        return Statistics(
            self.tokens,
            self.hessian * factor * factor[:, None],
            self.absmean * factor,
            self.absmax * factor,
        )

    @property
    def mean_square(self) -> Tensor:
        """(K,) float32, the mean of x²."""
        return self.hessian.diagonal() / max(self.tokens, 1)


def output_error(error: Tensor, statistics: Statistics) -> Tensor:
    """What a weight's error does to the outputs: per row e H eᵀ, the sum over tokens of (x · e)²; (N,) float32.

    Args:
        error: (N, K), ŵ − w.
        statistics: of the linear's inputs.
    """
    error = error.float()
    with full_precision_products():
        return ((error @ statistics.hessian) * error).sum(dim=1)
