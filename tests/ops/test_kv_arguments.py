# SPDX-License-Identifier: Apache-2.0
"""The cache operators' schemas, and that what does not fit is refused by name."""

from __future__ import annotations

import pytest
import torch

from kvopt import ops_kv
from ops.kv_stores import CODECS, empty_store, fill, upper_of
from ops.test_kv_quant import each_codec, each_device

ops = torch.ops.kvopt


OF_UPPER = ("lengths", "positions", "scores", "plain_keys", "plain_values", "factors")


def a_store(codec="int4", device="cpu", factors=False):
    capacities = [[40, 24], [24, 40]]
    group, residual = (8, 8) if CODECS[codec] > 1 else (1, 4)
    store = empty_store(
        capacities, 8, CODECS[codec], group, residual, torch.float32, factors=factors, device=device
    )
    fill(store, 30, counts=torch.full((2, 2), 20, dtype=torch.int32))
    for name in (
        "scores",
        "plain_keys",
        "plain_values",
        "factors",
    ):  # opcheck compares what NaN would not equal
        getattr(store, name).nan_to_num_()
    for name in ("key_scale", "value_scale"):
        getattr(store, name).nan_to_num_()
    return store


def a_pair(codec="int4", device="cpu"):
    lower = a_store(codec, device, factors=True)
    return lower, upper_of(lower)


def token(device="cpu"):
    at = torch.tensor([[30], [31]], dtype=torch.int32, device=device)
    return torch.randn(2, 2, 8, device=device), torch.randn(2, 2, 8, device=device), at


@each_device
@each_codec
def test_opcheck(device, codec):
    make = lambda: a_store(codec, device).arguments()  # noqa: E731
    key, value, at = token(device)
    check = torch.library.opcheck
    x = torch.randn(2, 2, 12, 8, device=device)
    columns = torch.arange(12, dtype=torch.int32, device=device)
    of_rows, of_keys = columns.expand(2, 12).contiguous(), columns.expand(2, 1, 12).contiguous()
    counts = torch.full((2, 2), 9, dtype=torch.int32, device=device)
    check(ops.kv_select_scores.default, (x.repeat(1, 2, 1, 1), x, of_rows, of_keys, 0.3, False))
    check(ops.kv_quant_pack.default, (*make(), x, x, of_keys, None, of_keys, counts))
    check(ops.kv_quant_unpack.default, (*make(), 44))
    check(ops.kv_evict_append.default, (*make(), key, value, at, None, 0.0, None, 1, 2, 3, False, True))
    query = torch.randn(2, 6, 8, device=device)
    check(ops.kv_attention_decode.default, (query, *make(), 0.3, 1, 0, None, None))
    check(ops.kv_merge_pair.default, (x, x.flip(2).contiguous(), 0.6))
    lower, upper = a_pair(codec, device)
    own = [getattr(upper, name) for name in OF_UPPER]
    check(ops.kv_merge_evict.default, (*lower.arguments(), *own, at, None, 1, 2, -1, False, True, 4, 0.6))


def spoil(store, name, tensor):
    setattr(store, name, tensor)
    return store


@each_device
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("segments", lambda t: t.long(), "segments must be int32"),
        ("lengths", lambda t: t[:1], r"lengths must have shape \(2, 2, 2\), got \(1, 2, 2\)"),
        ("positions", lambda t: t[:, 1:].contiguous(), "positions must have shape"),
        ("scores", lambda t: t.double(), "scores must be float32"),
        ("plain_keys", lambda t: t.int(), "plain_keys must be float32, float16, bfloat16 or float64"),
        ("plain_values", lambda t: t.half(), "plain_values must have the dtype"),
        ("plain_values", lambda t: t[:, ::2], "plain_values must"),
        ("packed_keys", lambda t: t[..., :3].contiguous(), "packed_keys must have shape"),
        ("packed_values", lambda t: t.view(torch.int8), "packed_values must be uint8"),
        ("key_scale", lambda t: t.float(), "key_scale must be float16"),
        ("value_scale", lambda t: t[:, 1:].contiguous(), "value_scale must have shape"),
        ("factors", lambda t: torch.ones(3), "factors must"),
        ("codec", lambda c: 5, "codec must be 0"),
        ("group", lambda g: 0, "group must be 1 to 1024, got 0"),
        ("group", lambda g: 7, "multiple of group"),
    ],
)
def test_a_bad_store_is_refused(device, name, change, message):
    store = a_store(device=device)
    spoil(store, name, change(getattr(store, name)))
    with pytest.raises(RuntimeError, match="kv_quant_unpack: .*" + message):
        ops_kv.kv_quant_unpack(store, 8)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ([0, 32, 0, 100], "must lie in"),
        ([-8, 32, 0, 8], "must lie in"),
        ([4, 32, 0, 8], "multiples of the group"),
        ([0, 32, 0, 4], "a group of 8"),
    ],
)
def test_segments_that_leave_their_memory_are_refused(segment, message):
    """Where the host can read them."""
    store = a_store()
    store.segments[1, 0] = torch.tensor(segment)
    with pytest.raises(RuntimeError, match="kv_attention_decode: segments: .*" + message):
        ops_kv.kv_attention_decode(torch.zeros(2, 2, 8), store, 1.0)


def test_lengths_beyond_the_capacity_are_refused():
    store = a_store()
    store.lengths[0, 1, 1] = 99
    with pytest.raises(RuntimeError, match=r"lengths: segment 1 of row 0 cannot hold .* 99 plain"):
        ops_kv.kv_evict_append(store, *token())


@each_device
def test_bad_tokens_are_refused(device):
    store = a_store(device=device)
    key, value, at = token(device)

    def refused(message, *arguments, **options):
        with pytest.raises(RuntimeError, match="kv_evict_append: " + message):
            ops_kv.kv_evict_append(store, *arguments, **options)

    refused("key must have shape", key[:, :1], value, at)
    refused("value must have the dtype", key, value.half(), at)
    refused("position must have 2 dimensions, the second of size 1 or 2", key, value, at[0])
    refused("position must be int32", key, value, at.long())
    refused("order must be 0", key, value, at, order=2)
    refused("recent must be -1 .*, or 0 or more .* got -2", key, value, at, recent=-2)
    refused("position must have shape", key, value, at.repeat(1, 2), shared=True)
    refused("victim must be int32", key, value, at, victim=at.float())
    refused("token_score must have shape", key, value, at, torch.zeros(2, device=device))
    store.scores = torch.zeros(0, device=device)
    refused("scores must be kept", key, value, at, order=1)


@each_device
def test_bad_queries_are_refused(device):
    store = a_store(device=device)
    query = torch.zeros(2, 4, 8, device=device)

    def refused(message, *arguments, **options):
        with pytest.raises(RuntimeError, match="kv_attention_decode: " + message):
            ops_kv.kv_attention_decode(*arguments, **options)

    refused("query must have shape", query[:, :3], store, 1.0)
    refused("query must have the dtype", query.half(), store, 1.0)
    refused("update must be 0", query, store, 1.0, update=4)
    gap = torch.zeros(2, dtype=torch.int32, device=device)
    refused("gap and frequencies must both", query, store, 1.0, first=2, gap=gap)
    refused("frequencies must have", query, store, 1.0, gap=gap, frequencies=torch.ones(5, device=device))
    store.scores = torch.zeros(0, device=device)
    refused("scores must be kept", query, store, 1.0, update=1)


@each_device
@pytest.mark.parametrize(
    ("layer", "name", "change", "message"),
    [
        (0, "lengths", lambda t: t.long(), "kv_merge_evict: lengths must be int32"),
        (0, "factors", lambda t: t[:0, 0, 0], "kv_merge_evict: factors must be kept"),
        (0, "group", lambda g: 0, "codec and group must be the lower store's"),
        (1, "codec", lambda c: 1, "codec and group must be the lower store's"),
        (1, "segments", lambda t: t.clone(), "segments must be the lower store's own"),
        (1, "packed_keys", lambda t: t.clone(), "packed_keys must be the lower store's own"),
        (1, "packed_values", lambda t: t.clone(), "packed_values must be the lower store's own"),
        (1, "key_scale", lambda t: t.clone(), "key_scale must be the lower store's own"),
        (1, "value_scale", lambda t: t.clone(), "value_scale must be the lower store's own"),
        (1, "lengths", lambda t: t[:1], r"upper: lengths must have shape \(2, 2, 2\), got \(1, 2, 2\)"),
        (1, "positions", lambda t: t[:, 1:].contiguous(), "upper: positions must have shape"),
        (1, "scores", lambda t: t.double(), "upper: scores must be float32"),
        (1, "scores", lambda t: t[0, :0], "upper: scores must be kept"),
        (1, "plain_keys", lambda t: t.half(), "upper: plain_keys must have the dtype"),
        (1, "plain_keys", lambda t: t[:, 1:].contiguous(), "upper: plain_keys must have shape"),
        (1, "plain_values", lambda t: t[:, ::2], "upper: plain_values must"),
        (1, "factors", lambda t: t[:, 1:].contiguous(), "upper: factors must have shape"),
        (1, "factors", lambda t: t[:0, 0, 0], "upper: factors must be kept"),
    ],
)
def test_a_bad_pair_is_refused(device, layer, name, change, message):
    pair = a_pair(device=device)
    spoil(pair[layer], name, change(getattr(pair[layer], name)))
    with pytest.raises(RuntimeError, match=message):
        ops_kv.kv_merge_evict(*pair, token(device)[2])


def test_a_pair_that_differs_is_refused():
    """Where the host can read it."""
    pair = a_pair()
    at = token()[2]
    pair[1].lengths[1, 0, 1] -= 1
    with pytest.raises(RuntimeError, match="upper: lengths: segment 0 of row 1 holds other tokens"):
        ops_kv.kv_merge_evict(*pair, at)
    pair[1].lengths = pair[0].lengths
    with pytest.raises(RuntimeError, match="upper: lengths must be another tensor"):
        ops_kv.kv_merge_evict(*pair, at)
    lower, upper = a_pair("fp8")
    lower.segments[0, 1] = torch.tensor([36, 20, 4, 0])
    lower.lengths[0, 1] = upper.lengths[0, 1] = torch.tensor([20, 0])
    with pytest.raises(RuntimeError, match="segments: beside packed slots there must be 1 plain ones, got 0"):
        ops_kv.kv_merge_evict(lower, upper, at)


@each_device
def test_a_bad_rule_is_refused(device):
    pair = a_pair(device=device)
    at = token(device)[2]

    def refused(message, *arguments, **options):
        with pytest.raises(RuntimeError, match="kv_merge_evict: " + message):
            ops_kv.kv_merge_evict(*pair, *arguments, **options)

    refused("position must have 2 dimensions, the second of size 1 or 2", at[0])
    refused("position must be int32", at.long())
    refused("position must have shape", at.repeat(1, 2), shared=True)
    refused("victim must be int32", at, victim=at.float())
    refused("order must be 0", at, order=2)
    refused("first must be 0 or more", at, first=-1)
    refused("recent must be -1", at, recent=-2)
    refused("residual must be 0 or more", at, residual=-1)
    refused(r"t must be in \[0, 1\], got 1.5", at, t=1.5)
    refused(r"t must be in \[0, 1\], got", at, t=float("nan"))
    for store in pair:
        store.scores = torch.zeros(0, device=device)
    refused("scores must be kept", at, order=1)
