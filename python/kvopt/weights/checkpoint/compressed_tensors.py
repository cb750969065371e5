# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: what llm-compressor writes and vLLM reads; integer weights, packed or plain.

``pack-quantized``:

    weight_packed      int32 (N, ⌈K · bits / 32⌉)       q + 2^(bits-1), a stream of bits per row (words.py)
    weight_scale       float (N, groups)
    weight_zero_point  int32 (⌈N · bits / 32⌉, groups)  asymmetric only; packed along N like the codes
    weight_shape       int64 (2,)                       N, K

``int-quantized``: ``weight`` int8 (N, K), ``weight_scale`` (N, 1), ``weight_zero_point`` int8 (N, 1) if asymmetric.
Their codes are signed, so that 2^(bits-1) lies between them and ours. The package's version 0.20 packs 3 bits without
gaps, as we do; older versions left two bits of each word unused, which is not read.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from kvopt.reference import Scheme, group_count
from kvopt.weights.checkpoint.codec import (
    Config,
    Modules,
    check_integers,
    check_untied,
    group_of,
    integer_zeros,
    number,
    plain_linears,
    with_suffix,
)
from kvopt.weights.checkpoint.files import FLOATS, TensorFiles
from kvopt.weights.checkpoint.plain import PlainWeight, group_order, half_scales, integer_format
from kvopt.weights.checkpoint.words import from_words, to_words, words_of
from kvopt.weights.formats import WeightFormat
from kvopt.weights.linear import QuantLinear

BITS = (2, 3, 4, 8)
PACKED, PLAIN, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


class CompressedTensors:
    """Format ``"compressed-tensors"``: int8 activations go into ``int-quantized``, everything else is packed."""

    method = "compressed-tensors"

    def modules(self, files: TensorFiles, config: Config) -> list[str]:
        """Those with a ``weight_scale``."""
        _groups(config)
        if config.get("sparsity_config") or config.get("transform_config"):
            raise ValueError("quantization_config: sparse or transformed weights are not read")
        return with_suffix(files.names, "weight_scale")

    def read(self, files: TensorFiles, config: Config, name: str, shape: tuple[int, int]) -> PlainWeight:
        """One weight."""
        group = _group_of_module(config, name)
        arguments = group["weights"]
        bits, activation_bits = arguments["num_bits"], _activation_bits(group, name)
        n, k = shape
        size = _group_size(arguments)
        groups = 1 if size == -1 else group_count(k, size)
        scale = files.read(f"{name}.weight_scale", (n, groups), FLOATS)
        middle = 2 ** (bits - 1)
        zero = torch.full((n, groups), middle, dtype=torch.uint8)
        zero_name = f"{name}.weight_zero_point"
        packed = f"{name}.weight_packed" in files
        if packed:
            words = files.read(f"{name}.weight_packed", (n, words_of(k, bits)), torch.int32)
            codes = from_words(words, k, bits)
            stored = files.read(f"{name}.weight_shape", (2,), (torch.int64, torch.int32)).tolist()
            if stored != [n, k]:
                where = files.where(f"{name}.weight_shape")
                raise ValueError(f"{where}: says {stored}, the model has {[n, k]}")
            if not arguments.get("symmetric", True):
                words = files.read(zero_name, (words_of(n, bits), groups), torch.int32)
                zero = from_words(words.T, n, bits).T.contiguous()
        else:
            codes = (files.read(f"{name}.weight", (n, k), torch.int8).short() + middle).byte()
            if not arguments.get("symmetric", True):
                zero = (files.read(zero_name, (n, groups), torch.int8).short() + middle).byte()
        if int(codes.max()) >= 2**bits:
            raise ValueError(f"{files.where(f'{name}.weight')}: a code does not fit {bits} bits")
        where = files.where(f"{name}.weight_scale")
        columns = group_of(size, groups, k, where)
        order = None
        if f"{name}.weight_g_idx" in files:
            g_idx = files.read(f"{name}.weight_g_idx", (k,), (torch.int32, torch.int64))
            if bool((g_idx >= 0).all()):  # -1 everywhere: none
                order = group_order(g_idx, columns or k, files.where(f"{name}.weight_g_idx"))
        half = zero.half()
        format = _format(name, bits, columns, half, activation_bits)
        codes = codes if order is None else codes[:, order.long()]
        return PlainWeight(format, codes, half_scales(scale, where), half, order=order)

    def config(self, model: nn.Module, modules: Modules) -> Config:
        """A group for each format, with its modules by name where there is more than one."""
        check_integers(self.method, modules, BITS)
        check_untied(self.method, model)
        formats: dict[WeightFormat, list[str]] = {}
        for name, module in modules.items():
            formats.setdefault(module.format, []).append(name)
        groups = {}
        for i, (format, names) in enumerate(formats.items()):
            groups[f"group_{i}"] = _describe(format) | {"targets": names if len(formats) > 1 else ["Linear"]}
        kinds = {group["format"] for group in groups.values()}
        return {
            "quant_method": self.method,
            "format": kinds.pop() if len(kinds) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": plain_linears(model, modules),
            "kv_cache_scheme": None,
        }

    def tensors(self, module: QuantLinear, config: Config) -> dict[str, Tensor]:
        """One weight's tensors."""
        weight = PlainWeight.of(module)
        bits = weight.format.bits
        if weight.format.scheme == Scheme.INT8_DYNAMIC:
            return {"weight": (weight.codes.short() - 128).to(torch.int8), "weight_scale": weight.scale}
        tensors = {
            "weight_packed": to_words(weight.codes, bits),
            "weight_scale": weight.scale,
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if not weight.format.symmetric:
            zeros = integer_zeros(weight)
            tensors["weight_zero_point"] = to_words(zeros.T.contiguous(), bits).T.contiguous()
        return tensors


def _describe(format: WeightFormat) -> dict[str, Any]:
    grouped = format.group_size is not None
    weights = {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": format.group_size,
        "dynamic": False,
    }
    activations = None
    if format.scheme == Scheme.INT8_DYNAMIC:
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": PACKED if activations is None else PLAIN,
    }


def _groups(config: Config) -> list[dict[str, Any]]:
    """The groups, checked.

    Raises:
        ValueError: not an integer format that we have.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError("quantization_config: 'config_groups' must be an object of objects")
    for label, group in groups.items():
        where = f"quantization_config: {label}"
        kind = group.get("format") or config.get("format")
        if kind not in (PACKED, PLAIN):
            raise ValueError(f"{where}: format {kind!r} is not read; possible: {PACKED}, {PLAIN}")
        weights = group.get("weights")
        if not isinstance(weights, dict) or weights.get("type", "int") != "int":
            raise ValueError(f"{where}: integer weights are needed, got {weights!r}")
        number(weights, "num_bits", lambda b: b in BITS, "2, 3, 4 or 8")
        if group.get("output_activations"):
            raise ValueError(f"{where}: quantised outputs are not read")
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"{where}: 'targets' must be a list of names")
        _group_size(weights)
    return list(groups.values())


def _group_of_module(config: Config, name: str) -> dict[str, Any]:
    """The group that a module belongs to: named, matched by a ``re:`` pattern, or by the class of linears."""
    groups = _groups(config)
    if len(groups) == 1:
        return groups[0]
    for group in groups:
        for target in group["targets"]:
            try:
                if target in (name, "Linear") or (target[:3] == "re:" and re.match(target[3:], name)):
                    return group
            except re.error as error:
                raise ValueError(f"quantization_config: target {target!r}: {error}") from None
    raise ValueError(f"quantization_config: no group names {name}, which is quantised")


def _group_size(weights: dict[str, Any]) -> int:
    """Columns per group, -1 for a row."""
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy == "channel":
        return -1
    if strategy != "group":
        raise ValueError(f"quantization_config: strategy {strategy!r} is not read; possible: group, channel")
    return number(weights, "group_size", lambda g: g > 0, "positive")


def _activation_bits(group: dict[str, Any], name: str) -> int:
    activations = group.get("input_activations")
    if activations is None:
        return 16
    read = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    for key, value in read.items():
        if activations.get(key) != value:
            raise ValueError(
                f"{name}: activations with {key} {activations.get(key)!r} are not read; only {value!r}"
            )
    return 8


def _format(name: str, bits: int, group: int | None, zero: Tensor, activation_bits: int) -> WeightFormat:
    format = integer_format(name, bits, group, zero, activation_bits)
    if (bits, group, format.scheme, activation_bits) == (8, None, Scheme.SYMMETRIC, 8):
        return WeightFormat(8, None, Scheme.INT8_DYNAMIC)
    if activation_bits == 8 and group is not None:
        raise ValueError(
            f"{name}: int8 activations per token need one weight scale per row, got groups of {group}"
        )
    return format
