# SPDX-License-Identifier: Apache-2.0
"""GPTQ's checkpoints, versions 1 and 2, as AutoGPTQ, GPTQModel and vLLM have them.

    qweight  int32 (K · bits / 32, N)       codes packed along K, a stream of bits per column (words.py)
    qzeros   int32 (groups, N · bits / 32)  zero points packed along N; version 1 stores them less one
    scales   float16 (groups, N)
    g_idx    int32 (K,)                     the group of each column

Version 1 subtracts one from the packed words of 2, 4 and 8 bits, where a zero point of 0 borrows from its neighbour,
and from each value of 3 bits (GPTQModel's rule, which is undone by the same addition). Readers of version 1 disagree
about a zero point of 0, and GPTQModel takes asymmetric weights of version 1 from itself alone. So we write version 1,
which everyone reads, of symmetric weights, and version 2 of others.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from kvopt.reference import group_count
from kvopt.weights.checkpoint.codec import (
    Config,
    Modules,
    check_integers,
    check_untied,
    group_of,
    integer_zeros,
    number,
    one_format,
    plain_linears,
    refuse,
    with_suffix,
)
from kvopt.weights.checkpoint.files import FLOATS, TensorFiles
from kvopt.weights.checkpoint.ordered import OrderedLinear
from kvopt.weights.checkpoint.plain import (
    PlainWeight,
    group_order,
    half_scales,
    in_input_order,
    integer_format,
)
from kvopt.weights.checkpoint.words import from_words, to_words, words_of
from kvopt.weights.linear import QuantLinear

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"
_LANES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


class Gptq:
    """Format ``"gptq"``: version 1 if symmetric, else version 2."""

    method = "gptq"

    def modules(self, files: TensorFiles, config: Config) -> list[str]:
        """Those with a ``qweight``."""
        number(config, "bits", lambda b: b in BITS, "2, 3, 4 or 8")
        number(config, "group_size", lambda g: g == -1 or g > 0, "-1 or positive")
        _version(config)
        return with_suffix(files.names, "qweight")

    def read(self, files: TensorFiles, config: Config, name: str, shape: tuple[int, int]) -> PlainWeight:
        """One weight."""
        n, k = shape
        bits, group_size = _of_module(config, name)
        qweight = files.read(f"{name}.qweight", (words_of(k, bits), n), torch.int32)
        groups = 1 if group_size == -1 else group_count(k, group_size)
        scale = files.read(f"{name}.scales", (groups, n), FLOATS)
        qzeros = files.read(f"{name}.qzeros", (groups, words_of(n, bits)), torch.int32)
        group = group_of(group_size, groups, k, files.where(f"{name}.scales"))
        order = None
        if f"{name}.g_idx" in files:
            g_idx = files.read(f"{name}.g_idx", (k,), (torch.int32, torch.int64))
            order = group_order(g_idx, k if group is None else group, files.where(f"{name}.g_idx"))
        codes = from_words(qweight.T, k, bits)
        zero = _read_zeros(qzeros, n, bits, _version(config)).T.contiguous().half()
        format = integer_format(name, bits, group, zero)
        return PlainWeight(
            format,
            codes if order is None else codes[:, order.long()],
            half_scales(scale.T.contiguous(), files.where(f"{name}.scales")),
            zero,
            order=order,
        )

    def config(self, model: nn.Module, modules: Modules) -> Config:
        """Bits, group size, version; linears that stay plain are excluded by name."""
        check_integers(self.method, modules, BITS, ordered=True, conv1d=True)
        check_untied(self.method, model)
        bits, group = one_format(self.method, modules)
        for name, module in modules.items():
            if module.format.activation_bits != 16:
                refuse(self.method, name, f"{module.format} takes int8 activations")
            for dimension, size in (("K", module.in_features), ("N", module.out_features)):
                if size * bits % 32:
                    refuse(
                        self.method,
                        name,
                        f"{dimension} = {size} values of {bits} bits do not fill whole words",
                    )
        symmetric = all(module.format.symmetric for module in modules.values())
        config: Config = {
            "quant_method": self.method,
            "bits": bits,
            "group_size": -1 if group is None else group,
            "sym": symmetric,
            "desc_act": any(isinstance(module, OrderedLinear) for module in modules.values()),
            "checkpoint_format": V1 if symmetric else V2,
            "lm_head": "lm_head" in modules,
        }
        excluded = [name for name in plain_linears(model, modules) if name != "lm_head"]
        if excluded:
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in excluded}
        return config

    def tensors(self, module: QuantLinear, config: Config) -> dict[str, Tensor]:
        """One weight's tensors."""
        weight = PlainWeight.of(module)
        bits, k = weight.format.bits, module.in_features
        groups = torch.arange(k, device=weight.codes.device) // weight.format.group_columns(k)
        zeros = integer_zeros(weight)
        return {
            "qweight": to_words(in_input_order(weight.codes, weight.order), bits).T.contiguous(),
            "qzeros": _write_zeros(zeros.T.contiguous(), bits, config["checkpoint_format"]),
            "scales": weight.scale.T.contiguous(),
            "g_idx": in_input_order(groups, weight.order).to(torch.int32),
        }


def _version(config: Config) -> str:
    version = config.get("checkpoint_format", config.get("format")) or V1
    if version not in (V1, V2):
        raise ValueError(
            f"quantization_config: checkpoint_format {version!r} is not read; possible: {V1}, {V2}"
        )
    return str(version)


def _of_module(config: Config, name: str) -> tuple[int, int]:
    """Bits and group size: the first pattern of GPTQModel's ``dynamic`` that fits may give a module its own."""
    own: Config = {}
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ValueError(f"quantization_config: 'dynamic' must be an object, got {dynamic!r}")
    for pattern, settings in dynamic.items():
        try:
            found = not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name)
        except re.error as error:
            raise ValueError(f"quantization_config: 'dynamic' has the pattern {pattern!r}: {error}") from None
        if found:
            own = settings if isinstance(settings, dict) else {}
            break
    merged = {key: own.get(key, config.get(key)) for key in ("bits", "group_size")}
    bits = number(merged, "bits", lambda b: b in BITS, "2, 3, 4 or 8")
    return bits, number(merged, "group_size", lambda g: g == -1 or g > 0, "-1 or positive")


def _read_zeros(qzeros: Tensor, n: int, bits: int, version: str) -> Tensor:
    """(groups, words) to zero points (groups, N) uint8."""
    if version == V1 and bits in _LANES:
        qzeros = qzeros + _LANES[bits]  # in whole words: a carry undoes the borrow of a zero point 0
    zeros = from_words(qzeros, n, bits)
    return zeros + 1 & 2**bits - 1 if version == V1 and bits not in _LANES else zeros


def _write_zeros(zeros: Tensor, bits: int, version: str) -> Tensor:
    """Zero points (groups, N) uint8, those of version 1 symmetric, to (groups, words)."""
    return to_words(zeros - 1 if version == V1 else zeros, bits)
