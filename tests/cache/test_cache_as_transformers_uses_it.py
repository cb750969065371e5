# SPDX-License-Identifier: Apache-2.0
"""Beams, taking tokens back, families, every way in, and everything that is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cache.brute_force import kept_sets
from cache.tiny_models import TINY, VOCABULARY, left_padded, random_ids, run_forced, tiny_gpt2, tiny_llama
from conftest import relative_error
from kvopt.cache import Cache, Policy, Tokens, compress, register_policy
from kvopt.cache.policies import POLICIES

MODELS = sorted(TINY)
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.15,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=None,
)


@pytest.mark.parametrize(
    "spec",
    [
        "full",
        "window_b16",
        "sink_b16_s4",
        "sink_b16_s4_orig",
        "h2o_b16+ada",
        "snapkv_b32+int8_g4_r8",
        "full+fp8",
        "full+minicache",
        "h2o_b16+minicache_k20+int8_g4_r8",
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_beam_search_reorders_everything(name: str, spec: str) -> None:
    """The best beam's score, recomputed by forcing its tokens through a cache of its own."""
    model = TINY[name](dtype=torch.float64)
    ids, mask = left_padded([random_ids(1, 30), random_ids(1, 12)])
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=Cache(model, spec),
        num_beams=4,
        max_new_tokens=25,
        min_new_tokens=25,
        do_sample=False,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, ids.shape[1] :]
    logits = run_forced(model, Cache(model, spec), ids, new[:, :-1], mask)
    score = logits.log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
    assert relative_error(out.sequences_scores, score) < 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        *("sink_b16_s4", "h2o_b16+ada", "tova_b32+int4_g8_r16", "full+fp8"),
        *("full+minicache", "h2o_b16+ada+minicache+fp8"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_return_sequences_and_repeated_rows(name: str, spec: str) -> None:
    model, ids = TINY[name](dtype=torch.float64), random_ids(2, 30)
    options = dict(max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert model.generate(ids, past_key_values=Cache(model, spec), **options).shape == (6, 35)
    more = random_ids(2, 20)
    cache = Cache(model, spec)
    run_forced(model, cache, ids, more)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    swapped = Cache(model, spec)
    run_forced(model, swapped, ids.flip(0), more.flip(0))
    token = random_ids(2, 1)
    got, expected = (run_forced(model, c, token, token[:, :0]) for c in (cache, swapped))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        *("full", "sink_b16_s4", "h2o_b24+int4_g4_r8", "snapkv_b40_grow+ada"),
        *("full+minicache", "snapkv_b40_grow+ada+minicache+int4_g4_r8"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_deep_copy_shares_a_prefix_and_not_the_model(name: str, spec: str) -> None:
    model, prefix, turns = TINY[name](), random_ids(1, 40), [random_ids(1, 12), random_ids(1, 12)]
    common = Cache(model, spec)
    run_forced(model, common, prefix, prefix[:, :5])
    for turn in turns:
        alone = Cache(model, spec)
        run_forced(model, alone, prefix, prefix[:, :5])
        expected = run_forced(model, alone, turn, turn)
        twin = copy.deepcopy(common)
        assert twin.architecture.base is common.architecture.base and twin.nbytes() == common.nbytes()
        assert torch.equal(run_forced(model, twin, turn, turn), expected)
    assert common.get_seq_length() == 45


def test_crop_takes_back_only_what_is_still_there() -> None:
    model, ids, more = tiny_llama(), random_ids(2, 20), random_ids(2, 10)
    cache = Cache(model, "full")
    run_forced(model, cache, ids, more)
    cache.crop(-6)
    cache.crop(22)
    assert cache.get_seq_length() == 22 and cache.positions(0).shape == (2, 2, 22)
    again = run_forced(model, cache, more[:, 2:3], more[:, 3:])
    expected = run_forced(model, Cache(model, "full"), ids, more)[:, 3:]
    assert torch.equal(again, expected)
    evicting = Cache(model, "window_b8")
    run_forced(model, evicting, ids, more)
    with pytest.raises(ValueError, match=r"'window_b8' evicts tokens"):
        evicting.crop(-1)
    evicting.crop(0)


def test_crop_stops_at_what_is_packed() -> None:
    model, ids, more = tiny_llama(), random_ids(2, 30), random_ids(2, 20)
    cache = Cache(model, "full+int8_g4_r16")
    run_forced(model, cache, ids, more)
    expected = [cache.keys(1)[:, :, :-10], cache.positions(1)[:, :, :-10]]
    cache.crop(-10)
    assert torch.equal(cache.keys(1), expected[0]) and torch.equal(cache.positions(1), expected[1])
    assert cache.lengths().unique().tolist() == [40]
    with pytest.raises(ValueError, match="can't take back 20 tokens, some of them are packed; the newest 13"):
        cache.crop(-20)
    assert cache.lengths().unique().tolist() == [40] and cache.get_seq_length() == 40
    run_forced(model, cache, more[:, :1], more[:, :5])
    assert cache.lengths().unique().tolist() == [46]


def test_crop_stops_at_what_is_merged() -> None:
    """While the plain parts have room nothing is; later only the newest token surely is not."""
    model, ids, more = tiny_llama(), random_ids(2, 10), random_ids(2, 40)
    cache, again = (Cache(model, "full+minicache_k5+int4_g4_r16") for _ in range(2))
    run_forced(model, cache, ids, more[:, :9])
    cache.crop(-9)
    run_forced(model, again, ids, ids[:, :0])
    got = run_forced(model, cache, more[:, :1], more[:, 1:])
    assert torch.equal(got, run_forced(model, again, more[:, :1], more[:, 1:]))
    before = [cache.keys(layer)[:, :, :-13] for layer in range(2)]
    cache.crop(-13)
    assert cache.lengths().unique().tolist() == [37]
    assert all(torch.equal(cache.keys(layer), keys) for layer, keys in enumerate(before))
    with pytest.raises(ValueError, match="can't take back 30 tokens, some of them are packed; the newest 13"):
        cache.crop(-30)
    run_forced(model, cache, more[:, :1], more)
    assert cache.lengths().unique().tolist() == [78]


@pytest.mark.parametrize("name", MODELS)
def test_inference_mode_may_come_and_go(name: str) -> None:
    model, ids = TINY[name](), random_ids(2, 20)
    specs = ["sink_b12_s4", "full", "h2o_b16+int4_g4_r4", "full+fp8", "snapkv_b32_grow", "tova_b8"]
    specs += [
        "full+minicache",
        "h2o_b16+minicache+int4_g4_r4",
        "snapkv_b32_grow+minicache_k0",
        "kvzip_b8+minicache",
    ]
    caches = [Cache(model, spec) for spec in specs]
    for cache in caches:
        with torch.inference_mode():
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        with torch.no_grad():
            model(ids[:, :1], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            model(ids[:, :5], past_key_values=cache)
        with torch.inference_mode():
            model(ids[:, :1], past_key_values=cache)


def test_user_policy_by_keys_keeps_its_own_set_in_each_head() -> None:
    @register_policy("smallnorm")
    class SmallNorm(Policy):
        def priority(self, tokens: Tokens) -> torch.Tensor:
            assert tokens.keys is not None and tokens.keys.shape[:3] == tokens.positions.shape
            return -tokens.keys.norm(dim=-1)

    try:
        model, ids, more = tiny_llama(dtype=torch.float64), random_ids(1, 50), random_ids(1, 30)
        everything, cache = Cache(model, "full"), Cache(model, "smallnorm_b16")
        run_forced(model, everything, ids, more[:, :0])
        run_forced(model, cache, ids, more[:, :0])
        norms = everything.keys(0)[0].norm(dim=-1)
        kept = (-norms).topk(16).indices.sort().values
        assert torch.equal(cache.positions(0)[0], kept.int())
        assert not torch.equal(cache.positions(0)[0, 0], cache.positions(0)[0, 1])
        for j, token in enumerate(more.T):
            norms = cache.keys(0)[0].norm(dim=-1)
            before = cache.positions(0)[0]
            run_forced(model, cache, token[None], more[:, :0])
            for head in range(2):
                stays = before[head][torch.arange(16) != norms[head].argmax()]
                assert torch.equal(
                    cache.positions(0)[0, head], torch.cat([stays, stays.new_tensor([50 + j])])
                )
    finally:
        del POLICIES["smallnorm"]


def test_user_policy_with_a_wrong_shape_is_told() -> None:
    @register_policy("wrong")
    class Wrong(Policy):
        def priority(self, tokens: Tokens) -> torch.Tensor:
            return tokens.positions[:, 0]

    try:
        model = tiny_llama()
        with pytest.raises(
            ValueError, match=r"'wrong': priority\(\) returned shape \(1, 20\), expected \(1, 2, 20\)"
        ):
            model(random_ids(1, 20), past_key_values=Cache(model, "wrong_b8"))
    finally:
        del POLICIES["wrong"]


def families() -> dict[str, Any]:
    return {
        "mistral": lambda: MistralForCausalLM(
            MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)
        ),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)),
        "phi": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
        "llama3 rope": lambda: tiny_llama(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        ),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(families()))
def test_families_inside_positions_equal_a_shifted_text(name: str) -> None:
    """One decoded token after eviction sees what it would see if the evicted tokens had never had a position.

    Only the first layer's keys don't depend on what was seen before, so the model is cut to one layer: there, the
    cache must equal one forward over the kept tokens alone, numbered from 0.
    """
    config_layers = dict(SMALL)
    try:
        SMALL["num_hidden_layers"] = 1
        model = families()[name]().double().eval()
    finally:
        SMALL.update(config_layers)
    if name == "llama3 rope":
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
    ids = random_ids(1, 60)
    got = run_forced(model, Cache(model, "sink_b16_s4"), ids[:, :40], ids[:, 40:])[0, -1]
    kept = kept_sets(0, 60, 16, 4)[59]
    expected = model(ids[:, kept], use_cache=False).logits[0, -1]
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(model_type="mistral", sliding_window=32, num_key_value_heads=2), "sliding window"),
        (dict(model_type="gemma2", num_key_value_heads=2, head_dim=16), "sliding_attention"),
        (dict(model_type="mamba", state_size=4), "recurrent"),
        (dict(model_type="t5", d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4), "encoder-decoder"),
        (dict(model_type="bloom", n_layer=1), "neither RoPE nor a learned table"),
        (
            dict(
                model_type="deepseek_v3",
                kv_lora_rank=16,
                q_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=12,
                first_k_dense_replace=2,
                num_key_value_heads=4,
            ),
            "keys have 16 numbers a head, its values 12",
        ),
    ],
)
def test_architectures_are_refused_by_name(settings: dict[str, Any], says: str) -> None:
    config = AutoConfig.for_model(**{**SMALL, **settings})
    if settings["model_type"] == "t5":
        from transformers import T5ForConditionalGeneration as Model

        model = Model(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{settings['model_type']}.*{says}"):
        Cache(model, "window_b8")


def test_interleaved_and_changing_rope_are_refused_for_inside_positions_only() -> None:
    cohere = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("cohere", **{**SMALL, "num_key_value_heads": 2})
    )
    dynamic = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    for model, says in ((cohere, "'cohere'.*interleaved"), (dynamic, "'dynamic'")):
        with pytest.raises(ValueError, match=says):
            Cache(model, "sink_b8_s4")
        ids = random_ids(1, 20)
        assert model.generate(
            ids, past_key_values=Cache(model, "sink_b8_s4_orig"), max_new_tokens=3
        ).shape == (1, 23)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        Cache(torch.nn.Linear(2, 2), "full")  # type: ignore[arg-type]
    model = tiny_llama()
    for prefill in (0, -3, "half", True, "16"):
        with pytest.raises(ValueError, match="prefill"):
            Cache(model, "full", prefill=prefill)
    with pytest.raises(ValueError, match="empty"):
        Cache(model, "full").positions(0)


@torch.no_grad()
def test_masks_that_do_not_fit_are_refused() -> None:
    model, ids = tiny_llama(), random_ids(2, 10)
    right = torch.ones(2, 10, dtype=torch.long)
    right[1, 8:] = 0
    for prefill in ("full", 4):
        with pytest.raises(ValueError, match="not on the left"):
            model(ids, attention_mask=right, past_key_values=Cache(model, "window_b8", prefill))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 7\), expected \(2, 10\)"):
        model(ids, attention_mask=right[:, :7], past_key_values=Cache(model, "window_b8"))
    cache = Cache(model, "window_b8")
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows, got a batch of 1"):
        model(ids[:1], past_key_values=cache)


@torch.no_grad()
def test_interrupted_forward_is_noticed() -> None:
    model, ids = tiny_llama(), random_ids(1, 10)
    cache = Cache(model, "window_b8")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, past_key_values=cache)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"call cache.reset\(\)"):
        model(ids, past_key_values=cache)
    cache.reset()
    model(ids, past_key_values=cache)


@torch.no_grad()
def test_attention_elsewhere_is_noticed() -> None:
    model, ids = tiny_llama(), random_ids(1, 10)
    cache = Cache(model, "window_b8")
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="layer 0 of model type 'llama' took its keys elsewhere"):
        model(ids, past_key_values=cache)


def test_a_prompt_keeps_its_gradients() -> None:
    model, ids = tiny_llama(), random_ids(2, 20)
    model(ids, past_key_values=DynamicCache(config=model.config)).logits.square().sum().backward()
    weight = model.model.layers[0].self_attn.k_proj.weight
    expected, weight.grad = weight.grad, None
    model(ids, past_key_values=Cache(model, "h2o_b8+int4_g4_r4")).logits.square().sum().backward()
    assert torch.equal(weight.grad, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [
        *("full", "sink_b12_s4", "h2o_b12", "full+int4_g4_r8", "kvzip_b12", "snapkv_b40+fp8"),
        *("full+minicache", "h2o_b12+minicache_k20", "full+minicache+int4_g4_r8"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_nothing_but_padding(name: str, spec: str) -> None:
    """More padding than any row needs: the first chunks hold no token at all."""
    model, prompts = TINY[name](dtype=torch.float64), [random_ids(1, 21), random_ids(1, 5)]
    ids, mask = left_padded([*prompts, random_ids(1, 40)])
    ids, mask, more = ids[:2], mask[:2], random_ids(2, 20)
    cache = Cache(model, spec, prefill=8)
    got = run_forced(model, cache, ids, more, mask)
    for row, prompt in enumerate(prompts):
        alone = Cache(model, spec, prefill=8)
        expected = run_forced(model, alone, prompt, more[row : row + 1])
        assert relative_error(got[row], expected[0]) < 1e-6
        assert torch.equal(cache.lengths()[:, row], alone.lengths()[:, 0])


@torch.no_grad()
def test_cache_of_another_model_is_noticed() -> None:
    one, two, ids = tiny_llama(), tiny_llama(), random_ids(1, 10)
    cache = Cache(one, "full")
    with pytest.raises(RuntimeError, match="model it was not made for"):
        two(ids, past_key_values=cache)
    Cache(two, "full")
    with pytest.raises(ValueError, match="made for another model"):
        two(ids, past_key_values=cache)


@torch.no_grad()
def test_compress_takes_every_way_in() -> None:
    """Plain forwards, an empty cache of transformers' own, positional arguments; refuses what it can't do."""
    model, ids, more = tiny_llama(), random_ids(1, 20), random_ids(1, 3)
    expected = run_forced(model, Cache(model, "window_b8"), ids, more)
    held = DynamicCache(config=model.config)
    model(ids, past_key_values=held)
    with compress(model, "window_b8") as cache:
        first = model(ids)
        second = model(more[:, :1], past_key_values=first.past_key_values)
        assert second.past_key_values is cache
        third = model.model(more[:, 1:2], None, None, cache)
        assert torch.equal(model.lm_head(third.last_hidden_state), expected[:, 2:3])
        assert torch.equal(run_forced(model, DynamicCache(config=model.config), ids, more), expected)
        assert cache.lengths().unique().tolist() == [8]
        with pytest.raises(ValueError, match="already holds tokens"):
            model(more, past_key_values=held)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids, use_cache=False)
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(ids, use_cache=False, max_new_tokens=2)
        with pytest.raises(ValueError, match="inside another"), compress(model, "full"):
            pass
        assert model.generate(ids, max_new_tokens=2).shape == (1, 22)


@torch.no_grad()
def test_position_table_is_not_overrun_silently() -> None:
    model, ids = tiny_gpt2(positions=32), random_ids(1, 30)
    for spec in ("window_b16", "sink_b16_s4_orig", "full", "sink_b64_s4"):
        cache = Cache(model, spec)
        run_forced(model, cache, ids, random_ids(1, 2))
        with pytest.raises(ValueError, match="table of 32"):
            run_forced(model, cache, ids[:, :1], ids[:, :0])
    run_forced(model, Cache(model, "sink_b16_s4"), ids, random_ids(1, 100))
    run_forced(model, Cache(model, "sink_b16_s4", prefill=8), random_ids(1, 100), ids)


@torch.no_grad()
def test_transformers_own_chunking() -> None:
    model, (ids, mask) = tiny_llama(), left_padded([random_ids(1, 40), random_ids(1, 13)])
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False, attention_mask=mask)
    expected = model.generate(ids, past_key_values=Cache(model, "sink_b16_s4", prefill=8), **options)
    cache = Cache(model, "sink_b16_s4")
    assert torch.equal(model.generate(ids, past_key_values=cache, prefill_chunk_size=8, **options), expected)
    with compress(model, "sink_b16_s4"):
        assert torch.equal(model.generate(ids, prefill_chunk_size=8, **options), expected)
