# SPDX-License-Identifier: Apache-2.0
"""HQQ (Badri and Shaji 2023): the zero point that suits a robust norm of the weight's own error; no data."""

from __future__ import annotations

from torch import Tensor

from kvopt import ops
from kvopt.reference import Scheme
from kvopt.weights.formats import WeightFormat
from kvopt.weights.solvers.solution import Solution
from kvopt.weights.solvers.statistics import Statistics

ITERATIONS, BETA, KAPPA, NORM = 20, 10.0, 1.01, 0.7


def solve(
    w: Tensor, format: WeightFormat, statistics: Statistics | None = None, *, seed: int = 0
) -> Solution:
    """Quantises a weight (N, K) by half-quadratic refinement of the zero points; the equations are in
    ``csrc/common/wsearch.h``.

    The scale is that of rounding to nearest. The zero point stays a fraction, stored in fp16. It stops group by group;
    the published code stops for a whole weight at once.

    Args:
        w: the weight, floating; computed in float32.
        format: an asymmetric one.
        statistics: unused: the method looks at the weight alone.
        seed: unused; nothing is drawn.

    Raises:
        ValueError: a format without zero points.
    """
    if format.scheme != Scheme.ASYMMETRIC:
        raise ValueError(f"hqq: needs an asymmetric format, got {format}")
    weight = w.detach().float().contiguous()
    group = format.group_columns(w.shape[1])
    return Solution(
        *ops.wsearch_hqq(weight, format.bits, group, format.scheme, ITERATIONS, BETA, KAPPA, NORM)
    )
