# SPDX-License-Identifier: Apache-2.0
"""The formats by name."""

from __future__ import annotations

from kvopt.grammar import unknown
from kvopt.weights.checkpoint.awq import Awq
from kvopt.weights.checkpoint.bitsandbytes import Bitsandbytes
from kvopt.weights.checkpoint.codec import Codec, Config
from kvopt.weights.checkpoint.compressed_tensors import CompressedTensors
from kvopt.weights.checkpoint.gptq import Gptq
from kvopt.weights.checkpoint.own import Own

CODECS: dict[str, Codec] = {
    "kvopt": Own(),
    "gptq": Gptq(),
    "awq": Awq(),
    "compressed-tensors": CompressedTensors(),
    "bnb": Bitsandbytes(),
}


def codec_named(format: str) -> Codec:
    """The format that ``save_quantized`` is asked for.

    Raises:
        ValueError: no such format; names the possible ones.
    """
    if format not in CODECS:
        raise unknown("save_quantized", format, "format", format, CODECS)
    return CODECS[format]


def codec_of(config: Config) -> Codec:
    """The format of a checkpoint, from its ``quantization_config``.

    Raises:
        ValueError: one that is not read; names the possible ones.
    """
    method = config.get("quant_method")
    for codec in CODECS.values():
        if codec.method == method:
            return codec
    possible = ", ".join(codec.method for codec in CODECS.values())
    raise ValueError(f"quantization_config: quant_method {method!r} is not read; possible: {possible}")
