# SPDX-License-Identifier: Apache-2.0
"""What must change nothing: a budget that is never reached, padding, the company of other rows, what ran before."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cache.tiny_models import TINY, left_padded, random_ids, run_forced, tiny_llama
from conftest import relative_error
from kvopt import assets
from kvopt.cache import Cache, CacheSpec, compress

SPECS = [
    *(
        "full",
        "window_b24",
        "sink_b24_s4_orig",
        "sink_b24_s4",
        "sink_p30_s2",
        "h2o_b24",
        "h2o_b24_r8_age",
        "tova_b24",
    ),
    *("snapkv_b40", "snapkv_b40_w16_grow", "random_b24", "kvzip_b24", "sink_b24_s4+pyramid", "pyramidkv_b40"),
    *(
        "full+fp8",
        "full+int8_g4_r8",
        "h2o_p40",
        "h2o_b24+ada",
        "h2o_p40+ada+int4_g4_r8",
        "window_b40+int2_g8_r16",
    ),
    *(
        "full+minicache",
        "full+minicache_k0_t50+int4_g4_r8",
        "window_b24+minicache_k10+fp8",
        "sink_b24_s4+minicache",
        "sink_p30_s2+minicache_k20+int8_g4_r8",
        "h2o_b24+minicache_k0",
        "h2o_p40+ada+minicache+int4_g4_r8",
        "tova_b24+minicache_k30",
        "snapkv_b40_w16_grow+minicache_k10",
        "random_b24+minicache",
        "kvzip_b24+ada+minicache_k20",
        "kvzip_b24+ada+int4_g4_r8",
        "keydiff_b24+minicache_t80",
    ),
]
MODELS = sorted(TINY)


@pytest.mark.parametrize("name", MODELS)
def test_full_is_dynamic_cache_for_200_tokens(name: str) -> None:
    model, ids = TINY[name](), random_ids(2, 40)
    options = dict(max_new_tokens=200, min_new_tokens=200, do_sample=False)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=Cache(model, "full"), **options), expected)


@pytest.mark.parametrize("name", ["llama-6m", "gpt2-18m"])
def test_full_is_dynamic_cache_on_real_text(name: str, request: pytest.FixtureRequest) -> None:
    embedded = name in assets.MODELS
    folder = assets.path(name) if embedded else request.getfixturevalue("models_folder") / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    texts = ["The castle stood on a hill above the river, and", "In 1912 the company"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    options = dict(max_new_tokens=200, min_new_tokens=200, do_sample=False)
    expected = model.generate(**inputs, **options)
    with compress(model, "full"):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "window_b120",
            "sink_b120_s4_orig",
            "sink_b120_s4",
            "window_b200",
            "h2o_b120",
            "snapkv_b120",
            "tova_b120",
        ),
        *("random_b120", "kvzip_b120", "h2o_b120+ada", "pyramidkv_b120+ada", "snapkv_b80_grow"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_budget_of_the_whole_text_changes_no_bit(name: str, spec: str) -> None:
    model = TINY[name]()
    ids, mask = left_padded([random_ids(1, 80), random_ids(1, 33)])
    more = random_ids(2, 40)
    expected = run_forced(model, Cache(model, "full"), ids, more, mask)
    got = run_forced(model, Cache(model, spec), ids, more, mask)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("prefill", ["full", 16])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing(name: str, spec: str, prefill: str | int) -> None:
    """Prompts longer and shorter than the budget and than the sinks, 60 decoded tokens, against each row alone."""
    model = TINY[name](dtype=torch.float64)
    # kvzip holds the prompt whole at first
    packs = ("int" in spec or "minicache" in spec) and "kvzip" not in spec
    if isinstance(prefill, int) and "ada" in spec and packs:
        with pytest.raises(ValueError, match=r"'ada' shares tokens out .* use prefill='full'"):
            Cache(model, spec, prefill)
        return
    prompts = [random_ids(1, length) for length in (70, 31, 24, 9, 2)]
    ids, mask = left_padded(prompts)
    more = random_ids(len(prompts), 60)
    cache = Cache(model, spec, prefill)
    got = run_forced(model, cache, ids, more, mask)
    for row, prompt in enumerate(prompts):
        alone = Cache(model, spec, prefill)
        expected = run_forced(model, alone, prompt, more[row : row + 1])
        assert relative_error(got[row], expected[0]) < 1e-6, f"row {row}"
        for layer in range(2):
            theirs, ours = alone.positions(layer)[0], cache.positions(layer)[row]
            assert torch.equal(ours[:, -theirs.shape[1] :], theirs)
            assert (ours[:, : -theirs.shape[1]] == -1).all()
            assert relative_error(cache.keys(layer)[row][:, -theirs.shape[1] :], alone.keys(layer)[0]) < 1e-6
            assert (
                relative_error(cache.values(layer)[row][:, -theirs.shape[1] :], alone.values(layer)[0]) < 1e-6
            )
        assert torch.equal(cache.lengths()[:, row], alone.lengths()[:, 0])


@pytest.mark.parametrize("prefill", ["full", 16])
@pytest.mark.parametrize("spec", ["sink_b24_s4", "h2o_b24", "snapkv_b40+int8_g4_r8"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_generate_gives_the_rows_alone(name: str, spec: str, prefill: str | int) -> None:
    # In float32 two logits or scores in a million are so close that the padding makes them change places.
    model = TINY[name](dtype=torch.float64)
    prompts = [random_ids(1, length) for length in (50, 20, 7)]
    ids, mask = left_padded(prompts)
    options = dict(max_new_tokens=50, min_new_tokens=50, do_sample=False)
    with compress(model, spec, prefill):
        together = model.generate(ids, attention_mask=mask, **options)
        for row, prompt in enumerate(prompts):
            assert torch.equal(
                together[row, ids.shape[1] :], model.generate(prompt, **options)[0, prompt.shape[1] :]
            )


@pytest.mark.parametrize(
    "spec",
    ["sink_b16_s4", "h2o_b16+int4_g4_r8", "kvzip_b16", "full+minicache+int4_g4_r8", "h2o_b16+minicache_k20"],
)
@pytest.mark.parametrize("name", MODELS)
def test_two_generations_never_leak(name: str, spec: str) -> None:
    model = TINY[name]()
    first, second = random_ids(2, 40), random_ids(3, 25)
    options = dict(max_new_tokens=40, min_new_tokens=40, do_sample=False)
    expected = model.generate(second, past_key_values=Cache(model, spec), **options)
    with compress(model, spec):
        model.generate(first, **options)
        assert torch.equal(model.generate(second, **options), expected)
    cache = Cache(model, spec)
    model.generate(first, past_key_values=cache, **options)
    cache.reset()
    assert cache.nbytes() == 0
    assert torch.equal(model.generate(second, past_key_values=cache, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_compress_leaves_no_trace(name: str) -> None:
    model, ids = TINY[name](), random_ids(2, 30)
    before = model(ids).logits
    after_one = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    implementation = model.config._attn_implementation
    with pytest.raises(KeyError), compress(model, "window_b8"):
        model(ids)
        raise KeyError
    assert model.config._attn_implementation == implementation == "sdpa"
    assert "generate" not in vars(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False), after_one)
    assert isinstance(model(ids, use_cache=True).past_key_values, DynamicCache)


@torch.no_grad()
def test_our_attention_without_our_cache_is_sdpa() -> None:
    """After kvopt.Cache the model stays switched; other caches, no cache, and training must not notice."""
    model, ids = tiny_llama(4), random_ids(2, 30)
    options = dict(
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = model.generate(ids, **options)
    Cache(model, "window_b8")
    assert model.config._attn_implementation == "kvopt"
    got = model.generate(ids, **options)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_chunked_prefill_of_one_chunk_is_full() -> None:
    model, ids = tiny_llama(), random_ids(2, 40)
    a = model(ids, past_key_values=Cache(model, "sink_b16_s4", prefill=40)).logits
    b = model(ids, past_key_values=Cache(model, "sink_b16_s4")).logits
    assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_chunked_full_cache_is_unchunked(name: str) -> None:
    model, (ids, mask) = TINY[name](dtype=torch.float64), left_padded([random_ids(1, 50), random_ids(1, 11)])
    more = random_ids(2, 10)
    expected = run_forced(model, Cache(model, "full"), ids, more, mask)
    for chunk in (1, 7, 16, 49, 50, 51):
        got = run_forced(model, Cache(model, "full", prefill=chunk), ids, more, mask)
        assert relative_error(got, expected) < 1e-6, f"chunks of {chunk}"


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_twice_may_come_in_chunks(name: str) -> None:
    """The prompt is held whole until the second reading, so chunks of the first change nothing."""
    model, (ids, mask) = TINY[name](dtype=torch.float64), left_padded([random_ids(1, 50), random_ids(1, 11)])
    more = random_ids(2, 10)
    expected = Cache(model, "kvzip_b16")
    logits = run_forced(model, expected, ids, more, mask)
    for chunk in (7, 16, 50):
        cache = Cache(model, "kvzip_b16", prefill=chunk)
        assert relative_error(run_forced(model, cache, ids, more, mask), logits) < 1e-6
        assert torch.equal(cache.positions(1), expected.positions(1))


def test_specs_used_here_parse() -> None:
    assert [str(CacheSpec.parse(spec)) for spec in SPECS] == SPECS
