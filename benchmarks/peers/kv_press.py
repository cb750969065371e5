# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's kvpress: a press compresses the prompt, afterwards transformers' DynamicCache grows with every token.

It needs transformers below 5.3, so it runs where that is installed and is left out elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from peers.base import Unavailable
from peers.kv_readers import KvPeer, Reader


class PressReader(Reader):
    """Reads the prompt inside the press, as kvpress' own pipeline does."""

    press: Any = None

    def prompt(self, ids: Tensor) -> Tensor:
        """See :class:`Reader`."""
        with self.press(self.model):
            return super().prompt(ids)


def press(name: str, *, eager: bool = False, **settings: Any) -> Callable[[Any, int, int], Reader]:
    """The press ``name`` of kvpress."""

    def open_it(model: Any, stay: int, prompt: int) -> Reader:
        try:
            import kvpress
        except ImportError as error:
            raise Unavailable(f"kvpress is not installed ({error})") from error
        from transformers import DynamicCache

        logging.getLogger("kvpress").setLevel(logging.ERROR)
        if eager:
            model.set_attn_implementation("eager")
        reader = PressReader(model, DynamicCache(config=model.config))
        own = getattr(kvpress, name)(**settings)
        # It keeps int(T * (1 - ratio)); half a token more, so that this is what was asked for.
        own.compression_ratio = 1.0 - (stay + 0.5) / prompt
        reader.press = own
        return reader

    return open_it


def _version() -> str:
    return f"kvpress {importlib.metadata.version('kvpress')}"


_GROWS = "compresses the prompt only"
PEERS = (
    KvPeer("kvpress StreamingLLM", press("StreamingLLMPress"), _version, _GROWS, keeps=True),
    KvPeer("kvpress SnapKV", press("SnapKVPress"), _version, f"{_GROWS}; window 64, kernel 5", keeps=True),
    KvPeer("kvpress PyramidKV", press("PyramidKVPress"), _version, f"{_GROWS}; window 64", keeps=True),
    KvPeer("kvpress TOVA", press("TOVAPress"), _version, _GROWS, keeps=True),
    KvPeer("kvpress KeyDiff", press("KeyDiffPress"), _version, _GROWS, keeps=True),
    KvPeer("kvpress Knorm", press("KnormPress"), _version, _GROWS, keeps=True),
    KvPeer("kvpress ExpectedAttention", press("ExpectedAttentionPress"), _version, _GROWS, keeps=True),
    KvPeer(
        "kvpress ObservedAttention",
        press("ObservedAttentionPress", eager=True),
        _version,
        f"{_GROWS}, by H2O's column sums; eager attention only",
        keeps=True,
    ),
)
