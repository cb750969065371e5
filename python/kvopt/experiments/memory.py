# SPDX-License-Identifier: Apache-2.0
"""Bytes that are really held: a cache's tensors, a model's linears, and the peak while something runs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Growth:
    """How much memory grew at its peak over the start, in bytes; ``None`` where it can't be told."""

    nbytes: int | None = None


def cache_nbytes(cache: Any) -> int:
    """Bytes that a cache holds: its own count for ``kvopt.Cache``, the tensors' storages for transformers' caches."""
    own = getattr(cache, "nbytes", None)
    if callable(own):
        return int(own())
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bits_per_weight(model: nn.Module) -> float | None:
    """Bits per weight over the linear layers, scales and zeros included, biases and the output head left out.

    ``None`` for a model without linears.
    """
    from transformers.pytorch_utils import Conv1D

    import kvopt

    get_outputs: Any = getattr(model, "get_output_embeddings", None)
    outputs = get_outputs() if get_outputs is not None else None
    nbytes = weights = 0
    for module in model.modules():
        if module is outputs:
            continue
        if isinstance(module, kvopt.QuantLinear):
            nbytes += module.quantized_weight.nbytes
            weights += module.in_features * module.out_features
        elif isinstance(module, nn.Linear | Conv1D):
            weight: torch.Tensor = module.weight
            nbytes += weight.nbytes
            weights += weight.numel()
    return 8 * nbytes / weights if weights else None


@contextmanager
def peak_growth(device: torch.device) -> Iterator[Growth]:
    """Measures how far memory grows above its start while the block runs.

    On a GPU from the allocator's statistics. On Linux from the resident set's high-water mark, after memory that the
    process no longer uses has been handed back; elsewhere it stays ``None``.
    """
    growth = Growth()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield growth
        torch.cuda.synchronize(device)
        growth.nbytes = torch.cuda.max_memory_allocated(device) - before
        return
    start = _restart_resident_peak()
    yield growth
    end = _status_bytes("VmHWM")
    if start is not None and end is not None:
        growth.nbytes = max(0, end - start)


def _restart_resident_peak() -> int | None:
    """Hands unused memory back, sets the resident set's peak to its present size and returns that."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
