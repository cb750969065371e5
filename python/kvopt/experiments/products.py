# SPDX-License-Identifier: Apache-2.0
"""How fast one product over a quantised weight is here, beside the dense one in 16 bits: what ``kvopt bench`` shows.

``benchmarks/run.py qlinear`` of the repository does the same with more contenders and more care.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvopt

ROTATE_BYTES = 2**28  # the copies of a weight together, so that no cache holds them


@dataclass(frozen=True)
class Product:
    """Medians of one shape; ``speedup`` is the dense product's time over ours."""

    m: int
    n: int
    k: int
    recipe: str
    dtype: str
    device: str
    microseconds: float
    dense_microseconds: float
    speedup: float
    gb_per_s: float
    relative_error: float


def time_product(
    m: int,
    n: int,
    k: int,
    recipe: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 9,
    seed: int = 0,
) -> Product:
    """Times x (M, K) by a random weight (N, K) in ``recipe`` and by the same weight dense, in turn.

    Raises:
        ValueError: the recipe is unknown, quantises nothing or does not fit the shape.
        RuntimeError: the result is not near the dense one's.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, device=device).div_(k**0.5).to(dtype)
    x = torch.randn(m, k, generator=generator, device=device).to(dtype)
    first = kvopt.quantize_weight(weight, recipe)
    count = max(2, min(64, -(-ROTATE_BYTES // first.nbytes)))
    packed = [first] + [kvopt.quantize_weight(weight, recipe) for _ in range(count - 1)]
    dense = [weight] + [weight.clone() for _ in range(max(2, min(64, -(-ROTATE_BYTES // weight.nbytes))) - 1)]
    with torch.inference_mode():
        exact = torch.nn.functional.linear(x, weight).float()
        error = ((kvopt.qlinear(x, first).float() - exact).norm() / exact.norm()).item()
        if not error < 1:
            raise RuntimeError(f"{recipe}: the product is {error:.3g} away from the dense one")
        ours, theirs = _medians(
            [
                [lambda w=w: kvopt.qlinear(x, w) for w in packed],  # type: ignore[misc]
                [lambda w=w: torch.nn.functional.linear(x, w) for w in dense],  # type: ignore[misc]
            ],
            device,
            rounds,
        )
    return Product(
        *(m, n, k, recipe, str(dtype).removeprefix("torch."), device),
        microseconds=1e6 * ours,
        dense_microseconds=1e6 * theirs,
        speedup=theirs / ours,
        gb_per_s=first.nbytes / ours / 1e9,
        relative_error=error,
    )


def _medians(contenders: list[list[Callable[[], Tensor]]], device: str, rounds: int) -> list[float]:
    samplers = [_captured(calls) if device.startswith("cuda") else _looped(calls) for calls in contenders]
    for sampler in samplers:
        sampler()
    samples = [[sampler() for sampler in samplers] for _ in range(rounds)]
    return [statistics.median(row[i] for row in samples) for i in range(len(samplers))]


def _looped(calls: list[Callable[[], Tensor]]) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    return sample


def _captured(calls: list[Callable[[], Tensor]]) -> Callable[[], float]:
    new_event: Callable[..., Any] = torch.cuda.Event
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = new_event(enable_timing=True), new_event(enable_timing=True)

    def sample() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end)) / len(calls)

    return sample
