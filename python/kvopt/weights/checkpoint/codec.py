# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint format is to the rest of the package: two questions for reading, two for writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvopt.reference import Scheme, group_count
from kvopt.weights.checkpoint.files import TensorFiles
from kvopt.weights.checkpoint.ordered import OrderedLinear
from kvopt.weights.checkpoint.plain import PlainWeight
from kvopt.weights.linear import QuantLinear, TiedEmbedding

Config = dict[str, Any]  # the quantization_config of a config.json
Modules = Mapping[str, QuantLinear]


class Codec(Protocol):
    """One format; ``method`` is its ``quant_method``."""

    method: str

    def modules(self, files: TensorFiles, config: Config) -> list[str]:
        """The quantised linears of a checkpoint.

        Raises:
            ValueError: a configuration that isn't understood, or says something we do not have.
        """
        ...

    def read(self, files: TensorFiles, config: Config, name: str, shape: tuple[int, int]) -> PlainWeight:
        """One weight, (N, K) as the model has it.

        Raises:
            ValueError: a tensor is missing or does not fit; names file and tensor.
        """
        ...

    def config(self, model: nn.Module, modules: Modules) -> Config:
        """The ``quantization_config`` of a model about to be written.

        Raises:
            ValueError: the format can't hold one of the modules; names it.
        """
        ...

    def tensors(self, module: QuantLinear, config: Config) -> dict[str, Tensor]:
        """One weight's tensors by suffix, without the bias."""
        ...


def with_suffix(names: Iterable[str], suffix: str) -> list[str]:
    """The modules that have a tensor of this name."""
    end = "." + suffix
    return [name.removesuffix(end) for name in names if name.endswith(end)]


def matches_any(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether one of transformers' patterns is found in a tensor's name."""
    return any(re.search(pattern, name) for pattern in patterns or ())


def number(config: Config, key: str, possible: Callable[[int], bool], expected: str) -> int:
    """An integer of a configuration.

    Raises:
        ValueError: it is not there, or not ``possible``.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not possible(value):
        raise ValueError(f"quantization_config: {key!r} must be {expected}, got {value!r}")
    return value


def refuse(format: str, name: str, why: str) -> NoReturn:
    """Raises the error of a module that a format can't hold."""
    raise ValueError(f"format {format!r} can't hold {name}: {why}")


def check_integers(
    format: str, modules: Modules, bits: tuple[int, ...], *, ordered: bool = False, conv1d: bool = False
) -> None:
    """Raises :class:`ValueError` for a module that is not plain integer codes with whole groups.

    Args:
        format: being written.
        modules: to be written.
        bits: that it has.
        ordered: it can hold columns in another order.
        conv1d: its readers know GPT-2's ``Conv1D``.
    """
    check_inputs(format, modules)
    for name, module in modules.items():
        f = module.format
        if f.scheme.has_book:
            refuse(format, name, f"{f} has a code book, not integers")
        if f.bits not in bits:
            refuse(format, name, f"{f} has {f.bits} bits; possible: {', '.join(map(str, bits))}")
        if f.has_a8_part:
            refuse(format, name, f"{f} takes int8 activations per group")
        if f.outlier_threshold is not None:
            refuse(format, name, f"{f} keeps outlier columns in 16 bits")
        if f.group_size is not None and module.in_features % f.group_size:
            refuse(
                format,
                name,
                f"{f} of {module.in_features} columns ends with a short group of {module.in_features % f.group_size}",
            )
        if not ordered and isinstance(module, OrderedLinear):
            refuse(format, name, "its groups are not consecutive inputs (act-order)")
        if not conv1d and module.source == "conv1d":
            refuse(format, name, "its readers know nn.Linear only, and this is a Conv1D")
        if not f.symmetric:
            zero = PlainWeight.of(module).zero.float()
            if not bool(((zero == zero.round()) & (zero >= 0) & (zero < 2**f.bits)).all()):
                refuse(format, name, f"a zero point is no integer in 0…{2**f.bits - 1}")


def check_inputs(format: str, modules: Modules) -> None:
    """Raises :class:`ValueError` for a module that scales its inputs."""
    for name, module in modules.items():
        if module.quantized_weight.input_scale is not None:
            refuse(
                format,
                name,
                "its inputs have a scale of their own, which is not folded into the layer before; "
                "a recipe such as awq_4bit_g128_fold has none",
            )


def check_untied(format: str, model: nn.Module) -> None:
    """Raises :class:`ValueError` for a quantised head that is the embedding as well."""
    for name, module in model.named_modules():
        if isinstance(module, TiedEmbedding):
            refuse(
                format,
                name,
                "the embedding shares the quantised table of the output head; quantise the model anew "
                "with the head left as it is",
            )


def one_format(format: str, modules: Modules) -> tuple[int, int | None]:
    """Bits and group size, which all modules share.

    Raises:
        ValueError: they do not.
    """
    first = next(iter(modules.values()))
    for name, module in modules.items():
        if (module.format.bits, module.format.group_size) != (first.format.bits, first.format.group_size):
            refuse(
                format,
                name,
                f"one number of bits and group size is needed, got {module.format} beside {first.format}",
            )
    return first.format.bits, first.format.group_size


def integer_zeros(weight: PlainWeight) -> Tensor:
    """The zero points (N, groups) as uint8, of integers that :func:`check_integers` has seen."""
    if weight.format.scheme != Scheme.ASYMMETRIC:
        return weight.zero.new_full(weight.zero.shape, 2 ** (weight.format.bits - 1)).byte()
    return weight.zero.byte()


def group_of(config_group: int, groups: int, k: int, where: str) -> int | None:
    """The group size of a weight with ``groups`` scales per row of ``k``; -1 in the configuration is a whole row.

    Raises:
        ValueError: they do not agree; names ``where``.
    """
    if groups == 1 and (config_group == -1 or config_group >= k):
        return None
    if config_group < 1 or group_count(k, config_group) != groups:
        expected = 1 if config_group == -1 else group_count(k, config_group)
        raise ValueError(
            f"{where}: expected {expected} groups of {config_group} in {k} columns, got {groups}"
        )
    return config_group


def plain_linears(model: nn.Module, modules: Modules) -> list[str]:
    """The linears that are not quantised, which readers must be told."""
    return [
        name
        for name, module in model.named_modules()
        if name not in modules and (isinstance(module, nn.Linear | Conv1D))
    ]
