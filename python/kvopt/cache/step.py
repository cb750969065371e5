# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping of one forward, done once for all layers before the first of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Rows:
    """What is known of each row, the same for all layers. Tensors live on the device, plain numbers are bounds.

    Attributes:
        count: (B,) int32, tokens seen by each row, padding excluded.
        budget: (B,) int32, tokens it may keep per KV head, mean over layers and heads; None without a limit.
        fewest, most: bounds of ``count``.
        least, largest: bounds of ``budget``.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.count = torch.zeros(batch, dtype=torch.int32, device=device)
        self.budget: Tensor | None = None
        self.fewest = self.most = self.least = self.largest = 0

    def limit(self, budgets: Sequence[int]) -> None:
        """Sets each row's own budget."""
        self.budget = torch.tensor(budgets, dtype=torch.int32, device=self.count.device)
        self.least, self.largest = min(budgets), max(budgets)

    def gap(self, seen: Tensor, most: int) -> Tensor | None:
        """How many of ``seen`` (B,) tokens are not kept, (B,) int32; None if surely none, at most ``most`` in a row."""
        if self.budget is None or most <= self.least:
            return None
        return (seen - self.budget).clamp(min=0)

    def select(self, rows: Tensor) -> None:
        """Keeps ``rows`` (int64) of the batch, in that order."""
        self.count = self.count.index_select(0, rows)
        if self.budget is not None:
            self.budget = self.budget.index_select(0, rows)

    def tensors(self) -> list[Tensor]:
        """Every tensor held, for counting bytes."""
        return [self.count] if self.budget is None else [self.count, self.budget]


@dataclass
class Step:
    """What one forward does to every layer.

    Attributes:
        new: tokens per row, padding included.
        positions: (B, q) int32 logical positions of the new tokens, -1 for padding.
        newest: (B,) int32, position of the newest token of each row.
        seen: (B,) int32, tokens each row has seen: with this one if it is one, before these if they are several.
        first: the cache was empty: the new tokens see each other only, through transformers' own mask.
        one: a decoded token, for which room is made first; otherwise the new tokens see all that is kept.
        prompt: the new tokens belong to the prompt, as its whole or a part.
        gap: (B,) int32, how far kept sinks are from their original positions; None for not at all.
        most: tokens seen by any row, the new ones included, at most.
        kept: tokens that were seen before by any row, at most.
        mask: what the attention of several tokens on a filled cache may see among the new ones, (B, 1, q, q) bool.
        reading: the tokens are read a second time to score those that are kept, and not stored.
        chosen: what the first layer chose for all, where a policy looks at positions only.
        hidden: the decoder's output for the chunks of a prompt that came before this one.
        again: the whole prompt that is to be read a second time: tokens or embeddings, and (B, T) bool, which columns
            are tokens.
        more: further chunks of the same prompt follow.
        totals: tokens that each row has seen, these included, where several came.
        added: how many of them these are.
    """

    new: int
    positions: Tensor
    newest: Tensor
    seen: Tensor
    first: bool = False
    one: bool = False
    prompt: bool = False
    gap: Tensor | None = None
    most: int = 0
    kept: int = 0
    mask: Tensor | None = None
    reading: bool = False
    chosen: tuple[Tensor, Tensor] | None = None
    hidden: list[Tensor] = field(default_factory=list)
    again: tuple[Tensor, Tensor] | None = None
    more: bool = False
    totals: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)

    def position_ids(self, inside: bool) -> Tensor:
        """(B, q) int64: the tokens' logical positions, or, ``inside``, their places in the cache; 0 for padding."""
        positions = self.positions
        if inside and self.gap is not None:
            positions = positions - self.gap[:, None]
        return positions.clamp(min=0).long()


def one_token(rows: Rows, sinks: int, table: int | None) -> Step:
    """A decoded token. Does not wait for the device.

    Args:
        rows: brought to the state after this token.
        sinks: how many first tokens appear at positions inside the cache.
        table: positions in the model's learned table.

    Raises:
        ValueError: the token's position is beyond the table.
    """
    position, most = rows.count, rows.most + 1
    _check_table(table, min(most, rows.largest) if sinks else most)
    rows.count = position + 1
    step = Step(1, position[:, None], position, rows.count, one=True, most=most, kept=rows.most)
    if sinks:
        step.gap = rows.gap(rows.count, most)
    rows.fewest += 1
    rows.most = most
    return step


def many_tokens(
    rows: Rows, valid: Tensor, sinks: int, table: int | None, *, first: bool, prompt: bool, partial: bool
) -> Step:
    """A prompt, a chunk of it, or the next turn of a conversation. Reads the rows' lengths from the device once.

    Args:
        rows: brought to the state after these tokens.
        valid: (B, q) bool, False for padding.
        sinks: as for :func:`one_token`.
        table: likewise.
        first: the cache is empty.
        prompt: the tokens belong to the prompt.
        partial: a chunk that we cut off; the whole was checked.

    Raises:
        ValueError: padding that is not on the left, or a position beyond the table.
    """
    new = valid.shape[1]
    column = torch.arange(new, dtype=torch.int32, device=valid.device)
    lengths = valid.sum(dim=1, dtype=torch.int32)
    padding = new - lengths
    on_left = (valid == (column >= padding[:, None])).all(dim=1).int()
    counts, added, left = torch.stack([rows.count, lengths, on_left]).tolist()
    # A chunk may be padding throughout in a row that has not begun, and in any row where we cut the turn ourselves.
    if not all(left) or not (
        partial or all(more or not count for more, count in zip(added, counts, strict=True))
    ):
        raise _padding_error()
    totals = [count + more for count, more in zip(counts, added, strict=True)]
    most = max(totals)
    inside = max(min(count, rows.largest) + more for count, more in zip(counts, added, strict=True))
    _check_table(table, inside if sinks else most)

    positions = (rows.count[:, None] + column - padding[:, None]).masked_fill(~valid, -1)
    newest = rows.count + lengths - 1
    step = Step(new, positions, newest, rows.count, first=first, prompt=prompt, most=most, kept=max(counts))
    step.totals, step.added = totals, added
    if not first:
        step.mask = causal_mask(valid)
        if sinks:
            step.gap = rows.gap(rows.count, max(counts))
    rows.count = rows.count + lengths
    rows.fewest, rows.most = min(totals), most
    return step


def causal_mask(valid: Tensor) -> Tensor:
    """(B, 1, q, q) bool: each of the tokens (``valid``, (B, q) bool) sees those up to itself, padding only itself."""
    new = valid.shape[1]
    causal = torch.ones((new, new), dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(new, dtype=torch.bool, device=valid.device)
    return ((causal & valid[:, None, :]) | itself)[:, None]


def check_padding(valid: Tensor) -> None:
    """Raises ValueError unless each row of ``valid`` (B, q) bool is padding, then tokens. Waits for the device."""
    if not bool((valid[:, -1].all() & (valid[:, 1:] >= valid[:, :-1]).all()).item()):
        raise _padding_error()


def _padding_error() -> ValueError:
    return ValueError("kvopt.Cache: the attention mask has padding that is not on the left of a row's tokens")


def _check_table(table: int | None, positions: int) -> None:
    if table is not None and positions > table:
        raise ValueError(
            f"kvopt.Cache: {positions} positions are more than the model's table of {table}; 'sink' without 'orig' and "
            "with a budget below that uses positions inside the cache and can go on"
        )
