# SPDX-License-Identifier: Apache-2.0
"""The attention implementation ``"kvopt"`` of transformers.

Without a kvopt cache it *is* transformers' ``sdpa``, bit for bit. With one, a layer of the cache takes over: its
``update`` hands it over here, just before the model calls its attention with the very keys that ``update`` returned.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

if TYPE_CHECKING:
    from kvopt.cache.layer import Layer

NAME = "kvopt"


class _HandOver(threading.local):
    layer: Layer | None = None
    key: Tensor | None = None


_waiting = _HandOver()


def hand_over(layer: Layer, key: Tensor) -> None:
    """The next attention with ``key`` is that of ``layer``."""
    _waiting.layer, _waiting.key = layer, key


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query`` (B, Hq, q, D) over ``key``, ``value`` (B, H, n, D); returns (B, q, Hq, D) and None."""

    def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )[0]
        return output

    layer = _waiting.layer if _waiting.key is key else None
    _waiting.layer = _waiting.key = None
    if layer is None:
        return sdpa(query, key, value, attention_mask), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, key, value, scale, attention_mask, sdpa), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
