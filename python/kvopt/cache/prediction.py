# SPDX-License-Identifier: Apache-2.0
"""How many bytes a cache will take, before a token has been read.

What is held is worked out exactly, from the same shapes that are allocated. What a layer needs for a moment while the
prompt is read is an upper bound on the tensors of ``layer.py`` and ``choice.py`` that live together, written out here.
Both come on top of what the model's own forward takes without a cache, a layer's new keys and values among it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kvopt.cache.architecture import Architecture, read_architecture
from kvopt.cache.codecs import Codec
from kvopt.cache.merge import MINICACHE, Merge
from kvopt.cache.second_reading import CHUNK
from kvopt.cache.spec import CacheSpec
from kvopt.cache.store import Shape, largest_parts

_CHOICE = 96  # bytes a candidate and KV head while tokens are chosen: priorities, two stable sorts and their workspace
_ADA = 72  # the same for sharing out among the heads of one row, in fp64
_COLUMN = 64  # bytes a row and column of a forward: positions, which columns are tokens
_PARTS = 2**19  # bytes of kv_select_scores on CUDA, whatever the lengths
_MERGED = 12  # copies of a layer's keys or values while two layers are merged
_FP32_COPIES = 3  # of a layer's keys, in a policy that computes scores from them


@dataclass(frozen=True)
class CacheBytes:
    """Device bytes of a cache.

    Attributes:
        after_prompt: held once the prompt has been read.
        steady: held after the new tokens.
        peak: no more than this at any time, over what the model's forward takes without a cache.
        exact: ``after_prompt`` and ``steady`` are what will be allocated; otherwise they are upper bounds, because
            ``ada`` shares packed tokens out among heads in a way that only the prompt decides.
    """

    after_prompt: int
    steady: int
    peak: int
    exact: bool


def cache_bytes(
    model: PreTrainedModel,
    spec: str | CacheSpec,
    rows: int,
    prompt: int | Sequence[int],
    new: int = 0,
    prefill: str | int = "full",
) -> CacheBytes:
    """What a :class:`Cache` for ``model`` will hold and what it will need at the most.

    .. code-block:: python

        kvopt.cache_bytes(model, "h2o_b512+int4", rows=8, prompt=4096, new=256).steady / 2**20

    Args:
        model: as for :class:`Cache`; only its shape is read, so it may be on the ``meta`` device.
        spec: as for :class:`Cache`.
        rows: of the batch.
        prompt: tokens of each row's prompt, or a number for each row, padding excluded.
        new: tokens decoded after it.
        prefill: as for :class:`Cache`.

    Raises:
        ValueError: a negative or empty number of rows or tokens, as many prompts as there are not rows, or what
            :class:`Cache` refuses.
    """
    arch, spec = read_architecture(model), CacheSpec.parse(spec)
    lengths = [prompt] * rows if isinstance(prompt, int) else list(prompt)
    if rows < 1 or new < 0 or len(lengths) != rows or min(lengths) < 1:
        raise ValueError(f"cache_bytes: {rows} rows, prompts of {prompt} tokens and {new} new ones")
    if prefill != "full" and (isinstance(prefill, (str, bool)) or prefill < 1):
        raise ValueError(
            f"cache_bytes: prefill must be 'full' or a chunk length of 1 or more, got {prefill!r}"
        )
    spec.codec.check(arch.head_dim, arch.model_type)
    total = max(lengths)
    chunk = total if isinstance(prefill, str) else min(prefill, total)
    sizes = _Sizes(arch, spec, rows)
    budgets = None
    if spec.budget is not None:
        budgets = spec.budget.per_row(
            lengths, spec.minimum, lambda tokens: budgeted_bytes(arch, spec, tokens, lengths)
        )
    held = sizes.held(budgets, lengths, 0)
    steady = sizes.held(budgets, lengths, new)
    widest = total
    if budgets is not None:
        widest = min(total, max(map(max, layer_budgets(spec, arch.layers, budgets, lengths))))
        if spec.allocator.ada:  # one head may hold nearly all
            widest = min(total, widest * arch.kv_heads)
    return CacheBytes(
        after_prompt=held,
        steady=steady,
        peak=max(held + sizes.reading(total, chunk, widest), steady + sizes.decoding(steady, widest)),
        exact=not (spec.allocator.ada and spec.packs),
    )


def chunk_length(spec: CacheSpec, prefill: str | int) -> int | None:
    """Tokens of a chunk that ``prefill`` says, None for the whole prompt at once.

    Raises:
        ValueError: neither ``"full"`` nor a number of 1 or more, or chunks where ``ada`` must see the whole prompt.
    """
    if prefill != "full" and (isinstance(prefill, (str, bool)) or prefill < 1):
        raise ValueError(
            f"kvopt.Cache: prefill must be 'full' or a chunk length of 1 or more, got {prefill!r}"
        )
    if isinstance(prefill, str):
        return None
    # For a second reading the prompt is held unpacked.
    if spec.allocator.ada and spec.packs and not spec.policy.second_reading:
        packer = spec.codec.name if spec.codec.packs else MINICACHE
        raise ValueError(
            f"kvopt.Cache: {str(spec)!r} with prefill={prefill}: 'ada' shares tokens out among heads when the "
            f"whole prompt is known, {packer!r} packs them for good after the first chunk; use "
            "prefill='full', or leave one of the two out"
        )
    return prefill


def layer_budgets(
    spec: CacheSpec, layers: int, budgets: Sequence[int], lengths: Sequence[int]
) -> list[list[int]]:
    """Tokens per KV head that each row may keep, per layer and row.

    Args:
        spec: of the cache.
        layers: L.
        budgets: of each row, mean over layers.
        lengths: of the rows' prompts.
    """
    rows = [
        spec.allocator.per_layer(budget, layers, length, spec.minimum)
        for budget, length in zip(budgets, lengths, strict=True)
    ]
    return [list(layer) for layer in zip(*rows, strict=True)]


def budgeted_bytes(
    architecture: Architecture, spec: CacheSpec, budgets: Sequence[int], lengths: Sequence[int]
) -> int:
    """Bytes of a cache whose rows keep ``budgets`` tokens per KV head; an upper bound with ``ada``."""
    return _Sizes(architecture, spec, len(budgets)).held(budgets, lengths, 0)


class _Sizes:
    """Bytes of one model's cache for so many rows."""

    def __init__(self, architecture: Architecture, spec: CacheSpec, rows: int) -> None:
        self.arch, self.spec, self.rows = architecture, spec, rows
        self.merge = spec.merge
        self.query_heads: int = architecture.base.config.num_attention_heads
        self.item = architecture.dtype.itemsize
        self.heads = rows * architecture.kv_heads

    # Held.

    def held(self, budgets: Sequence[int] | None, lengths: Sequence[int], new: int) -> int:
        """After prompts of ``lengths`` and ``new`` more tokens; ``budgets`` of the rows, None without a limit."""
        layers = self.arch.layers
        pairs = [] if self.merge is None else self.merge.pairs_of(layers, self.arch.model_type)
        uppers, merged = {upper for _, upper in pairs}, {layer for pair in pairs for layer in pair}
        limits: list[list[int]] | None = None
        total = 4 * self.rows
        if budgets is not None:
            limits = layer_budgets(self.spec, layers, budgets, lengths)
            total += 4 * self.rows + layers * 4 * self.heads
        known: dict[tuple[Any, ...], int] = {}
        for index in range(layers):
            limit = None if limits is None else limits[index]
            merge = self.merge if index in merged else None
            key = (merge, index in uppers, *(limit or ()))
            if key not in known:
                slots = self._slots(limit, lengths, new, merge)
                known[key] = self._shape(merge).nbytes(*slots, own=index in uppers)
            total += known[key]
        return total

    def _shape(self, merge: Merge | None) -> Shape:
        arch, spec = self.arch, self.spec
        return Shape(self.rows, arch.kv_heads, arch.head_dim, arch.dtype, spec.codec, spec.scored, merge)

    def _slots(
        self, limit: Sequence[int] | None, lengths: Sequence[int], new: int, merge: Merge | None
    ) -> tuple[int, int]:
        """Packed and plain slots a row of one layer, whose rows may keep ``limit`` tokens; None without a limit."""
        codec, heads, uneven = self.spec.codec, self.arch.kv_heads, self.spec.allocator.ada
        if merge is not None and self.spec.policy.grows:  # each row by what itself needs
            starts = [codec.residual] * self.rows if limit is None else limit
            kept = [min(n, start) if limit else n for n, start in zip(lengths, starts, strict=True)]
            capacities = [
                start + _whole_blocks(count + new - start, codec.block)
                for count, start in zip(kept, starts, strict=True)
            ]
            return largest_parts(capacities, heads, codec, uneven=uneven, merge=merge)
        if limit is None:
            capacities = [codec.round_up(max(lengths) + new)] * self.rows
            return largest_parts(capacities, heads, codec, uneven=False)
        packed, plain = largest_parts(limit, heads, codec, uneven=uneven, merge=merge)
        if self.spec.policy.grows:
            more = heads * _whole_blocks(new - max(0, min(limit) - max(lengths)), codec.block)
            packed, plain = (packed + more, plain) if codec.packs else (packed, plain + more)
        return packed, plain

    # For a moment.

    def vectors(self, tokens: int, item: int | None = None) -> int:
        """Keys or values of one layer, for so many tokens a KV head."""
        return self.heads * tokens * self.arch.head_dim * (item or self.item)

    def queries(self, tokens: int) -> int:
        """The same of all query heads."""
        return self.rows * self.query_heads * tokens * self.arch.head_dim * self.item

    def reading(self, total: int, chunk: int, widest: int) -> int:
        """While a prompt of ``total`` tokens is read, ``chunk`` at once, of which ``widest`` stay at most."""
        policy = self.spec.policy
        columns = _COLUMN * self.rows * total
        if chunk == total:
            layer = self._choosing(total, total) + 2 * self.vectors(total) + self._merging(total)
        else:
            held = total if self.spec.budget is None or policy.second_reading else widest
            layer = self._continuing(held, chunk)
            if policy.grows or policy.second_reading:  # a layer that grows is there twice
                layer += self._whole(total)
            hidden = self.rows * total * self.arch.base.config.hidden_size * self.item
            layer = hidden + max(layer, hidden)
        if policy.second_reading:
            whole = self.arch.layers * (self._whole(total) + 4 * self.heads * total)
            layer = whole + max(layer, self._continuing(total, min(total, CHUNK)))
        return columns + layer

    def _whole(self, total: int) -> int:
        """A layer that holds the whole prompt: in the model's type, for a second reading, or in the codec's."""
        arch, codec, scored = self.arch, self.spec.codec, self.spec.scored
        if self.spec.policy.second_reading or self.merge is not None:
            codec, scored = Codec(), False
        shape = Shape(self.rows, arch.kv_heads, arch.head_dim, arch.dtype, codec, scored)
        capacities = [codec.round_up(total)] * self.rows
        return shape.nbytes(*largest_parts(capacities, arch.kv_heads, codec, uneven=False))

    def _choosing(self, candidates: int, queries: int) -> int:
        """Scoring and choosing among so many tokens per KV head."""
        policy = self.spec.policy
        scores = 0
        observation = policy.observation
        if observation is not None:
            observed = queries if observation.queries is None else min(observation.queries, queries)
            # Contiguous copies; on CUDA the normalisers of each query, in parts while there are few queries.
            scores = self.queries(observed) + self.vectors(candidates)
            scores += 12 * self.rows * self.query_heads * (observed + 64)
            scores += _PARTS if self.arch.base.device.type == "cuda" else 0
        if policy.computes:
            scores += _FP32_COPIES * self.vectors(candidates, 4)
        ada = _ADA * self.arch.kv_heads * candidates if self.spec.allocator.ada else 0
        return scores + _CHOICE * self.heads * candidates + ada

    def _continuing(self, kept: int, new: int) -> int:
        """A chunk of ``new`` tokens over ``kept`` ones: what was kept, unpacked and in order, joined with the chunk."""
        both = kept + new
        policy = self.spec.policy
        alike = policy.second_reading or not self.spec.allocator.ada
        joining = 2 * self.vectors(kept) + 2 * self.vectors(both)
        copies = 3 if policy.sinks else 2  # keys a second time where sinks get other positions
        joined = copies * self.vectors(both)
        # What each query sees, as truth values and as sdpa wants it (on CUDA a second time, for its alignment); and
        # every query head's own keys and values.
        masks = self.rows * (1 if alike else self.query_heads) * new * both
        wide = self.item * (2 if self.arch.base.device.type == "cuda" else 1)
        attention = max(masks * (1 + wide) + 2 * self.queries(both), 2 * masks)
        chosen = masks + self._choosing(both, new) + 4 * self.vectors(new)
        turned = 3 * self.vectors(kept, 4) + 3 * self.vectors(kept) if policy.sinks else 0
        return max(joining, joined + max(attention, chosen) + turned) + self._merging(both)

    def _merging(self, tokens: int) -> int:
        """What a pair's lower layer leaves for the upper one, and the merging of both."""
        return 0 if self.merge is None else _MERGED * self.vectors(tokens) + _CHOICE * self.heads * tokens

    def decoding(self, held: int, widest: int) -> int:
        """Beside ``held`` bytes while a token is decoded."""
        policy = self.spec.policy
        if policy.grows:  # a layer that grows is there twice
            return -(-held // self.arch.layers) + _COLUMN * self.rows
        one = 4 * self.vectors(1) + _COLUMN * self.rows * (1 + self.query_heads)
        if policy.decode is None:  # the policy is asked, and sees everything
            return one + 2 * self.vectors(widest) + self._choosing(widest, 0)
        return one + _CHOICE * self.heads * widest


def _whole_blocks(tokens: int, block: int) -> int:
    """The least multiple of ``block`` that is no less than ``tokens``; 0 for none."""
    return max(0, -(-tokens // block)) * block
