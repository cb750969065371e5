# SPDX-License-Identifier: Apache-2.0
"""Reading the prompt a second time, against all of its own keys, to see which of them that needs.

KVzip (Kim et al. 2025, arXiv:2505.23416, section 3). The prompt is held whole until then. It is read in chunks that see
the held tokens and themselves, not the chunks before; their positions go on behind the prompt. Nothing of them is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvopt.cache.step import Step, causal_mask

if TYPE_CHECKING:
    from kvopt.cache.cache import Cache

CHUNK = 1024  # tokens read at once, counted from the end of the prompt
AGAIN = "kvopt_again"  # among the arguments of a forward: it is a part of a second reading


@torch.no_grad()
def read_again(cache: Cache, module: nn.Module, tokens: Tensor, valid: Tensor) -> None:
    """Scores the prompt's tokens by a second reading, then compresses them.

    Args:
        cache: holds the prompt.
        module: the decoder.
        tokens: (B, T) ids, or (B, T, width) embeddings.
        valid: (B, T) bool, False for padding.
    """
    name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
    counts, table = cache.rows.count, cache.architecture.position_table
    total = valid.shape[1]
    start, end = 0, total % CHUNK or CHUNK
    while start < total:
        part = valid[:, start:end]
        new = part.shape[1]
        padding = new - part.sum(dim=1, dtype=torch.int32)
        column = torch.arange(new, dtype=torch.int32, device=valid.device)
        places = (counts - padding)[:, None] + column
        step = _step(cache, new, places.masked_fill(~part, -1))
        step.reading, step.mask = True, causal_mask(part)
        if table is not None:  # a learned table may end before that; then its last entries serve
            places = places - (counts + new - table).clamp(min=0)[:, None]
        arguments: dict[str, Any] = {name: tokens[:, start:end], AGAIN: True}
        cache.step = step
        module(
            **arguments,
            position_ids=places.clamp(min=0).long(),
            past_key_values=cache,
            use_cache=True,
        )
        cache.check_attended()
        start, end = end, end + CHUNK
    cache.step = _step(cache, 0, valid.new_zeros((valid.shape[0], 0), dtype=torch.int32))
    cache.settle()
    cache.step = None


def _step(cache: Cache, new: int, positions: Tensor) -> Step:
    rows = cache.rows
    return Step(new, positions, rows.count - 1, rows.count, prompt=True, most=rows.most, kept=rows.most)
