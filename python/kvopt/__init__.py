# SPDX-License-Identifier: Apache-2.0
"""kvopt makes a Hugging Face language model small and fast, and measures what that costs.

>>> import kvopt
>>> model, tokenizer = kvopt.load("llama-6m", recipe="int4_g128")
>>> with kvopt.compress(model, "sink_b256_s4"):
...     model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvopt._version import __version__
from kvopt.models.registration import watch as _watch_for_transformers

if TYPE_CHECKING:
    from kvopt._library import FallbackWarning, build_info
    from kvopt.cache import Cache, CacheBytes, CacheSpec, cache_bytes, compress, register_policy
    from kvopt.models.load import load
    from kvopt.models.memory import model_nbytes
    from kvopt.weights import (
        QuantizationReport,
        QuantizedWeight,
        QuantLinear,
        Recipe,
        WeightFormat,
        dequantize,
        qlinear,
        quantize,
        quantize_weight,
    )
    from kvopt.weights.checkpoint import load_quantized, save_quantized

# Where each public name lives. Names are imported when first used, so that `kvopt --help` does not wait for torch.
_HOME = {
    "Cache": "kvopt.cache",
    "CacheBytes": "kvopt.cache",
    "CacheSpec": "kvopt.cache",
    "FallbackWarning": "kvopt._library",
    "QuantLinear": "kvopt.weights",
    "QuantizationReport": "kvopt.weights",
    "QuantizedWeight": "kvopt.weights",
    "Recipe": "kvopt.weights",
    "WeightFormat": "kvopt.weights",
    "build_info": "kvopt._library",
    "cache_bytes": "kvopt.cache",
    "compress": "kvopt.cache",
    "dequantize": "kvopt.weights",
    "load": "kvopt.models.load",
    "load_quantized": "kvopt.weights.checkpoint",
    "model_nbytes": "kvopt.models.memory",
    "qlinear": "kvopt.weights",
    "quantize": "kvopt.weights",
    "quantize_weight": "kvopt.weights",
    "register_policy": "kvopt.cache",
    "save_quantized": "kvopt.weights.checkpoint",
}
_SUBMODULES = (
    "assets",
    "cache",
    "eval",
    "experiments",
    "models",
    "ops",
    "ops_kv",
    "reference",
    "reference_kv",
    "weights",
)

__all__ = [
    "Cache",
    "CacheBytes",
    "CacheSpec",
    "FallbackWarning",
    "QuantLinear",
    "QuantizationReport",
    "QuantizedWeight",
    "Recipe",
    "WeightFormat",
    "__version__",
    "build_info",
    "cache_bytes",
    "compress",
    "dequantize",
    "load",
    "load_quantized",
    "model_nbytes",
    "qlinear",
    "quantize",
    "quantize_weight",
    "register_policy",
    "save_quantized",
]

_watch_for_transformers()


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"kvopt.{name}")
    else:
        raise AttributeError(f"module 'kvopt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
