# SPDX-License-Identifier: Apache-2.0
"""What torch's allocator gave while something ran, to the byte: how much is held, and how much was at the worst moment.

On the CPU every allocation and release is an event of torch's profiler, operators' own temporaries included; memory
that a kernel takes elsewhere is not seen. On CUDA the caching allocator keeps the count, by what was asked for and by
the blocks that were given.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

_MARK = "kvopt allocations: "


@dataclass(frozen=True)
class Span:
    """Bytes over the start of the block.

    Attributes:
        held: at the span's end.
        peak: the most at any time within the span.
        blocks: as ``held``, by the blocks of CUDA's caching allocator (``memory_allocated``); None on the CPU.
        peak_blocks: likewise ``peak`` (``max_memory_allocated``).
    """

    held: int
    peak: int
    blocks: int | None = None
    peak_blocks: int | None = None


@dataclass
class Allocations:
    """Spans by name; on the CPU they are there once the block has ended."""

    device: torch.device
    spans: dict[str, Span] = field(default_factory=dict)
    _start: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Span:
        return self.spans[name]

    def mark(self, name: str) -> None:
        """Ends a span: what happened since the mark before, or the start, is called ``name``."""
        gc.collect()
        if self.device.type != "cuda":
            with torch.profiler.record_function(_MARK + name):
                return
        now, peak = _cuda_bytes(self.device, "current"), _cuda_bytes(self.device, "peak")
        (held, blocks), (most, most_blocks) = (
            (a - self._start[0], b - self._start[1]) for a, b in (now, peak)
        )
        self.spans[name] = Span(held, most, blocks, most_blocks)
        torch.cuda.reset_peak_memory_stats(self.device)


@contextmanager
def allocations(device: torch.device | str) -> Iterator[Allocations]:
    """Follows the allocator while the block runs; :meth:`Allocations.mark` divides it into spans.

    Memory that is older than the block does not count, nor, on the CPU, does its release.

    .. code-block:: python

        with allocations("cpu") as seen:
            x = torch.zeros(1000)
            seen.mark("made")
            del x
            seen.mark("gone")
        assert seen["made"].held == 4000 and seen["gone"].held == 0 and seen["gone"].peak == 4000

    Raises:
        RuntimeError: on the CPU, torch's profiler runs already.
    """
    seen = Allocations(torch.device(device))
    if seen.device.type == "cuda":
        gc.collect()  # what goes away inside would be subtracted
    with _only_younger_garbage():
        if seen.device.type == "cuda":
            torch.cuda.synchronize(seen.device)
            torch.cuda.reset_peak_memory_stats(seen.device)
            seen._start = _cuda_bytes(seen.device, "current")
            yield seen
            return
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
            yield seen
    seen.spans = _spans(profiler)


@contextmanager
def _only_younger_garbage() -> Iterator[None]:
    """Collecting looks at objects made inside only, which is much faster."""
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def _cuda_bytes(device: torch.device, which: str) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    statistics = torch.cuda.memory_stats(device)
    return statistics[f"requested_bytes.all.{which}"], statistics[f"allocated_bytes.all.{which}"]


def _spans(profiler: Any) -> dict[str, Span]:
    events = profiler.profiler.kineto_results.events()
    timeline = sorted(
        (event.start_ns(), number, event)
        for number, event in enumerate(events)
        if event.name() == "[memory]" or event.name().startswith(_MARK)
    )
    spans: dict[str, Span] = {}
    held = peak = 0
    for _, _, event in timeline:
        if event.name() == "[memory]":
            if event.device_type() == torch._C._autograd.DeviceType.CPU:
                held += event.nbytes()
                peak = max(peak, held)
        else:
            spans[event.name().removeprefix(_MARK)] = Span(held, peak)
            peak = held
    return spans
