# SPDX-License-Identifier: Apache-2.0
"""One layer of the cache: what happens to its tokens in a forward.

transformers calls :meth:`Layer.update` with new keys and values, which hands them on to the attention; there, where the
queries are known as well, :meth:`Layer.attend` does the rest. A decoded token is two operators: ``kv_evict_append`` and
``kv_attention_decode``; in a pair of merged layers (:mod:`kvopt.cache.pair`), ``kv_merge_evict`` before. Several tokens
are attended, scored, chosen from and packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvopt import ops_kv
from kvopt.cache import attention, choice
from kvopt.cache.candidates import Candidates, append_chosen, joined
from kvopt.cache.codecs import Codec
from kvopt.cache.policies import Tokens
from kvopt.cache.step import Step
from kvopt.cache.store import Shape, Store

if TYPE_CHECKING:
    from kvopt.cache.cache import Cache
    from kvopt.cache.pair import Pair

Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""Query (B, Hq, q, D), keys and values (B, H, n, D) and a mask to (B, q, Hq, D), as transformers' ``sdpa`` does it."""


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """The tokens of one decoder layer.

    Attributes:
        index: of the layer.
        store: their memory; None before the first forward.
        limit: (B, H) int32, how many tokens each KV head may keep; None without a limit.
        capacities: the same, on the CPU.
        narrowest, widest: bounds of ``limit``.
        room: how many tokens still fit into every segment of a store that grows, at least.
        observed: (B, H, n) float32, what the second reading of a prompt has scored so far.
        merged: the pair that this layer is merged in, if any.
        held: of a pair's lower layer, what is to be chosen from once the upper one has come.
    """

    is_sliding = False

    def __init__(self, cache: Cache, index: int) -> None:
        super().__init__()
        self._cache = cache
        self.index = index
        self.merged: Pair | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees the memory."""
        self.store: Store | None = None
        self.limit: Tensor | None = None
        self.capacities: Tensor | None = None
        self.narrowest = self.widest = self.room = 0
        self.observed: Tensor | None = None
        self.held: Candidates | None = None

    @property
    def pair(self) -> Pair | None:
        """The pair whose tokens are chosen and packed together; None while the prompt is held whole."""
        return None if self._cache.holds else self.merged

    @property
    def members(self) -> Sequence[Layer]:
        """The layers that keep the same tokens: this one, or both of its pair."""
        return (self,) if self.pair is None else self.pair.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new keys and values, (B, H, q, D) each, and returns them: the attention goes on from there."""
        cache = self._cache
        if cache.step is None:
            raise RuntimeError(
                "kvopt.Cache: used by a model it was not made for; kvopt.Cache(model, ...) makes one"
            )
        cache.check_attended()
        cache.waiting = self.index
        attention.hand_over(self, key_states)
        return key_states, value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, sdpa: Attention
    ) -> Tensor:
        """Attention of the step's tokens over what they may see; stores them, or what is to stay of them.

        Args:
            query: (B, Hq, q, D).
            key: (B, H, q, D), as :meth:`update` got it.
            value: likewise.
            scale: of the logits.
            mask: transformers' own, for a prompt on an empty cache.
            sdpa: does the attention of several tokens.

        Returns:
            (B, q, Hq, D).
        """
        cache = self._cache
        step = cache.step
        assert step is not None
        cache.waiting = None
        if self.limit is None and not cache.holds:
            self._begin(key.shape[1])
        if step.one:
            return self._decode(step, query.detach(), key.detach(), value.detach(), scale)[:, None]
        if step.first:  # attended as it came, with its gradients
            output = sdpa(query, key, value, mask)
            with torch.no_grad():
                new = Candidates(key.detach(), value.detach(), step.positions[:, None])
                self._score(step, query.detach(), new.keys, new, scale)
                self._compress(step, new)
            return output
        with torch.no_grad():
            return self._continue(step, query, key, value, scale, sdpa)

    # A decoded token.

    def _decode(self, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        policy, rule = self._cache.spec.policy, self._cache.rule
        victim = token_score = None
        if self.pair is not None:
            self.pair.make_room(self, step)
        elif policy.grows:
            self._reserve(1)
        elif policy.decode is None and step.most > self.narrowest:
            victim = self._victim(step)
        if rule.new_score is None:
            new = Candidates(key, value, step.positions[:, None])
            token_score = policy.scores_of(self._tokens(step, new, None))
            assert token_score is not None
            token_score = token_score[:, :, 0].contiguous()
        store = self.store
        assert store is not None
        ops_kv.kv_evict_append(
            *(
                store,
                key[:, :, 0],
                value[:, :, 0],
                step.positions,
                token_score,
                rule.new_score or 0.0,
                victim,
            ),
            *(rule.order, rule.first, rule.recent, rule.shared, rule.age),
        )
        gap, rotary = self._gap(step), self._cache.rotary
        if gap is None or rotary is None:
            return ops_kv.kv_attention_decode(query[:, :, 0], store, scale, rule.update)
        frequencies = rotary.inv_freq.to(query.device, torch.float32)
        return ops_kv.kv_attention_decode(
            query[:, :, 0], store, scale, rule.update, policy.sinks, gap, frequencies
        )

    def _victim(self, step: Step) -> Tensor:
        """(B, 1 or H) int32: who makes room, where the compiled rule can't say it."""
        policy, store = self._cache.spec.policy, self.store
        assert store is not None
        positions = store.gather(store.positions, store.widest, -1)
        scores = store.gather(store.scores, store.widest, 0.0) if store.shape.scored else None
        # A policy that looks at positions only is shown no keys.
        seen = store.read_slots(store.widest) if not policy.positions_only else (store.plain_keys,) * 2
        tokens = self._tokens(step, Candidates(*seen, positions), scores)
        return choice.lowest(choice.priorities(policy, tokens), tokens.positions)

    def _gap(self, step: Step) -> Tensor | None:
        """(B,) int32: how far this layer's sinks are from their places; None for not at all."""
        cache = self._cache
        if not cache.spec.policy.sinks or not cache.spec.allocator.pyramid:
            return step.gap
        assert self.limit is not None
        return (step.seen - self.limit[:, 0]).clamp(min=0)

    # Several tokens.

    def _continue(
        self, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float, sdpa: Attention
    ) -> Tensor:
        """Several tokens on a cache that is not empty: they see all that is kept, and each other causally."""
        assert step.mask is not None
        kept = self.kept(step)
        candidates = joined(kept, Candidates(key, value, step.positions[:, None]))
        turned = self._turned(step, kept)
        attended = candidates.keys if turned is kept.keys else torch.cat([turned, key], dim=2)
        # Without ada all heads keep equally many tokens, at the end of `kept`: one mask does for all of them.
        uneven = self._cache.spec.allocator.ada and not self._cache.holds
        visible = (kept.positions[:, : None if uneven else 1] >= 0)[:, :, None]
        mask = torch.cat(
            [visible.expand(-1, -1, step.new, -1), step.mask.expand(-1, visible.shape[1], -1, -1)], dim=-1
        )
        if mask.shape[1] > 1:
            mask = mask.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        del kept, turned  # a layer's worth, which `candidates` has in copy
        output = sdpa(query, attended, candidates.values, mask)
        if step.reading:
            self._observe(step, query, attended, candidates, scale)
        else:
            self._score(step, query, attended, candidates, scale)
            self._compress(step, candidates)
        return output

    def kept(self, step: Step) -> Candidates:
        """What is kept, in the order of positions."""
        store = self.store
        assert store is not None
        keys, values, positions, order = store.read(min(store.widest, step.kept))
        scores = None
        if store.shape.scored:
            scores = store.gather(store.scores, order.shape[2], 0.0).gather(2, order)
        if self.alike:
            positions = positions[:, :1]
        return Candidates(keys, values, positions, scores, order.shape[2], order)

    @property
    def alike(self) -> bool:
        """Whether all heads keep the same tokens."""
        policy = self._cache.spec.policy
        return policy.positions_only or policy.shared_heads

    def _turned(self, step: Step, kept: Candidates) -> Tensor:
        """The kept keys, sinks at their positions inside the cache."""
        gap, rotary = self._gap(step), self._cache.rotary
        if gap is None or rotary is None:
            return kept.keys
        sink = (kept.positions < self._cache.spec.policy.sinks)[..., None]
        return torch.where(sink, rotary.move(kept.keys, gap), kept.keys)

    def _observe(self, step: Step, query: Tensor, keys: Tensor, candidates: Candidates, scale: float) -> None:
        """A part of a second reading: notes the attention that the kept tokens get."""
        observation = self._cache.spec.policy.observation
        assert observation is not None
        seen = _column_scores(step, query, keys, candidates, scale, None, observation.maximum)
        seen = seen[:, :, : candidates.old]
        if self.observed is None:
            self.observed = seen.clone()
        else:
            self.observed = (
                torch.maximum(self.observed, seen) if observation.maximum else self.observed + seen
            )

    def settle(self) -> None:
        """Ends the second reading: chooses what stays of the prompt, which was held whole."""
        step, store = self._cache.step, self.store
        assert step is not None and store is not None and self.observed is not None
        observation = self._cache.spec.policy.observation
        assert observation is not None
        kept = self.kept(step)
        scores = observation.finish(self.observed, kept.positions, step.newest)
        self.store = self.observed = None
        self._begin(kept.keys.shape[1])
        self._compress(step, Candidates(kept.keys, kept.values, kept.positions, scores))

    def _score(self, step: Step, query: Tensor, keys: Tensor, candidates: Candidates, scale: float) -> None:
        """Gives the candidates their scores, as the policy has them computed."""
        cache, policy = self._cache, self._cache.spec.policy
        observation = policy.observation
        if not cache.scored or cache.holds:
            return
        old = candidates.scores
        if observation is None:
            candidates.scores = policy.scores_of(self._tokens(step, candidates, None))
        elif policy.second_reading:  # what comes after the prompt is not read twice, and counts as decoded
            assert old is not None
            new = old.new_full((*old.shape[:2], step.new), cache.rule.new_score or 0.0)
            candidates.scores = torch.cat([old, new], dim=2)
        else:
            scores = _column_scores(
                step, query, keys, candidates, scale, observation.queries, observation.maximum
            )
            if observation.queries is None and old is not None:
                part = scores[:, :, : candidates.old]
                part.copy_(torch.maximum(part, old) if observation.maximum else part + old)
            candidates.scores = observation.finish(scores, candidates.positions, step.newest)

    def _tokens(self, step: Step, candidates: Candidates, scores: Tensor | None) -> Tokens:
        """The candidates as a policy sees them."""
        policy, positions, limit = self._cache.spec.policy, candidates.positions, self.limit
        if self.alike:
            positions = positions[:, :1]
            limit = None if limit is None else limit[:, :1]
        else:
            positions = positions.expand(-1, candidates.keys.shape[1], -1)
        keys = values = None
        if not policy.positions_only:
            keys, values = candidates.keys, candidates.values
        layer = 0 if policy.positions_only else self.index
        return Tokens(positions, keys, values, layer, scores=scores, newest=step.newest, capacity=limit)

    def _compress(self, step: Step, candidates: Candidates) -> None:
        """Chooses what stays of the candidates and makes it the content of the store."""
        if self.pair is not None:
            self.pair.compress(self, step, candidates)
            return
        chosen, counts, free = self.choose(step, [candidates])
        if free and self.store is not None:
            self._reserve(step.new)
        if self.store is not None and self.store.shape.packs:
            append_chosen([self.store], [candidates], chosen, step.new if free else self.widest)
        else:
            self._pack(step, candidates, chosen.contiguous(), counts)
        if not free:
            self.room = max(0, self.narrowest - step.most)

    def choose(self, step: Step, parts: Sequence[Candidates]) -> tuple[Tensor, Tensor, bool]:
        """Which of the candidates stay.

        Args:
            step: the forward.
            parts: the candidates of each of :attr:`members`, the same tokens.

        Returns:
            Indices as :func:`choice.best` gives them, their counts (B, H) int32, and whether all stay because there is
            no limit to them.
        """
        candidates = parts[0]
        present = candidates.positions >= 0
        free = self.limit is None or (self._cache.spec.policy.grows and not step.prompt)
        if free or step.most <= self.narrowest:
            counts = present.sum(dim=-1, dtype=torch.int32)
            chosen = choice.everything(present, step.most)
        else:
            chosen, counts = self._choose(step, parts, present)
        return chosen, counts.expand(-1, candidates.keys.shape[1]).contiguous(), free

    def _choose(self, step: Step, parts: Sequence[Candidates], present: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`choice.best` gives it, with the counts, (B, 1 or H) int32."""
        spec = self._cache.spec
        # What depends on positions alone is the same in every layer, unless the layers' capacities differ.
        share = spec.policy.positions_only and not spec.allocator.pyramid
        if share and step.chosen is not None:
            return step.chosen
        priority = self.priority(step, parts)
        present = present.expand(priority.shape)
        # What is packed has its segments for good; Cache refuses to read a prompt in chunks then.
        if spec.allocator.ada and step.prompt and (self.store is None or not spec.packs):
            budgets = torch.tensor(self._cache.budgets(self.index))
            shares = spec.allocator.per_head(priority, present, budgets, spec.policy.minimum)
            for member in self.members:
                member._share_out(shares)
        assert self.limit is not None
        limit = self.limit[:, : priority.shape[1]]
        counts = torch.minimum(present.sum(dim=-1, dtype=torch.int32), limit)
        result = choice.best(priority, present, counts, self.widest), counts
        if share:
            step.chosen = result
        return result

    def priority(self, step: Step, parts: Sequence[Candidates]) -> Tensor:
        """(B, G, n): the policy's, summed over :attr:`members`, whose candidates ``parts`` are."""
        policy = self._cache.spec.policy
        asked = self.members[:1] if policy.positions_only else self.members
        return choice.together(
            [
                choice.priorities(policy, member._tokens(step, part, part.scores))
                for member, part in zip(asked, parts, strict=False)
            ]
        )

    def _begin(self, heads: int) -> None:
        """Gives each head its layer's budget, where there is one."""
        budgets = self._cache.budgets(self.index)
        if budgets is not None:
            self._share_out(torch.tensor(budgets)[:, None].expand(-1, heads))

    def _share_out(self, capacities: Tensor) -> None:
        """Gives every segment its capacity, (B, H) integers on the CPU, and drops a store that has others."""
        self.store = None
        self.capacities = capacities
        self.narrowest, self.widest = int(capacities.min()), int(capacities.max())
        with torch.inference_mode(False):
            self.limit = capacities.to(self._cache.rows.count.device, torch.int32)

    def _pack(self, step: Step, candidates: Candidates, chosen: Tensor, counts: Tensor) -> None:
        """Fills the store afresh; none of the candidates was packed so far."""
        if self.store is None:
            capacities = self.capacities
            if self.limit is None or capacities is None:  # without a limit, or held for the second reading
                codec = Codec() if self._cache.holds else self._cache.spec.codec
                capacities = torch.full(counts.shape, codec.round_up(step.most))
            self.room = max(0, int(capacities.min()) - step.most)
            self.allocate(candidates.keys, capacities)
        store = self.store
        assert store is not None
        ops_kv.kv_quant_pack(
            *(store, candidates.keys, candidates.values, candidates.positions.contiguous()),
            *(candidates.scores if store.shape.scored else None, chosen, counts),
        )

    def allocate(self, keys: Tensor, capacities: Tensor, lower: Store | None = None) -> Store:
        """An empty store.

        Args:
            keys: (B, H, n, D), of what is to be stored.
            capacities: (B, H) integers on the CPU.
            lower: the store of the layer that this one is merged with, if it is there already.
        """
        cache = self._cache
        rows, heads, _, dim = keys.shape
        codec = Codec() if cache.holds else cache.spec.codec
        shape = Shape(rows, heads, dim, keys.dtype, codec, cache.scored and not cache.holds)
        if self.pair is not None:
            shape = replace(shape, merge=self.pair.merge)
        self.store = Store.allocate(shape, capacities, keys.device, lower)
        return self.store

    def _reserve(self, tokens: int) -> None:
        """Makes sure that so many tokens fit into every segment."""
        assert self.store is not None
        if tokens > self.room:
            blocks = -(-(tokens - self.room) // self.store.shape.codec.block)
            self.store = self.store.grow(blocks)
            self.room += blocks * self.store.shape.codec.block
        self.room -= tokens

    def select_rows(self, rows: Tensor) -> None:
        """Keeps ``rows`` (int64) of the batch, in that order; of a pair the lower layer first."""
        if self.store is not None:
            self.store = self.store.select_rows(rows, None if self.pair is None else self.pair.below(self))
        if self.limit is not None:
            with torch.inference_mode(False):
                self.limit = self.limit.index_select(0, rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer holds."""
        held = [] if self.store is None else list(self.store.tensors().values())
        if self.held is not None:
            held += [self.held.keys, self.held.values]
        return held + [tensor for tensor in (self.limit, self.observed) if tensor is not None]

    # What transformers asks of a layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is allocated when the first keys come."""

    def get_seq_length(self) -> int:
        """Columns seen, evicted ones included."""
        return self._cache.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset for transformers' own mask, which is used for a prompt on an empty cache only."""
        # 5.3 gives the positions of the new tokens, later versions their number.
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self._cache.columns + new, 0

    def get_max_length(self) -> int:
        """-1: there is no end."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of :meth:`get_max_length` before 5.16."""
        return -1


def _column_scores(
    step: Step,
    query: Tensor,
    keys: Tensor,
    candidates: Candidates,
    scale: float,
    queries: int | None,
    maximum: bool,
) -> Tensor:
    """(B, H, n) float32: the attention that each candidate gets from the newest ``queries``; None for all."""
    count = step.new if queries is None else min(queries, step.new)
    return ops_kv.kv_select_scores(
        *(query[:, :, -count:], keys, step.positions[:, -count:].contiguous()),
        *(candidates.positions.contiguous(), scale, maximum),
    )
