# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' 4-bit checkpoints (0.50): NF4 and FP4, plain or double-quantised.

    weight                   uint8 (N · K / 2, 1)  codes of the flattened weight, the first in the high nibble
    weight.absmax            float32 (blocks,)     or uint8 if double-quantised
    weight.quant_map         float32 (16,)         the code book
    weight.nested_absmax     float32               scales of 256 absmax each
    weight.nested_quant_map  float32 (256,)        the 8-bit map
    weight.quant_state.bitsandbytes__nf4  uint8    JSON: quant_type, blocksize, dtype, shape, nested_…

Blocks run along the flattened weight, so ours, which stay within a row, are the same where the block size divides K.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from kvopt.reference import BOOKS, DOUBLE_BLOCK, Scheme, dynamic_map, group_count
from kvopt.weights.checkpoint.codec import (
    Config,
    Modules,
    check_inputs,
    check_untied,
    plain_linears,
    refuse,
)
from kvopt.weights.checkpoint.files import TensorFiles
from kvopt.weights.checkpoint.plain import PlainWeight, half_scales
from kvopt.weights.formats import BOOK_BLOCKS, CompactAbsmax, WeightFormat
from kvopt.weights.linear import QuantLinear

SCHEMES = {"nf4": Scheme.NF4, "fp4": Scheme.FP4}
STATE = "weight.quant_state.bitsandbytes__"
STORAGE = (
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)  # the bytes may go by another type (FSDP)
LARGEST_STATE = 65536


class Bitsandbytes:
    """Format ``"bnb"``."""

    method = "bitsandbytes"

    def modules(self, files: TensorFiles, config: Config) -> list[str]:
        """Those with a quantisation state."""
        if config.get("load_in_8bit") or not config.get("load_in_4bit"):
            raise ValueError(
                "quantization_config: of bitsandbytes only 4-bit checkpoints are read (load_in_4bit)"
            )
        return [name.partition("." + STATE)[0] for name in files.names if "." + STATE in name]

    def read(self, files: TensorFiles, config: Config, name: str, shape: tuple[int, int]) -> PlainWeight:
        """One weight."""
        n, k = shape
        scheme, state = _state(files, name)
        where = files.where(f"{name}.weight")
        block = state.get("blocksize")
        if block not in BOOK_BLOCKS or state.get("shape") != [n, k]:
            raise ValueError(
                f"{where}: block size {block!r} and shape {state.get('shape')!r} do not fit {[n, k]}"
            )
        if k % block:
            raise ValueError(f"{where}: blocks of {block} that cross rows of {k} columns can't be read")
        _check_map(files, f"{name}.weight.quant_map", BOOKS[scheme])
        nibbles = _bytes(files, f"{name}.weight", n * k // 2)
        codes = torch.stack([nibbles >> 4, nibbles & 15], dim=1).view(n, k)
        groups = k // block
        nested = f"{name}.weight.nested_absmax" in files
        absmax_name = f"{name}.weight.absmax"
        absmax = files.read(absmax_name, (n * groups,), torch.uint8 if nested else torch.float32)
        zero = torch.zeros(n, groups, dtype=torch.float16)
        if not nested:
            scale = half_scales(absmax.view(n, groups), files.where(absmax_name))
            return PlainWeight(WeightFormat(4, block, scheme), codes, scale, zero)
        offset = state.get("nested_offset")
        if state.get("nested_blocksize") != DOUBLE_BLOCK or not isinstance(offset, float):
            raise ValueError(
                f"{where}: double quantisation in blocks of {DOUBLE_BLOCK} with an offset is read, got "
                f"{state.get('nested_blocksize')!r} and {offset!r}"
            )
        _check_map(files, f"{name}.weight.nested_quant_map", dynamic_map())
        scale = files.read(
            f"{name}.weight.nested_absmax", (group_count(n * groups, DOUBLE_BLOCK),), torch.float32
        )
        compact = CompactAbsmax(absmax, scale, torch.tensor(offset, dtype=torch.float32))
        return PlainWeight(WeightFormat(4, block, scheme, double_quantized=True), codes, zero, zero, compact)

    def config(self, model: nn.Module, modules: Modules) -> Config:
        """NF4 or FP4, of which all modules have the same; linears that stay plain are excluded by name."""
        check_untied("bnb", model)
        check_inputs("bnb", modules)
        first = next(iter(modules.values())).format
        for name, module in modules.items():
            f = module.format
            if not f.scheme.has_book:
                refuse("bnb", name, f"{f} is neither nf4 nor fp4")
            if f != first:
                refuse("bnb", name, f"one format is needed, got {f} beside {first}")
            if f.activation_bits != 16:
                refuse("bnb", name, f"{f} takes int8 activations")
            if module.in_features % f.group_columns(module.in_features):
                refuse(
                    "bnb", name, f"blocks of {f.group_size} cross the rows of {module.in_features} columns"
                )
        dtype = str(_dtype(model)).removeprefix("torch.")
        return {
            "quant_method": self.method,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": first.scheme.name.lower(),
            "bnb_4bit_use_double_quant": first.double_quantized,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": plain_linears(model, modules),
        }

    def tensors(self, module: QuantLinear, config: Config) -> dict[str, Tensor]:
        """One weight's tensors."""
        weight = PlainWeight.of(module)
        f = weight.format
        kind = f.scheme.name.lower()
        pairs = weight.codes.view(-1, 2)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": f.group_size,
            "dtype": config["bnb_4bit_compute_dtype"],
            "shape": list(weight.codes.shape),
        }
        tensors = {
            "weight": (pairs[:, 0] << 4 | pairs[:, 1])[:, None].contiguous(),
            "weight.absmax": weight.scale.float().flatten(),
            "weight.quant_map": BOOKS[f.scheme].clone(),
        }
        if weight.absmax is not None:
            tensors["weight.absmax"] = weight.absmax.codes
            tensors["weight.nested_absmax"] = weight.absmax.scale
            tensors["weight.nested_quant_map"] = dynamic_map().clone()
            state |= {
                "nested_blocksize": DOUBLE_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": weight.absmax.offset.item(),
            }
        tensors[STATE + kind] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors


def _state(files: TensorFiles, name: str) -> tuple[Scheme, dict[str, Any]]:
    """The JSON state of a weight."""
    kind = next((kind for kind in SCHEMES if f"{name}.{STATE}{kind}" in files), None)
    if kind is None:
        raise ValueError(f"{name}: no quantisation state of {' or '.join(SCHEMES)}")
    key = f"{name}.{STATE}{kind}"
    shape = files.shape(key)
    if len(shape) != 1 or shape[0] > LARGEST_STATE:
        raise ValueError(f"{files.where(key)}: expected at most {LARGEST_STATE} bytes, got shape {shape}")
    try:
        state = json.loads(bytes(files.read(key, shape, torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{files.where(key)}: no JSON: {error}") from None
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        raise ValueError(f"{files.where(key)}: expected an object of quant_type {kind}")
    return SCHEMES[kind], state


def _check_map(files: TensorFiles, name: str, expected: Tensor) -> None:
    got = files.read(name, tuple(expected.shape), torch.float32)
    if not torch.allclose(got, expected, rtol=1e-6, atol=1e-7):
        raise ValueError(
            f"{files.where(name)}: not the values that bitsandbytes 0.50 has; they can't be kept"
        )


def _bytes(files: TensorFiles, name: str, count: int) -> Tensor:
    dtype = files.dtype(name)
    if dtype not in STORAGE:
        raise ValueError(f"{files.where(name)}: expected packed bytes, got {dtype}")
    stored = files.read(name, (count // dtype.itemsize, 1), dtype)
    return stored.contiguous().view(torch.uint8).flatten()


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
