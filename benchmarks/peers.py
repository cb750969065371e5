# SPDX-License-Identifier: Apache-2.0
"""Other libraries' products over the same weight, where they are installed. Each maker returns ``x -> y`` or ``None``.

A maker gets the dense weight (N, K) in the activations' type and quantises it by its own rule; the case checks that the
result is near the dense product before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def torch_linear(weight: Tensor, dtype: torch.dtype) -> Product:
    """Plain ``F.linear`` in ``dtype``."""
    w = weight.to(dtype)
    return lambda x: torch.nn.functional.linear(x.to(dtype), w)


def torch_int4(weight: Tensor, group: int = 128) -> Product | None:
    """Torch's own 4-bit product (tinygemm on CUDA, a CPU kernel otherwise), asymmetric groups, bf16 activations."""
    n, k = weight.shape
    if k % group or n % 32 or (weight.is_cuda and torch.cuda.get_device_capability()[0] < 8):
        return None
    w = weight.float().view(n, k // group, group)
    low, high = w.amin(2), w.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-6)
    zero = low + scale * 8
    codes = ((w - low[..., None]) / scale[..., None]).round().clamp(0, 15).view(n, k).int()
    meta = torch.stack([scale, zero], dim=2).transpose(0, 1).contiguous().bfloat16()
    if weight.is_cuda:
        packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        return lambda x: torch._weight_int4pack_mm(x, packed, group, meta)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, meta)


def torch_int8(weight: Tensor) -> Product | None:
    """Torch's weight-only 8-bit product, per channel, bf16 activations (CPU)."""
    if weight.is_cuda:
        return None
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-8)
    codes = (weight.float() / scale[:, None]).round().to(torch.int8)
    scale = scale.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x, codes, scale)


def bitsandbytes_4bit(weight: Tensor) -> Product | None:
    """Bitsandbytes' NF4, blocks of 64."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    f = bitsandbytes.functional
    packed, state = f.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)
