# SPDX-License-Identifier: Apache-2.0
"""window and sink against a plain computation of the same definition, token by token, 600 decoded tokens."""

from __future__ import annotations

import pytest
import torch

from cache.brute_force import Reference, kept_sets, kept_sets_by_chunks
from cache.tiny_models import TINY, random_ids, run_forced, tiny_gpt2, tiny_llama
from conftest import relative_error
from kvopt.cache import Cache

PROMPT, DECODED = 90, 600
TURNED = 1e-5  # kv_attention_decode turns a query by fp32 angles: off by up to 600 · 2^-24 here


@pytest.mark.parametrize(
    ("spec", "sinks", "inside"),
    [("window_b64", 0, False), ("sink_b64_s4_orig", 4, False), ("sink_b64_s4", 4, True)],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_llama_600_tokens(spec: str, sinks: int, inside: bool, groups: int, exact_rope: None) -> None:
    model = tiny_llama(groups, torch.float64)
    ids = random_ids(1, PROMPT + DECODED)
    got = run_forced(model, Cache(model, spec), ids[:, :PROMPT], ids[:, PROMPT:])
    sets = kept_sets(PROMPT, ids.shape[1], 64, sinks)
    expected = Reference(model, sets, inside).logits(ids[0])[PROMPT - 1 :]
    assert relative_error(got[0], expected) < (TURNED if inside else 1e-9)


@pytest.mark.parametrize(("spec", "inside"), [("sink_b256_orig", False), ("sink_b256", True)])
def test_llama_600_tokens_that_cross_a_budget_of_256(spec: str, inside: bool, exact_rope: None) -> None:
    """The prompt is shorter than the budget: the cache fills while decoding, then evicts."""
    model = tiny_llama(2, torch.float64)
    ids = random_ids(1, PROMPT + DECODED)
    got = run_forced(model, Cache(model, spec), ids[:, :PROMPT], ids[:, PROMPT:])
    expected = Reference(model, kept_sets(PROMPT, ids.shape[1], 256, 4), inside).logits(ids[0])[PROMPT - 1 :]
    assert relative_error(got[0], expected) < (TURNED if inside else 1e-9)


@pytest.mark.parametrize(
    ("spec", "sinks", "inside"),
    [("window_b64", 0, False), ("sink_b64_s4_orig", 4, False), ("sink_b64_s4", 4, True)],
)
def test_gpt2_600_tokens(spec: str, sinks: int, inside: bool) -> None:
    model = tiny_gpt2(torch.float64)
    ids = random_ids(1, PROMPT + DECODED)
    got = run_forced(model, Cache(model, spec), ids[:, :PROMPT], ids[:, PROMPT:])
    sets = kept_sets(PROMPT, ids.shape[1], 64, sinks)
    reference = Reference(model, sets, inside)
    if inside:  # the prompt is attended in full at its own positions
        reference._places = lambda t: (torch.arange(len(sets[t])), t if t < PROMPT else len(sets[t]) - 1)
    expected = reference.logits(ids[0])[PROMPT - 1 :]
    assert relative_error(got[0], expected) < 1e-9


CHUNKED = [("window_b24", 0, False), ("sink_b24_s4_orig", 4, False), ("sink_b24_s4", 4, True)]


@torch.no_grad()
@pytest.mark.parametrize(("spec", "sinks", "inside"), CHUNKED)
@pytest.mark.parametrize("name", sorted(TINY))
def test_prompt_in_chunks(name: str, spec: str, sinks: int, inside: bool, exact_rope: None) -> None:
    """All logits of a prompt read 16 by 16, the first chunk being the short one."""
    model, ids = TINY[name](dtype=torch.float64), random_ids(1, 105)
    got = model(ids, past_key_values=Cache(model, spec, prefill=16)).logits
    sets = kept_sets_by_chunks([0, *range(105 % 16, 105, 16)], 105, 24, sinks)
    assert relative_error(got[0], Reference(model, sets, inside).logits(ids[0])) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize(("spec", "sinks", "inside"), CHUNKED)
@pytest.mark.parametrize("name", sorted(TINY))
def test_turns_of_a_conversation(name: str, spec: str, sinks: int, inside: bool, exact_rope: None) -> None:
    """Prompt, 20 decoded tokens, a turn longer than the budget, 20 tokens, a short turn; alone and left-padded."""
    model, ids = TINY[name](dtype=torch.float64), random_ids(1, 150)
    starts = [0, *range(30, 50), 50, *range(90, 110), 110, *range(115, 150)]
    sets = kept_sets_by_chunks(starts, 150, 24, sinks)
    for t in [*range(30, 50), *range(90, 110), *range(115, 150)]:  # one token: room is made before it enters
        sets[t] = kept_sets(0, t + 1, 24, sinks)[t]
    expected = Reference(model, sets, inside).logits(ids[0])
    cache, parts = Cache(model, spec), []
    for start, end in zip(starts, [*starts[1:], 150], strict=True):
        other = random_ids(1, end - start)  # a second row, one token shorter in every turn that has several
        mask = torch.ones(2, end, dtype=torch.long)
        mask[1, [s for s, e in zip(starts, [*starts[1:], 150], strict=True) if e - s > 1 and s < end]] = 0
        both = torch.cat([ids[:, start:end], other])
        parts.append(model(both, attention_mask=mask, past_key_values=cache).logits[:1])
    assert relative_error(torch.cat(parts, dim=1)[0], expected) < (TURNED if inside else 1e-9)


def test_unpatched_fp32_rope_stays_close() -> None:
    """The same with transformers' own fp32 angles: they are off by up to 700 · 2^-24 at the end of the text."""
    model = tiny_llama(2)
    ids = random_ids(1, PROMPT + DECODED)
    got = run_forced(model, Cache(model, "sink_b64_s4"), ids[:, :PROMPT], ids[:, PROMPT:])
    expected = Reference(model, kept_sets(PROMPT, ids.shape[1], 64, 4), True).logits(ids[0])[PROMPT - 1 :]
    assert relative_error(got[0], expected) < 1e-3
