# SPDX-License-Identifier: Apache-2.0
"""How a KV cache's vectors become codes, in plain torch; the rules stand in ``csrc/common/kv_store.h``.

Everything in float32, whatever the model's type.
"""

from __future__ import annotations

import torch
from torch import Tensor

MODEL, FP8, INT8, INT4, INT2 = range(5)  # codec numbers, part of the operators' schemas
CODE_BITS = {INT8: 8, INT4: 4, INT2: 2}

_LARGEST_HALF = 65504.0


def packed_bytes(codec: int, dtype: torch.dtype, dim: int) -> int:
    """Bytes of a packed vector of ``dim`` numbers."""
    if codec == MODEL:
        return dim * dtype.itemsize
    return dim if codec == FP8 else dim * CODE_BITS[codec] // 8


def _finite_half(x: Tensor) -> Tensor:
    return x.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()


def integer_range(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """KIVI's scale and minimum over ``dim`` (kept with size 1), float16 (arXiv:2402.02750, section 3)."""
    lowest, highest = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return _finite_half((highest - lowest) / (2**bits - 1)), _finite_half(lowest)


def integer_codes(x: Tensor, scale: Tensor, lowest: Tensor, bits: int) -> Tensor:
    """``clamp(round((x - lowest) / scale), 0, 2^bits - 1)``, half to even, 0 where the scale is; uint8."""
    code = ((x - lowest.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return torch.where(scale == 0, 0.0, code).to(torch.uint8)


def join_codes(codes: Tensor, bits: int) -> Tensor:
    """(..., D) codes to (..., D * bits / 8) bytes, lowest bits first."""
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // bits).int()
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=codes.device)
    return (parts << shifts).sum(-1).to(torch.uint8)


def split_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`join_codes`, int32."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device)
    codes: Tensor = packed.int()[..., None] >> shifts & 2**bits - 1
    return codes.flatten(-2)


def fp8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) to e4m3fn codes, uint8, and a float16 scale (...)."""
    scale = (x.abs().amax(-1) / 448).clamp(2.0**-24, _LARGEST_HALF).half()
    scaled = (x / scale.float()[..., None]).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def direction_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) float32 as direction (..., D) and norm (...), float32; 0 and 0 for a zero vector."""
    norm = x.double().square().sum(-1).sqrt().float()
    return torch.where(norm[..., None] == 0, 0.0, x / norm[..., None]), norm
