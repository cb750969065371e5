# SPDX-License-Identifier: Apache-2.0
"""What kvopt knows of an architecture: where its decoder layers are, and which of a layer's linears share an input.

A family is a table. What no table knows is found by running the model once: the general rule of
:mod:`kvopt.weights.streaming`. Tables add what running can't show: where a factor per channel of a group's input may
be moved into the module before it without changing the function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """The module whose outputs are a group's inputs, channel by channel and for nobody else.

    Dividing its output channels by ``s`` and multiplying the group's columns by ``s`` leaves the function as it is.

    Attributes:
        name: in the decoder layer: a norm or a linear.
        rows: of a linear, which of its output rows: ``config`` to row numbers, in the order of the group's input
            channels. ``None``: all.
        offset: a norm multiplies by ``offset + weight`` (Gemma: 1).
        when: ``config`` to whether the move is legal.
    """

    name: str
    rows: Callable[[Any], Tensor] | None = None
    offset: float = 0.0
    when: Callable[[Any], bool] = lambda config: True


@dataclass(frozen=True)
class Group:
    """Linears of a decoder layer that read the same input, and where that input comes from."""

    linears: tuple[str, ...]
    source: Source | None = None


Groups = tuple[Group, ...]


def find_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder layers: of all module lists of one class, the one whose linears hold most weights.

    Returns:
        The list's name and its modules; ``("", [])`` where there is no such list.
    """
    best, name, layers = 0, "", list[nn.Module]()
    for candidate, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            size = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
            if size > best:
                best, name, layers = size, candidate, list(module)
    return name, layers


def groups_of(model: nn.Module) -> Groups | None:
    """The groups of a decoder layer in the order in which they run, or ``None`` for an architecture without a table."""
    config: Any = getattr(model, "config", None)
    return FAMILIES.get(getattr(config, "model_type", ""))


def _values_by_value(config: Any) -> bool:
    """Every attention head has a value head of its own, so that values and attention outputs have the same channels."""
    heads: int = config.num_attention_heads
    return bool(getattr(config, "num_key_value_heads", None) in (None, heads))


def _last_third(config: Any) -> Tensor:
    """The values' rows of a joined query-key-value linear, one part below the other."""
    width: int = config.hidden_size
    return torch.arange(2 * width, 3 * width)


def _after_queries_and_keys(config: Any) -> Tensor:
    """The same where heads have a size of their own (Phi-3)."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    before = size * (config.num_attention_heads + config.num_key_value_heads)
    return torch.arange(before, before + size * config.num_key_value_heads)


def _last_of_each_head(config: Any) -> Tensor:
    """The same where each head's query, key and value lie together (GPT-NeoX)."""
    heads = config.num_attention_heads
    rows = torch.arange(3 * config.hidden_size)
    return rows.view(heads, 3, -1)[:, 2].reshape(-1)


def _second_half(config: Any) -> Tensor:
    """The up rows of a joined gate-up linear."""
    return torch.arange(config.intermediate_size, 2 * config.intermediate_size)


def _normed_first(config: Any) -> bool:
    """OPT: norms stand before their block; else the residual stream reads them too."""
    return bool(config.do_layer_norm_before)


def _is_relu(config: Any) -> bool:
    """ReLU passes a positive factor through."""
    return bool(config.activation_function == "relu")


def _gated(before_mlp: str = "post_attention_layernorm", offset: float = 0.0) -> Groups:
    """Llama's layer: norm → q, k, v → o; norm → gate, up → down."""
    q, k, v, o = (f"self_attn.{name}_proj" for name in "qkvo")
    gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    return (
        Group((q, k, v), Source("input_layernorm", offset=offset)),
        Group((o,), Source(v, when=_values_by_value)),
        Group((gate, up), Source(before_mlp, offset=offset)),
        Group((down,), Source(up)),
    )


_LLAMA = _gated()
_PHI = (  # attention and MLP read the same norm
    Group(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
        Source("input_layernorm"),
    ),
    Group(("self_attn.dense",), Source("self_attn.v_proj", when=_values_by_value)),
    Group(("mlp.fc2",)),
)
_PHI3 = (
    Group(("self_attn.qkv_proj",), Source("input_layernorm")),
    Group(
        ("self_attn.o_proj",), Source("self_attn.qkv_proj", _after_queries_and_keys, when=_values_by_value)
    ),
    Group(("mlp.gate_up_proj",), Source("post_attention_layernorm")),
    Group(("mlp.down_proj",), Source("mlp.gate_up_proj", _second_half)),
)
_OPT = (
    Group(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        Source("self_attn_layer_norm", when=_normed_first),
    ),
    Group(("self_attn.out_proj",), Source("self_attn.v_proj")),
    Group(("fc1",), Source("final_layer_norm", when=_normed_first)),
    Group(("fc2",), Source("fc1", when=_is_relu)),
)
_GPT2 = (
    Group(("attn.c_attn",), Source("ln_1")),
    Group(("attn.c_proj",), Source("attn.c_attn", _last_third)),
    Group(("mlp.c_fc",), Source("ln_2")),
    Group(("mlp.c_proj",)),
)
_GPT_NEOX = (
    Group(("attention.query_key_value",), Source("input_layernorm")),
    Group(("attention.dense",), Source("attention.query_key_value", _last_of_each_head)),
    Group(("mlp.dense_h_to_4h",), Source("post_attention_layernorm")),
    Group(("mlp.dense_4h_to_h",)),
)

# By `config.model_type`.
FAMILIES: dict[str, Groups] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    "gemma": _gated(offset=1.0),
    **dict.fromkeys(("gemma2", "gemma3_text"), _gated("pre_feedforward_layernorm", offset=1.0)),
    "phi": _PHI,
    "phi3": _PHI3,
    "opt": _OPT,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}


def within(groups: Groups, planned: set[str]) -> Groups | None:
    """The groups with the linears in ``planned`` only; ``None`` where a planned linear is in no group.

    A group that loses a linear loses its source too: the linear that stays as it is reads the same input.
    """
    known = {name for group in groups for name in group.linears}
    if not planned <= known:
        return None
    kept = []
    for group in groups:
        linears = tuple(name for name in group.linears if name in planned)
        if linears:
            kept.append(group if linears == group.linears else Group(linears))
    return tuple(kept)
