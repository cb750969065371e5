# SPDX-License-Identifier: Apache-2.0
"""One linear's candidates, a method's weight and the one rounded to nearest, and which of them is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvopt.weights.formats import QuantizedWeight, WeightFormat, quantize_to
from kvopt.weights.recipe import RTN
from kvopt.weights.solvers import SOLVERS, Statistics, output_error

NEEDS_DATA = ("gptq", "awq", "clip")


@dataclass
class Candidate:
    """A quantised weight and its errors, each relative to what it should be.

    ``factor`` (K,) says that the inputs will be divided by it elsewhere: the weight stands for one whose columns were
    multiplied by it.
    """

    method: str
    weight: QuantizedWeight
    factor: Tensor | None = None
    damping: float | None = None
    note: str = ""
    weight_error: float = 0.0
    output_error: float | None = None
    held_out_error: float | None = None

    def dense(self) -> Tensor:
        """The weight (N, K) that it stands for, float32."""
        dense = self.weight.dequantize()
        return dense if self.factor is None else dense / self.factor


def nearest(w: Tensor, format: WeightFormat, statistics: Statistics | None = None) -> Candidate:
    """A weight (N, K) rounded to nearest, measured on the inputs of ``statistics``."""
    return _measured(Candidate(RTN, quantize_to(w, format)), w, statistics)


def solve(
    w: Tensor, method: str, format: WeightFormat, statistics: Statistics | None, seed: int
) -> Candidate:
    """A weight (N, K) by a solver of that name, measured on the inputs of ``statistics``."""
    solution = SOLVERS[method](w, format, statistics, seed=seed)
    found = Candidate(method, solution.pack(format), None, solution.damping, solution.note)
    return _measured(found, w, statistics)


def solve_folded(
    w: Tensor, format: WeightFormat, statistics: Statistics, seed: int, factor: Tensor
) -> Candidate:
    """AWQ's candidate for a weight whose inputs will be divided by ``factor`` elsewhere: scaled, then clipped."""
    factor = factor.to(w.device)
    solution = SOLVERS["clip"](w * factor, format, statistics.scaled(1 / factor), seed=seed)
    found = Candidate("awq", solution.pack(format), factor, solution.damping, solution.note)
    return _measured(found, w, statistics)


def judge(candidate: Candidate, w: Tensor, held_out: Statistics) -> None:
    """Sets the error on tokens that no method saw, if there are such."""
    if held_out.tokens:
        candidate.held_out_error = relative_output_error(w, candidate.dense(), held_out)


def better(found: Candidate, rounded: Candidate) -> Candidate:
    """The method's candidate, unless rounding to nearest has the smaller held-out error; then the note says so."""
    if found is rounded or found.held_out_error is None or rounded.held_out_error is None:
        return found
    if found.held_out_error <= rounded.held_out_error:  # not so where it is NaN
        return found
    said = f"rounded to nearest: {found.method} had a held-out error of {found.held_out_error:.4f}"
    rounded.note = "; ".join(filter(None, [said, found.note]))
    return rounded


def relative_output_error(w: Tensor, quantized: Tensor, statistics: Statistics) -> float:
    """‖(ŵ − w) x‖ / ‖w x‖ over the tokens of the statistics; 0 where nothing is lost."""
    lost = output_error(quantized - w, statistics).sum(dtype=torch.float64).clamp(min=0)
    whole = output_error(w, statistics).sum(dtype=torch.float64).clamp(min=1e-30)
    return 0.0 if lost == 0 else (lost / whole).sqrt().item()


def _measured(candidate: Candidate, w: Tensor, statistics: Statistics | None) -> Candidate:
    dense = candidate.dense()
    w = w.float()
    candidate.weight_error = ((dense - w).norm() / w.norm().clamp(min=1e-30)).item()
    if statistics is not None and statistics.tokens:
        candidate.output_error = relative_output_error(w, dense, statistics)
    return candidate
