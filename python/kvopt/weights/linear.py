# SPDX-License-Identifier: Apache-2.0
"""The modules that stand where a ``Linear``, a ``Conv1D`` or a tied embedding stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvopt import _library, ops
from kvopt.weights.formats import CompactAbsmax, QuantizedWeight, WeightFormat
from kvopt.weights.storage import from_stream, to_stream

_qlinear: Any = torch.ops.kvopt.qlinear.default if _library.compiled else None


class QuantLinear(nn.Module):
    """``y = x @ w^T + bias`` with a packed weight; one fused kernel a call.

    Its buffers are integers (float ones as bit patterns), so a cast of the model leaves them alone; moving between
    device types repacks. A state dict holds plain tensors that mean the same on every device: ``codes`` (uint8, see
    ``storage.py``), ``scale`` and, if asymmetric, ``zero`` (float16); with double-quantised scales ``absmax`` (uint8),
    ``absmax_scale`` and ``absmax_offset`` (float32) in place of ``scale``; ``input_scale`` (float32) where the weight
    has one; and ``bias``.

    Args:
        weight: the quantised (out_features, in_features) weight.
        bias: (out_features,) or None.
        source: what it replaced, ``"linear"`` or ``"conv1d"`` (GPT-2's, whose weight is stored transposed).
    """

    packed: Tensor
    meta: Tensor | None
    absmax_codes: Tensor | None
    absmax_bits: Tensor | None  # offset, then scales: float32 bit patterns
    input_bits: Tensor | None  # the input scale: float32 bit patterns

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, source: str = "linear") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format: WeightFormat = weight.format
        self.source = source
        for name in ("packed", "meta", "absmax_codes", "absmax_bits", "input_bits"):
            self.register_buffer(name, None, persistent=False)
        self._hold(weight)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        f = weight.format
        group = f.group_columns(self.in_features)
        self._fixed = (self.out_features, f.bits, group, int(f.scheme), f.activation_bits)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``x``."""
        buffers = self._buffers  # not by attribute: a small product feels the search for it
        bias: Tensor | None = self._parameters.get("bias")
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        packed, meta, inputs = buffers["packed"], buffers["meta"], buffers["input_bits"]
        if self._is_plain and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            with torch._C._AutoDispatchBelowAutograd():  # ops.qlinear without what is absent here
                plain: Tensor = _qlinear(x, packed, meta, bias, *self._fixed)
                return plain
        if meta is None:
            meta = self.quantized_weight.meta
        if inputs is not None:
            inputs = inputs.view(torch.float32).to(x.dtype)
        if self.format.outlier_threshold is not None:
            threshold = self.format.outlier_threshold
            return ops.qlinear_outliers(x, packed, meta, bias, self.out_features, threshold, inputs)  # type: ignore[arg-type]
        return ops.qlinear(x, packed, meta, bias, *self._fixed, inputs)  # type: ignore[arg-type]

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The packed weight; shares its tensors with the module."""
        scales: Tensor | CompactAbsmax
        if self.meta is not None:
            scales = self.meta
        else:
            assert self.absmax_codes is not None and self.absmax_bits is not None
            values = self.absmax_bits.view(torch.float32)
            scales = CompactAbsmax(self.absmax_codes, values[1:], values[0])
        inputs = None if self.input_bits is None else self.input_bits.view(torch.float32)
        shape = (self.out_features, self.in_features)
        return QuantizedWeight(self.packed, scales, shape, self.format, inputs)

    def _hold(self, weight: QuantizedWeight) -> None:
        self.packed = weight.packed
        inputs = weight.input_scale
        self.input_bits = None if inputs is None else inputs.view(torch.int32)
        if isinstance(weight.scales, CompactAbsmax):
            absmax = weight.scales
            self.absmax_codes = absmax.codes
            self.absmax_bits = torch.cat([absmax.offset.reshape(1), absmax.scale]).view(torch.int32)
        else:
            self.meta = weight.scales
        self._see_if_plain()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        target = fn(self.packed.new_empty(0)).device
        if target.type != self.packed.device.type and "meta" not in (target.type, self.packed.device.type):
            self._hold(self.quantized_weight.to(target))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._see_if_plain()
        return self

    def _see_if_plain(self) -> None:
        """Whether a product is one call of the compiled operator, with nothing to prepare."""
        compiled = self.packed.device.type in _library.compiled
        absent = self.meta is not None and self.input_bits is None and self.format.outlier_threshold is None
        self._is_plain = compiled and absent

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.quantized_weight
        codes, scale, zero = weight.codes()
        destination[prefix + "codes"] = to_stream(codes, self.format.bits)
        if weight.input_scale is not None:
            destination[prefix + "input_scale"] = weight.input_scale.clone()
        if isinstance(weight.scales, CompactAbsmax):
            destination[prefix + "absmax"] = weight.scales.codes
            destination[prefix + "absmax_scale"] = weight.scales.scale.clone()
            destination[prefix + "absmax_offset"] = weight.scales.offset.clone()
            return
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
        if self.format.double_quantized:
            own = ["codes", "absmax", "absmax_scale", "absmax_offset"]
        else:
            own = ["codes", "scale"] + ([] if self.format.symmetric else ["zero"])
        if self.input_bits is not None:
            own.append("input_scale")
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
        n, k = self.out_features, self.in_features
        codes = from_stream(plain["codes"], k, self.format.bits)
        if tuple(codes.shape) != (n, k):
            raise ValueError(f"expected a weight of shape {(n, k)}, got {tuple(codes.shape)}")
        absmax = None
        if self.format.double_quantized:
            absmax = CompactAbsmax(plain["absmax"], plain["absmax_scale"], plain["absmax_offset"])
            expanded = QuantizedWeight(self.packed, absmax, (n, k), self.format)
            scale = expanded.codes()[1]
        else:
            scale = plain["scale"]
        zero = plain.get("zero", torch.zeros_like(scale))
        inputs = plain.get("input_scale")
        loaded = QuantLinear(QuantizedWeight.from_codes(codes, scale, zero, self.format, absmax, inputs))
        for name, buffer in self.named_buffers(recurse=False):
            buffer.copy_(loaded.get_buffer(name))

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
        weight = self._head[0].quantized_weight
        f = weight.format
        vectors = ops.wquant_rows(
            *(weight.packed, weight.meta, indices.flatten(), self.embedding_dim),
            *(f.bits, f.group_columns(self.embedding_dim), f.scheme, self.dtype),
        )
        if weight.input_scale is not None:
            vectors = (vectors * weight.input_scale).to(self.dtype)
        return vectors.view(*indices.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._head[0].format}, tied"
