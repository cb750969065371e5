# SPDX-License-Identifier: Apache-2.0
"""Perplexity over windows of text, plain or through a compressed cache, over exactly the same tokens.

Every window is read from an empty state. Its first ``prefill`` tokens are context, the others are scored::

    plain          one forward pass over the window
    through cache  the context is prefilled and compressed, then each token is one decoding step over the cache
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvopt.eval.forward import (
    evaluating,
    negative_log_likelihood,
    new_cache,
    read_prompt,
    require_finite,
    step,
)
from kvopt.eval.statistics import ratio_with_stderr


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity per token with its standard error, and what it was measured on.

    ``stderr`` is the delta method over windows (``None`` for a single window). ``window_nll`` holds the summed negative
    log-likelihood of each window, so two results over the same windows can be compared in pairs.
    """

    perplexity: float
    stderr: float | None
    window_nll: tuple[float, ...]
    tokens_per_window: int
    window: int
    prefill: int
    cache: str | None
    seconds: float

    @property
    def note(self) -> str:
        """How it was measured, in words."""
        scored = (
            f"{len(self.window_nll)} windows of {self.window}, last {self.tokens_per_window} tokens scored"
        )
        if self.cache is None:
            return f"perplexity: {scored}, one forward pass"
        return f"perplexity: {scored}, prompt of {self.prefill} compressed, then token by token through {self.cache}"


def perplexity(
    model: torch.nn.Module,
    windows: torch.Tensor,
    *,
    cache: str | None = None,
    prefill: int = 1,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity per token of ``model`` on ``windows``.

    Args:
        model: a Hugging Face causal language model.
        windows: ``(W, S)`` int64 token ids, from :func:`kvopt.eval.windows_of`.
        cache: cache spec to read through, or ``None`` for one plain forward pass per window.
        prefill: tokens of context at the head of each window that are not scored; the first is never scored.
        batch_size: windows read at once; default 2 plain, 16 through a cache. All have the same length: it is exact.
        progress: called with (windows done, windows in all).

    Raises:
        ValueError: ``prefill`` leaves nothing to score, or ``windows`` is not a matrix.
        FloatingPointError: a logit is NaN or infinite.
    """
    if windows.dim() != 2:
        raise ValueError(f"windows: expected (windows, tokens), got shape {tuple(windows.shape)}")
    count, window = windows.shape
    if not 1 <= prefill < window:
        raise ValueError(f"prefill must be 1…{window - 1} for a window of {window}, got {prefill}")
    size = batch_size or (2 if cache is None else 16)
    started = time.perf_counter()
    sums: list[float] = []
    with evaluating(model) as device:
        for begin in range(0, count, size):
            batch = windows[begin : begin + size].to(device)
            nll = _plain(model, batch, prefill) if cache is None else _through(model, batch, prefill, cache)
            require_finite(nll, f"perplexity, windows {begin}…{begin + len(batch) - 1}")
            sums += nll.double().sum(1).tolist()
            if progress is not None:
                progress(len(sums), count)
    scored = window - prefill
    mean, error = ratio_with_stderr(sums, [scored] * count)
    value = math.exp(mean)
    return PerplexityResult(
        perplexity=value,
        stderr=None if error is None else value * error,
        window_nll=tuple(sums),
        tokens_per_window=scored,
        window=window,
        prefill=prefill,
        cache=cache,
        seconds=time.perf_counter() - started,
    )


def paired_ratio(result: PerplexityResult, baseline: PerplexityResult) -> tuple[float, float | None]:
    """Perplexity over the baseline's, with the standard error of the ratio over the same windows.

    Most of the spread between windows is the text's and cancels, so this is far sharper than the two errors apart.

    Raises:
        ValueError: the two were not measured on windows of the same shape and number.
    """
    same = (result.window, result.prefill, len(result.window_nll))
    if same != (baseline.window, baseline.prefill, len(baseline.window_nll)):
        raise ValueError("paired_ratio: the two results were measured on different windows")
    differences = [a - b for a, b in zip(result.window_nll, baseline.window_nll, strict=True)]
    mean, error = ratio_with_stderr(differences, [result.tokens_per_window] * len(differences))
    ratio = math.exp(mean)
    return ratio, None if error is None else ratio * error


def _plain(model: torch.nn.Module, batch: torch.Tensor, context: int) -> torch.Tensor:
    """Negative log-likelihood ``(B, S - context)`` from one forward pass."""
    keep = batch.shape[1] - context + 1
    logits = model(input_ids=batch, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    rows = [negative_log_likelihood(row, ids) for row, ids in zip(logits, batch[:, context:], strict=True)]
    return torch.stack(rows)


def _through(model: torch.nn.Module, batch: torch.Tensor, context: int, spec: str) -> torch.Tensor:
    """The same through a cache: prefill ``context`` tokens, then one decoding step per token; no host sync inside."""
    cache = new_cache(model, spec)
    logits = read_prompt(model, cache, batch[:, :context])
    nll = torch.empty(batch.shape[0], batch.shape[1] - context, device=batch.device)
    for column, position in enumerate(range(context, batch.shape[1])):
        nll[:, column] = negative_log_likelihood(logits, batch[:, position])
        if position + 1 < batch.shape[1]:
            logits = step(model, cache, batch[:, position])
    return nll
