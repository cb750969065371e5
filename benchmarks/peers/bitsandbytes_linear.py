# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: NF4 and FP4 in blocks of 64, and LLM.int8 without outlier columns (``threshold=0``).

On a CPU with AVX512-BF16 its 4-bit product has two kernels: the wheel's own, and another that it fetches from the hub
when the ``kernels`` package is installed. The note of a row says which one ran.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers.base import Copies, Peer, Product, Unavailable


def import_library() -> Any:
    """Bitsandbytes, its advice at every call silenced.

    Raises:
        Unavailable: it is not installed.
    """
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it says at every call that int8 goes through fp16
    try:
        import bitsandbytes
    except ImportError as error:
        raise Unavailable(f"bitsandbytes is not installed ({error})") from error
    return bitsandbytes


def four_bits(kind: str) -> Callable[[Tensor], Copies]:
    """``bitsandbytes.matmul_4bit`` over ``kind``, the weight in the layout its modules would give it."""

    def prepare(weight: Tensor) -> Copies:
        bnb = import_library()
        layer = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=weight.dtype,
            compress_statistics=False,
            quant_type=kind,
        )
        layer.weight = bnb.nn.Params4bit(
            weight.cpu().clone(),
            requires_grad=False,
            compress_statistics=False,
            quant_type=kind,
            module=layer,
        )
        layer = layer.to(weight.device).eval()
        layer(
            torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        )  # packs it for the CPU
        codes, state = layer.weight.data, layer.weight.quant_state

        def copy() -> Product:
            import copy as copying

            own, c = copying.copy(state), codes.clone()
            own.absmax = state.absmax.clone()
            c = c if weight.device.type == "cpu" else c.t()
            return Product(lambda x: bnb.matmul_4bit(x, c, own), c.nbytes + own.absmax.nbytes)

        return copy

    return prepare


def eight_bits(weight: Tensor) -> Copies:
    """``bitsandbytes.matmul`` with int8 rows and int8 tokens."""
    bnb = import_library()
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())

    def copy() -> Product:
        state = bnb.MatmulLtState()
        state.CB, state.SCB = codes.clone(), scale.clone()
        state.has_fp16_weights, state.threshold, state.is_training = False, 0.0, False
        return Product(lambda x: bnb.matmul(x, state.CB, state=state), codes.nbytes + scale.nbytes)

    return copy


def version() -> str:
    """Of the installed package."""
    return f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"


def _notes() -> dict[str, str]:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return {"cpu": "the wheel's own kernel; the hub's (package `kernels`) is not installed"}
    return {}


PEERS = (
    Peer("bnb_nf4", ("cpu", "cuda"), four_bits("nf4"), 0.2, None, version, _notes()),
    Peer("bnb_fp4", ("cpu", "cuda"), four_bits("fp4"), 0.3, None, version, _notes()),
    Peer("bnb_int8", ("cpu", "cuda"), eight_bits, 0.05, torch.float16, version),
)
