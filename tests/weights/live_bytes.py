# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors are alive, op by op."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once of what ops inside gave back.

    Args:
        apart: addresses of memory that does not count.
    """

    def __init__(self, apart: set[int] | None = None) -> None:
        super().__init__()
        self._apart = set() if apart is None else apart
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}  # by address
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes():
                storage = leaf.untyped_storage()
                self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(
            self.peak, sum(size for at, (_, size) in self._alive.items() if at not in self._apart)
        )
        return result
