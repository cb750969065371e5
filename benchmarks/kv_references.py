# SPDX-License-Identifier: Apache-2.0
"""Choices that the package does not offer, for comparison: other orientations of quantised keys and values, other
ways of merging layers. They change the tensors of transformers' own cache and save nothing; only quality is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvopt.eval.perplexity import PerplexityResult, paired_ratio
from kvopt.eval.statistics import ratio_with_stderr

Change = Callable[[list[tuple[Tensor, Tensor]]], list[tuple[Tensor, Tensor]]]
GROUP = 32


def rows(model: Any, windows: Tensor, table: str) -> Iterator[dict[str, Any]]:
    """One row per choice: perplexity of the second half of each window over the changed cache of the first."""
    layers = model.config.num_hidden_layers
    baseline = None
    for name, change in (ORIENTATIONS if table == "orientation" else merges(layers)).items():
        start = time.perf_counter()
        result = _perplexity(model, windows, change)
        baseline = baseline or result
        ratio, error = paired_ratio(result, baseline)
        yield {
            "spec": name,
            "perplexity": result.perplexity,
            "stderr": result.stderr,
            "ratio": ratio,
            "ratio_stderr": error,
            "windows": len(result.window_nll),
            "window": windows.shape[1],
            "seconds": time.perf_counter() - start,
        }


def _perplexity(model: Any, windows: Tensor, change: Change) -> PerplexityResult:
    """The second half is read in one forward; its own keys and values are as they are."""
    half, sums, start = windows.shape[1] // 2, [], time.perf_counter()
    for row in windows.to(model.device).split(1):
        cache = DynamicCache(config=model.config)
        first = model(input_ids=row[:, :half], past_key_values=cache, logits_to_keep=1).logits
        for layer, (keys, values) in zip(
            cache.layers, change([(layer.keys, layer.values) for layer in cache.layers]), strict=True
        ):
            layer.keys, layer.values = keys.contiguous(), values.contiguous()
        rest = model(input_ids=row[:, half:-1], past_key_values=cache).logits
        logits = torch.cat([first, rest], 1).float().log_softmax(-1)
        sums.append(-float(logits.gather(-1, row[:, half:, None]).double().sum()))
    scored = windows.shape[1] - half
    mean, error = ratio_with_stderr(sums, [scored] * len(sums))
    value = float(torch.tensor(mean, dtype=torch.float64).exp())
    return PerplexityResult(
        perplexity=value,
        stderr=None if error is None else value * error,
        window_nll=tuple(sums),
        tokens_per_window=scored,
        window=windows.shape[1],
        prefill=half,
        cache=None,
        seconds=time.perf_counter() - start,
    )


# --- quantisation -----------------------------------------------------------------------------------------------------


def per_token(x: Tensor, bits: int) -> Tensor:
    """(B, H, n, D) rounded over groups of channels of one token."""
    groups = x.unflatten(3, (-1, min(GROUP, x.shape[3])))
    return _rounded(groups, bits, -1).flatten(3)


def per_channel(x: Tensor, bits: int) -> Tensor:
    """(B, H, n, D) rounded over groups of tokens of one channel; n is a multiple of the group."""
    return _rounded(x.unflatten(2, (-1, GROUP)), bits, 3).flatten(2, 3)


def _rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return ((x - low) / step).round() * step + low


def quantised(
    keys: Callable[[Tensor, int], Tensor],
    values: Callable[[Tensor, int], Tensor],
    residual: int,
    bits: int = 2,
) -> Change:
    """All but the newest ``residual`` tokens, and what is left over of whole groups."""

    def change(layers: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        n = max(0, layers[0][0].shape[2] - residual) // GROUP * GROUP
        return [
            tuple(torch.cat([f(x[:, :, :n], bits), x[:, :, n:]], 2) for f, x in ((keys, k), (values, v)))
            for k, v in layers
        ]  # type: ignore[misc]

    return change


ORIENTATIONS: dict[str, Change] = {
    "model type": lambda layers: layers,
    "K channel, V token": quantised(per_channel, per_token, 0),
    "K token, V token": quantised(per_token, per_token, 0),
    "K channel, V channel": quantised(per_channel, per_channel, 0),
    "K token, V channel": quantised(per_token, per_channel, 0),
    "K channel, V token, residual 32": quantised(per_channel, per_token, 32),
    "K channel, V token, residual 64": quantised(per_channel, per_token, 64),
    "K channel, V token, residual 128": quantised(per_channel, per_token, 128),
    "4 bits: K channel, V token": quantised(per_channel, per_token, 0, 4),
    "4 bits: K token, V token": quantised(per_token, per_token, 0, 4),
    "8 bits: K channel, V token": quantised(per_channel, per_token, 0, 8),
}


# --- merging ----------------------------------------------------------------------------------------------------------


def spherical(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """MiniCache, arXiv:2405.14366, section 3: one direction on the arc from a to b, and both magnitudes."""
    na, nb = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    ua, ub = a / na.clamp(min=1e-12), b / nb.clamp(min=1e-12)
    angle = (ua * ub).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = ((1 - t) * angle).sin() / sine * ua + (t * angle).sin() / sine * ub
    direction = torch.where(sine > 1e-4, arc, torch.nn.functional.normalize((1 - t) * ua + t * ub, dim=-1))
    return direction * na, direction * nb


def average(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of both, magnitudes and all."""
    return (a + b) / 2, (a + b) / 2


def merged(
    pairs: list[tuple[int, int]], merge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], keep: float
) -> Change:
    """Layers of each pair made one, but for the ``keep`` share of tokens per head whose keys differ most in angle."""

    def change(layers: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        layers = list(layers)
        for low, high in pairs:
            (ka, va), (kb, vb) = layers[low], layers[high]
            alike = torch.nn.functional.cosine_similarity(ka, kb, dim=-1)
            count = round(keep * alike.shape[2])
            kept = torch.zeros_like(alike, dtype=torch.bool)
            kept.scatter_(2, alike.topk(count, largest=False).indices, True)
            (mka, mkb), (mva, mvb) = merge(ka, kb), merge(va, vb)
            stay = kept[..., None]
            layers[low] = (torch.where(stay, ka, mka), torch.where(stay, va, mva))
            layers[high] = (torch.where(stay, kb, mkb), torch.where(stay, vb, mvb))
        return layers

    return change


def merges(layers: int) -> dict[str, Change]:
    """The upper half in pairs as published, the same by averaging, other places, other t, other shares."""
    half = layers // 2
    deep = [(low, low + 1) for low in range(half, layers - 1, 2)]
    shallow = [(low, low + 1) for low in range(0, half - 1, 2)]

    def slerp(t: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return lambda a, b: spherical(a, b, t)

    return {
        "unmerged": lambda tensors: tensors,
        "deep, SLERP 0.6, 5 %": merged(deep, slerp(0.6), 0.05),
        "deep, average, 5 %": merged(deep, average, 0.05),
        "deep, SLERP 0.5, 5 %": merged(deep, slerp(0.5), 0.05),
        "deep, SLERP 0.6, 0 %": merged(deep, slerp(0.6), 0.0),
        "deep, SLERP 0.6, 20 %": merged(deep, slerp(0.6), 0.20),
        "shallow, SLERP 0.6, 5 %": merged(shallow, slerp(0.6), 0.05),
        "last pair, SLERP 0.6, 5 %": merged([(layers - 2, layers - 1)], slerp(0.6), 0.05),
        "first pair, SLERP 0.6, 5 %": merged([(0, 1)], slerp(0.6), 0.05),
    }


# --- sinks ------------------------------------------------------------------------------------------------------------

SINKS: dict[str, tuple[int, int] | None] = {
    "every token": None,
    "window 64": (64, 0),
    "1 first + 63": (64, 1),
    "4 first + 60": (64, 4),
    "window 256": (256, 0),
    "1 first + 255": (256, 1),
}
"""Tokens that a query sees, itself included, and how many of them are the first of the text."""


def masked_nll(model: Any, windows: Tensor, name: str) -> list[float]:
    """Negative log-likelihood of each of ``windows`` (W, S) but its first token, under a mask of :data:`SINKS`.

    One forward from the start of the window, original positions. What a query sees does not depend on what it finds, so
    this equals reading token by token through ``window_b64`` or ``sink_b64_s1_orig``.
    """
    n, seen = windows.shape[1], SINKS[name]
    mask = None
    if seen is not None:
        width, first = seen
        query, key = torch.arange(n)[:, None], torch.arange(n)[None]
        visible = (key <= query) & ((key > query - (width - first)) | (key < first))
        mask = torch.zeros(n, n).masked_fill(~visible, float("-inf"))[None, None].to(model.device)
    sums = []
    for row in windows.to(model.device).split(1):
        logits = model(input_ids=row, attention_mask=mask, use_cache=False).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")
        sums.append(float(nll.double().sum()))
    return sums
