# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every contender once a round, so that all of them see the same machine.

On CUDA a contender's calls are captured in one graph and replays are timed with events. Work rotates over copies of the
weights that together exceed the last cache, because a model does not find its weights there either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]  # gets the number of the weight copy to use


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 10th and 90th percentile over the rounds."""

    median_us: float
    p10_us: float
    p90_us: float
    rounds: int


def interleaved(
    contenders: dict[str, Call], copies: int, device: str, rounds: int, calls: int
) -> dict[str, Timing]:
    """Times every contender, round by round in turn, each round being ``calls`` calls over rotating copies."""
    run = {
        name: (_graph if device == "cuda" else _loop)(call, copies, calls)
        for name, call in contenders.items()
    }
    for timed in run.values():  # warm-up
        timed()
    samples: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, timed in run.items():
            samples[name].append(timed())
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return Timing(statistics.median(ordered) * 1e6, pick(0.1) * 1e6, pick(0.9) * 1e6, len(ordered))


def _loop(call: Call, copies: int, calls: int) -> Callable[[], float]:
    state = {"next": 0}

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call(state["next"])
            state["next"] = (state["next"] + 1) % copies
        return (time.perf_counter() - start) / calls

    return timed


def _graph(call: Call, copies: int, calls: int) -> Callable[[], float]:
    calls = max(calls, copies)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(min(3, copies)):
            call(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    return timed
