# SPDX-License-Identifier: Apache-2.0
"""AWQ (Lin et al. 2024): input channels with large activations are scaled up before rounding, and back at run time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvopt import ops, reference
from kvopt.weights.formats import WeightFormat
from kvopt.weights.solvers import clip
from kvopt.weights.solvers.solution import Solution, require_integers, require_statistics
from kvopt.weights.solvers.statistics import Statistics, output_error

RATIOS = tuple(i / 20 for i in range(20))
LARGEST_SCALE = 2.0**12  # and its reciprocal the smallest


def search(weights: Sequence[Tensor], format: WeightFormat, statistics: Statistics | None) -> Tensor:
    """The scale s (K,), float32, of linears that share an input: W s is stored, x / s is its input.

    Candidates (the paper, equation 5, and the authors' code): x̄^r, and "duo" x̄^r / (w̄^(1-r) + 1e-4), for r = 0, 0.05, …
    0.95, with x̄ the mean |x| and w̄ the mean |w| in units of its group's largest; each divided by the geometric mean of
    its extremes. r = 0 without duo is the identity. The best is the one with the smallest error of all outputs
    together, tr(ΔW H ΔWᵀ), with the weights rounded to nearest in ``format``.

    Every candidate is rounded so that 1 / s is a bfloat16: exact in any type a model may have.

    Args:
        weights: each (N_i, K), floating.
        format: an integer one.
        statistics: of the shared input.

    Raises:
        ValueError: no weights, no statistics or unusable ones, or a format with a code book.
    """
    if not weights:
        raise ValueError("awq: no weights given")
    require_integers("awq", format)
    statistics = require_statistics("awq", weights[0], statistics)
    plain = [w.detach().float() for w in weights]
    best = torch.ones_like(statistics.absmean)
    least = _error(plain, best, format, statistics)
    for scale in candidates(plain, format, statistics):
        error = _error(plain, scale, format, statistics)
        better = error < least  # stays on the device: nothing waits for it
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def solve(w: Tensor, format: WeightFormat, statistics: Statistics | None, *, seed: int = 0) -> Solution:
    """Quantises one weight (N, K): the scale by :func:`search`, then the ranges by importance-weighted clipping.

    The solution's ``input_scale`` is 1 / s; ``None`` where the identity is best.

    Args:
        w: the weight, floating; computed in float32.
        format: an integer one.
        statistics: of the linear's inputs.
        seed: unused; nothing is drawn.

    Raises:
        ValueError: no statistics or unusable ones, or a format with a code book.
    """
    scale = search([w], format, statistics)
    statistics = require_statistics("awq", w, statistics)
    if bool((scale == 1).all()):
        return clip.solve(w, format, statistics)
    inverse = inverse_of(scale)
    return replace(clip.solve(w.float() * scale, format, statistics.scaled(inverse)), input_scale=inverse)


def candidates(weights: Sequence[Tensor], format: WeightFormat, statistics: Statistics) -> Iterator[Tensor]:
    """Every scale that :func:`search` tries beside the identity, (K,) each."""
    x = statistics.absmean
    w = _mean_share(weights, format)
    for ratio in RATIOS:
        if ratio:
            yield _normalised(x**ratio, x > 0)
        yield _normalised(x**ratio / (w ** (1 - ratio) + 1e-4), x > 0)


def _mean_share(weights: Sequence[Tensor], format: WeightFormat) -> Tensor:
    """(K,): the mean over all rows of |w| in units of the largest of its group."""
    total, rows = torch.zeros_like(weights[0][0]), 0
    for w in weights:
        k = w.shape[1]
        group = format.group_columns(k)
        absmax = reference.in_groups(w, group).abs().amax(dim=2)
        total += (w.abs() / (reference.expand_groups(absmax, k, group) + 1e-6)).sum(dim=0)
        rows += w.shape[0]
    return total / rows


def _normalised(scale: Tensor, alive: Tensor) -> Tensor:
    """Divided by √(largest · smallest), rounded, and 1 for inputs that are always 0."""
    scale = scale.clamp(min=1e-4)
    largest = torch.where(alive, scale, -torch.inf).amax()
    smallest = torch.where(alive, scale, torch.inf).amin()
    scale = (scale / (largest * smallest).sqrt()).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    scale = torch.where(alive, scale, 1.0)
    return 1 / inverse_of(scale)


def inverse_of(scale: Tensor) -> Tensor:
    """1 / s as a bfloat16 number in float32: what the inputs are multiplied by. For s of :func:`search` no rounding."""
    return (1 / scale).bfloat16().float()


def _error(weights: Sequence[Tensor], scale: Tensor, format: WeightFormat, statistics: Statistics) -> Tensor:
    """tr(ΔW H ΔWᵀ) of all weights, ()."""
    total = torch.zeros((), device=scale.device)
    for w in weights:
        group = format.group_columns(w.shape[1])
        plain = ops.wquant_rtn(w * scale, format.bits, group, format.scheme)
        back = reference.dequantize_codes(*plain, group, torch.float32, format.scheme) / scale
        total = total + output_error(back - w, statistics).sum()
    return total
