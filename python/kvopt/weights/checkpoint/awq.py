# SPDX-License-Identifier: Apache-2.0
"""AWQ's "GEMM" checkpoints, as AutoAWQ and vLLM have them; 4 bits.

    qweight  int32 (K, N / 8)        eight codes of a row of the transposed weight
    qzeros   int32 (groups, N / 8)   zero points, packed alike
    scales   float16 (groups, N)

Nibble i of a word, counted from the lowest, is output 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]: the order in which their kernel
unpacks two halves at a time.
"""

from __future__ import annotations

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
from kvopt.weights.checkpoint.plain import PlainWeight, half_scales, integer_format
from kvopt.weights.checkpoint.words import from_words, to_words
from kvopt.weights.linear import QuantLinear

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq:
    """Format ``"awq"``."""

    method = "awq"

    def modules(self, files: TensorFiles, config: Config) -> list[str]:
        """Those with a ``qweight``."""
        number(config, "bits", lambda b: b == BITS, "4")
        number(config, "group_size", lambda g: g == -1 or g > 0, "-1 or positive")
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(f"quantization_config: AWQ version {version!r} is not read; possible: gemm")
        return with_suffix(files.names, "qweight")

    def read(self, files: TensorFiles, config: Config, name: str, shape: tuple[int, int]) -> PlainWeight:
        """One weight."""
        n, k = shape
        if n % 8:
            raise ValueError(
                f"{files.where(f'{name}.qweight')}: AWQ needs a multiple of 8 outputs, the model has {n}"
            )
        size = config["group_size"]
        groups = 1 if size == -1 else group_count(k, size)
        qweight = files.read(f"{name}.qweight", (k, n // 8), torch.int32)
        qzeros = files.read(f"{name}.qzeros", (groups, n // 8), torch.int32)
        scale = files.read(f"{name}.scales", (groups, n), FLOATS)
        zero = _unpack(qzeros, n).T.contiguous().half()
        group = group_of(size, groups, k, files.where(f"{name}.scales"))
        return PlainWeight(
            integer_format(name, BITS, group, zero),
            _unpack(qweight, n).T.contiguous(),
            half_scales(scale.T.contiguous(), files.where(f"{name}.scales")),
            zero,
        )

    def config(self, model: nn.Module, modules: Modules) -> Config:
        """Group size; linears that stay plain are excluded by name."""
        check_integers(self.method, modules, (BITS,))
        check_untied(self.method, model)
        _, group = one_format(self.method, modules)
        for name, module in modules.items():
            if module.out_features % 8:
                refuse(self.method, name, f"N = {module.out_features} is no multiple of 8")
            if name == "lm_head":
                refuse(self.method, name, "its readers take the output head as it is")
        return {
            "quant_method": self.method,
            "bits": BITS,
            "group_size": -1 if group is None else group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": plain_linears(model, modules),
        }

    def tensors(self, module: QuantLinear, config: Config) -> dict[str, Tensor]:
        """One weight's tensors."""
        weight = PlainWeight.of(module)
        return {
            "qweight": _pack(weight.codes.T),
            "qzeros": _pack(integer_zeros(weight).T),
            "scales": weight.scale.T.contiguous(),
        }


def _pack(values: Tensor) -> Tensor:
    """(R, N) uint8 to (R, N / 8) int32."""
    eights = values.reshape(values.shape[0], -1, 8)[..., ORDER]
    return to_words(eights.reshape(values.shape), BITS)


def _unpack(words: Tensor, n: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    eights = from_words(words, n, BITS).view(words.shape[0], -1, 8)
    restored = torch.empty_like(eights)
    restored[..., ORDER] = eights
    return restored.view(-1, n)
