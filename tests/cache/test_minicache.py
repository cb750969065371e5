# SPDX-License-Identifier: Apache-2.0
"""minicache: what two layers share, against its definition in fp64, token by token; restoration, memory, growth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvopt
from cache import brute_force_policies as oracle
from cache.brute_force_pairs import BLOCK, PairReference
from cache.brute_force_policies import Definition, Kept
from cache.tiny_models import TINY, left_padded, random_ids, run_forced, tiny_gpt2, tiny_llama
from conftest import DEVICES, relative_error
from kvopt.cache import Cache, CacheSpec, Codec, Merge, Policy, Tokens, register_policy
from kvopt.cache.policies import POLICIES
from kvopt.cache.store import SHARED, Shape, largest_parts, lay_out

HEADS = 2


def everything() -> Definition:
    return Definition(
        prompt=lambda weights, keys, layer: [dict.fromkeys(range(keys.shape[1]), 0.0) for _ in keys],
        grows=True,
    )


def reference(model: Any, spec: CacheSpec, policy: Definition, length: int, ada: int | None) -> PairReference:
    budget = spec.budget.tokens if spec.budget is not None else max(BLOCK, -(-length // BLOCK) * BLOCK)
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    capacity = [[budget] * heads for _ in range(model.config.num_hidden_layers)]
    if spec.budget is None and spec.codec.packs:
        capacity = [[spec.codec.round_up(length)] * heads for _ in capacity]
    bits = {"model": 0, "int8": 8, "int4": 4, "int2": 2}[spec.codec.name]
    merge = spec.merge
    return PairReference(
        *(model, policy, capacity, ada),
        retained=merge.retained,
        t=merge.t,
        bits=bits,
        group=spec.codec.group,
        residual=max(spec.codec.residual, merge.recent),
    )


@torch.no_grad()
def compare(
    model: Any,
    text: str,
    prompts: list[int],
    steps: int,
    definition: Callable[[], Definition],
    ada: int | None = None,
) -> None:
    """Runs a left-padded batch through the cache and each row alone through the definition."""
    spec = CacheSpec.parse(text)
    rows = [random_ids(1, length) for length in prompts]
    ids, mask = left_padded(rows)
    more = random_ids(len(rows), steps)
    cache = Cache(model, spec)
    references = [reference(model, spec, definition(), length, ada) for length in prompts]
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
    for step in range(-1, steps):
        if step >= 0:
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)
            logits = model(more[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits[:, -1]
        for row, one in enumerate(references):
            where = f"row {row}, step {step}"
            held = kept(cache, row)
            expected = one.prompt(rows[row][0], held) if step < 0 else one.step(int(more[row, step]), held)
            assert one.kept() == held, where
            assert relative_error(logits[row], expected) < 1e-6, where
            assert merged_tokens(cache, row) == one.merged, where
        if step % 20 == 0 or step == steps - 1:
            for row, one in enumerate(references):
                same_vectors(cache, one, row)
    decisions = (steps + 1) * len(rows) * cache.architecture.layers * cache.architecture.kv_heads
    assert sum(one.ties for one in references) <= 2 + decisions // 200, "too many ties to be ties"
    if cache.spec.merge.retained < 100:
        assert any(head for one in references for pair in one.merged.values() for head in pair), "none merged"


def kept(cache: Cache, row: int) -> Kept:
    layers = range(cache.architecture.layers)
    return [[set(head) - {-1} for head in cache.positions(layer)[row].tolist()] for layer in layers]


def merged_tokens(cache: Cache, row: int) -> dict[int, list[list[int]]]:
    """``[lower layer][head]`` positions in the packed slots."""
    found = {}
    for pair in cache.pairs:
        store = pair.layers[0].store
        found[pair.layers[0].index] = [
            store.positions[row, segment[0] : segment[0] + length[0]].tolist()
            for segment, length in zip(store.segments[row].tolist(), store.lengths[row].tolist(), strict=True)
        ]
    return found


def same_vectors(cache: Cache, one: PairReference, row: int) -> None:
    for layer, both in enumerate(one.memory):
        for got, expected in zip((cache.keys(layer), cache.values(layer)), both, strict=True):
            for head, positions in enumerate(cache.positions(layer)[row].tolist()):
                there = [j for j in positions if j >= 0]
                part = got[row, head, len(positions) - len(there) :]
                assert relative_error(part, expected[head, there]) < 1e-6, f"layer {layer}, head {head}"


POLICIES_HERE: dict[str, tuple[Callable[[], Definition], int | None]] = {
    "full+minicache": (everything, None),
    "full+minicache_k0_t50": (everything, None),
    "full+minicache_k20+int8_g4_r8": (everything, None),
    "full+minicache+int4_g8_r16": (everything, None),
    "full+minicache_r16": (everything, None),
    "full+minicache_k0_r10+int4_g4_r8": (everything, None),
    "window_b24+minicache_k10": (oracle.window, None),
    "sink_b24_s4_orig+minicache_k0": (lambda: oracle.window(4), None),
    "h2o_b24+minicache_k20": (oracle.h2o, None),
    "h2o_b25_r6+minicache_k0+int4_g4_r4": (lambda: oracle.h2o(6), None),
    "h2o_b24_age+minicache_k30_t80": (lambda: oracle.h2o(age=True), None),
    "h2o_b24+ada+minicache_k10": (oracle.h2o, 4),
    "snapkv_b24_w8+minicache_k10+int8_g4_r8": (lambda: oracle.snapkv(8, 5), None),
    "snapkv_b24_w8_k1_grow+minicache": (lambda: oracle.snapkv(8, 1, grow=True), None),
    "tova_b24+minicache_k20": (oracle.tova, None),
    "random_b24+minicache_k50": (oracle.random_draw, None),
    "keydiff_b24+minicache_k20": (oracle.keydiff, None),
    "kvzip_b24+minicache_k20": (oracle.kvzip, None),
}


@pytest.mark.parametrize("spec", sorted(POLICIES_HERE))
def test_100_tokens_in_a_padded_batch(spec: str, exact_rope: None) -> None:
    definition, ada = POLICIES_HERE[spec]
    compare(tiny_llama(2, torch.float64), spec, [61, 17], 100, definition, ada)


@pytest.mark.parametrize(
    "spec",
    [
        "full+minicache",
        "h2o_b24+minicache_k20",
        "tova_b24+minicache_k20",
        "h2o_b25_r6+minicache_k0+int4_g4_r4",
    ],
)
@pytest.mark.parametrize("groups", [1, 4])
def test_other_group_sizes(spec: str, groups: int, exact_rope: None) -> None:
    compare(tiny_llama(groups, torch.float64), spec, [30, 47, 3], 40, POLICIES_HERE[spec][0])


@pytest.mark.parametrize("layers", [3, 4, 5])
@pytest.mark.parametrize("spec", ["full+minicache_k0_t50", "h2o_b24+minicache_k20", "tova_b24+minicache_k20"])
def test_pairs_beside_layers_that_are_not_merged(spec: str, layers: int, exact_rope: None) -> None:
    compare(tiny_llama(2, torch.float64, layers=layers), spec, [37, 20], 30, POLICIES_HERE[spec][0])


@pytest.mark.parametrize("spec", ["full+minicache", "window_b24+minicache_k10", "h2o_b24+minicache_k20"])
def test_gpt2(spec: str) -> None:
    compare(tiny_gpt2(torch.float64), spec, [41, 20], 40, POLICIES_HERE[spec][0])


def test_growth_keeps_the_share_of_each_row(exact_rope: None) -> None:
    """Rows that pass 256 tokens at different times; each is laid out by its own tokens."""
    compare(tiny_llama(1, torch.float64), "full+minicache_k10", [250, 190], 80, everything)


def test_pairs_are_those_from_the_middle_up() -> None:
    pairs = {layers: Merge.pairs(layers) for layers in (1, 2, 3, 5, 6, 7, 8)}
    assert pairs[1] == [] and pairs[2] == [(0, 1)] and pairs[3] == [(0, 1)] and pairs[5] == [(2, 3)]
    assert pairs[6] == [(2, 3), (4, 5)] and pairs[7] == [(2, 3), (4, 5)] and pairs[8] == [(4, 5), (6, 7)]
    with pytest.raises(ValueError, match=r"minicache: model type 'llama' has 1 layers, fewer than one pair"):
        Cache(tiny_llama(layers=1), "full+minicache")


@pytest.mark.parametrize("trial", range(20))
def test_layout_is_whole_groups_beside_what_is_not_merged(trial: int) -> None:
    merge = Merge(int(torch.randint(0, 101, ())), recent=int(torch.randint(0, 40, ())) * (trial % 2))
    codec = [Codec(), Codec("fp8"), Codec("fp8", 1, 9), Codec("int8", 4, 8), Codec("int2", 16, 32)][trial % 5]
    capacities = torch.randint(0, 700, (3, 4))
    segments, packed, plain = lay_out(capacities, codec, merge)
    least = max(codec.residual, codec.group, merge.recent)
    for capacity, (_, q, _, p) in zip(
        capacities.flatten().tolist(), segments.flatten(0, 1).tolist(), strict=True
    ):
        unmerged = least - (-capacity * merge.retained // 100)
        assert q + p == capacity and q % codec.group == 0
        assert p >= min(capacity, unmerged) and (q == 0 or p < unmerged + codec.group)
    shape = Shape(3, 4, 16, torch.float32, codec, True, merge)
    most = largest_parts([int(capacities.sum(1).max()) // 4 + 1] * 3, 4, codec, uneven=True, merge=merge)
    for own in (False, True):
        assert shape.nbytes(packed, plain, own=own) <= shape.nbytes(*most, own=own)


# Nothing merged, or nothing to lose.


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("device", DEVICES)
def test_everything_retained_is_full(name: str, device: str) -> None:
    """Bit for bit over a prompt, decoding past a block, another turn and crop."""
    model = TINY[name]().to(device)
    ids, mask = left_padded([random_ids(1, 60), random_ids(1, 13)])
    more, turn = random_ids(2, 210), random_ids(2, 9)
    results = []
    for spec in ("full", "full+minicache_k100"):
        cache = Cache(model, spec)
        logits = [run_forced(model, cache, ids.to(device), more.to(device), mask.to(device))]
        logits.append(run_forced(model, cache, turn.to(device), turn.to(device)))
        cache.crop(-5)
        logits.append(run_forced(model, cache, turn.to(device), turn.to(device)))
        held = [what(layer) for layer in range(2) for what in (cache.keys, cache.values, cache.positions)]
        results.append([*logits, *held])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Memory.


@pytest.mark.parametrize(
    "spec", ["full+minicache", "full+minicache_k20", "full+minicache+int4_g8_r16", "full+minicache+fp8"]
)
def test_bytes_are_the_formula_and_less_than_unmerged(spec: str) -> None:
    model, parsed = tiny_llama(layers=4), CacheSpec.parse(spec)
    codec, merge = parsed.codec, parsed.merge
    merged, alone = Cache(model, spec), Cache(model, CacheSpec(codec=codec))
    ids = random_ids(3, 400)
    for cache in (merged, alone):
        run_forced(model, cache, ids, random_ids(3, 3))
    capacity = codec.round_up(403)
    unmerged = max(codec.residual, codec.group) - (-capacity * merge.retained // 100)
    packed = (capacity - unmerged) // codec.group * codec.group
    plain = capacity - packed
    vector = 16 * 4
    of_packed = {"model": 2 * vector, "fp8": 2 * 16 + 4, "int4": 2 * 8 + 8 + 8}[codec.name]
    # A pair of layers, per row and head: two plain parts, one packed one, two norms of each, and positions
    pair = 2 * plain * 2 * vector + packed * of_packed + 2 * packed * 8 + 2 * 4 * capacity + (4 + 2 * 2) * 4
    q, p = codec.split(capacity)
    unmerged = 2 * (p * 2 * vector + q * of_packed + 4 * capacity + (4 + 2) * 4)
    assert merged.nbytes() == 3 * HEADS * (unmerged + pair) + 3 * 4
    assert alone.nbytes() == 3 * HEADS * 2 * unmerged + 3 * 4
    if codec.name == "model":
        assert merged.nbytes() < 0.85 * alone.nbytes()
    for pair_ in merged.pairs:
        lower, upper = (layer.store for layer in pair_.layers)
        assert all(getattr(lower, name) is getattr(upper, name) for name in SHARED)


@pytest.mark.parametrize(
    "spec", ["h2o_mb1+minicache", "window_mb1+minicache_k20+int4_g8_r16", "snapkv_mb1+ada+minicache"]
)
def test_budget_in_mebibytes_counts_what_is_shared_once(spec: str) -> None:
    model = tiny_llama(layers=4)
    cache = Cache(model, spec)
    run_forced(model, cache, random_ids(2, 2600), random_ids(2, 3))
    assert 0.93 * 2**20 < cache.nbytes() <= 2**20


@pytest.mark.parametrize(
    "spec",
    [
        *("full+minicache", "full+minicache_k20_r64+int4_g8_r16", "snapkv_b40_w8_grow+minicache+fp8"),
        *("h2o_b40+minicache", "h2o_p30+minicache_k0+int8_g4_r8", "h2o_b40+ada+minicache"),
    ],
)
def test_bytes_are_predicted(spec: str) -> None:
    """Rows of different lengths, which grow at different times; with ``ada`` an upper bound."""
    model, new = tiny_llama(layers=int(torch.randint(2, 5, ()))), 30
    lengths = torch.randint(3, 300, (3,)).tolist()
    ids, mask = left_padded([random_ids(1, length) for length in lengths])
    cache, sizes = Cache(model, spec), []
    for tokens, more, padding in ((ids, 0, mask), (random_ids(3, 1), new - 1, None)):
        run_forced(model, cache, tokens, random_ids(3, more), padding)
        sizes.append(cache.nbytes())
    expected = kvopt.cache_bytes(model, spec, 3, lengths, new)
    if expected.exact:
        assert sizes == [expected.after_prompt, expected.steady]
    else:
        assert 0.5 * expected.steady < sizes[0] <= sizes[1] <= expected.steady


def test_shared_tensors_stay_shared(tmp_path: Any) -> None:
    """Growth, selected and repeated rows, copies, files: never two copies of what is packed."""
    model = tiny_llama()
    cache = Cache(model, "full+minicache+int8_g4_r8")
    run_forced(model, cache, random_ids(2, 240), random_ids(2, 60))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.save(tmp_path / "state")
    for one in (cache, copy.deepcopy(cache), Cache.load(tmp_path / "state", model)):
        run_forced(model, one, random_ids(4, 5), random_ids(4, 300))
        lower, upper = (layer.store for layer in one.layers)
        assert all(getattr(lower, name) is getattr(upper, name) for name in SHARED)
        assert torch.equal(lower.lengths, upper.lengths)
        assert (
            one.nbytes()
            == sum(
                {t.untyped_storage().data_ptr(): t.nbytes for x in one.layers for t in x.tensors()}.values()
            )
            + one.rows.count.nbytes
        )
    assert cache.nbytes() < sum(t.nbytes for layer in cache.layers for t in layer.tensors())


@torch.no_grad()
@pytest.mark.parametrize("spec", ["full+minicache", "h2o_b24+minicache+int4_g4_r8"])
def test_a_rows_neighbours_change_no_bit_of_its_layout(spec: str) -> None:
    """Rows of a batch in different blocks of 256 are merged as they are alone."""
    model = tiny_llama(dtype=torch.float64)
    prompts = [random_ids(1, length) for length in (300, 40, 255)]
    ids, mask = left_padded(prompts)
    more = random_ids(3, 20)
    together = Cache(model, spec)
    got = run_forced(model, together, ids, more, mask)
    for row, prompt in enumerate(prompts):
        alone = Cache(model, spec)
        expected = run_forced(model, alone, prompt, more[row : row + 1])
        assert relative_error(got[row], expected[0]) < 1e-6
        assert merged_tokens(together, row) == merged_tokens(alone, 0)


@pytest.mark.parametrize("shared", [False, True])
def test_user_policies_are_asked_of_both_layers(shared: bool) -> None:
    """A policy without a rule for decoding: the sum over both layers (and heads) of minus the key's norm."""

    @register_policy("smallnorms")
    class SmallNorms(Policy):
        shared_heads = shared

        def priority(self, tokens: Tokens) -> torch.Tensor:
            assert tokens.keys is not None
            return -tokens.keys.norm(dim=-1)

    try:
        model, ids = tiny_llama(dtype=torch.float64), random_ids(2, 40)
        cache = Cache(model, "smallnorms_b16+minicache_k20")
        run_forced(model, cache, ids, ids[:, :0])
        for step in range(30):
            norms = sum(cache.keys(layer).norm(dim=-1) for layer in range(2))
            norms = norms.sum(1, keepdim=True).expand_as(norms) if shared else norms
            before = cache.positions(0)
            run_forced(model, cache, random_ids(2, 1), ids[:, :0])
            assert torch.equal(cache.positions(0), cache.positions(1))
            leaves = norms.argmax(-1)
            for row in range(2):
                for head in range(2):
                    expected = set(before[row, head].tolist()) - {int(before[row, head, leaves[row, head]])}
                    assert set(cache.positions(0)[row, head].tolist()) == expected | {40 + step}
    finally:
        del POLICIES["smallnorms"]


@torch.no_grad()
@pytest.mark.parametrize("prefill", ["full", 16])
@pytest.mark.parametrize(
    "spec", ["h2o_b24+minicache_k20", "tova_b24+minicache", "window_b40+minicache+int8_g4_r8"]
)
def test_turns_and_chunks_keep_the_pairs_alike(spec: str, prefill: str | int) -> None:
    """The budget holds, both layers hold the same tokens in the same slots, what is merged once stays as it is."""
    model = tiny_llama()
    cache = Cache(model, spec, prefill)
    budget = cache.spec.budget.tokens
    for length, more in ((90, 30), (17, 8), (60, 1), (3, 40)):
        logits = run_forced(model, cache, random_ids(2, length), random_ids(2, more))
        assert torch.isfinite(logits).all()
        assert cache.lengths().unique().tolist() == [budget]
        lower, upper = (layer.store for layer in cache.layers)
        n = lower.widest
        assert torch.equal(lower.gather(lower.positions, n, -1), upper.gather(upper.positions, n, -1))
        assert torch.equal(lower.lengths, upper.lengths)
        if spec.startswith("window"):
            newest = cache.get_seq_length()
            assert torch.equal(cache.positions(1)[0, 0], torch.arange(newest - 40, newest).int())


def test_reset_forgets_the_pair() -> None:
    model, ids, more = tiny_llama(), random_ids(1, 30), random_ids(1, 10)
    cache = Cache(model, "full+minicache")
    run_forced(model, cache, random_ids(3, 300), random_ids(3, 5))
    cache.reset()
    assert cache.nbytes() == 0 and cache.pairs[0].kept.numel() == 0
    expected = run_forced(model, Cache(model, "full+minicache"), ids, more)
    assert torch.equal(run_forced(model, cache, ids, more), expected)


@torch.no_grad()
def test_a_forward_that_breaks_between_the_layers_of_a_pair_is_noticed() -> None:
    model, ids = tiny_llama(), random_ids(1, 10)
    cache = Cache(model, "window_b8+minicache")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, past_key_values=cache)
    handle.remove()
    assert cache.layers[0].held is not None and cache.nbytes() > 0
    with pytest.raises(RuntimeError, match=r"call cache.reset\(\)"):
        model(ids, past_key_values=cache)
    cache.reset()
    assert cache.layers[0].held is None
    model(ids, past_key_values=cache)
