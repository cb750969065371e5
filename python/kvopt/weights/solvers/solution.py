# SPDX-License-Identifier: Apache-2.0
"""What a solver gives back, and what it may be asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvopt import ops
from kvopt.reference import dequantize_codes
from kvopt.weights.formats import QuantizedWeight, WeightFormat
from kvopt.weights.solvers.statistics import Statistics, output_error

SEARCH_STEPS, SMALLEST_RANGE = 40, 0.4  # of a group's range: see csrc/common/wsearch.h


@dataclass(frozen=True)
class Solution:
    """A weight in a format, not yet packed.

    Attributes:
        codes: (N, K) uint8.
        scale: (N, groups) float16.
        zero: (N, groups) float16.
        input_scale: (K,) float32, or ``None``: the codes stand for the weight divided by it, column by column.
        damping: GPTQ's, as a share of the mean diagonal; ``None`` elsewhere.
        note: anything unusual, for the report; often empty.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    input_scale: Tensor | None = None
    damping: float | None = None
    note: str = ""

    def dequantize(self, format: WeightFormat) -> Tensor:
        """The dense (N, K) weight, float32."""
        group = format.group_columns(self.codes.shape[1])
        dense = dequantize_codes(self.codes, self.scale, self.zero, group, torch.float32, format.scheme)
        return dense if self.input_scale is None else dense * self.input_scale

    def pack(self, format: WeightFormat) -> QuantizedWeight:
        """The same as a product takes it."""
        return QuantizedWeight.from_codes(
            self.codes, self.scale, self.zero, format, input_scale=self.input_scale
        )


class Solver(Protocol):
    """Quantises one weight (N, K), floating, in a format.

    ``statistics`` are those of the linear's inputs; a solver that needs them raises :class:`ValueError` without.
    ``seed`` is for solvers that draw; the same seed gives the same solution.
    """

    def __call__(
        self, w: Tensor, format: WeightFormat, statistics: Statistics | None, *, seed: int = 0
    ) -> Solution:
        """A solution for ``w``."""


def require_statistics(method: str, w: Tensor, statistics: Statistics | None) -> Statistics:
    """The statistics, on the weight's device.

    Raises:
        ValueError: there are none, of no tokens, or of another K.
    """
    if statistics is None or statistics.tokens == 0:
        raise ValueError(f"{method}: needs calibration data: the inputs of this linear")
    if statistics.hessian.shape[0] != w.shape[1]:
        raise ValueError(
            f"{method}: the inputs have {statistics.hessian.shape[0]} columns, the weight has {w.shape[1]}"
        )
    return statistics.to(w.device)


def require_integers(method: str, format: WeightFormat) -> None:
    """Raises :class:`ValueError` for code books."""
    if format.scheme.has_book:
        raise ValueError(f"{method}: knows integer formats only, got {format}")


def keep_better_rows(w: Tensor, format: WeightFormat, statistics: Statistics, found: Solution) -> Solution:
    """``found`` with the rows rounded to nearest that would have larger outputs' errors than that; notes how many.

    Args:
        w: (N, K) float32, what ``found`` stands for.
        format: an integer one.
        statistics: of the linear's inputs.
        found: without input scale.
    """
    group = format.group_columns(w.shape[1])
    nearest = Solution(*ops.wquant_rtn(w, format.bits, group, format.scheme))
    error, least = (output_error(s.dequantize(format) - w, statistics) for s in (found, nearest))
    worse = error > least
    count = int(worse.sum())
    if not count:
        return found
    note = f"{count} of {len(w)} rows rounded to nearest"
    pick = worse[:, None]
    return replace(
        found,
        codes=torch.where(pick, nearest.codes, found.codes),
        scale=torch.where(pick, nearest.scale, found.scale),
        zero=torch.where(pick, nearest.zero, found.zero),
        note="; ".join(part for part in (found.note, note) if part),
    )
