# SPDX-License-Identifier: Apache-2.0
"""Means over clusters and their standard errors.

Tokens of one window, and questions of one story, are not independent, so both measures treat the window or the story
as the unit that was drawn. The estimate is a ratio of two sums over clusters, and its variance is linearised (the
delta method; Cochran, Sampling Techniques, 3rd ed. 1977, section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def ratio_with_stderr(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """``sum(sums) / sum(counts)`` over clusters, and its standard error.

    Args:
        sums: the total of each cluster, for instance the negative log-likelihood of a window.
        counts: the size of each cluster, for instance its number of scored tokens.

    Returns:
        The ratio, and its standard error or ``None`` where there is only one cluster.

    Raises:
        ValueError: different lengths, no cluster, or nothing counted.
    """
    if len(sums) != len(counts) or not sums:
        raise ValueError(f"expected one sum per count and at least one, got {len(sums)} and {len(counts)}")
    total = float(sum(counts))
    if total <= 0:
        raise ValueError("nothing was counted")
    ratio = float(sum(sums)) / total
    clusters = len(sums)
    if clusters < 2:
        return ratio, None
    squares = sum((s - ratio * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return ratio, math.sqrt(squares * clusters / (clusters - 1)) / total
