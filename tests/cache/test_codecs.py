# SPDX-License-Identifier: Apache-2.0
"""Codecs in the cache: what is read is the formula, the newest stay as they are, nothing is quantised twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cache.tiny_models import TINY, random_ids, run_forced, tiny_llama
from conftest import relative_error
from kvopt.cache import Cache, Codec

MODELS = sorted(TINY)


def kivi(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """arXiv:2402.02750, section 3, over ``dim``; scale and minimum in fp16."""
    x = x.float()
    low = x.amin(dim, keepdim=True)
    scale = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    codes = torch.where(scale == 0, 0, ((x - low) / scale).round().clamp(0, 2**bits - 1))
    return codes * scale + low


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_is_kivi(name: str, bits: int) -> None:
    """Keys per channel over 8 tokens, values per token over 8 channels, the newest 16 … 23 untouched."""
    model, ids, more = TINY[name](), random_ids(2, 53), random_ids(2, 60)
    everything, cache = Cache(model, "full"), Cache(model, f"full+int{bits}_g8_r16")
    run_forced(model, everything, ids, more[:, :0])
    run_forced(model, cache, ids, more[:, :0])
    packed = 40  # 53 - 16, in groups of 8, rounded up: the plain part has 16 slots
    for layer in range(1):  # only the first layer's keys don't depend on what was seen before
        keys, values = everything.keys(layer), everything.values(layer)
        grouped = kivi(keys[:, :, :packed].unflatten(2, (-1, 8)), bits, 3).flatten(2, 3)
        assert relative_error(cache.keys(layer)[:, :, :packed], grouped) < 1e-6
        assert torch.equal(cache.keys(layer)[:, :, packed:], keys[:, :, packed:])
        by_channel = kivi(values[:, :, :packed].unflatten(-1, (-1, 8)), bits, -1).flatten(-2)
        assert relative_error(cache.values(layer)[:, :, :packed], by_channel) < 1e-6
        assert torch.equal(cache.values(layer)[:, :, packed:], values[:, :, packed:])


@pytest.mark.parametrize("spec", ["full+int8_g8_r16", "full+int2_g8_r16", "full+fp8", "full+fp8_r20"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_quantised_twice(name: str, spec: str) -> None:
    """What was packed reads the same after decoding, after another turn, and after chunks."""
    model = TINY[name]()
    cache = Cache(model, spec, prefill=24)
    packed: list[torch.Tensor] = []
    forwards = [random_ids(2, 70), *random_ids(20, 2)[:, :, None], random_ids(2, 41), random_ids(2, 3)]
    for ids in forwards:
        run_forced(model, cache, ids, ids[:, :0])
        store = cache.layers[1].store
        count = int(store.lengths[..., 0].min())
        assert int(store.lengths[..., 0].max()) == count
        now = cache.keys(1)[:, :, :count], cache.values(1)[:, :, :count]
        for before, after in zip(packed, now, strict=False):
            assert torch.equal(after[:, :, : before.shape[2]], before)
        packed = list(now)
    assert packed[0].shape[2] >= 80


@pytest.mark.parametrize(
    "spec", ["h2o_b40+int4_g4_r8", "window_b40+int8_g8_r16", "tova_b33+fp8", "h2o_b40+int2_g4_r8"]
)
@pytest.mark.parametrize("prefill", ["full", 16])
def test_selection_and_codec_hold_together_over_turns(spec: str, prefill: str | int) -> None:
    model = tiny_llama()
    cache = Cache(model, spec, prefill)
    budget = int(spec[spec.index("_b") + 2 :][:2])
    for length, more in ((90, 30), (17, 8), (60, 1)):
        logits = run_forced(model, cache, random_ids(2, length), random_ids(2, more))
        assert torch.isfinite(logits).all()
        assert cache.lengths().unique().tolist() == [budget]
        for layer in range(2):
            positions = cache.positions(layer)
            assert (positions.diff(dim=-1) > 0).all() and (positions >= 0).all()
            newest = int(positions.max())
            assert newest == cache.get_seq_length() - 1
    if spec.startswith("window"):
        assert torch.equal(cache.positions(0)[0, 0], torch.arange(newest - 39, newest + 1).int())


def test_window_with_a_codec_keeps_what_window_keeps() -> None:
    """Chunks and turns choose by position: the same tokens stay whatever they are stored in."""
    model = tiny_llama()
    caches = [Cache(model, spec, 16) for spec in ("window_b48", "window_b48+int4_g8_r16")]
    for length, more in ((70, 20), (33, 5), (5, 60)):
        ids, after = random_ids(2, length), random_ids(2, more)
        for cache in caches:
            run_forced(model, cache, ids, after)
        assert torch.equal(caches[0].positions(1), caches[1].positions(1))
        recent = caches[1].layers[0].store.shape.codec.residual - 8
        assert torch.equal(caches[0].values(0)[:, :, -recent:], caches[1].values(0)[:, :, -recent:])


@pytest.mark.parametrize("codec", ["fp8", "int8", "int4", "int2"])
def test_more_bits_are_closer(codec: str) -> None:
    model, ids, more = tiny_llama(dtype=torch.float64), random_ids(2, 100), random_ids(2, 30)
    expected = run_forced(model, Cache(model, "full"), ids, more)
    settings = "" if codec == "fp8" else "_g8_r8"
    error = relative_error(
        run_forced(model, Cache(model, f"full+{codec}{settings}"), ids, more)[:, 1:], expected[:, 1:]
    )
    bounds = {"int8": (0, 0.05), "fp8": (0.001, 0.3), "int4": (0.001, 0.6), "int2": (0.05, 1.5)}
    assert bounds[codec][0] < error < bounds[codec][1]


def test_prompt_shorter_than_the_residual_is_untouched() -> None:
    model, ids, more = tiny_llama(), random_ids(2, 20), random_ids(2, 40)
    expected = run_forced(model, Cache(model, "full"), ids, more)
    assert torch.equal(run_forced(model, Cache(model, "full+int4"), ids, more), expected)


def test_a_head_that_can_not_be_packed_is_refused() -> None:
    config: dict[str, Any] = dict(hidden_size=36, num_attention_heads=2, num_key_value_heads=2, head_dim=18)
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=1, intermediate_size=8, vocab_size=9))
    with pytest.raises(ValueError, match=r"'int4'.*18 numbers.*'llama'.*use fp8"):
        Cache(model, "full+int4")
    Cache(model, "full+fp8")


def test_codec_objects() -> None:
    assert Codec.named("int4") == Codec("int4", 32, 64)
    assert [Codec.named("int4").split(c) for c in (0, 64, 95, 96, 128)] == [
        (0, 0),
        (0, 64),
        (0, 95),
        (32, 64),
        (64, 64),
    ]
    assert Codec("fp8").split(9) == (9, 0) and Codec().split(9) == (0, 9)
    for tokens in (1, 64, 65, 320, 321, 5000):
        capacity = Codec.named("int4").round_up(tokens)
        assert capacity >= tokens and (capacity - 64) % 256 == 0 and capacity - tokens < 64 + 256
    for wrong in (("int3", 32, 64), ("fp8", 32, 64), ("int4", 32, 40), ("int4", 32, 0)):
        with pytest.raises(ValueError, match="codec"):
            Codec(*wrong)
