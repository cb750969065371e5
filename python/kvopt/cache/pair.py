# SPDX-License-Identifier: Apache-2.0
"""Two neighbouring layers that are merged: they hold the same tokens in the same slots, and share what is packed.

The lower layer of a pair leaves its candidates (:attr:`Layer.held`) until the upper one has been attended; then the
tokens of both are chosen and packed together. A decoded token finds room made in both stores when it reaches the lower
layer; each of the two then only appends and attends.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvopt import ops_kv
from kvopt.cache import choice
from kvopt.cache.candidates import Candidates, append_chosen
from kvopt.cache.step import Step
from kvopt.cache.store import Store

if TYPE_CHECKING:
    from kvopt.cache.cache import Cache
    from kvopt.cache.layer import Layer


class Pair:
    """The lower and the upper layer of a pair.

    Args:
        cache: that they belong to; its spec says how they are merged.
        lower: the layer that comes first.
        upper: the next one.

    Attributes:
        layers: the two.
        merge: how they are merged.
        kept: (B, H) int64 on the CPU, tokens in each segment, where none leaves after the prompt.
        capacities: (B, H) int64 on the CPU, slots of each segment. They follow from the row's own tokens, so that a row
            of a batch is merged as it would be alone.
        room: tokens that fit into every segment before one grows.
    """

    def __init__(self, cache: Cache, lower: Layer, upper: Layer) -> None:
        assert cache.spec.merge is not None
        self._cache = cache
        self.merge = cache.spec.merge
        self.layers = (lower, upper)
        self.reset()
        lower.merged = upper.merged = self

    def reset(self) -> None:
        """Forgets everything."""
        self.kept = self.capacities = torch.zeros(0, 0, dtype=torch.int64)
        self.room = 0

    def below(self, layer: Layer) -> Store | None:
        """The store whose tensors ``layer``'s own shares: the lower one's if ``layer`` is the upper, else None."""
        return self.layers[0].store if layer is self.layers[1] else None

    def make_room(self, layer: Layer, step: Step) -> None:
        """Before a decoded token enters ``layer``: room for it in both, once. Does not wait for the device."""
        lower, upper = self.layers
        if layer is upper:
            return
        policy, rule = self._cache.spec.policy, self._cache.rule
        victim = None
        if policy.grows and self.room:
            self.kept, self.room = self.kept + 1, self.room - 1
        elif policy.grows:
            self._reserve(self.kept + 1)
        elif (policy.decode is None or rule.shared) and step.most > lower.narrowest:
            victim = self._victim(step)
        lower_store, upper_store = self._stores()
        ops_kv.kv_merge_evict(
            *(lower_store, upper_store, step.positions, victim),
            *(rule.order, rule.first, rule.recent),
            *(False, rule.age),
            residual=self.merge.residual(self._cache.spec.codec),
            t=self.merge.share,
        )

    def _victim(self, step: Step) -> Tensor:
        """(B, H) int32: who makes room, where the operator can't say it.

        It compares slots, but heads that keep the same tokens merge different ones and so have them in different slots.
        """
        policy, lower = self._cache.spec.policy, self.layers[0]
        assert lower.limit is not None
        if policy.decode is None:
            parts = [layer.kept(step) for layer in self.layers]
            order, index = parts[0].order, choice.lowest(lower.priority(step, parts), parts[0].positions)
            assert order is not None
        else:
            stores = self._stores()
            n = stores[0].widest
            positions, order = stores[0].gather(stores[0].positions, n, -1).sort(dim=-1, stable=True)
            scores = [store.gather(store.scores, n, 0.0).gather(2, order) for store in stores]
            index = choice.lowest_by_rule(
                policy.decode, positions, choice.together(scores), step.newest, lower.limit
            )
        index = index.long()[..., None].expand(-1, order.shape[1], -1)
        return order.gather(2, index)[..., 0].int()

    def compress(self, layer: Layer, step: Step, candidates: Candidates) -> None:
        """Chooses what stays of both layers' candidates and stores it, once the upper layer's have come."""
        lower, upper = self.layers
        if layer is lower:
            lower.held = candidates
            return
        assert lower.held is not None
        parts = (lower.held, candidates)
        lower.held = None
        chosen, counts, free = lower.choose(step, parts)
        first = lower.store is None
        if self._cache.spec.policy.grows:
            self._reserve(self._kept(step, free, counts.shape))
        elif first:
            assert lower.capacities is not None
            self.capacities = lower.capacities
        if first:
            store = lower.allocate(candidates.keys, self.capacities)
            stores = (store, upper.allocate(candidates.keys, self.capacities, store))
            pack_merged(stores, parts, chosen, counts)
        else:
            append_chosen(self._stores(), parts, chosen, step.new if free else lower.widest)

    def _kept(self, step: Step, free: bool, shape: torch.Size) -> Tensor:
        """Tokens in each segment after the step, where none leaves after the prompt."""
        if free and self.kept.numel():
            return self.kept + torch.tensor(step.added)[:, None]
        limit = self.layers[0].capacities
        totals = torch.tensor(step.totals or self._cache.rows.count.tolist())[:, None].expand(shape)
        return totals if limit is None else torch.minimum(totals, limit)

    def _reserve(self, kept: Tensor) -> None:
        """Makes room for ``kept`` (B, H) tokens; segments grow by whole blocks."""
        lower, upper = self.layers
        codec, have = self._cache.spec.codec, self.capacities
        if lower.store is None:
            have = torch.full_like(kept, codec.residual) if lower.capacities is None else lower.capacities
        blocks = (kept - have + codec.block - 1).clamp(min=0) // codec.block
        self.kept, self.capacities = kept, have + blocks * codec.block
        self.room = int((self.capacities - kept).min())
        if lower.store is not None and bool(blocks.any()):
            stores = self._stores()
            lower.store = stores[0].grow_to(self.capacities)
            upper.store = stores[1].grow_to(self.capacities, lower.store)

    def select_rows(self, rows: Tensor) -> None:
        """Keeps ``rows`` (int64) of the batch, in that order; the stores are the layers' own business."""
        if self.kept.numel():
            rows = rows.cpu()
            self.kept, self.capacities = self.kept[rows], self.capacities[rows]

    def recount(self) -> None:
        """Reads from the stores what is known on the CPU."""
        store = self._stores()[0]
        self.capacities = store.capacities().cpu().long()
        self.kept = store.lengths.sum(-1).cpu().long()
        self.room = int((self.capacities - self.kept).min())

    def _stores(self) -> tuple[Store, Store]:
        lower, upper = (layer.store for layer in self.layers)
        assert lower is not None and upper is not None
        return lower, upper


def pack_merged(
    stores: tuple[Store, Store], parts: tuple[Candidates, Candidates], chosen: Tensor, counts: Tensor
) -> None:
    """Fills a pair's fresh stores with chosen tokens: the merged ones packed, the others plain, each in order.

    A segment packs what its plain part has no room for, in whole groups: of all but the newest R' tokens those whose
    keys are nearest in the two layers; ties: the older.

    Args:
        stores: written; of the lower and the upper layer.
        parts: the candidates of each, the same tokens.
        chosen: (B, 1 or H, m) int32 indices of candidates in increasing order, n behind the first ``counts``.
        counts: (B, H) int32.
    """
    merge = stores[0].shape.merge
    assert merge is not None
    rows, heads, n, _ = parts[0].keys.shape
    index = chosen.long().expand(rows, heads, -1)
    if index.shape[2] < n:  # nothing is merged that does not stay
        lower, upper = (_gathered(part, index.clamp(max=n - 1)) for part in parts)
        n = index.shape[2]
        index = torch.arange(n, device=chosen.device).expand(rows, heads, n)
    else:
        lower, upper = parts
    key, *key_norms, distance = ops_kv.kv_merge_pair(lower.keys, upper.keys, merge.share)
    value, *value_norms, _ = ops_kv.kv_merge_pair(lower.values, upper.values, merge.share)
    order, packed = _merged_first(stores[0], distance.gather(2, index.clamp(max=n - 1)), counts)
    index = index.gather(2, order)
    rank = torch.arange(index.shape[2], device=index.device)
    merged = torch.zeros(rows, heads, n + 1, dtype=torch.bool, device=index.device)
    merged = merged.scatter_(2, index, rank < packed)[..., :n, None]
    slots = torch.where(rank < packed, stores[0].segments[..., :1] + rank, stores[0].packed_slots).flatten(1)
    index = index.clamp(max=n - 1)
    for layer, (store, part) in enumerate(zip(stores, (lower, upper), strict=True)):
        torch.where(merged, key, part.keys, out=key)
        torch.where(merged, value, part.values, out=value)
        ops_kv.kv_quant_pack(
            replace(store, factors=store.factors.new_empty(0)),  # directions are packed as they are
            *(key, value, part.positions.contiguous(), part.scores if store.shape.scored else None),
            *(index.int(), counts),
        )
        norms = torch.stack([key_norms[layer], value_norms[layer]], dim=-1)
        norms = norms.gather(2, index[..., None].expand(-1, -1, -1, 2)).flatten(1, 2)
        room = norms.new_zeros(rows, store.packed_slots + 1, 2)
        room.scatter_(1, slots.long()[..., None].expand(-1, -1, 2), norms)
        store.factors.copy_(room[:, :-1])


def _gathered(part: Candidates, index: Tensor) -> Candidates:
    """The candidates at ``index`` (B, H, m) int64."""
    at = index[..., None].expand(-1, -1, -1, part.keys.shape[3])
    positions = part.positions.expand(-1, index.shape[1], -1).gather(2, index)
    scores = None if part.scores is None else part.scores.gather(2, index)
    return Candidates(part.keys.gather(2, at), part.values.gather(2, at), positions, scores)


def _merged_first(store: Store, distance: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Who is merged.

    Args:
        store: whose segments are to be filled.
        distance: (B, H, m) between the keys of the two layers, tokens in the order of positions.
        counts: (B, H) int32, how many of the m there are.

    Returns:
        (B, H, m) int64, the merged tokens, then the others, each in order; and (B, H, 1), how many are merged.
    """
    merge, group = store.shape.merge, store.group
    assert merge is not None
    count = counts[..., None]
    beyond = (count - store.segments[..., 3:]).clamp(min=0)
    packed = (beyond + group - 1) // group * group
    newest = (count - packed).clamp(max=merge.residual(store.shape.codec))
    rank = torch.arange(distance.shape[2], dtype=torch.int32, device=distance.device)
    far = distance.nan_to_num(nan=2.0).masked_fill(rank >= count - newest, math.inf)
    nearest = far.argsort(dim=-1, stable=True)
    merged = torch.zeros_like(far, dtype=torch.bool).scatter_(2, nearest, rank < packed)
    kind = torch.where(merged, 0, torch.where(rank < count, 1, 2))
    return kind.argsort(dim=-1, stable=True), packed
