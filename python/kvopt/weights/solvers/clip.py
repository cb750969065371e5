# SPDX-License-Identifier: Apache-2.0
"""Importance-weighted clipping: each group's range by the squared error that its columns' inputs make count."""

from __future__ import annotations

import torch
from torch import Tensor

from kvopt import ops
from kvopt.weights.formats import WeightFormat
from kvopt.weights.solvers.solution import (
    SEARCH_STEPS,
    SMALLEST_RANGE,
    Solution,
    keep_better_rows,
    require_integers,
    require_statistics,
)
from kvopt.weights.solvers.statistics import Statistics


def solve(w: Tensor, format: WeightFormat, statistics: Statistics | None, *, seed: int = 0) -> Solution:
    """Quantises a weight (N, K), each group's scale and zero point searched (``csrc/common/wsearch.h``).

    A column's squared error counts E[x²], the diagonal of H. The rest of H is asked once at the end, row by row: a row
    that rounding to nearest serves better is rounded to nearest.

    Args:
        w: the weight, floating; computed in float32.
        format: an integer one.
        statistics: of the linear's inputs.
        seed: unused; nothing is drawn.

    Raises:
        ValueError: no statistics or unusable ones, or a format with a code book.
    """
    require_integers("clip", format)
    statistics = require_statistics("clip", w, statistics)
    weight = w.detach().float().contiguous()
    group = format.group_columns(w.shape[1])
    found = ops.wsearch(
        *(weight, importance_of(statistics), format.bits, group, format.scheme),
        *(SEARCH_STEPS, SMALLEST_RANGE),
    )
    return keep_better_rows(weight, format, statistics, Solution(*found))


def importance_of(statistics: Statistics) -> Tensor:
    """E[x²], (K,), and a millionth of its mean where an input is always 0: such a column is rounded too."""
    square = statistics.mean_square
    mean = square.mean()
    return torch.where(mean > 0, square.clamp(min=1e-6 * mean), torch.ones_like(square)).contiguous()
