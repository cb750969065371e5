# SPDX-License-Identifier: Apache-2.0
"""A model with outlier channels that computes what the model without them computes."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def add_outliers(model: Any, factor: float, count: int) -> Any:
    """Makes ``count`` channels of the inputs of q, k, v, gate, up and down ``factor`` times as large, in place.

    What makes the inputs (a norm's weight, up's rows) is multiplied and the columns that meet them are divided: with a
    power of two every product stays the same bit for bit. The channels of the norms are the same in every layer, as
    in the models of LLM.int8(), section 4.

    Args:
        model: of Llama's kind, float32.
        factor: a power of two.
        count: channels of each input.
    """
    config = model.config
    hidden = torch.randperm(config.hidden_size)[:count]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[hidden] *= factor
            for reader in readers:
                reader.weight[:, hidden] /= factor
        inner = torch.randperm(config.intermediate_size)[:count]
        mlp.up_proj.weight[inner] *= factor
        if mlp.up_proj.bias is not None:
            mlp.up_proj.bias[inner] *= factor
        mlp.down_proj.weight[:, inner] /= factor
    return model
