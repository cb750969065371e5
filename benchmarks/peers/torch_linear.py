# SPDX-License-Identifier: Apache-2.0
"""Torch's own products: dense, 4-bit and 8-bit weight-only, dynamic int8."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from peers.base import Copies, Peer, Product, Unavailable


def dense(dtype: torch.dtype | None, library: str | None = None) -> Callable[[Tensor], Copies]:
    """``F.linear`` in ``dtype`` (None: the weight's); ``library`` is the one that CUDA asks first."""

    def prepare(weight: Tensor) -> Copies:
        def copy() -> Product:
            w = weight.to(dtype or weight.dtype, copy=True)
            if library is None:
                return Product(lambda x: linear(x, w), w.nbytes)

            def run(x: Tensor) -> Tensor:
                torch.backends.cuda.preferred_blas_library(library)
                return linear(x, w)

            return Product(run, w.nbytes)

        return copy

    return prepare


def int4(weight: Tensor, group: int = 128) -> Copies:
    """4 bits in asymmetric groups: tinygemm on CUDA, a kernel of its own on the CPU."""
    n, k = weight.shape
    if k % group or n % 32:
        raise Unavailable(f"takes N in multiples of 32 and K of {group}")
    if weight.is_cuda and torch.cuda.get_device_capability()[0] < 8:
        raise Unavailable("tinygemm needs sm_80")
    w = weight.float().view(n, k // group, group)
    low, high = w.amin(2), w.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-6)
    codes = ((w - low[..., None]) / scale[..., None]).round().clamp(0, 15).view(n, k).int()
    meta = torch.stack([scale, low + scale * 8], dim=2).transpose(0, 1).contiguous().bfloat16()
    if weight.is_cuda:
        packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        multiply = torch._weight_int4pack_mm
    else:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        multiply = torch._weight_int4pack_mm_for_cpu

    def copy() -> Product:
        p, m = packed.clone(), meta.clone()
        return Product(lambda x: multiply(x, p, group, m), p.nbytes + m.nbytes)

    return copy


def int8(weight: Tensor) -> Copies:
    """8 bits a row, weight-only (CPU)."""
    codes, scale = _rows_to_int8(weight)
    scale = scale.bfloat16()

    def copy() -> Product:
        c, s = codes.clone(), scale.clone()
        return Product(lambda x: torch._weight_int8pack_mm(x, c, s), c.nbytes + s.nbytes)

    return copy


def dynamic_int8(engine: str) -> Callable[[Tensor], Copies]:
    """``torch.ao.nn.quantized.dynamic.Linear``: int8 a row of the weight, activations int8 per tensor at run time."""

    def prepare(weight: Tensor) -> Copies:
        if engine not in torch.backends.quantized.supported_engines:
            raise Unavailable(f"this torch has no quantised engine {engine}")
        codes = rows_to_qint8(weight)

        def copy() -> Product:
            layer = dynamic_linear(codes, None, engine)

            def run(x: Tensor) -> Tensor:
                torch.backends.quantized.engine = engine
                return layer(x)

            return Product(run, codes.numel() + 4 * codes.shape[0])

        return copy

    return prepare


def rows_to_qint8(weight: Tensor) -> Tensor:
    """Torch's quantised tensor: int8, one scale a row."""
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-8).double()
    zero = torch.zeros(weight.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces their end
        return torch.quantize_per_channel(weight.float(), scale, zero, 0, torch.qint8)


def dynamic_linear(codes: Tensor, bias: Tensor | None, engine: str) -> torch.nn.Module:
    """A dynamically quantised linear, its weight packed for ``engine``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successor
        from torch.ao.nn.quantized.dynamic import Linear

        torch.backends.quantized.engine = engine
        n, k = codes.shape
        layer = Linear(k, n, bias_=bias is not None)
        layer.set_weight_bias(codes, None if bias is None else bias.float())
    return layer.eval()


def int8_matmul(weight: Tensor) -> Copies:
    """``torch._int_mm``'s product alone (CUDA): int8 x int8 to int32, activations quantised beforehand, no scales."""
    codes, scale = _rows_to_int8(weight)
    _refuse_int_mm(weight)
    of_tokens: dict[str, Any] = {}

    def enter(x: Tensor) -> Tensor:
        q, of_tokens["scale"] = _tokens_to_int8(x)
        of_tokens["rows"] = x.shape[0]
        return q

    def copy() -> Product:
        c = codes.clone()
        return Product(
            lambda q: torch._int_mm(q, c.T),
            c.nbytes,
            enter,
            lambda y: (y * (of_tokens["scale"] * scale))[: of_tokens["rows"]],
        )

    return copy


def int8_tokens(weight: Tensor) -> Copies:
    """W8A8 out of torch's parts (CUDA): per-token quantisation, ``_int_mm``, both scales; eager, nothing fused."""
    codes, scale = _rows_to_int8(weight)
    _refuse_int_mm(weight)

    def copy() -> Product:
        c, s = codes.clone(), scale.clone()

        def run(x: Tensor) -> Tensor:
            q, each = _tokens_to_int8(x)
            return (torch._int_mm(q, c.T) * (each * s)).to(x.dtype)[: x.shape[0]]

        return Product(run, c.nbytes + s.nbytes)

    return copy


def _rows_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-8)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def _tokens_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    padded = pad(x, (0, 0, 0, max(0, 17 - x.shape[0])))  # _int_mm wants more than 16 rows
    scale = (padded.abs().amax(1, keepdim=True).float() / 127).clamp(min=1e-8)
    return (padded / scale).round().to(torch.int8), scale


def _refuse_int_mm(weight: Tensor) -> None:
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        raise Unavailable("torch._int_mm takes N and K in multiples of 8")


_BF16 = torch.bfloat16
_PER_TENSOR = {"cpu": "activations int8 per tensor"}
PEERS = (
    Peer("torch_bf16", ("cpu",), dense(_BF16), 0.01, _BF16),
    Peer("torch_fp32", ("cpu",), dense(torch.float32), 0.01, torch.float32),
    Peer("torch_dense_cublas", ("cuda",), dense(None, "cublas"), 0.01),
    Peer("torch_dense_cublaslt", ("cuda",), dense(None, "cublaslt"), 0.01),
    Peer("torch_int4_g128", ("cpu",), int4, 0.2, _BF16),
    Peer("tinygemm_int4_g128", ("cuda",), int4, 0.2, _BF16),
    Peer("torch_int8", ("cpu",), int8, 0.02, _BF16),
    *(
        Peer(f"torch_dynamic_{name}", ("cpu",), dynamic_int8(name), 0.05, torch.float32, notes=_PER_TENSOR)
        for name in ("x86", "onednn")
    ),
    Peer(
        *("torch_int_mm", ("cuda",), int8_matmul, 0.03),
        notes={"cuda": "product alone: no quantisation, no scales; from 17 rows, fewer are padded"},
    ),
    Peer(
        *("torch_int8_tokens", ("cuda",), int8_tokens, 0.03),
        notes={"cuda": "eager quantisation and scales around torch._int_mm"},
    ),
)
