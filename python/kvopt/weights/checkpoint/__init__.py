# SPDX-License-Identifier: Apache-2.0
"""Quantised models on disk: our own format and those of others, one file per format (``docs/formats.md``).

``save`` and ``load`` are the two calls; ``files`` and ``folder`` read and write safetensors; ``plain`` is the weight
that every format is turned into and made from.
"""

from kvopt.weights.checkpoint.load import load_quantized
from kvopt.weights.checkpoint.save import save_quantized

__all__ = ["load_quantized", "save_quantized"]
