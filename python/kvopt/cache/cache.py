# SPDX-License-Identifier: Apache-2.0
"""kvopt.Cache: a compressed KV cache that transformers takes as ``past_key_values``."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache

from kvopt.cache import attention, hooks, persistence
from kvopt.cache.architecture import read_architecture
from kvopt.cache.layer import Layer
from kvopt.cache.pair import Pair
from kvopt.cache.policies import DecodeRule, Full
from kvopt.cache.prediction import budgeted_bytes, chunk_length, layer_budgets
from kvopt.cache.rotary import Rotary, check_rotary
from kvopt.cache.spec import CacheSpec
from kvopt.cache.step import Rows, Step, check_padding, many_tokens, one_token


class Cache(TransformersCache):  # type: ignore[misc]
    """A KV cache that keeps some of the tokens, in fewer bits.

    .. code-block:: python

        cache = kvopt.Cache(model, "h2o_b512+int4")
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

    Attributes:
        holds: the prompt is kept whole for now, because it will be read a second time.
        waiting: the layer whose attention is due.
        pairs: of layers that are merged.

    Raises:
        TypeError: ``model`` is no transformers model.
        ValueError: a bad ``spec`` or ``prefill``, or an architecture that is not served; the message names it.
    """

    def __init__(self, model: PreTrainedModel, spec: str | CacheSpec, prefill: str | int = "full") -> None:
        self.spec = CacheSpec.parse(spec)
        self.chunk = chunk_length(self.spec, prefill)
        self.architecture = arch = read_architecture(model)
        policy = self.spec.policy
        self.spec.codec.check(arch.head_dim, arch.model_type)
        self.rotary: Rotary | None = None
        if policy.sinks and arch.position_table is None:
            self.rotary = check_rotary(arch.base, arch.model_type)
        self.scored = self.spec.scored
        self.rule = policy.decode or DecodeRule(new_score=None if policy.computes else 0.0)
        self.columns = 0
        self.rows = Rows(0, arch.base.device)
        self.step: Step | None = None
        self.waiting: int | None = None
        self.holds = False
        self._prompt = False  # the prompt is being read
        self._budgets: list[list[int]] | None = None  # per layer and row
        super().__init__(layers=[Layer(self, index) for index in range(arch.layers)])
        self.pairs: list[Pair] = []
        if self.spec.merge is not None:
            pairs = self.spec.merge.pairs_of(arch.layers, arch.model_type)
            self.pairs = [Pair(self, self.layers[lower], self.layers[upper]) for lower, upper in pairs]
        if arch.base.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(attention.NAME)
        hooks.attach(arch.base)

    def __repr__(self) -> str:
        return f"kvopt.Cache({str(self.spec)!r}, {self.columns} columns seen)"

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """A second cache for the same model, as the reuse of a common prefix needs it; the model is not copied."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for shared in (self.architecture, self.rotary, self.spec):
            memo[id(shared)] = shared
        for name, value in vars(self).items():
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    # What users read.

    def nbytes(self) -> int:
        """Bytes of all memory this cache holds, bookkeeping included, each storage once."""
        tensors = self.rows.tensors()
        for layer in self.layers:
            tensors += layer.tensors()
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def lengths(self) -> Tensor:
        """Tokens kept, (layers, batch, KV heads) int32; batch is 0 before the first forward."""
        if not self.columns:
            heads = self.architecture.kv_heads
            return torch.zeros((len(self.layers), 0, heads), dtype=torch.int32, device=self.rows.count.device)
        return torch.stack([layer.store.lengths.sum(dim=-1, dtype=torch.int32) for layer in self.layers])

    def positions(self, layer: int) -> Tensor:
        """Logical positions of the kept tokens, (batch, KV heads, slots) int32, increasing, -1 (first) where empty.

        A position counts the row's own tokens, so it is the same for a row alone and in a left-padded batch. ``slots``
        is what the fullest head holds.

        Raises:
            ValueError: no forward has used the cache yet.
        """
        return self._read(layer)[2]

    def keys(self, layer: int) -> Tensor:
        """The kept keys in the order of :meth:`positions`, (batch, KV heads, slots, D), 0 where empty.

        They are in the model's type whatever the codec. Keys with RoPE are those at the original positions, whatever
        positions the attention uses.
        """
        return self._read(layer)[0]

    def values(self, layer: int) -> Tensor:
        """The kept values in the order of :meth:`positions`, (batch, KV heads, slots, D), 0 where empty."""
        return self._read(layer)[1]

    def _read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        if not self.columns:
            raise ValueError("kvopt.Cache: it is empty, no forward has used it yet")
        store = self.layers[layer].store
        keys, values, positions, _ = store.read(int(store.lengths.sum(dim=-1).max()))
        return keys, values, positions

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what is kept, as it is kept, to one safetensors file; :meth:`load` continues from it bit for bit.

        Raises:
            ValueError: no forward has used the cache yet.
            RuntimeError: a forward is under way, or did not reach its end.
        """
        persistence.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> Cache:
        """A cache for ``model`` that goes on where :meth:`save` left off.

        Raises:
            ValueError: the file is damaged, was not written by :meth:`save`, or is of a model of another shape; the
                message says which. Everything in it is checked before it is used.
        """
        return persistence.load(cls, path, model)

    # One forward: the hooks call `begin` and `finish`, the layers read `step`.

    def begin(
        self, batch: int, new: int, mask: Tensor | None, device: torch.device, *, partial: bool
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
            self.step = one_token(self.rows, sinks, table)
            return self.step
        valid = self.valid(batch, new, mask, device)
        first = not self.columns
        if first and not partial:
            self._limit(valid)
        self.step = many_tokens(
            self.rows, valid, sinks, table, first=first, prompt=self._prompt, partial=partial
        )
        return self.step

    def begin_prompt(self, batch: int, new: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """Looks at a prompt that will come in chunks; arguments and errors are those of :meth:`begin`.

        Returns:
            (B, q) bool, which of its columns are tokens.
        """
        self._check(batch)
        valid = self.valid(batch, new, mask, device)
        check_padding(valid)
        if not self.columns:
            self._limit(valid)
        return valid

    def finish(self) -> None:
        """The forward has run through."""
        assert self.step is not None
        self.check_attended()
        self.columns += self.step.new
        self._prompt = self._prompt and self.step.more
        self.step = None

    def settle(self) -> None:
        """Ends the second reading: what is to stay of the prompt is chosen, layer by layer."""
        self.holds = False
        for layer in self.layers:
            layer.settle()

    def check_attended(self) -> None:
        """Raises RuntimeError where a layer got keys, but its attention never came."""
        if self.waiting is not None:
            raise RuntimeError(
                f"kvopt.Cache: layer {self.waiting} of model type {self.architecture.model_type!r} took its keys "
                "elsewhere than to transformers' attention interface"
            )

    def budgets(self, layer: int) -> list[int] | None:
        """Tokens per KV head that each row may keep in ``layer``, mean over heads; None without a limit."""
        return None if self._budgets is None else self._budgets[layer]

    def _limit(self, valid: Tensor) -> None:
        self.rows = Rows(valid.shape[0], valid.device)
        self._prompt = True
        self.holds = self.spec.policy.second_reading
        if self.spec.budget is None:
            return
        lengths = valid.sum(dim=1).tolist()
        arch, spec = self.architecture, self.spec
        budgets = self.spec.budget.per_row(
            lengths, spec.minimum, lambda tokens: budgeted_bytes(arch, spec, tokens, lengths)
        )
        self.rows.limit(budgets)
        self._budgets = layer_budgets(spec, arch.layers, budgets, lengths)

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

    def valid(self, batch: int, new: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """(B, q) bool, which of the new columns are tokens; ValueError for a mask that does not fit."""
        if mask is None:
            return torch.ones((batch, new), dtype=torch.bool, device=device)
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (new, self.columns + new):
            raise ValueError(
                f"kvopt.Cache: attention_mask of shape {tuple(mask.shape)}, expected ({batch}, {self.columns + new})"
            )
        return mask[:, -new:].to(device=device, dtype=torch.bool)

    # What transformers asks of a cache.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes (B, H, q, D) new keys and values of one layer and returns them for the attention to go on."""
        seen: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states)
        return seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding and evicted tokens included: the logical length."""
        return self.columns

    def reset(self) -> None:
        """Forgets everything and frees the memory."""
        self.step = self.waiting = self._budgets = None
        self.columns = 0
        self.holds = self._prompt = False
        self.rows = Rows(0, self.architecture.base.device)
        for part in (*self.layers, *self.pairs):
            part.reset()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps ``indices`` of the batch, in that order."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        rows = rows.to(self.rows.count.device, torch.int64)
        self.rows.select(rows)
        for part in (*self.layers, *self.pairs):
            part.select_rows(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
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
            ValueError: the policy evicts, so what stood there before the tokens may be gone; or some of them are packed
                already, in groups with tokens that stay.
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
        count = (rows.count - remove).clamp(min=0)
        if not all(layer.store.reaches(count) for layer in self.layers):
            raise ValueError(
                f"kvopt.Cache: {str(self.spec)!r} can't take back {remove} tokens, some of them are packed; the newest "
                f"{self.spec.never_packed} never are"
            )
        rows.count = count
        for layer in self.layers:
            layer.store.cut(count)
            layer.room += min(remove, rows.fewest)
        for pair in self.pairs:
            pair.recount()
        rows.fewest, rows.most = max(0, rows.fewest - remove), rows.most - remove
        self.columns -= remove
