# SPDX-License-Identifier: Apache-2.0
"""What was predicted is what the allocator gives: after the prompt, at its worst, while decoding, after a reset."""

from __future__ import annotations

import functools
import random
from itertools import product
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvopt
from cache.tiny_models import TINY, left_padded, random_ids, tiny_llama
from conftest import DEVICES
from kvopt.cache import Cache, CacheSpec
from kvopt.experiments.allocations import Allocations, allocations

POLICIES = [
    *("full", "window_b40", "sink_b40_s4", "sink_b40_s4_orig", "h2o_b40", "tova_b40", "snapkv_b40_w8"),
    *("snapkv_b40_w8_grow", "pyramidkv_b40_w8", "kvzip_b40", "random_b40", "keydiff_b40", "h2o_p30"),
]
CODECS = ["", "+fp8", "+int4_g8_r16"]
OTHERS = [
    *("h2o_b40+ada", "pyramidkv_b40_w8+ada", "kvzip_b40+ada", "snapkv_b40_w8_grow+ada", "h2o_mb1"),
    *("full+int8_g16", "full+int2_g4_r8", "tova_b40+int2_g32_r32", "window_mb1+int8", "h2o_b40_r30_age"),
    *(
        "full+minicache",
        "full+minicache+int4_g8_r16",
        "h2o_b40+minicache",
        "snapkv_b40_w8_grow+minicache+fp8",
    ),
    "kvzip_b40+minicache_k20+int4_g8_r16",
]
CHUNK = 48


@functools.cache
def model_of(name: str, device: str) -> PreTrainedModel:
    """The weights do not matter here, so one model serves all tests."""
    return TINY[name]().to(device)


@torch.no_grad()
def without_cache(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> int:
    """The most that a forward takes which keeps nothing; not the first one, since libraries allocate once."""
    model(ids[:, :1], use_cache=False)
    with allocations(ids.device) as seen:
        model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        seen.mark("forward")
    return seen["forward"].peak


@torch.no_grad()
def watched(
    model: PreTrainedModel, spec: str, ids: torch.Tensor, mask: torch.Tensor, prefill: Any, new: int
) -> tuple[Allocations, int, int, bool]:
    """The spans prompt, decode, more and reset; ``nbytes`` after the prompt and after ``new`` + ``new`` tokens.

    And whether all heads of all rows kept as many tokens before those as after.
    """
    rows = ids.shape[0]
    tokens = random_ids(rows, 2 * new).to(ids.device)
    with allocations(ids.device) as seen:
        cache = Cache(model, spec, prefill)
        model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        after_prompt, kept = cache.nbytes(), cache.lengths().tolist()
        seen.mark("prompt")
        for t in range(2 * new):
            model(tokens[:, t : t + 1], past_key_values=cache)
            if t + 1 == new:
                seen.mark("decode")
        seen.mark("more")
        steady, was_full = cache.nbytes(), kept == cache.lengths().tolist()
        cache.reset()
        seen.mark("reset")
    return seen, after_prompt, steady, was_full


def check(name: str, spec: str, prefill: Any, device: str, new: int = 12) -> None:
    model = model_of(name, device)
    lengths = [random.randrange(60, 200), random.randrange(3, 200)]
    ids, mask = (x.to(device) for x in left_padded([random_ids(1, length) for length in lengths]))
    read = ids.shape[1] if prefill == "full" or "kvzip" in spec else min(prefill, ids.shape[1])
    forward = without_cache(model, ids[:, -read:], mask[:, -read:])
    token = without_cache(model, ids[:, :1], torch.ones_like(ids[:, :1]))
    seen, after_prompt, steady, was_full = watched(model, spec, ids, mask, prefill, new)
    expected = kvopt.cache_bytes(model, spec, 2, lengths, 2 * new, prefill)

    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    host = 2 * 8 * layers * 2 * heads  # each head's capacity, and its tokens, are on the CPU as well
    assert 0 <= seen["prompt"].held - after_prompt <= host
    assert 0 <= seen["more"].held - steady <= host
    if expected.exact:
        assert (after_prompt, steady) == (expected.after_prompt, expected.steady)
    else:
        assert 0.5 * expected.steady < steady <= expected.steady
    assert seen["prompt"].peak <= forward + expected.peak
    assert max(seen["decode"].peak, seen["more"].peak) <= token + expected.peak
    if not CacheSpec.parse(spec).policy.grows:  # nothing grows with what is generated, not even for a moment
        assert after_prompt == steady and seen["decode"].held == seen["more"].held
        assert not was_full or seen["more"].peak <= seen["decode"].peak
    assert seen["reset"].held == 0


@pytest.mark.parametrize("prefill", ["full", CHUNK])
@pytest.mark.parametrize("spec", [*map("".join, product(POLICIES, CODECS)), *OTHERS])
@pytest.mark.parametrize("device", DEVICES)
def test_allocator_gives_what_was_predicted(spec: str, prefill: Any, device: str) -> None:
    check("llama", spec, prefill, device)


@pytest.mark.parametrize("spec", ["full+fp8", "sink_b40_s4", "h2o_b40+ada", "snapkv_b40_w8_grow+int4_g8_r16"])
@pytest.mark.parametrize("prefill", ["full", CHUNK])
@pytest.mark.parametrize("device", DEVICES)
def test_also_with_as_many_kv_heads_as_heads(spec: str, prefill: Any, device: str) -> None:
    check("gpt2", spec, prefill, device)


@pytest.mark.parametrize("spec", ["h2o_b40+ada+int4_g8_r16", "snapkv_b40_w8+ada+int2_g4_r8"])
def test_uneven_heads_with_packed_tokens_take_no_more_than_predicted(spec: str) -> None:
    assert not kvopt.cache_bytes(model_of("llama", "cpu"), spec, 1, 99).exact
    check("llama", spec, "full", "cpu")


@pytest.mark.parametrize("spec", ["full", "full+int4_g8_r16", "snapkv_b40_w8_grow", "snapkv_b64_w8_grow+fp8"])
@pytest.mark.parametrize("prompt", [3, 50, 255])
def test_what_grows_is_predicted_over_hundreds_of_tokens(spec: str, prompt: int) -> None:
    model, cache = model_of("llama", "cpu"), Cache(model_of("llama", "cpu"), spec)
    sizes = []
    with torch.no_grad():
        model(random_ids(1, prompt), past_key_values=cache)
        for _ in range(300):
            model(random_ids(1, 1), past_key_values=cache)
            sizes.append(cache.nbytes())
    expected = [kvopt.cache_bytes(model, spec, 1, prompt, new).steady for new in range(1, 301)]
    assert sizes == expected and len(set(sizes)) <= 3


@pytest.mark.parametrize("spec", ["h2o_b40+int4_g8_r16", "kvzip_b40", "full"])
def test_generate_leaves_the_cache_and_its_tokens(spec: str) -> None:
    model, ids = model_of("llama", "cpu"), random_ids(3, 70)
    options = dict(max_new_tokens=20, do_sample=False)
    model.generate(ids, past_key_values=Cache(model, spec), **options)
    with allocations("cpu") as seen:
        cache = Cache(model, spec)
        tokens = model.generate(ids, past_key_values=cache, **options)
        seen.mark("generate")
        cache.reset()
        seen.mark("reset")
    expected = kvopt.cache_bytes(model, spec, 3, 70, 19)  # the last token is not read
    assert seen["generate"].held == pytest.approx(expected.steady + tokens.nbytes, rel=0.02)
    assert seen["reset"].held == tokens.nbytes


def test_only_the_shape_of_the_model_is_read() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    here = kvopt.cache_bytes(model, "h2o_b40+int4", 4, 500, 7)
    with torch.device("meta"):
        nowhere = type(model)(model.config)
    assert kvopt.cache_bytes(nowhere, "h2o_b40+int4", 4, 500, 7) == here
    assert model.config._attn_implementation == before and not model._forward_hooks
    half = kvopt.cache_bytes(model.half(), "window_b40", 4, 500)
    assert half.steady < kvopt.cache_bytes(model.float(), "window_b40", 4, 500).steady


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h2o_b40", 0, 10), "0 rows"),
        (("h2o_b40", 2, [10]), "2 rows"),
        (("h2o_b40", 2, [10, 0]), "prompts of"),
        (("h2o_b40", 2, 10, -1), "-1 new"),
        (("h2o_b40", 2, 10, 1, 0), "prefill"),
        (("h2o_b40", 2, 10, 1, "chunks"), "prefill"),
        (("nothing_b40", 1, 10), "policy"),
        (("full+int4_g8_r9", 1, 10), "multiple of the group"),
        (("h2o_mb1", 4096, 1000), "needs 2 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kvopt.cache_bytes(model_of("llama", "cpu"), *arguments)
