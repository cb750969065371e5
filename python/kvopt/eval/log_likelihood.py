# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood of continuations, read through a compressed cache.

lm-evaluation-harness scores a continuation with one forward pass over context and continuation; no query of it ever
reads a compressed cache, so compression seems to cost nothing. Here the context is read and compressed as it would be
in use, and the continuation goes through the cache token by token, or a few tokens at once. Everything else follows
the harness: how context and continuation are split into tokens, what stands before an empty context, which side is cut
off, how a long text is divided into windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvopt.eval.documents import pad_right
from kvopt.eval.forward import evaluating, negative_log_likelihood, require_finite

Text = str | Sequence[int]
Pair = tuple[list[int], list[int]]
Score = tuple[float, bool, int]  # log probability, greedy, bytes of the request's share of the cache


@dataclass(frozen=True)
class LogLikelihoodResult:
    """What became of each request, in their order.

    Attributes:
        scores: log probability (natural logarithm, summed over the continuation's tokens) and whether each of them was
            the model's first choice: the tuples that lm-evaluation-harness expects.
        tokens: of each continuation, or text.
        cache_bytes: what the cache held for each at its end, the batch's bytes divided by its rows; 0 without a cache.
        cache: the spec that was read through; None for plain passes.
        chunk: tokens of the continuation that were read at once.
    """

    scores: tuple[tuple[float, bool], ...]
    tokens: tuple[int, ...]
    cache_bytes: tuple[int, ...]
    cache: str | None
    chunk: int

    @property
    def perplexity(self) -> float:
        """Per token, over all requests together."""
        return math.exp(-sum(score for score, _ in self.scores) / sum(self.tokens))

    @property
    def note(self) -> str:
        """How it was measured, in words."""
        if self.cache is None:
            return f"log-likelihood: {len(self.scores)} requests, one forward pass each"
        how = "token by token" if self.chunk == 1 else f"{self.chunk} tokens at once"
        return f"log-likelihood: {len(self.scores)} requests, context compressed, then {how} through {self.cache}"


def log_likelihood(
    model: torch.nn.Module,
    requests: Sequence[tuple[Text, Text]],
    tokenizer: Any = None,
    *,
    cache: str | None = "full",
    prefill: str | int = "full",
    chunk: int = 1,
    batch_size: int = 8,
    max_length: int | None = None,
    add_bos_token: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LogLikelihoodResult:
    """Log probability of each continuation after its context.

    .. code-block:: python

        result = log_likelihood(model, [("The capital of France is", " Paris")], tokenizer, cache="snapkv_b256+int4")
        (log_probability, greedy), = result.scores

    Args:
        model: a Hugging Face causal language model.
        requests: (context, continuation), each a string or token ids. Spaces at a context's end belong to the
            continuation, and both are made into tokens together, as the harness does it.
        tokenizer: for strings, and for the token that stands in place of an empty context (bos, or eos).
        cache: cache spec to read through, or None for one plain pass over context and continuation.
        prefill: how the cache reads the context: ``"full"``, or tokens of a chunk.
        chunk: tokens of the continuation that are read at once. They see what was kept before them and each other.
        batch_size: requests that are read together; the result does not depend on it.
        max_length: tokens that the model reads at most, the model's context if None. More are cut off on the left.
        add_bos_token: put the beginning-of-sequence token before each context.
        progress: called with (requests done, requests in all).

    Raises:
        ValueError: an empty continuation or one longer than ``max_length``, an empty context or a string without a
            tokenizer that helps, numbers below 1, or what :class:`kvopt.Cache` refuses.
        FloatingPointError: a logit is NaN or infinite.
    """
    limit = _length_limit(model, max_length)
    for name, number in (("chunk", chunk), ("batch_size", batch_size), ("max_length", limit)):
        if number < 1:
            raise ValueError(f"log_likelihood: {name} must be 1 or more, got {number}")
    pairs = [
        _cut(_encode_pair(tokenizer, *request, add_bos_token), limit, number)
        for number, request in enumerate(requests)
    ]
    found: dict[int, Score] = {}
    with evaluating(model) as device:
        for batch in _batches(pairs, batch_size, limit):
            rows = [pairs[number] for number in batch]
            if cache is None:
                scores = _plain(model, rows, device)
            else:
                scores = _through(model, rows, device, cache, prefill, chunk)
            found |= zip(batch, scores, strict=True)
            if progress is not None:
                progress(len(found), len(pairs))
    ordered = [found[number] for number in range(len(pairs))]
    return LogLikelihoodResult(
        scores=tuple((value, greedy) for value, greedy, _ in ordered),
        tokens=tuple(len(continuation) for _, continuation in pairs),
        cache_bytes=tuple(nbytes for *_, nbytes in ordered),
        cache=cache,
        chunk=chunk,
    )


def log_likelihood_rolling(
    model: torch.nn.Module,
    texts: Sequence[Text],
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    context: int = 1,
    add_bos_token: bool = False,
    **options: Any,
) -> LogLikelihoodResult:
    """Log probability of whole texts, in windows: for perplexity over long text.

    Each token is scored once. The first window begins with the prefix token (bos, or eos), every other one with
    ``context`` tokens that were scored before; they are the prompt that is compressed, and the rest of the window goes
    through the cache.

    Args:
        model: as for :func:`log_likelihood`.
        texts: strings or token ids.
        tokenizer: of the strings, and for the prefix token.
        max_length: tokens of a window, the model's context if None.
        context: tokens that a window repeats, 1 to ``max_length``. The harness has 1.
        add_bos_token: as for :func:`log_likelihood`.
        options: as for :func:`log_likelihood`.

    Returns:
        A score for each text; ``cache_bytes`` is the largest of its windows.

    Raises:
        ValueError: an empty text, ``context`` out of range, or as :func:`log_likelihood`.
        FloatingPointError: a logit is NaN or infinite.
    """
    limit = _length_limit(model, max_length)
    if not 1 <= context <= limit:
        raise ValueError(f"log_likelihood_rolling: context must be 1…{limit}, got {context}")
    windows: list[Pair] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        ids = _encode(tokenizer, text, add_bos_token)
        if not ids:
            raise ValueError(f"log_likelihood_rolling: text {number} is empty")
        own = rolling_windows(ids, _prefix_token(tokenizer), limit, context)
        windows += own
        owners += [number] * len(own)
    result = log_likelihood(model, windows, tokenizer, max_length=limit, **options)
    scores, tokens, nbytes = [0.0] * len(texts), [0] * len(texts), [0] * len(texts)
    greedy = [True] * len(texts)
    for owner, (score, first), count, held in zip(
        owners, result.scores, result.tokens, result.cache_bytes, strict=True
    ):
        scores[owner] += score
        tokens[owner] += count
        greedy[owner] &= first
        nbytes[owner] = max(nbytes[owner], held)
    return LogLikelihoodResult(
        tuple(zip(scores, greedy, strict=True)), tuple(tokens), tuple(nbytes), result.cache, result.chunk
    )


def rolling_windows(ids: Sequence[int], prefix: int, length: int, context: int) -> list[Pair]:
    """(context, continuation) windows in which each of ``ids`` is scored once.

    Args:
        ids: of the text.
        prefix: what stands before its first token.
        length: tokens that are read for a window at most: context and continuation but its last token.
        context: tokens of context in every window but the first, 1 to ``length``.
    """
    ids = list(ids)
    windows = [([prefix], ids[:length])]
    begin = length
    while begin < len(ids):
        end = min(len(ids), begin + length - context + 1)
        first = max(0, end - 1 - length)  # a last window that is shorter gets more context instead
        windows.append((ids[first:begin], ids[begin:end]))
        begin = end
    return windows


# --- tokens -----------------------------------------------------------------------------------------------------------


def _length_limit(model: Any, max_length: int | None) -> int:
    if max_length is not None:
        return max_length
    known = getattr(model.config, "max_position_embeddings", None)
    return int(known) if known else 2**31 - 1


def _prefix_token(tokenizer: Any) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise ValueError(
        "log_likelihood: nothing can stand before the first token; pass a tokenizer with a bos or eos token"
    )


def _encode(tokenizer: Any, text: Text, add_bos_token: bool) -> list[int]:
    if not isinstance(text, str):
        return [int(token) for token in text]
    if tokenizer is None:
        raise ValueError("log_likelihood: strings need a tokenizer")
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return [_prefix_token(tokenizer), *ids] if add_bos_token else ids


def _encode_pair(tokenizer: Any, context: Text, continuation: Text, add_bos_token: bool) -> Pair:
    if isinstance(context, str) and isinstance(continuation, str):
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = _encode(tokenizer, context, add_bos_token)
        after = _encode(tokenizer, context + continuation, add_bos_token)[len(before) :]
    else:
        before = _encode(tokenizer, context, add_bos_token)
        after = _encode(tokenizer, continuation, False)
    return before or [_prefix_token(tokenizer)], after


def _cut(pair: Pair, limit: int, number: int) -> Pair:
    context, continuation = pair
    if not continuation:
        raise ValueError(f"log_likelihood: request {number} has an empty continuation")
    if len(continuation) > limit:
        raise ValueError(
            f"log_likelihood: the continuation of request {number} has {len(continuation)} tokens, "
            f"max_length is {limit}"
        )
    return context[-(limit + 1 - len(continuation)) :], continuation


def _batches(pairs: Sequence[Pair], size: int, limit: int) -> list[list[int]]:
    """Requests of similar length together, the longest first; padding takes none of them beyond ``limit``."""
    batches: list[list[int]] = []
    before = after = 0
    for number in sorted(range(len(pairs)), key=lambda n: (-len(pairs[n][0]), -len(pairs[n][1]))):
        before, after = max(before, len(pairs[number][0])), max(after, len(pairs[number][1]))
        if not batches or len(batches[-1]) == size or before + after - 1 > limit:
            batches.append([])
            before, after = map(len, pairs[number])
        batches[-1].append(number)
    return batches


# --- reading ----------------------------------------------------------------------------------------------------------


def _plain(model: Any, rows: Sequence[Pair], device: torch.device) -> list[Score]:
    """One pass; padded at the end, where causal attention keeps it from everything that counts."""
    ids = pad_right([context + continuation for context, continuation in rows], padding=0).to(device)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    width = max(len(continuation) for _, continuation in rows)
    first = torch.tensor([len(context) - 1 for context, _ in rows], device=device)
    columns = (first[:, None] + torch.arange(width, device=device)).clamp(max=logits.shape[1] - 1)
    chosen = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[2]))
    targets = pad_right([continuation for _, continuation in rows], padding=0).to(device)
    return _scores(rows, negative_log_likelihood(chosen, targets), chosen.argmax(-1) == targets, 0)


def _through(
    model: Any, rows: Sequence[Pair], device: torch.device, spec: str, prefill: str | int, chunk: int
) -> list[Score]:
    """Contexts padded on the left; continuations at the end: what is read behind a row's last token counts nowhere."""
    import kvopt

    longest = max(len(context) for context, _ in rows)
    prompt = torch.tensor([[0] * (longest - len(context)) + context for context, _ in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(context)) + [1] * len(context) for context, _ in rows], device=device
    )
    targets = pad_right([continuation for _, continuation in rows], padding=0).to(device)
    cache = kvopt.Cache(model, spec, prefill)
    logits = model(
        input_ids=prompt, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    losses = [negative_log_likelihood(logits, targets[:, :1])]
    agrees = [logits.argmax(-1) == targets[:, :1]]
    for begin in range(0, targets.shape[1] - 1, chunk):
        end = min(begin + chunk, targets.shape[1] - 1)
        reading, real = targets[:, begin:end], None
        if end - begin == 1 < chunk:  # not a decoded token: what is left of a chunk sees what a chunk sees
            real = torch.tensor([[0, 1]], device=device).expand(len(rows), -1)
            reading = torch.cat([torch.zeros_like(reading), reading], dim=1)
        logits = model(input_ids=reading, attention_mask=real, past_key_values=cache, use_cache=True).logits[
            :, begin - end :
        ]
        following = targets[:, begin + 1 : end + 1]
        losses.append(negative_log_likelihood(logits, following))
        agrees.append(logits.argmax(-1) == following)
    return _scores(rows, torch.cat(losses, 1), torch.cat(agrees, 1), cache.nbytes() // len(rows))


def _scores(rows: Sequence[Pair], losses: torch.Tensor, agrees: torch.Tensor, nbytes: int) -> list[Score]:
    lengths = torch.tensor([len(continuation) for _, continuation in rows], device=losses.device)
    counts = torch.arange(losses.shape[1], device=losses.device) < lengths[:, None]
    require_finite(losses[counts], "log_likelihood")
    totals = -losses.double().masked_fill(~counts, 0.0).sum(1)
    return [
        (total, greedy, nbytes)
        for total, greedy in zip(totals.tolist(), (agrees | ~counts).all(1).tolist(), strict=True)
    ]
