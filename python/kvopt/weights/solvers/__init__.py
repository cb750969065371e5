# SPDX-License-Identifier: Apache-2.0
"""Methods that choose a weight's codes better than rounding to nearest does: one file each."""

from kvopt.weights.solvers import awq, clip, gptq, hqq
from kvopt.weights.solvers.solution import Solution, Solver
from kvopt.weights.solvers.statistics import Statistics, output_error

SOLVERS: dict[str, Solver] = {
    "gptq": gptq.solve,
    "awq": awq.solve,
    "hqq": hqq.solve,
    "clip": clip.solve,
}

__all__ = ["SOLVERS", "Solution", "Solver", "Statistics", "output_error"]
