# SPDX-License-Identifier: Apache-2.0
"""Many cache specs over the same prompts: each prompt is read once, and every spec begins from what was recorded.

A prompt that is attended in full gives every spec the same queries, keys and values; specs differ in what they keep of
them. So a prompt is read once with plain attention, its tensors are handed to each spec's cache as the model would
have done, and only what follows (questions, answers, the rest of a text) is read through each cache, a token at a
time. Of prompts with a common beginning that beginning is read once. Rows of different lengths share a left-padded
batch: a row's result is the same alone. What is measured is what ``kvopt.eval`` measures, several times faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kvopt
from kvopt.cache.second_reading import read_again
from kvopt.eval.documents import RecallDocument, pad_right
from kvopt.eval.forward import negative_log_likelihood, require_finite, step
from kvopt.eval.recall import _Continuation, _continuations
from kvopt.tokens import token_ids

Layers = list[tuple[Tensor, Tensor, Tensor]]
"""Queries, keys and values of every layer, (rows, heads, tokens, D) each, for the tokens just read."""

_NAME = "kvopt_recording"
_read: Layers = []
_scales: list[float] = []


def _recording(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    new = query.shape[2]
    _read.append((query, key[:, :, -new:], value[:, :, -new:]))
    scaling = kwargs.get("scaling")
    _scales.append(query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(_NAME, _recording)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def recording(model: Any) -> Iterator[None]:
    """The model notes its queries, keys and values: :func:`read`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def read(model: Any, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, Layers]:
    """Reads ``ids`` (rows, q) behind what ``cache`` holds; logits (rows, q, V), and the layers' tensors."""
    _read.clear()
    _scales.clear()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    layers = list(_read)
    _read.clear()
    return logits, layers


@dataclass
class Prompts:
    """Prompts that were read.

    Attributes:
        rows: for each prompt the queries, keys and values of every layer, (1, heads, tokens, D).
        ids: their tokens.
        logits: (rows, V) of the last position.
        scales: of each layer's attention logits.
    """

    rows: list[Layers]
    ids: list[list[int]]
    logits: Tensor
    scales: list[float]

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """Queries, keys and values of one layer, (B, heads, longest, D): shorter rows are 0 at their left."""
        longest = max(map(len, self.ids))
        parts = []
        for part in range(3):
            rows = [row[index][part] for row in self.rows]
            batch = rows[0].new_zeros((len(rows), rows[0].shape[1], longest, rows[0].shape[3]))
            for line, row in zip(batch, rows, strict=True):
                line[:, longest - row.shape[2] :] = row[0]
            parts.append(batch)
        return tuple(parts)

    def padded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and mask, (B, longest) int64 each, padded at the left."""
        longest = max(map(len, self.ids))
        ids = [[0] * (longest - len(row)) + row for row in self.ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in self.ids]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def read_prompts(model: Any, beginning: list[int], endings: Sequence[list[int]] = ()) -> Prompts:
    """Reads one prompt, or one for each of ``endings`` behind a common ``beginning``."""
    cache = DynamicCache(config=model.config)
    with recording(model):
        logits, first = read(model, torch.tensor([beginning], device=model.device), cache)
        if not endings:
            return Prompts([first], [beginning], logits[:, -1], list(_scales))
        cache.batch_repeat_interleave(len(endings))
        logits, rest = read(model, pad_right(endings, padding=0).to(model.device), cache)
    rows = [
        [
            tuple(torch.cat([a, b[r : r + 1, :, : len(ending)]], 2) for a, b in zip(old, new, strict=True))
            for old, new in zip(first, rest, strict=True)
        ]
        for r, ending in enumerate(endings)
    ]
    last = torch.stack([logits[r, len(ending) - 1] for r, ending in enumerate(endings)])
    return Prompts(rows, [beginning + ending for ending in endings], last, list(_scales))  # type: ignore[arg-type]


def joined(prompts: Sequence[Prompts]) -> Prompts:
    """All of them in one batch."""
    return Prompts(
        [row for part in prompts for row in part.rows],
        [ids for part in prompts for ids in part.ids],
        torch.cat([part.logits for part in prompts]),
        prompts[0].scales,
    )


def compressed(model: Any, spec: str, prompts: Prompts, layers: list[tuple[Tensor, ...]]) -> kvopt.Cache:
    """A cache that has just read the prompts; ``layers`` are those of :meth:`Prompts.layer`."""
    cache = kvopt.Cache(model, spec)
    ids, mask = prompts.padded(model.device)
    cache.begin(*ids.shape, mask, model.device, partial=False)
    for index, (query, key, value) in enumerate(layers):
        cache.layers[index].attend(query, key, value, prompts.scales[index], None, _unattended)
    cache.finish()
    if cache.spec.policy.second_reading:
        read_again(cache, cache.architecture.base, ids, mask.bool())
    return cache


def _unattended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """In the place of a prompt's attention, which was computed when it was read."""
    return query.transpose(1, 2)


# --- recall -----------------------------------------------------------------------------------------------------------


@dataclass
class Stories:
    """Stories of one batch, read: what every spec begins from.

    Attributes:
        aware: the prompts end with the question, and ``rows`` are the answers; otherwise they are stories, and ``rows``
            questions and answers.
        source: the prompt that each of ``rows`` follows.
        story: the story it belongs to.
    """

    documents: list[RecallDocument]
    aware: bool
    prompts: Prompts
    layers: list[tuple[Tensor, ...]]
    rows: list[_Continuation]
    source: list[int]
    story: list[int]


def read_stories(model: Any, tokenizer: Any, documents: Sequence[RecallDocument], aware: bool) -> Stories:
    """Reads the stories, and with ``aware`` the questions."""
    parts, rows, source, story = [], [], [], []
    for number, document in enumerate(documents):
        ids = token_ids(tokenizer, document.story, begins=True)
        asked = _continuations(tokenizer, document, False)
        if aware:
            begins = [row.answers[0][0] for row in asked]
            endings = [row.ids[:begin] for row, begin in zip(asked, begins, strict=True)]
            parts.append(read_prompts(model, ids, endings))
            source += range(len(rows), len(rows) + len(asked))
            asked = [
                _Continuation(row.ids[begin:], [(0, len(row.ids) - begin)])
                for row, begin in zip(asked, begins, strict=True)
            ]
        else:
            parts.append(read_prompts(model, ids))
            source += [number] * len(asked)
        rows += asked
        story += [number] * len(asked)
    prompts = joined(parts)
    layers = [prompts.layer(index) for index in range(len(prompts.scales))]
    prompts.rows.clear()
    return Stories(list(documents), aware, prompts, layers, rows, source, story)


def recall_of(model: Any, spec: str, stories: Stories) -> list[int]:
    """Right answers of each story.

    Raises:
        FloatingPointError: a logit is NaN or infinite.
    """
    cache = compressed(model, spec, stories.prompts, stories.layers)
    source = torch.tensor(stories.source, device=model.device)
    if not stories.aware:
        cache.batch_select_indices(source)
    ids = pad_right([row.ids for row in stories.rows], padding=0).to(model.device)
    logits = stories.prompts.logits[source]
    agrees, levels = [logits.argmax(-1) == ids[:, 0]], [logits.float().logsumexp(-1)]
    for column in range(ids.shape[1] - 1):
        logits = step(model, cache, ids[:, column])
        agrees.append(logits.argmax(-1) == ids[:, column + 1])
        levels.append(logits.float().logsumexp(-1))
    require_finite(torch.stack(levels), f"recall through {spec}")
    verdict = torch.stack(agrees, 1).cpu()
    right = [0] * len(stories.documents)
    for line, row, number in zip(verdict, stories.rows, stories.story, strict=True):
        begin, end = row.answers[0]
        right[number] += bool(line[begin:end].all())
    return right


# --- perplexity -------------------------------------------------------------------------------------------------------


@dataclass
class Windows:
    """Windows of text whose first part was read."""

    ids: Tensor
    prompts: Prompts
    layers: list[tuple[Tensor, ...]]


def read_windows(model: Any, ids: Tensor, prefill: int) -> Windows:
    """Reads the first ``prefill`` tokens of each window of ``ids`` (W, S)."""
    prompts = joined([read_prompts(model, row[:prefill].tolist()) for row in ids])
    layers = [prompts.layer(index) for index in range(len(prompts.scales))]
    prompts.rows.clear()
    return Windows(ids.to(model.device), prompts, layers)


def nll_of(model: Any, spec: str, windows: Windows) -> list[float]:
    """Negative log-likelihood of the rest of each window, a decoding step per token.

    Raises:
        FloatingPointError: a logit is NaN or infinite.
    """
    cache = compressed(model, spec, windows.prompts, windows.layers)
    logits, ids, prefill = windows.prompts.logits, windows.ids, len(windows.prompts.ids[0])
    nll = []
    for position in range(prefill, ids.shape[1]):
        nll.append(negative_log_likelihood(logits, ids[:, position]))
        if position + 1 < ids.shape[1]:
            logits = step(model, cache, ids[:, position])
    found = torch.stack(nll, 1)
    require_finite(found, f"perplexity through {spec}")
    return found.double().sum(1).tolist()
