# SPDX-License-Identifier: Apache-2.0
"""Recall: does the model still find facts of a story that it has read?

The prompt is the story, a blank line, ``Q: …``, a blank line and ``A:``. An answer counts when every one of its tokens
is the model's first choice after the right ones before it (teacher-forced exact match: the same verdict as greedy
decoding up to the answer's length, in one pass).

Each question is asked on its own. Through a cache the story is read and compressed **before** the question is known
(query-agnostic), then question and answer are read token by token over the compressed cache. With ``query_aware=True``
the question is part of the prompt, so a policy may look at what it needs, and only the answer is read over the
compressed cache; a cache that serves one question is the easier case. ``history=True`` asks the questions of a story as
one dialogue instead, with the right answers before each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvopt.eval.documents import RecallDocument, pad_right
from kvopt.eval.forward import evaluating, new_cache, read_prompt, require_finite, step
from kvopt.eval.statistics import ratio_with_stderr
from kvopt.tokens import token_ids


@dataclass(frozen=True)
class RecallResult:
    """The share of questions answered exactly, with its standard error clustered by document.

    ``by_length`` maps the documents' length class to (right, asked). ``skipped`` documents were too long for the model.
    """

    recall: float
    stderr: float | None
    by_length: dict[str, tuple[int, int]]
    n_documents: int
    n_questions: int
    skipped: int
    cache: str | None
    history: bool
    seconds: float
    query_aware: bool = False

    @property
    def note(self) -> str:
        """How it was measured, in words."""
        how = "as one dialogue" if self.history else "each asked alone"
        when = "story and question compressed" if self.query_aware else "story compressed before the question"
        through = "" if self.cache is None else f", {when}, read through {self.cache}"
        left_out = f", {self.skipped} documents too long for the model left out" if self.skipped else ""
        return f"recall: {self.n_questions} questions, {how}{through}{left_out}"


@dataclass(frozen=True)
class _Continuation:
    """Tokens that follow a story, and the spans in them that are answers."""

    ids: list[int]
    answers: list[tuple[int, int]]


def recall(
    model: torch.nn.Module,
    tokenizer: Any,
    documents: Sequence[RecallDocument],
    *,
    cache: str | None = None,
    history: bool = False,
    query_aware: bool = False,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> RecallResult:
    """Exact-match recall of ``model`` over the questions of ``documents``.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        documents: from :func:`kvopt.eval.read_recall`.
        cache: cache spec to read through, or ``None`` for plain passes.
        history: ask a story's questions as one dialogue instead of each alone.
        query_aware: compress story and question together instead of the story before the question is known.
        batch_size: questions of one story that are read at once; they share its cache (``query_aware``: each has its
            own) and don't see each other.
        progress: called with (documents done, documents in all).

    Raises:
        ValueError: no document fits the model's context, or ``query_aware`` together with ``history``.
        FloatingPointError: a logit is NaN or infinite.
    """
    if query_aware and history:
        raise ValueError("recall: query_aware asks each question alone, it can't be joined with history")
    count_right = _count_right_aware if query_aware else _count_right
    started = time.perf_counter()
    context = getattr(model.config, "max_position_embeddings", None)
    right: list[int] = []
    asked: list[int] = []
    by_length: dict[str, tuple[int, int]] = {}
    skipped = 0
    with evaluating(model) as device:
        for number, document in enumerate(documents, 1):
            story = token_ids(tokenizer, document.story, begins=True)
            rows = _continuations(tokenizer, document, history)
            if context is not None and len(story) + max(len(row.ids) for row in rows) > context:
                skipped += 1
                continue
            correct = 0
            for begin in range(0, len(rows), batch_size):
                part = rows[begin : begin + batch_size]
                correct += count_right(model, story, part, cache, device, document.id)
            right.append(correct)
            asked.append(len(document.questions))
            before = by_length.get(document.length, (0, 0))
            by_length[document.length] = (before[0] + correct, before[1] + len(document.questions))
            if progress is not None:
                progress(number, len(documents))
    if not right:
        raise ValueError(
            f"recall: none of the {len(documents)} documents fits the model's context of {context} tokens"
        )
    value, error = ratio_with_stderr(right, asked)
    return RecallResult(
        recall=value,
        stderr=error,
        by_length=by_length,
        n_documents=len(right),
        n_questions=sum(asked),
        skipped=skipped,
        cache=cache,
        history=history,
        seconds=time.perf_counter() - started,
        query_aware=query_aware,
    )


def _continuations(tokenizer: Any, document: RecallDocument, history: bool) -> list[_Continuation]:
    """What follows the story: one row per question, or one row with all of them."""
    rows: list[_Continuation] = []
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for question, answer in zip(document.questions, document.answers, strict=True):
        ids = ids + token_ids(tokenizer, f"\n\nQ: {question}\n\nA:", begins=False)
        begin = len(ids)
        ids = ids + token_ids(tokenizer, f" {answer}", begins=False)
        spans = [*spans, (begin, len(ids))]
        if not history:
            rows.append(_Continuation(ids, spans))
            ids, spans = [], []
    return [_Continuation(ids, spans)] if history else rows


def _count_right(
    model: torch.nn.Module,
    story: list[int],
    rows: list[_Continuation],
    spec: str | None,
    device: torch.device,
    name: str,
) -> int:
    """Right answers among ``rows``, which all follow the same story.

    The story is read once and its cache repeated for every row. Rows are padded at their end: causal attention keeps
    the padding from every answer, and a cache may evict for it only after the row's answer has been scored.
    """
    prompt = torch.tensor([story], device=device)
    ids = pad_right([row.ids for row in rows], padding=0).to(device)
    cache = new_cache(model, spec)
    first = read_prompt(model, cache, prompt)
    if ids.shape[0] > 1:
        cache.batch_repeat_interleave(ids.shape[0])
    # The last token of a row is never read: nothing after it is scored. choice[:, i] is the model's first choice for
    # token i of the row, level its log-sum-exp.
    reading = ids[:, :-1]
    choices, levels = (
        [first.argmax(-1).expand(len(rows))[:, None]],
        [_level(first).expand(len(rows))[:, None]],
    )
    if spec is None:
        logits = model(input_ids=reading, past_key_values=cache, use_cache=True).logits
        choices.append(logits.argmax(-1))
        levels.append(_level(logits))
    else:
        for column in range(reading.shape[1]):
            logits = step(model, cache, reading[:, column])
            choices.append(logits.argmax(-1)[:, None])
            levels.append(_level(logits)[:, None])
    choice, level = torch.cat(choices, 1), torch.cat(levels, 1)
    require_finite(level, f"recall, document {name!r}")
    agrees = (choice == ids).cpu()
    return sum(bool(agrees[r, begin:end].all()) for r, row in enumerate(rows) for begin, end in row.answers)


def _count_right_aware(
    model: Any,
    story: list[int],
    rows: list[_Continuation],
    spec: str | None,
    device: torch.device,
    name: str,
) -> int:
    """The same where each row's prompt is the story and its question: a left-padded batch with a cache of its own."""
    begins = [row.answers[0][0] for row in rows]
    prompts = [story + row.ids[:begin] for row, begin in zip(rows, begins, strict=True)]
    answers = [row.ids[begin:] for row, begin in zip(rows, begins, strict=True)]
    longest = max(map(len, prompts))
    prompt = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    ids = pad_right(answers, padding=0).to(device)
    cache = new_cache(model, spec)
    logits = model(
        input_ids=prompt,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    agrees, levels, positions = [logits.argmax(-1) == ids[:, 0]], [_level(logits)], mask.sum(1)
    for column in range(ids.shape[1] - 1):
        mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)
        logits = model(
            input_ids=ids[:, column : column + 1],
            attention_mask=mask,
            position_ids=positions[:, None] + column,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        agrees.append(logits.argmax(-1) == ids[:, column + 1])
        levels.append(_level(logits))
    require_finite(torch.stack(levels, 1), f"recall, document {name!r}")
    verdict = torch.stack(agrees, 1).cpu()
    return sum(bool(verdict[row, : len(answer)].all()) for row, answer in enumerate(answers))


def _level(logits: torch.Tensor) -> torch.Tensor:
    """``(..., V)`` → ``(...)`` in fp32; NaN or infinite where a logit is NaN or plus infinity."""
    return logits.float().logsumexp(-1)
