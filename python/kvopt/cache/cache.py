# SPDX-License-Identifier: Apache-2.0
"""kvopt.Cache: a compressed KV cache that transformers takes as ``past_key_values``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache

from kvopt.cache import attention, hooks
from kvopt.cache.architecture import read_architecture
from kvopt.cache.budgets import TokenCost
from kvopt.cache.layer import Layer
from kvopt.cache.policies import Full
from kvopt.cache.rotary import check_rotary
from kvopt.cache.sinks import Sinks
from kvopt.cache.slots import Rows, Slots
from kvopt.cache.spec import CacheSpec
from kvopt.cache.step import Step, check_padding, many_tokens, one_token


class Cache(TransformersCache):  # type: ignore[misc]
    """A KV cache that keeps some of the tokens.

    .. code-block:: python

        cache = kvopt.Cache(model, "sink_b256")
        model.generate(**inputs, past_key_values=cache)

    The prompt is attended in full and compressed at its end, or chunk by chunk; from then on no query sees more tokens
    than the budget, itself included. A forward with several tokens on a cache that is not empty (the next turn of a
    conversation) attends to what is kept and to all of the new tokens, then compresses. Passing the cache to a second
    ``generate`` continues the conversation; :meth:`reset` starts a new one.

    Making a cache switches the model to the attention implementation ``"kvopt"`` (``model.set_attn_implementation``),
    which without a kvopt cache is transformers' ``sdpa``, and adds forward hooks that do nothing without one.
    Padding must be on the left. Attention masks are read when several tokens come at once; a single token that follows
    is always taken as real.

    Args:
        model: a decoder of transformers with RoPE or learned positions, on one device.
        spec: a :class:`CacheSpec` or its string.
        prefill: ``"full"``, or the chunk length in tokens. Chunks are counted from the end of the prompt, so that a
            row of a left-padded batch is cut where it would be cut alone.

    Raises:
        TypeError: ``model`` is no transformers model.
        ValueError: a bad ``spec`` or ``prefill``, or an architecture that is not served; the message names it.
    """

    def __init__(self, model: PreTrainedModel, spec: str | CacheSpec, prefill: str | int = "full") -> None:
        self.spec = CacheSpec.parse(spec)
        if prefill != "full" and (isinstance(prefill, (str, bool)) or prefill < 1):
            raise ValueError(
                f"kvopt.Cache: prefill must be 'full' or a chunk length of 1 or more, got {prefill!r}"
            )
        self.chunk: int | None = None if isinstance(prefill, str) else prefill
        self.architecture = arch = read_architecture(model)
        self.sinks: Sinks | None = None
        if self.spec.policy.sinks and arch.position_table is None:
            self.sinks = Sinks(check_rotary(arch.base, arch.model_type), self.spec.policy.sinks, arch.layers)
        self.columns = 0
        self.rows = Rows(0, arch.base.device)
        self.step: Step | None = None
        super().__init__(layers=[Layer(self, index) for index in range(arch.layers)])
        if arch.base.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        hooks.attach(arch.base)

    def __repr__(self) -> str:
        return f"kvopt.Cache({str(self.spec)!r}, {self.columns} columns seen, {self.rows.used} kept)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """A second cache for the same model, as the reuse of a common prefix needs it; the model is not copied."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.architecture)] = self.architecture
        if self.sinks is not None:
            memo[id(self.sinks.rotary)] = self.sinks.rotary
        for name, value in vars(self).items():
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    # What users read.

    def nbytes(self) -> int:
        """Bytes of all memory this cache holds, bookkeeping included, each storage once."""
        tensors = [*self.rows.tensors(), *(self.sinks.tensors() if self.sinks else [])]
        for layer in self.layers:
            tensors += layer.tensors()
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def lengths(self) -> torch.Tensor:
        """Tokens kept, (layers, batch, KV heads) int32; batch is 0 before the first forward."""
        kept = self.rows.used - self.rows.holes
        return kept[None, :, None].repeat(len(self.layers), 1, self.architecture.kv_heads)

    def positions(self, layer: int) -> torch.Tensor:
        """Logical positions of the kept tokens, (batch, KV heads, slots) int32, increasing, -1 (first) where empty.

        A position counts the row's own tokens, so it is the same for a row alone and in a left-padded batch.

        Raises:
            ValueError: no forward has used the cache yet.
        """
        return self._sorted(layer)[0]

    def keys(self, layer: int) -> torch.Tensor:
        """The kept keys in the order of :meth:`positions`, (batch, KV heads, slots, D), 0 where empty.

        Keys with RoPE are those at the original positions, whatever positions the attention uses.
        """
        positions, order = self._sorted(layer)
        keys = self._gather(self.layers[layer].content.keys.read(self.rows.used), positions, order)
        if self.sinks is not None and self.sinks.original is not None:
            first = self.sinks.first
            at = positions.clamp(0, first - 1).long()[..., None].expand(-1, -1, -1, keys.shape[3])
            is_sink = (positions >= 0) & (positions < first)
            keys = torch.where(is_sink[..., None], self.sinks.original[layer].gather(2, at), keys)
        return keys

    def values(self, layer: int) -> torch.Tensor:
        """The kept values in the order of :meth:`positions`, (batch, KV heads, slots, D), 0 where empty."""
        positions, order = self._sorted(layer)
        return self._gather(self.layers[layer].content.values.read(self.rows.used), positions, order)

    def _sorted(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.columns:
            raise ValueError("kvopt.Cache: it is empty, no forward has used it yet")
        content = self.layers[layer].content
        positions = content.slots.positions.narrow(2, 0, self.rows.used)
        positions = positions.expand(-1, content.keys.read(0).shape[1], -1)
        ordered, order = positions.sort(dim=-1)
        return ordered, order

    @staticmethod
    def _gather(vectors: torch.Tensor, positions: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        gathered = vectors.gather(2, order[..., None].expand(-1, -1, -1, vectors.shape[3]))
        return gathered.masked_fill((positions < 0)[..., None], 0)

    # One forward: the hooks call `begin` and `finish`, the layers read `step`.

    @property
    def slots(self) -> Slots:
        """The slots of layer 0, which all layers share if the policy looks at positions only."""
        slots: Slots = self.layers[0].content.slots
        return slots

    def begin(
        self, batch: int, new: int, mask: torch.Tensor | None, device: torch.device, *, partial: bool
    ) -> Step:
        """Prepares a forward of ``new`` tokens per row.

        Args:
            batch: rows, B.
            new: tokens per row, padding included.
            mask: the attention mask, (B, all tokens seen and new) or (B, new), or None.
            device: where the tokens are.
            partial: the tokens are a chunk that the hook cut off a prompt.

        Raises:
            RuntimeError: the forward before did not reach its end.
            ValueError: a mask or batch that does not fit, padding that is not on the left, a position table that is too
                short, a budget in MiB that is too small.
        """
        self._check(batch)
        sinks, table = self.spec.policy.sinks, self.architecture.position_table
        if self.columns and new == 1 and not partial:
            self.step = one_token(self.rows, self.slots, sinks, self.sinks, table)
            return self.step
        valid = self._valid(batch, new, mask, device)
        if not self.columns and not partial:
            self._limit(valid)
        slots = self.slots if self.columns else None
        self.step = many_tokens(self.rows, slots, valid, sinks, self.sinks, table, partial=partial)
        return self.step

    def begin_prompt(
        self, batch: int, new: int, mask: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Looks at a prompt that will come in chunks; arguments and errors are those of :meth:`begin`.

        Returns:
            (B, q) bool, which of its columns are tokens.
        """
        self._check(batch)
        valid = self._valid(batch, new, mask, device)
        check_padding(valid)
        if not self.columns:
            self._limit(valid)
        return valid

    def finish(self) -> None:
        """The forward has run through."""
        assert self.step is not None
        self.columns += self.step.new
        self.step = None

    def _limit(self, valid: torch.Tensor) -> None:
        self.rows = Rows(valid.shape[0], valid.device)
        if self.spec.budget is not None:
            lengths = valid.sum(dim=1).tolist()
            self.rows.limit(self.spec.budget.per_row(lengths, self.spec.policy.minimum, self._cost()))

    def _check(self, batch: int) -> None:
        if self.step is not None:
            raise RuntimeError(
                "kvopt.Cache: the forward before this one did not reach its end; call cache.reset()"
            )
        if self.columns and batch != self.rows.count.shape[0]:
            have = self.rows.count.shape[0]
            raise ValueError(
                f"kvopt.Cache: it holds {have} rows, got a batch of {batch}; cache.reset() starts anew"
            )

    def _valid(self, batch: int, new: int, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        if mask is None:
            return torch.ones((batch, new), dtype=torch.bool, device=device)
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (new, self.columns + new):
            raise ValueError(
                f"kvopt.Cache: attention_mask of shape {tuple(mask.shape)}, expected ({batch}, {self.columns + new})"
            )
        return mask[:, -new:].to(device=device, dtype=torch.bool)

    def _cost(self) -> TokenCost:
        arch, policy = self.architecture, self.spec.policy
        vector = self.spec.codec.bytes_per_vector(arch.head_dim, arch.dtype)
        heads = arch.layers * arch.kv_heads
        places = 4 * (1 if policy.positions_only else heads)
        first = policy.sinks if self.sinks else 0
        return TokenCost(token=heads * 2 * vector + places, row=12 + first * (heads * vector + 8))

    # What transformers asks of a cache.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes (B, H, q, D) new keys and values of one layer; returns those that the step attends to."""
        seen: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].update(key_states, value_states)
        return seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding and evicted tokens included: the logical length."""
        return self.columns

    def reset(self) -> None:
        """Forgets everything and frees the memory."""
        self.step = None
        self.columns = 0
        self.rows = Rows(0, self.architecture.base.device)
        if self.sinks is not None:
            self.sinks.clear()
        for layer in self.layers:
            layer.reset()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps ``indices`` of the batch, in that order."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        rows = rows.to(self.rows.count.device, torch.int64)
        self.rows.select_rows(rows)
        if self.sinks is not None:
            self.sinks.select_rows(rows)
        for layer in self.layers:
            layer.select_rows(rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i continues what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        rows = torch.arange(self.rows.count.shape[0], device=self.rows.count.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: only ``full`` forgets nothing."""
        return isinstance(self.spec.policy, Full)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest tokens: as many as a negative number says, or all beyond a positive length.

        Raises:
            ValueError: the policy evicts, so what stood there before the tokens may be gone.
        """
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns - tokens_to_remove)
        if remove == 0:
            return
        if not self.is_croppable:
            raise ValueError(
                f"kvopt.Cache: {str(self.spec)!r} evicts tokens and can't take back {remove}; use 'full'"
            )
        if remove >= self.columns:
            self.reset()
            return
        rows = self.rows
        rows.count = (rows.count - remove).clamp(min=0)
        rows.used -= remove
        self.slots.positions.narrow(2, rows.used, remove).fill_(-1)
        rows.fewest, rows.most = max(0, rows.fewest - remove), rows.most - remove
        self.columns -= remove
