# SPDX-License-Identifier: Apache-2.0
"""The attention implementation ``"kvopt"`` of transformers.

Without a kvopt cache it *is* transformers' ``sdpa``, bit for bit. With one, a decoded token reads each key and value
once per KV head: the queries of a group become rows of one product, instead of repeating keys and values per query
head. The mask comes from the cache, which knows which of its slots are filled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

if TYPE_CHECKING:
    from kvopt.cache.cache import Cache

NAME = "kvopt"


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    kvopt_cache: Cache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query`` (B, Hq, q, D) over ``key``, ``value`` (B, H, n, D); returns (B, q, Hq, D) and None.

    ``kvopt_cache`` is what the cache's forward hook adds to the model's arguments.
    """
    step = None if kvopt_cache is None else kvopt_cache.step
    if step is None or query.shape[2] != 1:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    batch, heads, _, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], dim)
    output = scaled_dot_product_attention(
        grouped, key, value, attn_mask=step.mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
