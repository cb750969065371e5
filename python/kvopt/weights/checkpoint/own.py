# SPDX-License-Identifier: Apache-2.0
"""Our own format: the plain tensors of a state dict, and which module has which format.

``quantization_config`` holds ``version`` and ``groups``: each a format spelled out, and the modules that have it; and
``tied_embedding``, the embedding that reads the head's table, or null. See ``docs/formats.md``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvopt._version import __version__
from kvopt.reference import Scheme, group_count
from kvopt.weights.checkpoint.codec import Config, Modules
from kvopt.weights.checkpoint.files import TensorFiles
from kvopt.weights.checkpoint.plain import PlainWeight, half_scales
from kvopt.weights.formats import CompactAbsmax, WeightFormat
from kvopt.weights.linear import QuantLinear, TiedEmbedding
from kvopt.weights.storage import from_stream, row_bytes

VERSION = 1
_FIELDS = ("bits", "group_size", "scheme", "double_quantized", "activation_bits")


class Own:
    """Format ``"kvopt"``."""

    method = "kvopt"

    def modules(self, files: TensorFiles, config: Config) -> list[str]:
        """Those that the configuration lists; each has codes, and what has codes is listed."""
        listed = formats_of(config)
        for name in files.names:
            if name.endswith(".codes") and name.removesuffix(".codes") not in listed:
                raise ValueError(f"{files.where(name)}: the quantization_config lists no such module")
        return list(listed)

    def read(self, files: TensorFiles, config: Config, name: str, shape: tuple[int, int]) -> PlainWeight:
        """One weight."""
        format = formats_of(config)[name]
        n, k = shape
        try:
            groups = group_count(k, format.group_columns(k))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        stream = files.read(f"{name}.codes", (n, row_bytes(k, format.bits)), torch.uint8)
        codes = from_stream(stream, k, format.bits)
        zero = torch.zeros(n, groups, dtype=torch.float16)
        absmax = None
        if format.double_quantized:
            blocks = group_count(n * groups, 256)
            absmax = CompactAbsmax(
                files.read(f"{name}.absmax", (n * groups,), torch.uint8),
                files.read(f"{name}.absmax_scale", (blocks,), torch.float32),
                files.read(f"{name}.absmax_offset", (), torch.float32),
            )
            scale = torch.zeros_like(zero)
        else:
            scale = _finite(files, f"{name}.scale", n, groups)
        if not format.symmetric:
            zero = _finite(files, f"{name}.zero", n, groups)
        return PlainWeight(
            format, codes, scale, zero, absmax, _order(files, name, k), _input_scale(files, name, k)
        )

    def config(self, model: nn.Module, modules: Modules) -> Config:
        """The formats and their modules."""
        tied = [name for name, m in model.named_modules() if isinstance(m, TiedEmbedding)]
        groups: dict[WeightFormat, list[str]] = {}
        for name, module in modules.items():
            groups.setdefault(module.format, []).append(name)
        return {
            "quant_method": self.method,
            "version": VERSION,
            "written_by": f"kvopt {__version__}",
            "groups": [_describe(f) | {"modules": names} for f, names in groups.items()],
            "tied_embedding": tied[0] if tied else None,
        }

    def tensors(self, module: QuantLinear, config: Config) -> dict[str, Tensor]:
        """One weight's tensors."""
        return {name: tensor for name, tensor in module.state_dict().items() if name != "bias"}


def formats_of(config: Config) -> dict[str, WeightFormat]:
    """The format of each module.

    Raises:
        ValueError: a version or format we do not know, or a module listed twice.
    """
    version = config.get("version")
    if version != VERSION:
        raise ValueError(f"quantization_config: version {version!r} is not known; expected {VERSION}")
    groups = config.get("groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("quantization_config: 'groups' must be a list of objects")
    formats: dict[str, WeightFormat] = {}
    for group in groups:
        format = _parse(group)
        names = group.get("modules")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("quantization_config: 'modules' must be a list of names")
        for name in names:
            if name in formats:
                raise ValueError(f"quantization_config: {name!r} is listed twice")
            formats[name] = format
    return formats


def _describe(format: WeightFormat) -> dict[str, Any]:
    threshold = format.outlier_threshold
    return {
        "format": str(format),
        "bits": format.bits,
        "group_size": format.group_size,
        "scheme": format.scheme.name.lower(),
        "double_quantized": format.double_quantized,
        "activation_bits": format.activation_bits,
    } | ({} if threshold is None else {"outlier_threshold": threshold})


def _parse(group: dict[str, Any]) -> WeightFormat:
    values = [group.get(field) for field in _FIELDS]
    bits, group_size, scheme, double, activation_bits = values
    whole = all(type(v) is int for v in (bits, activation_bits)) and type(group_size) in (int, type(None))
    known = isinstance(scheme, str) and scheme.upper() in Scheme.__members__
    if not whole or not known or type(double) is not bool:
        described = ", ".join(f"{field} {value!r}" for field, value in zip(_FIELDS, values, strict=True))
        raise ValueError(f"quantization_config: no format of ours: {described}")
    threshold = group.get("outlier_threshold")
    if type(threshold) not in (float, int, type(None)):
        raise ValueError(f"quantization_config: 'outlier_threshold' must be a number, got {threshold!r}")
    try:
        return WeightFormat(
            *(int(bits or 0), group_size, Scheme[str(scheme).upper()], double, int(activation_bits or 0)),
            outlier_threshold=threshold,
        )
    except ValueError as error:
        raise ValueError(f"quantization_config: {error}") from None


def _finite(files: TensorFiles, key: str, n: int, groups: int) -> Tensor:
    return half_scales(files.read(key, (n, groups), torch.float16), files.where(key))


def _input_scale(files: TensorFiles, name: str, k: int) -> Tensor | None:
    key = f"{name}.input_scale"
    if key not in files:
        return None
    scale = files.read(key, (k,), torch.float32)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{files.where(key)}: a value is not finite")
    return scale


def _order(files: TensorFiles, name: str, k: int) -> Tensor | None:
    key = f"{name}.order"
    if key not in files:
        return None
    order = files.read(key, (k,), torch.int32)
    if not torch.equal(order.sort().values, torch.arange(k, dtype=torch.int32)):
        raise ValueError(f"{files.where(key)}: expected each of the columns 0…{k - 1} once")
    return order
