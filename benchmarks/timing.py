# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every contender once a round, so that all of them see the same machine.

A model does not find its weights in a cache, so no sample here does either. On the CPU a sample calls each copy of the
weight at most once and is preceded by one pass of the read probe over a buffer larger than the last cache; that pass is
also the read rate beside the sample. On CUDA a contender's calls rotate over its copies within one captured graph,
whose replays are timed with events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch

from kvopt import _library

PROBE_BYTES = 2**30
Call = Callable[[], object]  # one call over one copy


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 10th and 90th percentile over the rounds.

    Attributes:
        calls: of a sample.
        reads: GB/s of the read probe beside each sample; empty on CUDA.
        seconds: a call of each sample.
    """

    median_us: float
    p10_us: float
    p90_us: float
    calls: int
    seconds: list[float]
    reads: list[float]

    def share_of_reading(self, nbytes: int) -> float | None:
        """Median over the samples of bytes a second over the rate probed beside it."""
        if not self.reads:
            return None
        return statistics.median(
            nbytes / s / 1e9 / rate for s, rate in zip(self.seconds, self.reads, strict=True)
        )


def interleaved(
    contenders: dict[str, Sequence[Call]],
    device: str,
    rounds: int,
    calls: int,
    threads: Mapping[str, Executor | None] | None = None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times every contender, round by round in turn, every other round backwards.

    Args:
        contenders: by name, a call for each copy of the weight.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: samples of each.
        calls: of a sample, at least (CUDA); on the CPU a sample has at most one a copy.
        threads: of contenders that must run in a thread of their own (CPU).

    Returns:
        The timings, and for those whose calls can't be captured in a graph the reason.
    """
    samplers: dict[str, _CpuSampler | _CudaSampler] = {}
    failures: dict[str, str] = {}
    probe = _library._host_module.ReadProbe(PROBE_BYTES) if device == "cpu" else None
    for name, each in contenders.items():
        try:
            samplers[name] = (
                _CpuSampler(each, probe, (threads or {}).get(name))
                if device == "cpu"
                else _CudaSampler(each, calls)
            )
        except RuntimeError as error:
            failures[name] = f"its calls can't be captured in a graph: {str(error).splitlines()[0]}"
    for sampler in samplers.values():  # warm-up
        sampler.sample()
    results: dict[str, list[tuple[float, float | None]]] = {name: [] for name in samplers}
    for turn in range(rounds):
        for name in list(samplers) if turn % 2 == 0 else list(reversed(samplers)):
            results[name].append(samplers[name].sample())
    return {name: _summary(values, samplers[name].calls) for name, values in results.items()}, failures


def _summary(samples: list[tuple[float, float | None]], calls: int) -> Timing:
    seconds = [s for s, _ in samples]
    ordered = sorted(seconds)
    pick = lambda q: 1e6 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    reads = [rate for _, rate in samples if rate is not None]
    return Timing(1e6 * statistics.median(ordered), pick(0.1), pick(0.9), calls, seconds, reads)


class _CpuSampler:
    """Calls over distinct copies, as many as fit into a twentieth of a second, starting at another copy each time."""

    def __init__(self, each: Sequence[Call], probe: Any, thread: Executor | None) -> None:
        self.each, self.probe, self.thread = each, probe, thread
        self.calls, self.next = max(1, len(each) - 1), 0

    def sample(self) -> tuple[float, float]:
        time.sleep(0.003)  # other libraries' idle threads stop spinning
        rate = self.probe.run(torch.get_num_threads()) / 1e9
        return (self._time() if self.thread is None else self.thread.submit(self._time).result()), rate

    def _time(self) -> float:
        self._take()()  # wakes this contender's threads; its copy is not read again below
        timed = [self._take() for _ in range(self.calls)]
        start = time.perf_counter()
        for call in timed:
            call()
        seconds = (time.perf_counter() - start) / self.calls
        self.calls = max(1, min(self.calls, int(0.05 / seconds)))
        return seconds

    def _take(self) -> Call:
        self.next = (self.next + 1) % len(self.each)
        return self.each[self.next]


class _CudaSampler:
    def __init__(self, each: Sequence[Call], calls: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in each[:3]:
                call()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            each[0]()
            end.record()
        stream.synchronize()
        # Fast calls: more of them than copies, so that a replay is long beside its own launch.
        once = begin.elapsed_time(end)
        self.calls = max(len(each), min(calls, int(10 / once) + 1))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.calls):
                each[i % len(each)]()
        self.begin, self.end = begin, end

    def sample(self) -> tuple[float, None]:
        self.begin.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) * 1e-3 / self.calls, None
