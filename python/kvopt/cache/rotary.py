# SPDX-License-Identifier: Apache-2.0
"""Turning keys that already carry RoPE to other positions.

RoPE multiplies pair i of a key at position p by the rotation of angle p·f_i (Su et al. 2021, arXiv:2104.09864).
Rotations add up: a key stored at position p becomes the key at p + g by one more rotation of g·f_i. Only the
model's own inverse frequencies are needed; a constant factor on cos and sin (YaRN) is already in the stored key.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

_STATIC_TYPES = ("default", "linear", "llama3", "yarn")


class Rotary:
    """The rotation of one model: the first R numbers of a head are rotated, number i with number i + R/2.

    Args:
        module: the model's own; its buffer ``inv_freq`` (R/2,) is read each time, so that it may move or change type.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def inv_freq(self) -> torch.Tensor:
        """(R/2,) inverse frequencies."""
        return self._module.inv_freq  # type: ignore[return-value]

    def move(self, keys: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """Moves keys by ``gap`` positions.

        Args:
            keys: (..., B, H, n, D) post-RoPE keys.
            gap: (B,) integers, one per row.

        Returns:
            A new tensor like ``keys``; angles and products are in fp32, fp64 for fp64 keys. A gap of 0 is exact.
        """
        dtype = torch.promote_types(keys.dtype, torch.float32)
        half = self.inv_freq.shape[0]
        angle = gap.to(dtype)[:, None, None, None] * self.inv_freq.to(keys.device, dtype)
        cos, sin = angle.cos(), angle.sin()
        wide = keys.to(dtype)
        first, second = wide[..., :half], wide[..., half : 2 * half]
        moved = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
        if 2 * half < keys.shape[-1]:
            moved.append(wide[..., 2 * half :])
        return torch.cat(moved, dim=-1).to(keys.dtype)


def find_rotary_module(base: nn.Module) -> nn.Module | None:
    """The one module of ``base`` that makes cos and sin, or None."""
    found = [
        module for module in base.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
    ]
    return found[0] if len(found) == 1 else None


def check_rotary(base: nn.Module, model_type: str) -> Rotary:
    """The model's rotation, after trying it on the model's own code.

    Raises:
        ValueError: frequencies that change with the length (dynamic, longrope), several sections (mrope), or a
            convention other than pairing i with i + R/2 (the interleaved one of GPT-J and Cohere).
    """
    advice = "use the original positions: sink_b…_orig"
    module: Any = find_rotary_module(base)
    if module is None:
        raise ValueError(
            f"sink: model type {model_type!r} has no single rotary embedding to follow; {advice}"
        )
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    kind = getattr(module, "rope_type", parameters.get("rope_type", "default"))
    if kind not in _STATIC_TYPES or "mrope_section" in parameters:
        name = "mrope" if "mrope_section" in parameters else kind
        raise ValueError(f"sink: RoPE type {name!r} of model type {model_type!r} is not supported; {advice}")
    rotary = Rotary(module)
    if not _agrees_with_model(rotary, module, base):
        raise ValueError(
            f"sink: model type {model_type!r} does not rotate number i of a head with number i + R/2 (an interleaved "
            f"rotary convention, or one unknown to us); {advice}"
        )
    return rotary


def _agrees_with_model(rotary: Rotary, module: Any, base: nn.Module) -> bool:
    """Whether a key rotated by the model to 3 and moved by 39 equals the key rotated by the model to 42."""
    apply = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    size = 2 * rotary.inv_freq.shape[0]
    device = rotary.inv_freq.device
    key = torch.linspace(-1.0, 1.0, size, device=device).mul(5.0).sin().reshape(1, 1, 1, size)

    def at(position: int) -> torch.Tensor:
        cos, sin = module(key, torch.tensor([[position]], device=device))
        return torch.as_tensor(apply(key, key, cos, sin)[1])

    try:
        moved = rotary.move(at(3), torch.tensor([39], device=device))
        return bool(torch.allclose(moved, at(42), atol=1e-4))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
