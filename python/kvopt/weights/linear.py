# SPDX-License-Identifier: Apache-2.0
"""The modules that stand where a ``Linear``, a ``Conv1D`` or a tied embedding stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvopt import ops
from kvopt.weights.formats import QuantizedWeight, WeightFormat


class QuantLinear(nn.Module):
    """``y = x @ w^T + bias`` with a packed weight; one fused kernel a call.

    ``packed`` and ``meta`` are integer buffers, so a cast of the model leaves them alone; moving between device types
    repacks. A state dict holds plain tensors that mean the same on every device: ``codes`` (uint8; two 4-bit codes a
    byte, the even column in the low nibble), ``scale`` and ``zero`` (float16), and ``bias``.

    Args:
        weight: the quantised (out_features, in_features) weight.
        bias: (out_features,) or None.
        source: what it replaced, ``"linear"`` or ``"conv1d"`` (GPT-2's, whose weight is stored transposed).
    """

    packed: Tensor
    meta: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, source: str = "linear") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format: WeightFormat = weight.format
        self.source = source
        self.register_buffer("packed", weight.packed, persistent=False)
        self.register_buffer("meta", weight.meta, persistent=False)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self._group = weight.format.group_columns(self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``."""
        f = self.format
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.qlinear(
            x, self.packed, self.meta, bias, self.out_features, f.bits, self._group, f.symmetric
        )

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The packed weight; shares its tensors with the module."""
        return QuantizedWeight(self.packed, self.meta, (self.out_features, self.in_features), self.format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        target = fn(self.packed.new_empty(0)).device
        if target.type != self.packed.device.type and "meta" not in (target.type, self.packed.device.type):
            moved = self.quantized_weight.to(target)
            self.packed, self.meta = moved.packed, moved.meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes, scale, zero = self.quantized_weight.codes()
        destination[prefix + "codes"] = _to_nibbles(codes) if self.format.bits == 4 else codes
        destination[prefix + "scale"] = scale
        if not self.format.symmetric:
            destination[prefix + "zero"] = zero

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = ["codes", "scale"] + ([] if self.format.symmetric else ["zero"])
        plain = {name: state_dict.pop(prefix + name) for name in own if prefix + name in state_dict}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        absent = [prefix + name for name in own if name not in plain]
        if absent:
            missing_keys.extend(absent)
            return
        try:
            self._load_plain({name: tensor.to(self.packed.device) for name, tensor in plain.items()})
        except (RuntimeError, ValueError) as error:
            error_msgs.append(f"{prefix}codes: {error}")

    def _load_plain(self, plain: dict[str, Tensor]) -> None:
        codes = _from_nibbles(plain["codes"], self.in_features) if self.format.bits == 4 else plain["codes"]
        if tuple(codes.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"expected a weight of shape {(self.out_features, self.in_features)}, got {tuple(codes.shape)}"
            )
        zero = plain.get("zero", torch.full_like(plain["scale"], 2.0 ** (self.format.bits - 1)))
        loaded = QuantizedWeight.from_codes(codes, plain["scale"], zero, self.format)
        self.packed.copy_(loaded.packed)
        self.meta.copy_(loaded.meta)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, {self.format}, bias={self.bias is not None}"


class TiedEmbedding(nn.Module):
    """The input embedding of a model whose tied head is quantised: it reads the head's packed rows and owns nothing.

    Args:
        head: the quantised head, (rows, features).
        dtype: of the vectors it gives.
    """

    def __init__(self, head: QuantLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._head = [head]  # in a list, so that it is not registered a second time
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TiedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, indices: Tensor) -> Tensor:
        """Row numbers (...) to vectors (..., features)."""
        head = self._head[0]
        f = head.format
        vectors = ops.wquant_rows(
            *(head.packed, head.meta, indices.flatten(), head.in_features),
            *(f.bits, f.group_columns(head.in_features), f.symmetric, self.dtype),
        )
        return vectors.view(*indices.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._head[0].format}, tied"


def _to_nibbles(codes: Tensor) -> Tensor:
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)


def _from_nibbles(nibbles: Tensor, k: int) -> Tensor:
    return torch.stack([nibbles & 15, nibbles >> 4], dim=2).view(nibbles.shape[0], -1)[:, :k].contiguous()
