# SPDX-License-Identifier: Apache-2.0
"""One layer of the cache: keys and values in their slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvopt.cache.codecs import PlainStore
from kvopt.cache.policies import Tokens
from kvopt.cache.slots import Slots
from kvopt.cache.step import Step

if TYPE_CHECKING:
    from kvopt.cache.cache import Cache

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Content:
    """Where a layer's tokens are."""

    keys: PlainStore
    values: PlainStore
    slots: Slots

    def read(self, n: int) -> Pair:
        """Keys and values of the first ``n`` slots, (B, H, n, D)."""
        return self.keys.read(n), self.values.read(n)


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one decoder layer. transformers calls :meth:`update`; all else is the cache's.

    ``slots`` are its own if the policy looks at keys; a policy that looks at positions only shares those of layer 0.
    """

    is_sliding = False

    def __init__(self, cache: Cache, index: int) -> None:
        super().__init__()
        self._cache = cache
        self._index = index
        self._shares = cache.spec.policy.positions_only
        self.content: Content | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Takes the new keys and values, (B, H, q, D) each, and returns those that this step attends to."""
        step = self._cache.step
        if step is None:
            raise RuntimeError(
                "kvopt.Cache: used by a model it was not made for; kvopt.Cache(model, ...) makes one"
            )
        keys, values = key_states.detach(), value_states.detach()
        if self.content is None:
            self.content = self._allocate(keys, values)
        if step.arrivals is not None and self._cache.sinks is not None:
            self._cache.sinks.keep(self._index, keys, *step.arrivals)
        if step.append:
            seen = self._append(step, keys, values, self.content)
        elif step.one:
            seen = self._replace(step, keys, values, self.content)
        else:
            seen = self._compress(step, keys, values, self.content)
        # A prompt on an empty cache goes to the attention as it came, with its gradients.
        return seen if step.before else (key_states, value_states)

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> Content:
        capacity, codec = self._cache.rows.capacity, self._cache.spec.codec
        with torch.inference_mode(False):
            if self._shares and self._index:
                slots = self._cache.slots
            else:
                slots = Slots(keys.shape[0], 1 if self._shares else keys.shape[1], capacity, keys.device)
            return Content(codec.store(keys, capacity), codec.store(values, capacity), slots)

    def _append(self, step: Step, keys: torch.Tensor, values: torch.Tensor, content: Content) -> Pair:
        if not (self._shares and self._index):
            content.slots.append(step.positions, step.before)
        content.keys.append(keys, step.before)
        content.values.append(values, step.before)
        return content.read(step.keep)

    def _replace(self, step: Step, keys: torch.Tensor, values: torch.Tensor, content: Content) -> Pair:
        slots = step.choice
        if slots is None:
            tokens = self._tokens(step, content.slots.positions, lambda: content.read(step.before))
            slots = content.slots.replace(self._cache.spec.policy, tokens, step.positions[:, 0], step.hole)
            if step.sink_slots is not None:
                slots = torch.cat([slots, step.sink_slots[:, None]], dim=-1)
            slots = slots[..., None]
            if self._shares:
                step.choice = slots
        if step.moved is not None:
            keys = torch.cat([keys, step.moved[self._index]], dim=2)
        batch, heads, _, dim = keys.shape
        content.keys.put(keys, slots.expand(batch, heads, -1, dim))
        content.values.put(values, slots[:, :, :1].expand(batch, heads, 1, values.shape[3]))
        return content.read(step.keep)

    def _compress(self, step: Step, keys: torch.Tensor, values: torch.Tensor, content: Content) -> Pair:
        if step.before:
            if step.moved is not None and step.sink_slots is not None:
                moved = step.moved[self._index]
                content.keys.put(moved, step.sink_slots[:, None, :, None].expand(moved.shape))
            keys = torch.cat([content.keys.read(step.before), keys], dim=2)
            values = torch.cat([content.values.read(step.before), values], dim=2)
        columns = step.choice
        if columns is None:
            old = content.slots.positions.narrow(2, 0, step.before)
            new = step.positions[:, None].expand(-1, old.shape[1], -1)
            tokens = self._tokens(step, torch.cat([old, new], dim=2), lambda: (keys, values))
            columns = content.slots.choose(self._cache.spec.policy, tokens, step.keep, self._cache.rows)
            if self._shares:
                step.choice = columns
        content.keys.take(keys, columns)
        content.values.take(values, columns)
        return keys, values

    def _tokens(self, step: Step, positions: torch.Tensor, read: Callable[[], Pair]) -> Tokens:
        if self._shares:
            return Tokens(positions, None, None, 0, step.full)
        return Tokens(positions, *read(), self._index, step.full)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps ``rows`` (int64) of the batch, in that order."""
        if self.content is not None:
            self.content.keys.select_rows(rows)
            self.content.values.select_rows(rows)
            if not (self._shares and self._index):
                self.content.slots.select_rows(rows)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor this layer holds; shared slots appear in each layer."""
        if self.content is None:
            return []
        content = self.content
        return [*content.keys.tensors(), *content.values.tensors(), content.slots.positions]

    # What transformers asks of a layer.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
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

    def reset(self) -> None:
        """Forgets everything and frees the memory."""
        self.content = None
