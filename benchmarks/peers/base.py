# SPDX-License-Identifier: Apache-2.0
"""What a contender of a product benchmark is: a rule that quantises a weight, and a call that multiplies by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Unavailable(Exception):
    """Why a contender can't take part here: not installed, no kernel for this processor, a shape it refuses."""


@dataclass(frozen=True)
class Product:
    """``x (M, K) -> y (M, N)`` with one copy of the weight.

    Attributes:
        run: what is timed.
        nbytes: bytes of the weight that a call reads, scales and zero points included.
        enter: makes of ``x`` what ``run`` takes, where that is not ``x``; untimed.
        leave: makes ``y`` of what ``run`` returns, where that is not ``y``; only for the check.
        thread: where ``run`` must be called, where that is not the main thread.
    """

    run: Callable[[Any], Any]
    nbytes: int
    enter: Callable[[Tensor], Any] = lambda x: x
    leave: Callable[[Any], Tensor] = lambda y: y
    thread: Executor | None = None


Copies = Callable[[], Product]  # each call gives another copy of the same weight in memory of its own


@dataclass(frozen=True)
class Peer:
    """A contender.

    Attributes:
        name: as in the table.
        devices: where it runs.
        prepare: takes the dense weight (N, K), quantises it by its own rule and returns a maker of copies. Raises
            :class:`Unavailable`.
        error: largest relative error of a product of random data that its rule may give.
        takes: the type of activations its kernel wants; None: the case's. They are given in it, conversion untimed.
        version: of what runs, with the build's flags where they matter.
        notes: what a reader must know beside its figures, by device.
    """

    name: str
    devices: tuple[str, ...]
    prepare: Callable[[Tensor], Copies]
    error: float
    takes: torch.dtype | None = None
    version: Callable[[], str] = lambda: f"torch {torch.__version__}"
    notes: Mapping[str, str] = field(default_factory=dict)
