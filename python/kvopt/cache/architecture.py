# SPDX-License-Identifier: Apache-2.0
"""What the cache must know of a model, and the models it does not serve, each refused by name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvopt.cache.rotary import find_rotary_module


@dataclass(frozen=True)
class Architecture:
    """A decoder as the cache sees it.

    Attributes:
        base: the module whose forward takes ``past_key_values`` and runs the layers.
        model_type: as in its configuration.
        layers, kv_heads, head_dim: sizes of the cache.
        dtype: of keys and values.
        position_table: entries of a learned position table (GPT-2); None for RoPE.
        arguments: names of the parameters of ``base.forward``, in order.
    """

    base: PreTrainedModel
    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    position_table: int | None
    arguments: tuple[str, ...]


def read_architecture(model: PreTrainedModel) -> Architecture:
    """Reads ``model``.

    Raises:
        TypeError: not a transformers model.
        ValueError: an architecture that the cache does not serve; the message names it.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"kvopt.Cache: expected a transformers PreTrainedModel, got {type(model).__name__}")
    config: Any = model.config
    name = config.model_type
    base: PreTrainedModel = model.base_model
    reason = _refusal(model, base, config)
    if reason:
        raise ValueError(f"kvopt.Cache: model type {name!r} is not supported: {reason}")
    parameters = inspect.signature(base.forward).parameters
    return Architecture(
        base=base,
        model_type=name,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=base.dtype,
        position_table=None if find_rotary_module(base) is not None else config.max_position_embeddings,
        arguments=tuple(parameters),
    )


def _refusal(model: PreTrainedModel, base: PreTrainedModel, config: Any) -> str | None:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it has cross-attention (encoder-decoder)"
    if getattr(model, "_is_stateful", False):
        return "it is recurrent, its state is no KV cache"
    if config.get_text_config() is not config:
        return "it is multimodal; pass its language model"
    kinds = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"})
    if kinds:
        return f"it has layers of type {', '.join(kinds)} (sliding-window or hybrid)"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return f"it was trained with a sliding window ({window} tokens)"
    if "local" in (getattr(config, "attention_layers", None) or []):
        return "it has local attention layers"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share one KV cache"
    of_keys, of_values = getattr(config, "qk_head_dim", None), getattr(config, "v_head_dim", None)
    if of_keys is not None and of_values is not None and of_keys != of_values:
        return f"its keys have {of_keys} numbers a head, its values {of_values}"
    if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
        return "its layers are spread over several devices"
    if find_rotary_module(base) is None and not hasattr(base, "wpe"):
        return "its positions are neither RoPE nor a learned table as in GPT-2"
    names = inspect.signature(base.forward).parameters
    missing = [n for n in ("past_key_values", "attention_mask", "position_ids") if n not in names]
    if missing:
        return f"{type(base).__name__}.forward takes no {', '.join(missing)}"
    return None
