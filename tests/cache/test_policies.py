# SPDX-License-Identifier: Apache-2.0
"""Parts of the policies: scores that add up, pooling, the hash of random, settings."""

from __future__ import annotations

import pytest
import torch

from cache.tiny_models import left_padded, random_ids, run_forced, tiny_llama
from conftest import DEVICES
from kvopt.cache import Cache, CacheSpec, DecodeRule, Observation, Policy, SnapKV, Tokens, register_policy
from kvopt.cache.policies import HALF, POLICIES, KeyDiff, Random
from kvopt.cache.testing import check_policy


def stored_scores(cache: Cache, layer: int) -> torch.Tensor:
    """(B, H) sums over what is kept."""
    store = cache.layers[layer].store
    assert store is not None
    return store.gather(store.scores, store.widest, 0.0).double().sum(-1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_h2o_scores_add_up_to_queries_times_heads(groups: int) -> None:
    """While nothing is evicted, each query of each head of the group has handed out exactly 1."""
    lengths, decoded = (37, 20, 1), 9
    ids, mask = left_padded([random_ids(1, n) for n in lengths])
    model = tiny_llama(groups)
    cache = Cache(model, "h2o_b64")
    run_forced(model, cache, ids, random_ids(3, decoded), mask)
    expected = torch.tensor([[groups * (n + decoded)] for n in lengths]).expand(3, 2).double()
    for layer in range(2):
        torch.testing.assert_close(stored_scores(cache, layer), expected, rtol=1e-5, atol=0)


def test_tova_scores_are_those_of_the_newest_query() -> None:
    ids, mask = left_padded([random_ids(1, n) for n in (37, 20)])
    model = tiny_llama(4)
    for decoded in (0, 5):
        cache = Cache(model, "tova_b64")
        run_forced(model, cache, ids, random_ids(2, decoded), mask)
        torch.testing.assert_close(
            stored_scores(cache, 1), torch.full((2, 2), 4.0).double(), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("chunk", [7, 16])
def test_h2o_sums_do_not_depend_on_chunks_while_nothing_is_evicted(chunk: int) -> None:
    model, ids = tiny_llama(2), random_ids(1, 45)
    whole, parts = Cache(model, "h2o_b64"), Cache(model, "h2o_b64", prefill=chunk)
    with torch.no_grad():
        model(ids, past_key_values=whole)
        model(ids, past_key_values=parts)
    for layer in range(2):
        torch.testing.assert_close(
            stored_scores(parts, layer), stored_scores(whole, layer), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("pool", [1, 3, 5])
@pytest.mark.parametrize("n", [1, 4, 19])
def test_pooling_and_protection(n: int, pool: int) -> None:
    """Against sums written out; the row begins with two places of padding that hold rubbish."""
    protect = 3
    scores = torch.rand(1, 2, n + 2)
    positions = torch.cat([torch.full((2,), -1), torch.arange(n)]).int()[None, None]
    given = scores.masked_fill(positions < 0, 1e9)
    got = Observation(pool=pool, protect=protect).finish(given, positions, torch.tensor([n - 1]).int())
    for head in range(2):
        for j in range(n):
            neighbours = [i for i in range(j - pool // 2, j + pool // 2 + 1) if 0 <= i < n - protect]
            mean = sum(float(scores[0, head, i + 2]) for i in neighbours) / pool
            expected = float("inf") if j >= n - protect else mean
            assert float(got[0, head, j + 2]) == pytest.approx(expected, rel=1e-5)


def tokens_at(positions: torch.Tensor, heads: int, layer: int) -> Tokens:
    keys = torch.zeros(positions.shape[0], heads, positions.shape[2], 4, device=positions.device)
    return Tokens(positions, keys, keys, layer)


@pytest.mark.parametrize("device", DEVICES)
def test_random_is_a_function_of_seed_layer_head_and_position(device: str) -> None:
    policy, positions = Random(seed=5), torch.arange(4096, dtype=torch.int32)[None, None]
    cpu = policy.scores_of(tokens_at(positions, 3, 1))
    there = positions.to(device)
    shuffled = torch.randperm(4096, device=device)
    moved = policy.scores_of(tokens_at(there[:, :, shuffled].expand(2, 3, -1), 3, 1))
    assert torch.equal(moved.cpu(), cpu[:, :, shuffled.cpu()].expand(2, -1, -1))
    draws = [cpu[0], Random(seed=6).scores_of(tokens_at(positions, 3, 1))[0]]
    draws.append(policy.scores_of(tokens_at(positions, 3, 2))[0])
    together = torch.cat(draws)
    assert float(together.min()) >= 0 and float(together.max()) < 1
    assert float((together.mean(1) - 0.5).abs().max()) < 5 * (1 / 12 / 4096) ** 0.5
    other = torch.corrcoef(together) - torch.eye(9)
    assert float(other.abs().max()) < 6 / 4096**0.5, "layers, heads and seeds must be drawn independently"


def test_half_is_the_larger_half_of_each_heads_capacity() -> None:
    positions = torch.arange(12, dtype=torch.int32).expand(1, 2, 12)
    tokens = Tokens(
        positions,
        None,
        None,
        0,
        newest=torch.tensor([11]),
        capacity=torch.tensor([[5, 8]], dtype=torch.int32),
    )
    assert tokens.among_newest(HALF).sum(-1).tolist() == [[3, 4]]
    assert tokens.among_newest(2).expand(1, 2, 12).sum(-1).tolist() == [[2, 2]]


def test_keydiff_ranks_by_cosine_and_is_blind_to_padding_and_length() -> None:
    anchor = torch.tensor([1.0, 0, 0, 0])
    angles = torch.tensor([0.3, 2.5, 0.1, 1.2, 0.2])
    keys = torch.stack([angles.cos(), angles.sin(), 0 * angles, 0 * angles], -1) + 0 * anchor
    keys = torch.cat([keys, keys * torch.tensor([1.0, -1, 1, 1])])  # mirrored: the mean points to the anchor
    keys = keys * torch.rand(10, 1).add(0.1)  # lengths must not matter
    positions = torch.cat([torch.full((3,), -1), torch.arange(10)]).int()[None, None]
    padded = torch.cat([torch.full((3, 4), 1e4), keys])[None, None]
    tokens = Tokens(positions, padded, padded, 0, newest=torch.tensor([9]), capacity=torch.tensor([[4]]))
    scores = KeyDiff(recent=0).scores_of(tokens)[0, 0, 3:]
    torch.testing.assert_close(
        scores[:5], -angles.cos() * torch.sign(angles.cos().mean()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "text",
    [
        *(
            "h2o_b64",
            "h2o_b64_r16",
            "h2o_b64_r16_age",
            "snapkv_b64_w8",
            "snapkv_b64_k7_grow",
            "keydiff_b64_r0",
        ),
        *("tova_b64", "kvzip_p25", "random_b64_seed3", "random_b64_prompt", "random_b64_seed3_prompt"),
    ],
)
def test_settings_are_read_back(text: str) -> None:
    spec = CacheSpec.parse(text)
    assert str(spec) == text and CacheSpec.parse(str(spec)) == spec
    assert type(spec.policy).from_settings({}, "").settings() == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snapkv_b64_k4", "odd"),
        ("snapkv_b16", "b32 or more"),
        ("h2o_b64_r64", "b65 or more"),
        ("random_b8", "b9 or more"),
        ("h2o_b64_w3", "setting of 'h2o'"),
        ("tova_b64+ada", "ada"),
    ],
)
def test_impossible_settings_are_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CacheSpec.parse(text)
    with pytest.raises(ValueError, match="odd"):
        SnapKV(kernel=2)


def test_what_the_guide_shows() -> None:
    """docs/writing_a_policy.md: properties given as class attributes."""

    @register_policy("glance")
    class Glance(Policy):
        observation = Observation(queries=16, maximum=True, protect=16)
        decode = DecodeRule(order=1, new_score=float("inf"))

        def priority(self, tokens: Tokens) -> torch.Tensor:
            assert tokens.scores is not None
            return tokens.scores

    try:
        check_policy("glance", budget=24)
    finally:
        del POLICIES["glance"]
