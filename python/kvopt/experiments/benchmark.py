# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode speed, honestly: contenders alternate within each round, warm-up is dropped, medians are kept.

One sequence, greedy decoding. Prefill is the time from a prompt to its last logits. Decoding is a plain loop of forward
passes over the cache, the same for the baseline and every contender; the host waits for the device at its ends only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvopt.experiments.memory import cache_nbytes, peak_growth


@dataclass
class Contender:
    """A model with a cache to be timed.

    ``cache`` is a spec; ``"full"`` is transformers' own ``DynamicCache`` with the ``attention`` implementation that
    the model came with (``None``: leave it), because a ``kvopt.Cache`` switches the model to its own.
    """

    name: str
    model: Any
    cache: str = "full"
    attention: str | None = None


@dataclass
class Timing:
    """Every counted round of one contender, in the order they ran, and what its memory did."""

    prompt_tokens: int
    new_tokens: int
    n_warmup: int
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    cache_bytes: int | None = None
    growth_bytes: int | None = None

    @property
    def n_runs(self) -> int:
        """Counted rounds."""
        return len(self.decode_seconds)

    @property
    def prefill_ms(self) -> float:
        """Median milliseconds from the prompt to its last logits."""
        return 1e3 * statistics.median(self.prefill_seconds)

    @property
    def decode_tok_s(self) -> float:
        """Median of the rounds' decoded tokens per second."""
        return statistics.median(self._rates())

    @property
    def decode_tok_s_std(self) -> float | None:
        """Standard deviation of the rounds' tokens per second; ``None`` for a single round."""
        rates = self._rates()
        return statistics.stdev(rates) if len(rates) > 1 else None

    def _rates(self) -> list[float]:
        return [self.new_tokens / seconds for seconds in self.decode_seconds]


def time_interleaved(
    contenders: Sequence[Contender],
    prompt: torch.Tensor,
    new_tokens: int,
    *,
    rounds: int = 5,
    warmup: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Timing]:
    """Times the contenders on the same prompt, one after the other within each round, so that drift hits all alike.

    The first warm-up run of each also gives its cache's bytes at the end and the growth of memory; without any warm-up
    these come from the first round.

    Args:
        contenders: what to time.
        prompt: ``(B, S)`` int64 token ids; ``decode_tok_s`` counts the tokens of one row.
        new_tokens: decoding steps per run, at least 1.
        rounds: counted rounds, at least 1.
        warmup: rounds that are thrown away.
        progress: called with (rounds done, rounds in all).

    Returns:
        One timing per contender, in order.

    Raises:
        ValueError: ``rounds`` or ``new_tokens`` below 1, or ``warmup`` below 0.
    """
    if rounds < 1 or new_tokens < 1 or warmup < 0:
        raise ValueError(
            f"expected rounds ≥ 1, new_tokens ≥ 1, warmup ≥ 0; got {rounds}, {new_tokens}, {warmup}"
        )
    timings = [Timing(prompt.shape[-1], new_tokens, warmup) for _ in contenders]
    for turn in range(-warmup, rounds):
        # Every other round runs backwards: nobody always comes after the same neighbour.
        order = range(len(contenders)) if turn % 2 == 0 else reversed(range(len(contenders)))
        for i in order:
            run_once(contenders[i], prompt, timings[i], counts=turn >= 0, watch_memory=turn == -warmup)
        if progress is not None:
            progress(turn + warmup + 1, rounds + warmup)
    return timings


def run_once(
    contender: Contender, prompt: torch.Tensor, timing: Timing, *, counts: bool, watch_memory: bool
) -> None:
    """Reads ``prompt`` and decodes ``timing.new_tokens`` tokens; adds to ``timing`` what it is told to."""
    device = next(contender.model.parameters()).device
    if watch_memory:
        with peak_growth(device) as growth:
            prefill, decode, cache = _read_and_decode(contender, prompt.to(device), timing.new_tokens)
        timing.growth_bytes = growth.nbytes
        timing.cache_bytes = cache_nbytes(cache)
    else:
        prefill, decode, cache = _read_and_decode(contender, prompt.to(device), timing.new_tokens)
    if counts:
        timing.prefill_seconds.append(prefill)
        timing.decode_seconds.append(decode)


def make_cache(contender: Contender) -> Any:
    """A fresh cache: a ``kvopt.Cache``, but for ``"full"`` transformers' own, which is the baseline."""
    model = contender.model
    if contender.cache == "full":
        from transformers import DynamicCache

        if contender.attention is not None and model.config._attn_implementation != contender.attention:
            model.set_attn_implementation(contender.attention)
        return DynamicCache(config=model.config)
    import kvopt

    return kvopt.Cache(model, contender.cache)


@torch.inference_mode()
def _read_and_decode(contender: Contender, prompt: torch.Tensor, steps: int) -> tuple[float, float, Any]:
    """Seconds of prefill, seconds of ``steps`` decoding steps, and the cache."""
    model = contender.model
    cache = make_cache(contender)
    begin = _now(prompt.device)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)
    read = _now(prompt.device)
    for _ in range(steps):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    end = _now(prompt.device)
    return read - begin, end - read, cache


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
