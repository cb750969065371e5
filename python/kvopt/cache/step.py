# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping of one forward, done once for all layers before the first of them runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvopt.cache.sinks import Sinks
from kvopt.cache.slots import Rows, Slots


@dataclass
class Step:
    """What one forward does to every layer.

    Attributes:
        new: tokens per row, padding included.
        before, keep: columns in use before and after.
        positions: (B, q) int32 logical positions of the new tokens, -1 for padding.
        append: the new tokens go behind the others, nothing is dropped.
        one: a decoded token, for which room is made first; otherwise the new tokens see all that is kept.
        full: no slot is empty among the tokens a policy is asked about.
        gap: (B,) int32, how far kept sinks are from their original positions; None for not at all.
        hole: what :meth:`Rows.fill` returned.
        mask: (B, 1, q, n) bool over the tokens this step sees; None where the attention needs none, or where the
            cache was empty and transformers' own mask is right.
        moved, sink_slots: the sinks of each layer where they belong in this step, and their slots.
        arrivals: which new tokens are sinks, as :meth:`Sinks.keep` takes it.
        choice: what the first layer chose, for a policy that looks at positions only: the slots to write,
            (B, 1, 1 + sinks, 1), or the columns to keep, (B, 1, keep).
        hidden: the decoder's output for the chunks of a prompt that came before this one.
    """

    new: int
    before: int
    keep: int
    positions: torch.Tensor
    append: bool
    one: bool
    full: bool = False
    gap: torch.Tensor | None = None
    hole: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    moved: tuple[torch.Tensor, ...] | None = None
    sink_slots: torch.Tensor | None = None
    arrivals: tuple[torch.Tensor, torch.Tensor] | None = None
    choice: torch.Tensor | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)

    def position_ids(self, inside: bool) -> torch.Tensor:
        """(B, q) int64: the tokens' logical positions, or, ``inside``, their places in the cache; 0 for padding."""
        positions = self.positions
        if inside and self.gap is not None:
            positions = positions - self.gap[:, None]
        return positions.clamp(min=0).long()


def one_token(rows: Rows, slots: Slots, sinks: int, moving: Sinks | None, table: int | None) -> Step:
    """A decoded token. Does not wait for the device.

    Args:
        rows: brought to the state after this token.
        slots: of layer 0.
        sinks: how many first tokens appear at positions inside the cache.
        moving: their keys, for a model with RoPE.
        table: positions in the model's learned table.

    Raises:
        ValueError: the token's position is beyond the table.
    """
    position = rows.count
    append = rows.capacity is None or rows.used < rows.capacity
    _check_table(table, rows.used + append if sinks else rows.most + 1)
    step = Step(1, rows.used, rows.used + int(append), position[:, None], append, one=True)
    if not append:
        step.hole = rows.fill()
        step.full = step.hole is None and rows.most_holes == 0
        if sinks:
            step.gap = position - (rows.used - 1) + rows.holes
            if moving is not None:
                step.moved, step.sink_slots = moving.move(step.gap), moving.locate(slots, rows)
    if moving is not None and rows.fewest < sinks:
        arrived = position[:, None] == torch.arange(sinks, dtype=torch.int32, device=position.device)
        step.arrivals = (torch.zeros_like(arrived, dtype=torch.int64), arrived)
    rows.used = step.keep
    rows.count = position + 1
    rows.fewest += 1
    rows.most += 1
    step.mask = rows.mask()
    return step


def many_tokens(
    rows: Rows,
    slots: Slots | None,
    valid: torch.Tensor,
    sinks: int,
    moving: Sinks | None,
    table: int | None,
    *,
    partial: bool,
) -> Step:
    """A prompt, a chunk of it, or the next turn of a conversation. Reads the rows' lengths from the device once.

    Args:
        rows: brought to the state after these tokens.
        slots: of layer 0; None where the cache is empty.
        valid: (B, q) bool, False for padding.
        sinks: as for :func:`one_token`.
        moving: likewise.
        table: likewise.
        partial: a chunk that we cut off; the whole was checked.

    Raises:
        ValueError: padding that is not on the left, or a position beyond the table.
    """
    new = valid.shape[1]
    column = torch.arange(new, dtype=torch.int32, device=valid.device)
    lengths = valid.sum(dim=1, dtype=torch.int32)
    padding = new - lengths
    on_left = (valid == (column >= padding[:, None])).all(dim=1).int()
    counts, holes, added, left = rows.read(lengths, on_left)
    # A chunk may be padding throughout in a row that has not begun, and in any row where we cut the turn ourselves.
    if not all(left) or not (
        partial or all(more or not count for more, count in zip(added, counts, strict=True))
    ):
        raise _padding_error()
    had = [rows.used - hole for hole in holes]
    kept = [have + more for have, more in zip(had, added, strict=True)]
    totals = [count + more for count, more in zip(counts, added, strict=True)]
    _check_table(table, max(kept if sinks else totals))

    positions = (rows.count[:, None] + column - padding[:, None]).masked_fill(~valid, -1)
    step = Step(new, rows.used, rows.used + new, positions, append=True, one=False)
    step.full = rows.most_holes == 0 and min(added) == new
    too_many = rows.capacity is not None and step.keep > rows.capacity
    if too_many or (
        rows.used > 0 and min(added) < new
    ):  # padding between tokens would be a hole in the middle
        step.append = False
        step.keep = max(1, max(kept) if rows.capacity is None else min(rows.capacity, max(kept)))
    if rows.used:
        step.mask = _mask(rows, valid)
        if sinks and any(count > have for count, have in zip(counts, had, strict=True)):
            step.gap = rows.count - (rows.used - rows.holes)
            if moving is not None:
                assert slots is not None
                moving.stale = True
                step.moved, step.sink_slots = moving.move(step.gap), moving.locate(slots, rows)
    if moving is not None:
        moving.stale = True
        if min(counts) < sinks:
            place = torch.arange(sinks, dtype=torch.int32, device=valid.device) - rows.count[:, None]
            arrived = (place >= 0) & (place < lengths[:, None])
            step.arrivals = ((place + padding[:, None]).clamp(0, new - 1).long(), arrived)

    stay = rows.used - rows.holes + lengths
    fewest_stay = min(kept)
    if not step.append and rows.capacity is not None:
        stay = torch.minimum(stay, rows.capacity - rows.reserve)
        fewest_stay = min(fewest_stay, rows.capacity - rows.most_reserve)
    rows.holes = step.keep - stay
    rows.most_holes = step.keep - fewest_stay
    rows.used = step.keep
    rows.count = rows.count + lengths
    rows.fewest, rows.most = min(totals), max(totals)
    return step


def _mask(rows: Rows, valid: torch.Tensor) -> torch.Tensor:
    """(B, 1, q, used + q): everything kept, and the new tokens causally."""
    batch, new = valid.shape
    causal = torch.ones((new, new), dtype=torch.bool, device=valid.device).tril()
    kept = rows.mask()
    if kept is None:
        kept = causal.new_ones((batch, 1, 1, rows.used))
    return torch.cat([kept.expand(-1, 1, new, -1), (causal & valid[:, None, :])[:, None]], dim=-1)


def check_padding(valid: torch.Tensor) -> None:
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
