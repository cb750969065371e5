# SPDX-License-Identifier: Apache-2.0
"""Whole models in other libraries' quantisations: every linear but the head, replaced in a copy of a dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peers import Unavailable, bitsandbytes_linear, torch_linear


def bitsandbytes(kind: str) -> Callable[[Any], tuple[Any, str]]:
    """``Linear4bit`` (nf4, fp4) or ``Linear8bitLt`` with threshold 0."""

    def build(base: Any) -> tuple[Any, str]:
        bnb = bitsandbytes_linear.import_library()
        dtype = base.dtype

        def convert(linear: nn.Linear) -> nn.Module:
            n, k = linear.weight.shape
            has_bias = linear.bias is not None
            if kind == "int8":
                new = bnb.nn.Linear8bitLt(k, n, bias=has_bias, has_fp16_weights=False, threshold=0.0)
                new.weight = bnb.nn.Int8Params(
                    linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
                )
            else:
                new = bnb.nn.Linear4bit(k, n, bias=has_bias, compute_dtype=dtype, quant_type=kind)
                new.weight = bnb.nn.Params4bit(
                    linear.weight.data.cpu(), requires_grad=False, quant_type=kind, module=new
                )
            if has_bias:
                new.bias = linear.bias
            return new.to(linear.weight.device).eval()

        return _replaced(base, convert), bitsandbytes_linear.version()

    return build


def dynamic_int8(engine: str) -> Callable[[Any], tuple[Any, str]]:
    """Torch's dynamic int8 in one of its engines, over an fp32 model, as it wants it."""

    def build(base: Any) -> tuple[Any, str]:
        if base.device.type != "cpu":
            raise Unavailable("torch's dynamic int8 is for the CPU")
        if engine not in torch.backends.quantized.supported_engines:
            raise Unavailable(f"this torch has no quantised engine {engine}")

        def convert(linear: nn.Linear) -> nn.Module:
            codes = torch_linear.rows_to_qint8(linear.weight.data)
            return torch_linear.dynamic_linear(codes, linear.bias, engine)

        return _replaced(base, convert).float(), f"torch {torch.__version__}"

    return build


def _replaced(base: Any, convert: Callable[[nn.Linear], nn.Module]) -> Any:
    model = copy.deepcopy(base)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head":
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], convert(module))
    return model.eval()


FOREIGN: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "bnb_nf4": bitsandbytes("nf4"),
    "bnb_int8": bitsandbytes("int8"),
    "torch_dynamic_x86": dynamic_int8("x86"),
    "torch_dynamic_onednn": dynamic_int8("onednn"),
}
