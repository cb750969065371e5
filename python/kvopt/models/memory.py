# SPDX-License-Identifier: Apache-2.0
"""How many bytes a model really holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def storage_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage once however many tensors share it."""
    seen: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            seen[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def model_nbytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer of ``model``, each storage once: codes, scales, zero points, embeddings,
    norms and what was left unquantised.
    """
    return storage_nbytes([*model.parameters(), *model.buffers()])
